"""Numbers of completions from their tokens, against plain float64 loops, in value and gradient."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.sequence import length_desensitised_sums, sequence_mean, sequence_sum, wpo_weights

# Plain, full, left-padded, with a gap, one token, none.
MASK = np.array(
    [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 0, 1, 0, 1], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]
)
OTHER_MASK = np.array(
    [[1, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1, 1]]
    + [[0, 0, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0]]
)
WEIGHTS = np.float32([0.5, 1.0, 1.5, 2.0, 0.7, 1.3])


def logprobs_of(mask, seed):
    return np.float32(-np.random.default_rng(seed).gamma(1.0, 1.0, mask.shape))


def nan_outside(x, mask):
    return np.where(mask > 0, x, np.nan).astype(np.float32)


def desensitised(x, mask, other_mask, alpha):
    out = []
    for row, real, other in zip(np.float64(x), mask > 0, other_mask > 0, strict=True):
        tokens, shared = row[real], min(real.sum(), other.sum())
        out.append(tokens[:shared].sum() + alpha * tokens[shared:].sum())
    return np.array(out)


@pytest.mark.parametrize("outside", ["numbers", "nan"])
def test_sum_and_mean(outside):
    exact = logprobs_of(MASK, 0)
    x = nan_outside(exact, MASK) if outside == "nan" else exact
    count = np.maximum(MASK.sum(1), 1)
    total = (np.float64(exact) * MASK).sum(1)
    np.testing.assert_allclose(sequence_sum(x, MASK), total, rtol=1e-6)
    np.testing.assert_allclose(sequence_mean(x, MASK), total / count, rtol=1e-6)
    grad = lambda f: jax.grad(lambda x: (f(x, MASK) * WEIGHTS).sum())(x)
    np.testing.assert_allclose(grad(sequence_sum), MASK * WEIGHTS[:, None], rtol=1e-6)
    np.testing.assert_allclose(grad(sequence_mean), MASK * (WEIGHTS / count)[:, None], rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_length_desensitised(alpha, slope_of):
    chosen, rejected = logprobs_of(MASK, 1), logprobs_of(OTHER_MASK, 2)
    f = lambda c, r: length_desensitised_sums(c, MASK, r, OTHER_MASK, tail_weight=alpha)
    given = (nan_outside(chosen, MASK), nan_outside(rejected, OTHER_MASK))
    got = f(*given)
    np.testing.assert_allclose(got[0], desensitised(chosen, MASK, OTHER_MASK, alpha), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(got[1], desensitised(rejected, OTHER_MASK, MASK, alpha), rtol=1e-6, atol=1e-7)
    grads = jax.grad(lambda c, r: sum((x * WEIGHTS).sum() for x in f(c, r)), argnums=(0, 1))(*given)
    for grad, x, mask, other in zip(
        grads, (chosen, rejected), (MASK, OTHER_MASK), (OTHER_MASK, MASK), strict=True
    ):
        want = slope_of(lambda x, m=mask, o=other: (desensitised(x, m, o, alpha) * WEIGHTS).sum(), x)
        np.testing.assert_allclose(grad, want, rtol=1e-5, atol=1e-7)


def test_length_desensitised_by_hand():
    # Three tokens against one: the first counts whole, the others half; the shorter is left as it is.
    chosen, rejected = jnp.array([[-1.0, -2.0, -3.0]]), jnp.array([[-5.0, jnp.nan]])
    masks = jnp.array([[1, 1, 1]]), jnp.array([[1, 0]])
    got = length_desensitised_sums(chosen, masks[0], rejected, masks[1], tail_weight=0.5)
    np.testing.assert_array_equal(got, [[-3.5], [-5.0]])


def test_length_desensitised_at_1_is_the_sum():
    chosen, rejected = logprobs_of(MASK, 3), logprobs_of(OTHER_MASK, 4)
    got = length_desensitised_sums(chosen, MASK, rejected, OTHER_MASK, tail_weight=1.0)
    chex.assert_trees_all_equal(got, (sequence_sum(chosen, MASK), sequence_sum(rejected, OTHER_MASK)))


def test_length_desensitised_leaves_equal_lengths_alone():
    chosen, rejected = logprobs_of(MASK, 5), logprobs_of(MASK, 6)
    got = length_desensitised_sums(chosen, MASK, rejected, MASK, tail_weight=0.1)
    chex.assert_trees_all_equal(got, (sequence_sum(chosen, MASK), sequence_sum(rejected, MASK)))


def pair_of_distributions(masks, seed, V=7):
    rng = np.random.default_rng(seed)
    out = []
    for mask in masks:
        logits = rng.normal(0.0, 2.0, (*mask.shape, V))
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        ids = (logp + rng.gumbel(size=logp.shape)).argmax(-1)  # drawn from it
        out += [np.take_along_axis(logp, ids[..., None], -1)[..., 0], np.log(np.exp(2 * logp).sum(-1)), mask]
    return out


def test_wpo_weights():
    args = pair_of_distributions((MASK, OTHER_MASK), 7)
    log_weight = np.zeros(len(MASK))
    for x, collision, mask in (args[:3], args[3:]):
        log_weight += ((x - collision) * mask).sum(1) / np.maximum(mask.sum(1), 1)
    want = np.minimum(np.exp(log_weight), 1.0)
    assert 0 < (want == 1.0).sum() < len(want)  # the bound acts on some, not on all
    given = [nan_outside(x, m) for x, m in zip(args, [MASK] * 3 + [OTHER_MASK] * 3, strict=True)]
    given[2], given[5] = MASK, OTHER_MASK
    np.testing.assert_allclose(wpo_weights(*given), want, rtol=1e-5)


def test_wpo_weights_carry_no_gradient():
    args = pair_of_distributions((MASK, OTHER_MASK), 8)
    f = lambda *floats: wpo_weights(floats[0], floats[1], MASK, floats[2], floats[3], OTHER_MASK).sum()
    floats = [np.float32(args[i]) for i in (0, 1, 3, 4)]
    for grad in jax.grad(f, argnums=(0, 1, 2, 3))(*floats):
        np.testing.assert_array_equal(grad, 0.0)


def test_wpo_weight_of_certain_tokens_is_1_and_of_impossible_ones_0():
    zero, ones = jnp.zeros((2, 3)), jnp.ones((2, 3))
    certain = wpo_weights(zero, zero, ones, zero, zero, ones)  # p = 1: log p = log sum p^2 = 0
    np.testing.assert_array_equal(certain, 1.0)
    impossible = wpo_weights(zero - 1e4, zero, ones, zero, zero, ones)
    np.testing.assert_array_equal(impossible, 0.0)


def test_one_token_and_half_precision():
    x, mask = jnp.full((1, 1), -2.0, jnp.bfloat16), jnp.ones((1, 1))
    got = [sequence_sum(x, mask), sequence_mean(x, mask)]
    got += length_desensitised_sums(x, mask, x, mask, tail_weight=0.5)
    chex.assert_type(got, jnp.float32)
    np.testing.assert_array_equal(got, -2.0)
    weight = wpo_weights(x, x / 4, mask, x, x / 2, mask)  # exp(-2 + 0.5 - 2 + 1)
    np.testing.assert_allclose(weight, np.exp(-2.5), rtol=1e-6)


def test_shapes_must_agree():
    x, short = jnp.zeros((2, 3)), jnp.zeros((2, 2))
    for f in (sequence_sum, sequence_mean):
        with pytest.raises(AssertionError):
            f(x, short)
    with pytest.raises(AssertionError):
        length_desensitised_sums(x, x, short, x, tail_weight=0.5)
    with pytest.raises(AssertionError):
        length_desensitised_sums(x, x, x[:1], x[:1], tail_weight=0.5)
    with pytest.raises(AssertionError):
        wpo_weights(x, short, x, x, x, x)
