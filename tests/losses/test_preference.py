"""The DPO family against plain float64 formulae, in value and gradient, and at the extremes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.preference import LOSSES, SCORES, combined_preference_loss, preference_loss

TAU, SMOOTHING = 0.05, 0.15


def sigma(x):
    return 1.0 / (1.0 + np.exp(-x))


def cdpo(h, e):
    return -(1 - e) * np.log(sigma(h)) - e * np.log(sigma(-h))


# c, r: log ratios of chosen and rejected; b: beta; e: label smoothing; p: the four log-probabilities.
REFERENCE = {
    "sigmoid": lambda c, r, b, e, p: cdpo(b * (c - r), e),
    "hinge": lambda c, r, b, e, p: np.maximum(0.0, 1 - b * (c - r)),
    "ipo": lambda c, r, b, e, p: ((c - r) - 1 / (2 * b)) ** 2,
    "ipo_sum": lambda c, r, b, e, p: ((c - r) - 1 / (2 * b)) ** 2,
    "robust": lambda c, r, b, e, p: (
        (-(1 - e) * np.log(sigma(b * (c - r))) + e * np.log(sigma(-b * (c - r)))) / (1 - 2 * e)
    ),
    "exo_pair": lambda c, r, b, e, p: (
        sigma(b * (c - r)) * (np.log(sigma(b * (c - r))) - np.log(1 - e))
        + sigma(-b * (c - r)) * (np.log(sigma(-b * (c - r))) - np.log(e))
    ),
    "nca_pair": lambda c, r, b, e, p: (
        -np.log(sigma(b * c)) - 0.5 * np.log(sigma(-b * c)) - 0.5 * np.log(sigma(-b * r))
    ),
    "bco_pair": lambda c, r, b, e, p: -np.log(sigma(b * c)) - np.log(sigma(-b * r)),
    "sppo_hard": lambda c, r, b, e, p: (c - 1 / (2 * b)) ** 2 + (r + 1 / (2 * b)) ** 2,
    "aot": lambda c, r, b, e, p: cdpo(b * (np.sort(p[0] - p[1]) - np.sort(p[2] - p[3])), e),
    "aot_unpaired": lambda c, r, b, e, p: cdpo(b * (np.sort(c) - np.sort(r)), e),
    "apo_zero": lambda c, r, b, e, p: 1 - sigma(b * c) + sigma(b * r),
    "apo_down": lambda c, r, b, e, p: sigma(b * c) + 1 - sigma(b * (c - r)),
    "discopop": lambda c, r, b, e, p: (
        (1 - sigma(b * (c - r) / TAU)) * -np.log(sigma(b * (c - r)))
        + sigma(b * (c - r) / TAU) * np.exp(-b * (c - r))
    ),
    "sigmoid_norm": lambda c, r, b, e, p: -np.log(sigma(b * (c - r))),
    "sft": lambda c, r, b, e, p: -p[0],
}


def reference(logprobs, loss_type, beta, smoothing):
    p = [np.asarray(x, np.float64) for x in logprobs]
    return REFERENCE[loss_type](p[0] - p[2], p[1] - p[3], beta, smoothing, p)


def central_differences(f, xs, argument, step=1e-5):
    out = np.zeros(len(xs[argument]))
    for i in range(len(out)):
        ends = []
        for sign in (1, -1):
            moved = [np.array(x, np.float64) for x in xs]
            moved[argument][i] += sign * step
            ends.append(f(moved))
        out[i] = (ends[0] - ends[1]) / (2 * step)
    return out


@functools.cache
def loss_and_gradient(loss_type):
    """Losses, rewards and the gradient of the weighted sum of losses, by all four arguments; compiled once a row."""

    def weighted(logprobs, weights, beta):
        losses, chosen, rejected = preference_loss(
            *logprobs, beta=beta, label_smoothing=SMOOTHING, loss_type=loss_type
        )
        return (losses * weights).sum(), (losses, chosen, rejected)

    return jax.jit(jax.value_and_grad(weighted, has_aux=True))


def test_every_row_has_a_reference():
    assert set(LOSSES) == set(REFERENCE)


@pytest.mark.parametrize("seed, beta", [(0, 0.1), (1, 0.5), (2, 2.0)])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_value_and_gradient(loss_type, seed, beta):
    rng = np.random.default_rng(seed)
    logprobs = np.float32(rng.normal(-4.0, 1.5, (4, 25)))
    weights = np.float32(rng.uniform(0.5, 2.0, 25))
    (_, (losses, chosen, rejected)), grads = loss_and_gradient(loss_type)(list(logprobs), weights, beta)
    want = reference(logprobs, loss_type, beta, SMOOTHING)
    np.testing.assert_allclose(losses, want, rtol=2e-5, atol=2e-6)
    exact = np.float64(logprobs)
    np.testing.assert_allclose(chosen, beta * (exact[0] - exact[2]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rejected, beta * (exact[1] - exact[3]), rtol=1e-5, atol=1e-6)
    weighted = lambda xs: (reference(xs, loss_type, beta, SMOOTHING) * weights).sum()
    for argument in (0, 1):
        want = central_differences(weighted, logprobs, argument)
        np.testing.assert_allclose(grads[argument], want, rtol=2e-4, atol=2e-5)
    chex.assert_trees_all_equal(grads[2:], [np.zeros(25, np.float32)] * 2)  # the reference is held fixed


@pytest.mark.parametrize("loss_type", LOSSES)
def test_far_log_ratios_stay_finite(loss_type):
    ends = np.float32([-1e4, -300.0, 0.0, 300.0, 1e4])
    chosen, rejected = (x.ravel() for x in np.meshgrid(ends, ends))
    zeros = np.zeros_like(chosen)
    run = loss_and_gradient(loss_type)
    (_, (losses, *rewards)), grads = run([chosen, rejected, zeros, zeros], np.ones_like(zeros), 0.1)
    chex.assert_tree_all_finite((losses, rewards, grads))


def test_discopop_at_the_far_end_is_the_logistic_loss():
    # h = -1000: the weight of exp(-h) is e^-20000, so the loss is -log sigma(-1000) and its slope -beta.
    far = lambda x: preference_loss(*x, beta=0.1, loss_type="discopop")[0].sum()
    zero = jnp.zeros(1)
    value, grads = jax.value_and_grad(far)([jnp.full(1, -1e4), zero, zero, zero])
    np.testing.assert_allclose(value, 1000.0, rtol=1e-6)
    np.testing.assert_allclose([grads[0][0], grads[1][0]], [-0.1, 0.1], rtol=1e-5)
    # h = +1000: the loss is e^-1000 and its slope 0.
    value, grads = jax.value_and_grad(far)([jnp.full(1, 1e4), zero, zero, zero])
    assert value == 0.0
    assert grads[0][0] == 0.0


def test_far_losses_are_the_asymptotes():
    # Log ratios -1e4 chosen, +1e4 rejected, beta 0.1: h = -2000.
    zero, end = jnp.zeros(1), jnp.full(1, 1e4)
    want = {
        "sigmoid": 0.85 * 2000,
        "hinge": 2001.0,
        "bco_pair": 2000.0,
        "nca_pair": 1500.0,
        "apo_zero": 2.0,
        "apo_down": 1.0,
        "exo_pair": -np.log(SMOOTHING),
        "robust": 0.85 * 2000 / 0.7,
    }
    for loss_type, value in want.items():
        losses, _, _ = preference_loss(-end, end, zero, zero, loss_type=loss_type, label_smoothing=SMOOTHING)
        np.testing.assert_allclose(losses, [value], rtol=1e-6, err_msg=loss_type)


def test_equal_policies_pay_log_two():
    logprobs = jnp.array([-3.0, -70.0])
    for loss_type in ("sigmoid", "sigmoid_norm", "aot", "aot_unpaired", "robust"):
        losses, chosen, rejected = preference_loss(
            logprobs, logprobs, logprobs, logprobs, loss_type=loss_type
        )
        np.testing.assert_allclose(losses, np.log(2.0), rtol=1e-6)
        np.testing.assert_array_equal(chosen, 0.0)
        np.testing.assert_array_equal(rejected, 0.0)


def test_dpo_by_hand():
    # Log ratios 2 and -1, beta 0.5: h = 1.5; -log sigma(1.5) = 0.201413; slope -beta sigma(-1.5) = -0.0912127.
    one = lambda x: jnp.array([x])
    f = lambda pw, pl: preference_loss(pw, pl, one(-3.0), one(-4.0), beta=0.5)[0].sum()
    value, grads = jax.value_and_grad(f, argnums=(0, 1))(one(-1.0), one(-5.0))
    np.testing.assert_allclose(value, 0.201413, rtol=1e-5)
    np.testing.assert_allclose([grads[0][0], grads[1][0]], [-0.0912127, 0.0912127], rtol=1e-5)
    _, chosen, rejected = preference_loss(one(-1.0), one(-5.0), one(-3.0), one(-4.0), beta=0.5)
    assert (chosen[0], rejected[0]) == (1.0, -0.5)


def test_rewards_carry_no_gradient():
    def total(p):
        _, chosen, rejected = preference_loss(p, 2 * p, jnp.zeros(3), jnp.zeros(3))
        return (chosen + rejected).sum()

    np.testing.assert_array_equal(jax.grad(total)(jnp.ones(3)), 0.0)


@pytest.mark.parametrize("loss_type", [name for name, row in LOSSES.items() if not row.whole_batch])
def test_pairs_do_not_touch_each_other(loss_type):
    logprobs = [np.float32(x) for x in np.random.default_rng(3).normal(-4.0, 1.0, (4, 5))]
    f = lambda xs: preference_loss(*xs, loss_type=loss_type, label_smoothing=SMOOTHING)[0]
    alone = [f([x[i : i + 1] for x in logprobs])[0] for i in range(5)]
    np.testing.assert_allclose(f(logprobs), np.stack(alone), rtol=1e-6)


@pytest.mark.parametrize("loss_type", [name for name, row in LOSSES.items() if row.whole_batch])
def test_transport_losses_ignore_the_order_of_pairs(loss_type):
    logprobs = np.float32(np.random.default_rng(4).normal(-4.0, 1.0, (4, 5)))
    order = np.array([3, 0, 4, 1, 2])
    f = lambda xs: preference_loss(*xs, loss_type=loss_type)[0]
    np.testing.assert_array_equal(f(logprobs), f(logprobs[:, order]))


@pytest.mark.parametrize("loss_type", LOSSES)
def test_smoothed_says_who_reads_label_smoothing(loss_type):
    logprobs = np.float32(np.random.default_rng(5).normal(-4.0, 1.0, (4, 5)))
    few, many = (preference_loss(*logprobs, loss_type=loss_type, label_smoothing=e)[0] for e in (0.1, 0.3))
    assert bool((few != many).any()) == LOSSES[loss_type].smoothed


def test_robust_is_unbiased_under_flipped_labels():
    # Eq. 12 of the paper: averaged over flips with probability e, the loss is the clean DPO loss.
    logprobs = np.float32(np.random.default_rng(6).normal(-4.0, 1.0, (4, 5)))
    kept = preference_loss(*logprobs, loss_type="robust", label_smoothing=0.2)[0]
    flipped = preference_loss(*logprobs[[1, 0, 3, 2]], loss_type="robust", label_smoothing=0.2)[0]
    np.testing.assert_allclose(0.8 * kept + 0.2 * flipped, preference_loss(*logprobs)[0], rtol=1e-5)


def test_one_pair_and_half_precision():
    logprobs = [jnp.full(1, x, jnp.bfloat16) for x in (-2.0, -3.0, -2.5, -2.5)]
    losses, chosen, rejected = preference_loss(*logprobs)
    chex.assert_type([losses, chosen, rejected], jnp.float32)
    np.testing.assert_allclose(losses, reference(logprobs, "sigmoid", 0.1, 0.0), rtol=1e-6)


def test_coefficients_may_be_traced():
    logprobs = np.float32(np.random.default_rng(7).normal(-4.0, 1.0, (4, 5)))
    for loss_type in LOSSES:
        f = lambda beta, e, kind=loss_type: preference_loss(
            *logprobs, beta=beta, label_smoothing=e, loss_type=kind
        )[0]
        swept = jax.jit(jax.vmap(f))(jnp.array([0.1, 0.5]), jnp.array([0.2, 0.3]))
        np.testing.assert_allclose(swept[1], reference(logprobs, loss_type, 0.5, 0.3), rtol=3e-5, atol=3e-6)


def test_bad_arguments():
    x = jnp.zeros(2)
    with pytest.raises(ValueError, match="'dpo'.*sigmoid, hinge, ipo"):
        preference_loss(x, x, x, x, loss_type="dpo")
    for bad in (0.0, -0.1, 1.0):
        with pytest.raises(ValueError, match="label_smoothing.*exo_pair"):
            preference_loss(x, x, x, x, loss_type="exo_pair", label_smoothing=bad)
    with pytest.raises(ValueError, match="label_smoothing.*robust"):
        preference_loss(x, x, x, x, loss_type="robust", label_smoothing=0.5)
    with pytest.raises(AssertionError):
        preference_loss(x, x, x, jnp.zeros(3))
    with pytest.raises(TypeError):
        preference_loss(x, x, x, x, gamma=1.0)


# f-divergences: f'(ratio) from its log, and its slope by the log, written out.
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
