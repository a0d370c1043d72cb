"""Preference losses that need no reference model, from two log-probabilities a pair.

Knows sums (or averages) of log-probabilities over completions, one number each; nothing of tokens, masks, models or
how a pair was labelled. `LOSSES` is the table: a new loss is a small function and a row.

Sources: ORPO (Hong et al. 2024, arXiv:2403.07691), CPO (Xu et al. 2024, arXiv:2401.08417), SimPO (Meng et al. 2024,
arXiv:2405.14734), AlphaPO (Gupta et al. 2025, arXiv:2501.03884); hinge and IPO as in losses/preference.py."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.losses.stable import box_cox, log1mexp


def reference_free_loss(
    policy_chosen_logprobs: jax.Array,
    policy_rejected_logprobs: jax.Array,
    chosen_nll: jax.Array | None = None,
    *,
    beta: float | jax.Array = 0.1,
    nll_coeff: float | jax.Array = 1.0,
    gamma: float | jax.Array = 0.5,
    shape_alpha: float | jax.Array = 0.0,
    label_smoothing: float | jax.Array = 0.0,
    loss_type: str,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One loss a pair, and the rewards that the policy implies.

    With r = beta * logprob, or AlphaPO's shape of it, and h = r_chosen - r_rejected, plus nll_coeff * chosen_nll:

      "orpo"       -beta * log sigma(log odds of chosen - log odds of rejected), eqs. 6 and 7; beta is its lambda.
      "cpo"        -log sigma(h), eq. 3.
      "cpo_hinge"  max(0, 1 - h).
      "cpo_ipo"    (h / beta - 1 / (2 beta))^2.
      "simpo"      -log sigma(h - gamma), eq. 6.

    Args:
      policy_chosen_logprobs, policy_rejected_logprobs: [B] nats. Sums over completion tokens, but averages over them
        where `LOSSES[loss_type].averaged` ("orpo", "cpo_ipo", "simpo").
      chosen_nll: [B] nats, the negative log-likelihood that holds up the chosen, averaged over tokens as the caller
        sees fit (ORPO's, in the authors' code, takes the prompt's tokens too). None: no such term, for SimPO and
        AlphaPO. Gradient flows through it.
      beta: reward units a nat; 0.1 suits ORPO and CPO, 2.0 to 2.5 SimPO.
      nll_coeff: weight of chosen_nll. 1 for ORPO; CPO's and TRL's cpo_alpha; with "simpo", CPO-SimPO.
      gamma: reward units, the margin that "simpo" asks for; inside the sigmoid as it is, as TRL's is in effect.
      shape_alpha: AlphaPO's alpha, r = beta * (1 - p^-alpha) / alpha for a p of log-probability `logprobs`; 0 gives
        beta * log p. Every row with `shaped` reads it; "simpo" with it is AlphaPO.
      label_smoothing: probability that a label is wrong. Only rows with `smoothed` read it: "cpo", "simpo".
      loss_type: a key of `LOSSES`.
    Returns: (losses [B], chosen_rewards [B], rejected_rewards [B]), float32; the rewards, r, carry no gradient.
    Raises: ValueError for an unknown loss_type, for one that is not itself without chosen_nll ("orpo", "cpo...") when
      that is None and nll_coeff is not 0, and for a shape_alpha other than 0 with "orpo" (checked unless traced).
      AssertionError if the shapes differ.
    """
    _check_arguments(loss_type, chosen_nll, nll_coeff, shape_alpha)
    row = LOSSES[loss_type]
    given = [policy_chosen_logprobs, policy_rejected_logprobs] + ([] if chosen_nll is None else [chosen_nll])
    chex.assert_rank(given, 1)
    chex.assert_equal_shape(given)
    chosen, rejected = (jnp.asarray(x, jnp.float32) for x in given[:2])
    # (1 - p^-alpha) / alpha is (p^a - 1) / a at a = -alpha.
    shape = (lambda x: box_cox(x, -shape_alpha)) if row.shaped else (lambda x: x)
    pairs = Pairs(shape(chosen), shape(rejected), beta, gamma, label_smoothing)
    losses = row.loss(pairs)
    if chosen_nll is not None:
        losses = losses + nll_coeff * jnp.asarray(chosen_nll, jnp.float32)
    rewards = jax.lax.stop_gradient((beta * pairs.chosen, beta * pairs.rejected))
    return losses, *rewards


class Pairs(NamedTuple):
    """What a row of the table may read: [B] float32, and the coefficients."""

    chosen: jax.Array  # log-probability in nats, shaped where the row is
    rejected: jax.Array
    beta: Any
    gamma: Any
    label_smoothing: Any

    @property
    def delta(self):
        return self.chosen - self.rejected

    @property
    def logits(self):
        """The log-odds, by the policy's rewards, that chosen is the better one."""
        return self.beta * self.delta


class ReferenceFreeLoss(NamedTuple):
    """A row: the loss of [B] pairs, and what its caller has to know of it."""

    loss: Callable[[Pairs], jax.Array]
    averaged: bool = False  # takes log-probabilities averaged over tokens instead of summed
    smoothed: bool = False  # reads label_smoothing
    shaped: bool = True  # reads shape_alpha
    needs_nll: bool = True  # is only half a loss without chosen_nll


def _check_arguments(loss_type, chosen_nll, nll_coeff, shape_alpha):
    if loss_type not in LOSSES:
        raise ValueError(f"loss_type is {loss_type!r}; expected one of {', '.join(LOSSES)}.")
    row = LOSSES[loss_type]
    if row.needs_nll and chosen_nll is None and not _is_zero(nll_coeff):
        raise ValueError(
            f"chosen_nll is None with loss_type {loss_type!r}, which adds it; give it, or set nll_coeff to 0."
        )
    if not row.shaped and not isinstance(shape_alpha, jax.core.Tracer) and not _is_zero(shape_alpha):
        raise ValueError(
            f"shape_alpha is {shape_alpha} with loss_type {loss_type!r}, which has no reward to shape."
        )


def _is_zero(x):
    return not isinstance(x, jax.core.Tracer) and bool(x == 0.0)


# The rows.


def _smoothed_sigmoid(logits, label_smoothing):
    return -(1.0 - label_smoothing) * jax.nn.log_sigmoid(logits) - label_smoothing * jax.nn.log_sigmoid(
        -logits
    )


def _orpo(p):
    """The log odds ratio as a difference of logs, with log(1 - p) never taken of a rounded p."""
    log_odds_ratio = p.delta - (log1mexp(p.chosen) - log1mexp(p.rejected))
    return -p.beta * jax.nn.log_sigmoid(log_odds_ratio)


def _cpo(p):
    return _smoothed_sigmoid(p.logits, p.label_smoothing)


def _cpo_hinge(p):
    return jax.nn.relu(1.0 - p.logits)


def _cpo_ipo(p):
    """Eq. 17 of arXiv:2310.12036 without its reference, on averages as TRL has it."""
    return jnp.square(p.delta - 1.0 / (2.0 * p.beta))


def _simpo(p):
    return _smoothed_sigmoid(p.logits - p.gamma, p.label_smoothing)


LOSSES = {
    "orpo": ReferenceFreeLoss(_orpo, averaged=True, shaped=False),
    "cpo": ReferenceFreeLoss(_cpo, smoothed=True),
    "cpo_hinge": ReferenceFreeLoss(_cpo_hinge),
    "cpo_ipo": ReferenceFreeLoss(_cpo_ipo, averaged=True),
    "simpo": ReferenceFreeLoss(_simpo, averaged=True, smoothed=True, needs_nll=False),
}
