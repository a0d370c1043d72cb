"""KL between two policies from samples of the first, and the controller that holds it near a target.

Knows log-probabilities; nothing of where the coefficient is used. Estimators: Schulman, "Approximating KL divergence"
(2020); controller: Ziegler et al. 2019, arXiv:1909.08593, section 2.2."""

import chex
import jax.numpy as jnp

KINDS = ("k1", "k2", "k3")


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
