"""KL between two policies from samples of the first, and the controllers of what it costs.

Knows log-probabilities; nothing of where the coefficient is used. Controllers are pure: what they remember comes in and
goes out. Sources: estimators, Schulman, "Approximating KL divergence" (2020); adaptive controller, Ziegler et al. 2019,
arXiv:1909.08593, section 2.2; budget, Stooke et al. 2020, arXiv:2007.03964. The exact KL is in losses/full_kl.py."""

import chex
import jax.numpy as jnp

KINDS = ("k1", "k2", "k3")
BUDGET_ERROR = (-1.0, 2.0)  # of KL / target - 1, beyond which a budget reacts no more strongly


def kl_estimate(logprobs, ref_logprobs, kind="k1"):
    """Estimate of KL(policy || reference) at each token, for tokens drawn from the policy.

    With d = logprobs - ref_logprobs: k1 = d (unbiased, may be negative), k2 = d^2 / 2 (biased, of low variance),
    k3 = exp(-d) - 1 + d (unbiased and never negative; grows as exp(-d) for tokens the reference likes more).

    Args:
      logprobs, ref_logprobs: one shape, nats. kind: k1, k2 or k3.
    Returns: float32 of that shape, nats.
    Raises: ValueError for another kind.
    """
    chex.assert_equal_shape([logprobs, ref_logprobs])
    difference = logprobs.astype(jnp.float32) - ref_logprobs.astype(jnp.float32)
    if kind == "k1":
        return difference
    if kind == "k2":
        return 0.5 * jnp.square(difference)
    if kind == "k3":
        return jnp.expm1(-difference) + difference
    raise ValueError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}.")


def adaptive_kl_update(kl_coeff, observed_kl, *, target, horizon, batch_size):
    """The next coefficient: up where KL is above its target, down where it is below.

    Args:
      kl_coeff: reward units a nat. observed_kl, target: in one unit; ours is nats a completion, summed over tokens.
      horizon: completions over which an error of 1 would double it. batch_size: completions since the last update.
    Returns: kl_coeff * (1 + e * batch_size / horizon), e = observed_kl / target - 1 within +-0.2; never below 0. An
      observation that is NaN changes nothing.
    """
    error = jnp.clip(observed_kl / target - 1.0, -0.2, 0.2)
    error = jnp.where(jnp.isnan(error), 0.0, error)
    return jnp.maximum(kl_coeff * (1.0 + error * batch_size / horizon), 0.0)


def kl_budget_update(kl_coeff, observed_kl, *, target, rate, previous_kl, damping=5.0, bounds=(1e-6, 1e3)):
    """The next coefficient for a run that is to end at KL = target: the multiplier of that constraint, by dual ascent.

    log kl_coeff rises by rate * (e + damping * (e - e_before)), where e = KL / target - 1. In the log the coefficient
    stays positive and one rate serves every scale; e itself is linear in KL, so that the noise of a batch's estimate
    moves no mean. Dual ascent alone (damping 0) adds up an error that the policy answers late, and swings around the
    target; the second term answers at once to a KL that moves (the PI Lagrangian of Stooke et al., in velocity form,
    which has no sum that could wind up at the bounds).

    Args:
      kl_coeff: above 0. observed_kl, target, previous_kl: in one unit; ours is nats a completion. previous_kl: what was
        observed before; 0 at the start of a run, where the policy is the reference.
      rate: of dual ascent, a step. damping: steps by which a trend is answered in advance; about as many as the policy
        takes to follow its price. bounds: of the coefficient.
    Returns: (coefficient, previous_kl of the next step). e is kept within BUDGET_ERROR. An observation that is not
      finite changes neither.
    """
    error = lambda kl: jnp.clip(kl / target - 1.0, *BUDGET_ERROR)
    seen = jnp.isfinite(observed_kl)
    kl = jnp.where(seen, observed_kl, previous_kl)
    trend = error(kl) - error(previous_kl)
    new = jnp.clip(kl_coeff * jnp.exp(rate * (error(kl) + damping * trend)), *bounds)
    return jnp.where(seen, new, kl_coeff), kl
