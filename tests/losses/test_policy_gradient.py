"""The unclipped surrogate against float64, value and gradient; at ratio 1 it is REINFORCE."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.policy_gradient import policy_gradient_loss
from rlhf_jax.losses.ppo import clipped_policy_loss

MASK = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])


def make(seed=0, apart=0.5):
    rng = np.random.default_rng(seed)
    new = rng.normal(-2, 1, MASK.shape)
    return new, new + apart * rng.normal(size=MASK.shape), rng.normal(size=MASK.shape), MASK


def by_token(new, old, advantages, mask):
    """(loss, gradient) in float64."""
    ratio = np.exp(new - old)
    return -(ratio * advantages * mask).sum() / mask.sum(), -ratio * advantages * mask / mask.sum()


def by_sequence(new, old, advantages, mask, clip=np.inf):
    counts = mask.any(1)
    ratio = np.exp(((new - old) * mask).sum(1))
    bounded = np.clip(ratio, 1 - clip, 1 + clip)
    gain = np.minimum(ratio * advantages, bounded * advantages) * counts
    free = (ratio * advantages <= bounded * advantages) & counts
    slope = -np.where(free, ratio * advantages, 0.0) / counts.sum()
    return -gain.sum() / counts.sum(), slope[:, None] * mask


def both(new, old, advantages, mask, *more):
    """(loss, gradient, metrics) of ours, with NaN wherever nothing may be read."""
    hide = lambda x: jnp.where(mask > 0, jnp.float32(x), jnp.nan)
    advantages = hide(advantages) if np.ndim(advantages) == 2 else jnp.float32(advantages)
    f = jax.value_and_grad(policy_gradient_loss, has_aux=True)
    (loss, metrics), gradient = f(hide(new), hide(old), advantages, jnp.asarray(mask), *more)
    return loss, gradient, metrics


@pytest.mark.parametrize("seed", range(3))
def test_by_token(seed):
    loss, gradient, _ = both(*make(seed))
    expected, slope = by_token(*make(seed))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("seed", range(3))
def test_by_sequence(seed, clip):
    new, old, advantages, mask = make(seed)
    advantages = advantages[:, 0]
    advantages[2] = np.nan  # of the row without a token
    loss, gradient, metrics = both(new, old, advantages, mask, "sequence", clip)
    expected, slope = by_sequence(new, old, np.nan_to_num(advantages), mask, clip or np.inf)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-7)
    assert (metrics["clip_fraction"] > 0) == (clip is not None and (slope[[0, 1, 3], 0] == 0).any())


def test_on_policy_the_gradient_is_that_of_reinforce():
    new, _, advantages, mask = make(apart=0)
    _, gradient, metrics = both(new, new, advantages, mask)
    np.testing.assert_allclose(gradient, -advantages * mask / mask.sum(), rtol=1e-6)
    assert metrics["ratio_max_gap"] == 0 and metrics["approx_kl"] == 0 and metrics["ratio_mean"] == 1


def test_the_same_as_ppo_where_nothing_is_clipped():
    new, old, advantages, mask = (jnp.asarray(x, jnp.float32) for x in make(apart=0.02))
    ours, metrics = policy_gradient_loss(new, old, advantages, mask)
    ppo, ppo_metrics = clipped_policy_loss(new, old, advantages, mask, 0.5)
    np.testing.assert_allclose(ours, ppo, rtol=1e-6)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], ppo_metrics[name], rtol=1e-6, err_msg=name)


def test_large_ratios_stay_finite_and_an_empty_batch_is_0():
    new, old, advantages, mask = make()
    for level, a in (("token", advantages), ("sequence", advantages[:, 0])):
        loss, gradient, _ = both(new, old - 1e4, a, mask, level)
        assert np.isfinite(loss) and np.isfinite(gradient).all()
        loss, gradient, _ = both(new, old, a, np.zeros_like(mask), level)
        assert loss == 0 and not np.asarray(gradient).any()


def test_what_is_refused():
    new, old, advantages, mask = (jnp.asarray(x, jnp.float32) for x in make())
    with pytest.raises(ValueError, match="level is 'word'; expected one of token, sequence"):
        policy_gradient_loss(new, old, advantages, mask, "word")
    with pytest.raises(ValueError, match="PPO's loss"):
        policy_gradient_loss(new, old, advantages, mask, clip_epsilon=0.2)
    with pytest.raises(AssertionError):
        policy_gradient_loss(new, old, advantages, mask, "sequence")
