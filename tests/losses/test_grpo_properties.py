"""The GRPO family: what holds for every loss type, whatever the numbers; and the ends of the range."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.grpo import KL_KINDS, LOSSES, grpo_loss
from tests.losses.grpo_reference import MAX_LENGTH, clips, compiled, numbers


@pytest.mark.parametrize("loss_type", LOSSES)
def test_on_policy_gradient_is_the_policy_gradient(loss_type):
    logprobs, _, _, advantages, mask = numbers(3)
    got = compiled(loss_type, with_ref=False)(
        logprobs, logprobs, logprobs, advantages, mask, *clips(loss_type), 0.0
    )
    lengths = np.maximum(mask.sum(-1, keepdims=True), 1)
    B = len(mask)
    weight = {
        "bnpo": 1 / mask.sum(),
        "dapo": 1 / mask.sum(),
        "cispo": 1 / mask.sum(),
        "dr_grpo": 1 / (B * MAX_LENGTH),
        "luspo": 1 / B,
    }.get(loss_type, 1 / (B * lengths))
    want = np.where(mask > 0, -np.nan_to_num(advantages)[:, None] * weight, 0.0)
    np.testing.assert_allclose(got[1], want, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(got[0][1]["ratio_mean"], 1.0, rtol=1e-6)
    assert got[0][1]["clip_fraction"] == 0.0


def test_old_logprobs_may_be_the_same_array():
    # The usual single-update call: old is the policy itself, and must not cancel the gradient.
    lp = jnp.full((1, 2), -1.0)
    grad = jax.grad(lambda x: grpo_loss(x, x, x, jnp.ones(1), jnp.ones((1, 2)), beta=0.5)[0])(lp)
    np.testing.assert_allclose(grad, [[-0.5, -0.5]], rtol=1e-6)


@pytest.mark.parametrize("loss_type", [name for name in LOSSES if name not in ("cispo", "sapo")])
def test_a_bound_token_has_no_gradient(loss_type):
    # Ratio 1.5 with A > 0, 0.5 with A < 0: bound. The other way round: free, slope -A r.
    ratio = np.float32([[1.5] * 6, [0.5] * 6, [0.5] * 6, [1.5] * 6, [1.0] * 6])
    old = np.full((5, 6), -1.0, np.float32)
    advantages = np.float32([1, -1, 1, -1, 1])
    mask = np.int32([[1] * 6] * 4 + [[0] * 6])
    run = compiled(loss_type, with_ref=False)
    got = run(old + np.log(ratio), old, old, advantages, mask, 0.2, 0.2, 0.0)
    grad = np.asarray(got[1])
    np.testing.assert_array_equal(grad[:2], 0.0)
    assert (grad[2] < 0).all()
    np.testing.assert_allclose(grad[3] / grad[2], -3.0, rtol=1e-5)
    np.testing.assert_allclose(got[0][1]["clip_fraction_low"], 0.25)
    np.testing.assert_allclose(got[0][1]["clip_fraction_high"], 0.25)


def test_no_room_to_clip_still_learns_on_policy():
    lp = jnp.full((2, 2), -1.0)
    loss = lambda x: grpo_loss(
        x, lp, None, jnp.array([1.0, -2.0]), jnp.ones((2, 2)), clip_low=0.0, clip_high=0.0
    )[0]
    np.testing.assert_allclose(jax.grad(loss)(lp), [[-0.25] * 2, [0.5] * 2], rtol=1e-6)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_what_lies_in_padding_cannot_matter(loss_type):
    arrays = numbers(9)
    run = lambda filler: compiled(loss_type)(
        *[np.where(np.isnan(x), np.float32(filler), x) for x in arrays[:4]], arrays[4], *clips(loss_type), 0.3
    )
    plain = run(0.0)
    for filler in (np.nan, np.inf, -np.inf, -1e4):
        chex.assert_trees_all_equal(run(filler), plain)
    np.testing.assert_array_equal(np.asarray(plain[1])[arrays[4] == 0], 0.0)


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "gspo"])
def test_more_padding_changes_nothing(loss_type):
    arrays = numbers(13)
    run = compiled(loss_type)
    wider = [np.pad(x, ((0, 0), (0, 3)), constant_values=np.nan) for x in arrays[:3]]
    wider += [arrays[3], np.pad(arrays[4], ((0, 0), (0, 3)))]
    short, long = run(*arrays, *clips(loss_type), 0.3), run(*wider, *clips(loss_type), 0.3)
    chex.assert_trees_all_close(short[0], long[0], rtol=1e-6)
    np.testing.assert_allclose(short[1], np.asarray(long[1])[:, :6], rtol=1e-6)


@pytest.mark.parametrize("loss_type, share", [("grpo", 0.5), ("luspo", 0.5), ("bnpo", 1.0), ("cispo", 1.0)])
def test_a_row_without_tokens_is_a_sequence_of_loss_zero(loss_type, share):
    arrays = numbers(17, lengths=(5, 0))
    both = compiled(loss_type)(*arrays, *clips(loss_type), 0.3)[0][0]
    alone = compiled(loss_type)(*[x[:1] for x in arrays], *clips(loss_type), 0.3)[0][0]
    np.testing.assert_allclose(both, share * alone, rtol=1e-6)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_nothing_but_padding_is_zero(loss_type):
    (value, metrics), grad = compiled(loss_type)(*numbers(1, lengths=(0,) * 5), *clips(loss_type), 0.3)
    assert value == 0.0
    np.testing.assert_array_equal(grad, 0.0)
    assert all(x == 0.0 for x in metrics.values())


@pytest.mark.parametrize("loss_type", LOSSES)
def test_far_log_ratios_stay_finite(loss_type):
    ends = np.float32([-1e4, 1e4, -100.0, 100.0, 0.0, 30.0])
    logprobs = np.stack([ends, ends, -ends, np.full(6, 1e4), np.full(6, -1e4)]).astype(np.float32)
    zeros, advantages = np.zeros_like(logprobs), np.float32([1, -1, 1, -1, -1])
    arrays = [logprobs, zeros, zeros, advantages, np.ones((5, 6), np.int32)]
    chex.assert_tree_all_finite(compiled(loss_type)(*arrays, *clips(loss_type), 0.1))


@pytest.mark.parametrize("kl_kind", KL_KINDS)
def test_far_from_the_reference_stays_finite(kl_kind):
    ends = np.float32([[-1e4, 1e4, -100.0, 100.0, 0.0, 30.0]])
    zeros, ones = np.zeros_like(ends), np.ones(1, np.float32)
    got = compiled("grpo", kl_kind)(ends, ends, zeros, ones, np.ones_like(ends), 0.2, 0.2, 0.1)
    chex.assert_tree_all_finite(got)
    if kl_kind in ("k2", "k3+"):  # even there the pull back to the reference is the whole log ratio
        np.testing.assert_allclose(got[1], (0.1 * ends - 1.0) / 6, rtol=1e-5)


@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
def test_parts_of_a_batch_sum_to_the_whole(loss_type):
    arrays = numbers(21)
    total = int(arrays[4].sum())
    run = compiled(loss_type, num_tokens=total)
    whole = run(*arrays, *clips(loss_type), 0.3)
    parts = [run(*[x[cut] for x in arrays], *clips(loss_type), 0.3) for cut in (slice(0, 2), slice(2, 5))]
    np.testing.assert_allclose(sum(p[0][0] for p in parts), whole[0][0], rtol=1e-5)
    np.testing.assert_allclose(np.concatenate([p[1] for p in parts]), whole[1], rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(
        whole[0][0], compiled(loss_type)(*arrays, *clips(loss_type), 0.3)[0][0], rtol=1e-6
    )


def test_equal_lengths_make_the_averages_agree():
    arrays = numbers(2, lengths=(6,) * 5)
    values = {
        name: compiled(name)(*arrays, 0.2, 0.28, 0.3)[0][0] for name in ("grpo", "bnpo", "dapo", "dr_grpo")
    }
    np.testing.assert_allclose(values["bnpo"], values["grpo"], rtol=1e-5)
    np.testing.assert_allclose(values["dapo"], values["grpo"], rtol=1e-5)
    np.testing.assert_allclose(values["dr_grpo"] * MAX_LENGTH / 6, values["grpo"], rtol=1e-5)


def test_sequence_ratio_forms_agree():
    # With one advantage a sequence, GSPO-token has GSPO's value and gradient; LUSPO is GSPO times the length.
    arrays = numbers(2, lengths=(4,) * 5)
    gspo, by_token, luspo = (
        compiled(name, with_ref=False)(*arrays, 0.2, 0.2, 0.0) for name in ("gspo", "gspo_token", "luspo")
    )
    chex.assert_trees_all_close(gspo, by_token, rtol=1e-5)
    np.testing.assert_allclose(luspo[0][0], 4 * gspo[0][0], rtol=1e-5)
    np.testing.assert_allclose(luspo[1], 4 * gspo[1], rtol=1e-5, atol=1e-8)


def test_advantages_by_token():
    arrays = numbers(4)
    spread = np.broadcast_to(arrays[3][:, None], arrays[4].shape)
    for name in ("grpo", "gspo_token"):
        run = compiled(name)
        chex.assert_trees_all_equal(
            run(*arrays, 0.2, 0.2, 0.3), run(*arrays[:3], spread, arrays[4], 0.2, 0.2, 0.3)
        )


def test_sapo_slope_is_one_on_policy_and_fades():
    lp = lambda r: jnp.log(jnp.full((1, 1), r))
    one = jnp.ones((1, 1))
    slope = lambda r, A: jax.grad(
        lambda x: grpo_loss(x, 0 * one, None, jnp.array([A]), one, loss_type="sapo")[0]
    )(lp(r))
    np.testing.assert_allclose(slope(1.0, 1.0), [[-1.0]], rtol=1e-6)
    # -A 4 sigma'(tau (r - 1)) r at r = 3, tau 1: sigma'(2) = 0.104994, so -1.25992.
    np.testing.assert_allclose(slope(3.0, 1.0), [[-1.259924]], rtol=1e-5)
    # tau 1.05: sigma'(2.1) = 0.0971947.
    np.testing.assert_allclose(slope(3.0, -1.0), [[1.166336]], rtol=1e-5)


def test_half_precision_inputs_reduce_in_float32():
    arrays = numbers(6)
    half = [jnp.asarray(x, jnp.bfloat16) for x in arrays[:4]]
    value, metrics = grpo_loss(*half, arrays[4], beta=0.1)
    chex.assert_type([value, *metrics.values()], jnp.float32)
    full = grpo_loss(
        *[x.astype(jnp.float32) for x in half], arrays[4] > 0, beta=0.1
    )  # a bool mask is as good
    chex.assert_trees_all_equal((value, metrics), full)
    chex.assert_trees_all_equal(
        full, grpo_loss(*[x.astype(jnp.float32) for x in half], arrays[4] > 0, beta=0.1)
    )


def test_coefficients_may_be_swept():
    arrays = numbers(8)
    f = lambda low, beta, n: grpo_loss(*arrays, clip_low=low, beta=beta, loss_type="dapo", num_tokens=n)[0]
    swept = jax.vmap(f)(jnp.array([0.1, 0.3]), jnp.array([0.0, 0.5]), jnp.array([0, 20]))
    np.testing.assert_allclose(swept[1], f(0.3, 0.5, 20), rtol=1e-6)
    assert np.isfinite(swept[0])


def test_bad_arguments():
    x, A = jnp.zeros((2, 3)), jnp.zeros(2)
    with pytest.raises(ValueError, match="'ppo'.*grpo, bnpo, dr_grpo"):
        grpo_loss(x, x, None, A, x, loss_type="ppo")
    with pytest.raises(ValueError, match="'kl'.*k1, k2, k3"):
        grpo_loss(x, x, x, A, x, kl_kind="kl")
    with pytest.raises(ValueError, match="max_length"):
        grpo_loss(x, x, None, A, x, loss_type="dr_grpo")
    with pytest.raises(ValueError, match="ref_logprobs"):
        grpo_loss(x, x, None, A, x, beta=0.1)
    with pytest.raises(ValueError, match="ref_logprobs"):
        jax.jit(lambda beta: grpo_loss(x, x, None, A, x, beta=beta))(0.0)
    for wrong in (
        (x, x[:1], None, A, x),
        (x, x, None, A[:1], x),
        (x, x, x[:, :2], A, x),
        (x, x, None, A, x[0]),
    ):
        with pytest.raises(AssertionError):
            grpo_loss(*wrong)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "luspo"])
def test_an_exact_kl_is_averaged_as_an_estimate_is(loss_type):
    """Handed the values of k2, it has the loss, gradient and metric of k2; outside the mask it is never read."""
    rng = np.random.default_rng(5)
    logprobs, ref = (jnp.float32(rng.normal(-2, 0.5, (3, 5))) for _ in range(2))
    mask = jnp.array([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    common = dict(beta=0.7, loss_type=loss_type, num_tokens=9)

    def exact(lp):
        kl = jnp.where(mask > 0, 0.5 * jnp.square(lp - ref), jnp.nan)
        return grpo_loss(lp, logprobs, ref, jnp.ones(3), mask, kl_kind="exact", token_kl=kl, **common)

    k2 = lambda lp: grpo_loss(lp, logprobs, ref, jnp.ones(3), mask, kl_kind="k2", **common)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
        *(jax.value_and_grad(f, has_aux=True)(logprobs) for f in (exact, k2)),
    )
    with pytest.raises(ValueError, match="'exact' and token_kl go together"):
        grpo_loss(logprobs, logprobs, ref, jnp.ones(3), mask, kl_kind="exact", **common)
