"""Every f-divergence and mixture of the DPO family against float64, in value and gradient, and at the extremes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.preference import LOSSES, SCORES, combined_preference_loss, preference_loss
from tests.losses.preference_reference import REFERENCE, SMOOTHING, central_differences

# f'(ratio) from its log, and its slope by the log, written out.
F_ALPHA = 0.4
SCORE = {
    "reverse_kl": lambda x: x,
    "forward_kl": lambda x: 1 - np.exp(-x),
    "js": lambda x: np.log(2 * np.exp(x) / (1 + np.exp(x))),
    "alpha": lambda x: (np.exp((F_ALPHA - 1) * x) - 1) / (F_ALPHA - 1),
}
DIVERGENT = [name for name, row in LOSSES.items() if row.divergent]
SUMS = [name for name in DIVERGENT if not LOSSES[name].averaged]


def scored_reference(logprobs, loss_type, beta, smoothing, divergence, lengths=(1, 1)):
    """The row's formula on f' of sums, both by token where it is averaged."""
    p = [np.asarray(x, np.float64) for x in logprobs]
    n = lengths if LOSSES[loss_type].averaged or loss_type == "sft" else (1, 1)
    score = SCORE[divergence]
    chosen, rejected = score(p[0] - p[2]) / n[0], score(p[1] - p[3]) / n[1]
    return REFERENCE[loss_type](chosen, rejected, beta, smoothing, [p[0] / n[0], *p[1:]])


def test_every_divergence_has_a_reference():
    assert set(SCORES) == set(SCORE)


@pytest.mark.parametrize("divergence", SCORES)
@pytest.mark.parametrize("loss_type", SUMS)
def test_divergence_value_and_gradient(loss_type, divergence):
    rng = np.random.default_rng(10)
    logprobs = np.float32(rng.normal(-4.0, 1.5, (4, 15)))

    def total(xs):
        got = preference_loss(
            *xs,
            beta=0.3,
            label_smoothing=SMOOTHING,
            loss_type=loss_type,
            f_divergence=divergence,
            f_alpha=F_ALPHA,
        )
        return got[0].sum(), got

    (_, (losses, chosen, _)), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(list(logprobs))
    f = lambda xs: scored_reference(xs, loss_type, 0.3, SMOOTHING, divergence)
    np.testing.assert_allclose(losses, f(logprobs), rtol=3e-5, atol=3e-6)
    np.testing.assert_allclose(chosen, 0.3 * (np.float64(logprobs[0]) - logprobs[2]), rtol=1e-5, atol=1e-6)
    for argument in (0, 1):
        want = central_differences(lambda xs: f(xs).sum(), logprobs, argument)
        np.testing.assert_allclose(grads[argument], want, rtol=3e-4, atol=2e-5 * max(1.0, np.abs(want).max()))
    chex.assert_trees_all_equal(grads[2:], [np.zeros(15, np.float32)] * 2)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_reverse_kl_is_the_plain_loss(loss_type):
    logprobs = np.float32(np.random.default_rng(11).normal(-4.0, 1.5, (4, 9)))
    f = lambda **kwargs: preference_loss(*logprobs, loss_type=loss_type, label_smoothing=SMOOTHING, **kwargs)
    chex.assert_trees_all_equal(f(f_divergence="reverse_kl"), f())
    if loss_type in SUMS:  # alpha has both KL at its ends
        one, zero = (f(f_divergence="alpha", f_alpha=a) for a in (1.0, 0.0))
        chex.assert_trees_all_equal(one, f())
        chex.assert_trees_all_equal(zero, f(f_divergence="forward_kl"))


@pytest.mark.parametrize("divergence", SCORES)
def test_divergences_agree_near_the_reference(divergence):
    # Every f' has value 0 and slope f''(1) at ratio 1: 1 for the KL and alpha, 1/2 for Jensen-Shannon.
    policy, ref = jnp.array([-3.0, -3.002]), jnp.array([-3.001, -3.0])
    f = lambda c, r: preference_loss(c, r, ref, ref, beta=1.0, loss_type="hinge", f_divergence=divergence)[
        0
    ].sum()
    grads = jax.grad(f, argnums=(0, 1))(policy, policy)
    slope = 0.5 if divergence == "js" else 1.0
    np.testing.assert_allclose(grads, [[-slope] * 2, [slope] * 2], rtol=4e-3)


@pytest.mark.parametrize("divergence", SCORES)
@pytest.mark.parametrize("loss_type", DIVERGENT)
def test_far_log_ratios_stay_finite_under_any_divergence(loss_type, divergence):
    ends = np.float32([-1e4, -300.0, 0.0, 300.0, 1e4])
    chosen, rejected = (x.ravel() for x in np.meshgrid(ends, ends))
    zeros, lengths = np.zeros_like(chosen), np.full(25, 3)

    def total(xs):
        got = combined_preference_loss(
            *xs,
            lengths,
            lengths,
            loss_weights={loss_type: 1.0},
            label_smoothing=SMOOTHING,
            f_divergence=divergence,
            f_alpha=3.0,
        )
        return got[0].sum(), got

    chex.assert_tree_all_finite(jax.value_and_grad(total, has_aux=True)([chosen, rejected, zeros, zeros]))


def test_a_lost_chosen_is_still_pulled_back():
    # e^300 is no float32. A clamp would leave no gradient where the policy has all but dropped the chosen answer.
    x, zero = jnp.full(1, -300.0), jnp.zeros(1)
    f = lambda x: preference_loss(x, zero, zero, zero, f_divergence="forward_kl")[0].sum()
    assert jax.grad(f)(x)[0] < -1e9


@functools.cache
def mixture(divergence, *names):
    def total(xs, lengths, weights):
        got = combined_preference_loss(
            *xs,
            *lengths,
            loss_weights=dict(zip(names, weights, strict=True)),
            beta=0.3,
            label_smoothing=SMOOTHING,
            f_divergence=divergence,
            f_alpha=F_ALPHA,
        )
        return got[0].sum(), got

    return jax.jit(jax.value_and_grad(total, has_aux=True))


MIXTURES = [("reverse_kl", name) for name in LOSSES] + [
    ("reverse_kl", "sigmoid", "bco_pair", "sft"),  # MPO
    ("reverse_kl", "ipo", "ipo_sum", "aot"),
    ("js", "sigmoid_norm", "hinge", "ipo"),
    ("alpha", "sigmoid_norm", "sft"),
    ("forward_kl", "ipo", "discopop", "exo_pair"),
]


@pytest.mark.parametrize("divergence, names", [(m[0], m[1:]) for m in MIXTURES])
def test_mixture_value_and_gradient(divergence, names):
    rng = np.random.default_rng(12)
    logprobs = np.float32(rng.normal(-4.0, 1.5, (4, 15)))
    lengths = rng.integers(1, 9, (2, 15))
    weights = np.float32([0.8, 0.2, 1.5][: len(names)])
    (_, (losses, chosen, rejected)), grads = mixture(divergence, *names)(list(logprobs), lengths, weights)
    f = lambda xs: sum(
        w * scored_reference(xs, name, 0.3, SMOOTHING, divergence, lengths)
        for name, w in zip(names, np.float64(weights), strict=True)
    )
    np.testing.assert_allclose(losses, f(logprobs), rtol=3e-5, atol=3e-6)
    exact = np.float64(logprobs)
    np.testing.assert_allclose(chosen, 0.3 * (exact[0] - exact[2]), rtol=1e-5, atol=1e-6)  # of sums, always
    np.testing.assert_allclose(rejected, 0.3 * (exact[1] - exact[3]), rtol=1e-5, atol=1e-6)
    for argument in (0, 1):
        want = central_differences(lambda xs: f(xs).sum(), logprobs, argument)
        np.testing.assert_allclose(grads[argument], want, rtol=3e-4, atol=2e-5 * max(1.0, np.abs(want).max()))
    chex.assert_trees_all_equal(grads[2:], [np.zeros(15, np.float32)] * 2)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_mixture_of_one_is_the_loss_itself(loss_type):
    sums = np.float32(np.random.default_rng(13).normal(-4.0, 1.5, (4, 9)))
    lengths = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9]), np.array([4, 1, 1, 2, 0, 8, 3, 2, 1])  # 0 counts as 1
    by = np.float32([lengths[0], np.maximum(lengths[1], 1)] * 2)
    row = LOSSES[loss_type]
    given = sums / by if row.averaged or row.either else sums
    alone = preference_loss(*given, loss_type=loss_type, label_smoothing=SMOOTHING)[0]
    got = combined_preference_loss(*sums, *lengths, loss_weights={loss_type: 2.0}, label_smoothing=SMOOTHING)
    np.testing.assert_allclose(got[0], 2 * alone, rtol=1e-5, atol=1e-6)


def test_bad_divergences_and_mixtures():
    x, n = jnp.zeros(2), jnp.ones(2, jnp.int32)
    with pytest.raises(ValueError, match="'kl'; expected one of reverse_kl, forward_kl, js, alpha"):
        preference_loss(x, x, x, x, f_divergence="kl")
    for loss_type, row in LOSSES.items():
        if not row.divergent:
            with pytest.raises(ValueError, match=f"'{loss_type}', which reads more than the difference"):
                preference_loss(x, x, x, x, loss_type=loss_type, label_smoothing=0.1, f_divergence="js")
            weights = {"sigmoid": 1.0, loss_type: 1.0}
            with pytest.raises(ValueError, match=f"'{loss_type}', which reads more than the difference"):
                combined_preference_loss(
                    x, x, x, x, n, n, loss_weights=weights, label_smoothing=0.1, f_divergence="js"
                )
        elif row.averaged:
            with pytest.raises(ValueError, match=f"'{loss_type}'.*combined_preference_loss"):
                preference_loss(x, x, x, x, loss_type=loss_type, f_divergence="js")
    with pytest.raises(ValueError, match="loss_weights is empty"):
        combined_preference_loss(x, x, x, x, n, n, loss_weights={})
    with pytest.raises(ValueError, match="'dpo'"):
        combined_preference_loss(x, x, x, x, n, n, loss_weights={"sigmoid": 1.0, "dpo": 1.0})
    with pytest.raises(ValueError, match="label_smoothing.*exo_pair"):
        combined_preference_loss(x, x, x, x, n, n, loss_weights={"exo_pair": 1.0})
    with pytest.raises(AssertionError):
        combined_preference_loss(x, x, x, x, n, n[:1], loss_weights={"sigmoid": 1.0})
