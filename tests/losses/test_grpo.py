"""The GRPO family against a float64 reference written with loops over rows and tokens, in value and gradient."""

import functools

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.grpo import KL_KINDS, LOSSES, grpo_loss
from tests.losses.grpo_reference import clips, compiled, differences, numbers, reference, token_kl


def check(arrays, got, loss_type, beta, kl_kind="k3", with_ref=True, num_tokens=None):
    (value, metrics), grad = got
    logprobs, old, ref, advantages, mask = [np.float64(x) for x in arrays]
    low, high = clips(loss_type)
    f = lambda x: reference(
        x,
        old,
        ref if with_ref else None,
        advantages,
        mask,
        now=logprobs,
        loss_type=loss_type,
        low=low,
        high=high,
        beta=beta,
        kl_kind=kl_kind,
        num_tokens=num_tokens,
    )
    np.testing.assert_allclose(value, f(logprobs), rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(grad, differences(f, logprobs, mask), rtol=3e-4, atol=2e-6)
    chex.assert_tree_all_finite(metrics)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("loss_type", LOSSES)
def test_value_and_gradient(loss_type, seed):
    arrays = numbers(seed)
    check(arrays, compiled(loss_type)(*arrays, *clips(loss_type), 0.3), loss_type, 0.3)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_without_a_reference(loss_type):
    arrays = numbers(7)
    got = compiled(loss_type, with_ref=False)(*arrays, *clips(loss_type), 0.0)
    check(arrays, got, loss_type, 0.0, with_ref=False)
    assert "kl" not in got[0][1]


@pytest.mark.parametrize("kl_kind", KL_KINDS)
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_kl_kinds(loss_type, kl_kind):
    arrays = numbers(11)
    got = compiled(loss_type, kl_kind)(*arrays, *clips(loss_type), 0.7)
    check(arrays, got, loss_type, 0.7, kl_kind)
    logprobs, _, ref, _, mask = [np.float64(x) for x in arrays]
    d = (logprobs - ref)[mask > 0]
    np.testing.assert_allclose(
        got[0][1]["kl"], token_kl(d, d, kl_kind).sum() / 4, rtol=1e-5
    )  # 4 rows have tokens


@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
def test_tokens_of_the_whole_batch(loss_type):
    arrays = numbers(5)
    got = compiled(loss_type, num_tokens=40)(*arrays, *clips(loss_type), 0.3)
    check(arrays, got, loss_type, 0.3, num_tokens=40)


def test_metrics_by_hand():
    ratio = np.array([[1.5, 0.5, 1.1, 1.0], [1.5, 0.5, 0.9, np.nan]])
    mask = np.array([[1, 1, 1, 1], [1, 1, 1, 0]])
    old = np.where(mask > 0, -1.0, np.nan)
    loss = functools.partial(grpo_loss, old + np.log(ratio), old, None, jnp.array([1.0, -1.0]), mask)
    value, metrics = loss()
    # Row 1: min(r A, clip A) = 1.2, 0.5, 1.1, 1.0. Row 2: -1.5, -0.8, -0.9.
    np.testing.assert_allclose(value, -(3.8 / 4 - 3.2 / 3) / 2, rtol=1e-5)
    rs = ratio[mask > 0]
    want = {
        "clip_fraction": 2 / 7,
        "clip_fraction_low": 1 / 7,
        "clip_fraction_high": 1 / 7,
        "ratio_mean": rs.mean(),
        "approx_kl": (rs - 1 - np.log(rs)).mean(),
    }
    assert set(metrics) == set(want)
    for name in want:
        np.testing.assert_allclose(metrics[name], want[name], rtol=1e-5, err_msg=name)
    _, metrics = loss(loss_type="cispo", clip_high=1.2)
    np.testing.assert_allclose(metrics["clip_fraction_high"], 2 / 7, rtol=1e-5)  # of either sign
    assert metrics["clip_fraction_low"] == 0.0
    assert loss(loss_type="sapo")[1]["clip_fraction"] == 0.0
    # One ratio a sequence, counted at each of its tokens: row 1 is within 20 %, row 2 too (0.675 ** (1/3) = 0.877).
    _, metrics = loss(loss_type="gspo", clip_low=0.1)
    np.testing.assert_allclose(metrics["clip_fraction_low"], 3 / 7, rtol=1e-5)
    np.testing.assert_allclose(metrics["ratio_mean"], (4 * 0.825**0.25 + 3 * 0.675 ** (1 / 3)) / 7, rtol=1e-5)
