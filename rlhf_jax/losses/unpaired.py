"""KTO and its kin: completions judged one by one, each only good or bad.

Knows sums of log-probabilities over completions and a flag for each; nothing of tokens, models, or how a mismatched
completion was found. `LOSSES` is the table: a new loss is a small function and a row.

Sources: KTO (Ethayarajh et al. 2024, arXiv:2402.01306), APO (D'Oosterlinck et al. 2024, arXiv:2408.06266)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.losses.masking import masked_mean


def unpaired_loss(
    policy_logprobs: jax.Array,
    ref_logprobs: jax.Array,
    desirable: jax.Array,
    kl: float | jax.Array | None,
    mask: jax.Array | None = None,
    *,
    beta: float | jax.Array = 0.1,
    desirable_weight: float | jax.Array = 1.0,
    undesirable_weight: float | jax.Array = 1.0,
    loss_type: str = "kto",
) -> tuple[jax.Array, jax.Array]:
    """One loss a completion, and the reward that the policy implies.

    "kto" is arXiv:2402.01306, section 4, eq. 7: weight - value, with value = weight * sigma(beta * (log ratio - kl))
    of a desirable completion and weight * sigma(beta * (kl - log ratio)) of another. "apo_zero_unpaired" is the same
    without the reference point, eq. 7 of arXiv:2408.06266 taken one side at a time.

    Args:
      policy_logprobs: [B] nats, sums over completion tokens; the only argument that carries gradient.
      ref_logprobs: [B] nats, the same under the reference.
      desirable: [B] bool, or 1 and 0.
      kl: scalar, nats: the reference point z0 of the whole batch, from `mismatched_kl`. None for loss types that do
        not read it.
      mask: [B], 1 where the row is real; None: all are. Entries elsewhere are never read, NaN included.
      beta: reward units a nat; larger holds the policy closer to the reference.
      desirable_weight, undesirable_weight: the paper's lambdas. Where flags are unbalanced, weight * count of the
        desirable should be 1 to 4/3 times that of the others.
      loss_type: a key of `LOSSES`.
    Returns: (losses [B], rewards [B]), float32, 0 in rows that are not real; callers average over real rows, of both
      flags together, as TRL does. Rewards are beta * log ratio and carry no gradient.
    Raises: ValueError for an unknown loss_type, or one that reads kl without it. AssertionError if the shapes differ.
    """
    if loss_type not in LOSSES:
        raise ValueError(f"loss_type is {loss_type!r}; expected one of {', '.join(LOSSES)}.")
    row = LOSSES[loss_type]
    if row.reads_kl and kl is None:
        raise ValueError(
            f"kl is None with loss_type {loss_type!r}, which measures from it; give that of `mismatched_kl`, or 0.0."
        )
    chex.assert_rank([policy_logprobs, desirable], 1)
    mask = jnp.ones(desirable.shape, bool) if mask is None else mask
    chex.assert_equal_shape([policy_logprobs, ref_logprobs, desirable, mask])
    keep, desirable = mask > 0, (desirable > 0) & (mask > 0)
    log_ratio = _log_ratio(policy_logprobs, ref_logprobs, keep)
    if kl is not None:
        kl = jax.lax.stop_gradient(jnp.asarray(kl, jnp.float32))
        chex.assert_rank(kl, 0)
    weights = jnp.where(desirable, desirable_weight, undesirable_weight)
    losses = weights * row.loss(Completions(log_ratio, jnp.where(desirable, 1.0, -1.0), kl, beta))
    return jnp.where(keep, losses, 0.0), jax.lax.stop_gradient(beta * log_ratio)


def mismatched_kl(
    policy_logprobs: jax.Array, ref_logprobs: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """KTO's reference point z0: KL(policy || reference), estimated where nobody judged.

    The mean log ratio of completions given to another prompt of the batch, 0 where it is negative (arXiv:2402.01306,
    section 4). It is biased, cheap, and of the whole batch: with microbatches, take it before they are cut.

    Args:
      policy_logprobs, ref_logprobs: [B] nats, sums over the tokens of the mismatched completions.
      mask: [B], 1 where the row is real; None: all are. Entries elsewhere are never read, NaN included.
    Returns: float32 scalar, nats, at least 0, without gradient; 0 for a batch without a real row.
    Raises: AssertionError if the shapes differ.
    """
    chex.assert_rank(policy_logprobs, 1)
    mask = jnp.ones(policy_logprobs.shape, bool) if mask is None else mask
    chex.assert_equal_shape([policy_logprobs, ref_logprobs, mask])
    log_ratio = _log_ratio(policy_logprobs, ref_logprobs, mask > 0)
    return jax.lax.stop_gradient(jnp.maximum(masked_mean(log_ratio, mask > 0), 0.0))


class Completions(NamedTuple):
    """What a row of the table may read: [B] float32 in nats, 0 in rows that are not real, and the coefficients."""

    log_ratio: jax.Array  # of policy to reference
    sign: jax.Array  # 1 for desirable, -1 for undesirable
    kl: jax.Array | None  # scalar
    beta: Any


class UnpairedLoss(NamedTuple):
    """A row: the loss of [B] completions before their weights, and what its caller has to know of it."""

    loss: Callable[[Completions], jax.Array]
    reads_kl: bool = False  # mismatched completions have to be scored


def _log_ratio(policy_logprobs, ref_logprobs, keep):
    policy, ref = (jnp.where(keep, jnp.asarray(x, jnp.float32), 0.0) for x in (policy_logprobs, ref_logprobs))
    return policy - jax.lax.stop_gradient(ref)


# The rows. sigma(-x) is written for 1 - sigma(x), which rounds to 0 from x = 17 on.


def _kto(c):
    return jax.nn.sigmoid(-c.sign * c.beta * (c.log_ratio - c.kl))


def _apo_zero_unpaired(c):
    return jax.nn.sigmoid(-c.sign * c.beta * c.log_ratio)


LOSSES = {
    "kto": UnpairedLoss(_kto, reads_kl=True),
    "apo_zero_unpaired": UnpairedLoss(_apo_zero_unpaired),
}
