"""The GRPO family: surrogates for one advantage a completion, and the ways to average them.

Knows log-probabilities, advantages and masks; nothing of groups, prompts, or how an advantage came about. `LOSSES` is
the table: a loss type is a surrogate, the ratio it sees (a token's or its sequence's) and an average.

Sources: GRPO (Shao et al. 2024, arXiv:2402.03300), Dr. GRPO (Liu et al. 2025, arXiv:2503.20783), DAPO (Yu et al. 2025,
arXiv:2503.14476), GSPO (Zheng et al. 2025, arXiv:2507.18071), CISPO (MiniMax 2025, arXiv:2506.13585), SAPO (Gao et al.
2025, arXiv:2511.20347), LUSPO (arXiv:2602.05261); bnpo is TRL's name for the mean over the tokens of a local batch."""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.losses.kl import kl_estimate
from rlhf_jax.losses.masking import masked_mean

LOG_RATIO_LIMIT = 20.0  # nats; exp(20) is 5e8, far from overflow and from any ratio that means something


def grpo_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    ref_logprobs: jax.Array | None,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip_low: float | jax.Array = 0.2,
    clip_high: float | jax.Array = 0.2,
    beta: float | jax.Array = 0.0,
    kl_kind: str = "k3",
    token_kl: jax.Array | None = None,
    loss_type: str = "grpo",
    max_length: int | None = None,
    num_tokens: int | jax.Array | None = None,
    sapo_temperature_pos: float | jax.Array = 1.0,
    sapo_temperature_neg: float | jax.Array = 1.05,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The policy loss, with a penalty on KL(policy || reference) where one is asked for.

    Args:
      logprobs: [B, T] nats; the only argument that carries gradient.
      old_logprobs: [B, T] nats, under the policy that sampled, at the sampling temperature.
      ref_logprobs: [B, T] nats under the reference, or None without a penalty.
      advantages: [B] reward units, one a completion; [B, T] is taken too, one a token.
      mask: [B, T], 1 where the token counts. Entries elsewhere are never read, NaN included, nor the advantage of a row
        without a token.
      clip_low, clip_high: the ratio is bounded to [1 - clip_low, 1 + clip_high]. "cispo": clip_high is the largest
        weight itself (5.0 is usual) and clip_low is not read. "sapo" reads neither.
      beta: weight of the KL estimate, added to every token's loss (without TRL's factor of the ratio).
      kl_kind: "k1", "k2", "k3", or "k3+": value of k3, gradient of k2. Sampled from the policy, k2 has the
        gradient of KL(policy || reference); that of k1 is 0 in expectation, that of k3 KL(reference || policy)'s.
        "exact" takes token_kl.
      token_kl: [B, T] nats, the exact KL at the state of each token, with its gradient (losses/full_kl.py). As of every
        kind here, that is the gradient at the states visited, without the part that leads to other states.
      loss_type: a key of `LOSSES`. "grpo", "gspo", "gspo_token" and "sapo" are means over sequences of means over
        tokens, "bnpo" is a mean over tokens, "dapo" and "cispo" are sums over tokens by `num_tokens`, "dr_grpo" by
        B * max_length, "luspo" is a mean over sequences of sums over tokens, of GSPO's surrogate. A row without a
        token is a sequence of loss 0. All counts are at least 1.
      max_length: the longest completion allowed, "dr_grpo" only.
      num_tokens: real tokens in the whole accumulated batch, "dapo" and "cispo" only, so that the losses of its parts
        sum to its own; None: those of this mask.
      sapo_temperature_pos, sapo_temperature_neg: sharpness of the gate by the sign of the advantage.
    Returns: (scalar float32 loss, metrics). Means over tokens: `ratio_mean`, of the ratio that the loss type uses,
      `clip_fraction` with its `_low` and `_high` parts, and `approx_kl`, policy against sampler in nats. With
      ref_logprobs: `kl`, kl_kind's estimate in nats a sequence, over rows that have a token.
    Raises: ValueError for an unknown loss_type or kl_kind, "dr_grpo" without max_length, or a beta without
      ref_logprobs. AssertionError if the shapes differ.
    """
    _check_arguments(ref_logprobs, beta, kl_kind, token_kl, loss_type, max_length)
    chex.assert_rank([logprobs, mask], 2)
    chex.assert_equal_shape(
        [logprobs, old_logprobs, mask, *(x for x in (ref_logprobs, token_kl) if x is not None)]
    )
    if advantages.ndim == 1:
        advantages = jnp.broadcast_to(advantages[:, None], (advantages.shape[0], mask.shape[1]))
    chex.assert_equal_shape([advantages, mask])

    # Everything that is not a real token becomes 0 here, before any exp, or NaN would reach the gradient.
    keep = mask > 0
    real = lambda x: jnp.where(keep, jnp.asarray(x, jnp.float32), 0.0)
    logprobs = real(logprobs)
    old_logprobs, advantages = jax.lax.stop_gradient((real(old_logprobs), real(advantages)))

    row = LOSSES[loss_type]
    log_ratio = logprobs - old_logprobs
    ratio = jnp.exp(_bounded(row.log_weight(log_ratio, logprobs, keep)))
    tokens = Tokens(
        ratio, logprobs, advantages, clip_low, clip_high, sapo_temperature_pos, sapo_temperature_neg
    )
    losses, clipped_low, clipped_high = row.surrogate(tokens)
    metrics = {
        "ratio_mean": masked_mean(ratio, keep),
        "clip_fraction": masked_mean((clipped_low | clipped_high).astype(jnp.float32), keep),
        "clip_fraction_low": masked_mean(clipped_low.astype(jnp.float32), keep),
        "clip_fraction_high": masked_mean(clipped_high.astype(jnp.float32), keep),
        # k3 of sampler and policy in this order, because the samples come from the sampler.
        "approx_kl": masked_mean(jnp.expm1(_bounded(log_ratio)) - _bounded(log_ratio), keep),
    }
    if ref_logprobs is not None:
        if kl_kind == "exact":
            kl = real(token_kl)
        else:
            kl = KL_KINDS[kl_kind](logprobs - jax.lax.stop_gradient(real(ref_logprobs)))
        if _may_penalise(beta):
            losses = losses + beta * kl
        metrics["kl"] = jnp.where(keep, kl, 0.0).sum() / jnp.maximum(keep.any(axis=-1).sum(), 1)
    loss = row.average(jnp.where(keep, losses, 0.0), keep, max_length, num_tokens)
    return loss, jax.lax.stop_gradient(metrics)


class Tokens(NamedTuple):
    """What a surrogate may read: [B, T] float32, 0 where no token is, and the coefficients."""

    ratio: jax.Array  # policy to sampler, of the token or of its sequence
    logprobs: jax.Array
    advantages: jax.Array
    clip_low: float | jax.Array
    clip_high: float | jax.Array
    sapo_temperature_pos: float | jax.Array
    sapo_temperature_neg: float | jax.Array


class GroupLoss(NamedTuple):
    """A row of the table."""

    surrogate: Callable  # Tokens -> (losses, whether bound from below, whether bound from above), each [B, T]
    log_weight: Callable  # (log_ratio [B, T], logprobs [B, T], keep [B, T]) -> log of the ratio [B, T]
    average: Callable  # (losses [B, T], 0 where no token is; keep [B, T], max_length, num_tokens) -> scalar


def _check_arguments(ref_logprobs, beta, kl_kind, token_kl, loss_type, max_length):
    if loss_type not in LOSSES:
        raise ValueError(f"loss_type is {loss_type!r}; expected one of {', '.join(LOSSES)}.")
    if kl_kind not in (*KL_KINDS, "exact"):
        raise ValueError(f"kl_kind is {kl_kind!r}; expected one of {', '.join(KL_KINDS)}, exact.")
    if (kl_kind == "exact") != (token_kl is not None):
        raise ValueError("kl_kind 'exact' and token_kl go together; give both or neither.")
    if loss_type == "dr_grpo" and max_length is None:
        raise ValueError(
            "loss_type 'dr_grpo' divides by max_length, which is None; give the longest completion."
        )
    if ref_logprobs is None and _may_penalise(beta):
        raise ValueError(
            f"beta is {beta}, but ref_logprobs is None; give both, or set beta=0 for no KL penalty."
        )


def _may_penalise(beta):
    return isinstance(beta, jax.core.Tracer) or beta != 0.0


def _bounded(log_ratio):
    return jnp.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


# Surrogates.


def _clipped(t):
    """min(r A, clip(r) A) as in PPO, by cases: a token is bound where leaving the interval would pay, nowhere else."""
    low = (t.ratio < 1.0 - t.clip_low) & (t.advantages < 0)
    high = (t.ratio > 1.0 + t.clip_high) & (t.advantages > 0)
    bounded = jnp.where(low, 1.0 - t.clip_low, jnp.where(high, 1.0 + t.clip_high, t.ratio))
    return -bounded * t.advantages, low, high


def _capped_weight(t):
    """CISPO: the ratio is a bounded constant weight, so that every token keeps a gradient."""
    weight = jax.lax.stop_gradient(jnp.minimum(t.ratio, t.clip_high))
    capped = t.ratio > t.clip_high
    return -weight * t.advantages * t.logprobs, jnp.zeros_like(capped), capped


def _soft_gate(t):
    """SAPO: slope 1 at ratio 1, fading smoothly on both sides; nothing is ever bound."""
    temperature = jnp.where(t.advantages > 0, t.sapo_temperature_pos, t.sapo_temperature_neg)
    gate = jax.nn.sigmoid(temperature * (t.ratio - 1.0)) * 4.0 / temperature
    never = jnp.zeros(gate.shape, bool)
    return -gate * t.advantages, never, never


# Ratios.


def _of_token(log_ratio, logprobs, keep):
    return log_ratio


def _of_sequence(log_ratio, logprobs, keep):
    """GSPO: the geometric mean of the tokens' ratios, at every token."""
    mean = masked_mean(log_ratio, keep, axis=-1)
    return jnp.broadcast_to(mean[:, None], log_ratio.shape)


def _of_sequence_by_token(log_ratio, logprobs, keep):
    """GSPO-token: the sequence's ratio in value, the token's own in gradient, for advantages that differ by token."""
    sequence = jax.lax.stop_gradient(_of_sequence(log_ratio, logprobs, keep))
    return sequence + (logprobs - jax.lax.stop_gradient(logprobs))


# Averages. Losses are 0 where no token is.


def _sequence_means(losses, keep, max_length, num_tokens):
    return masked_mean(losses, keep, axis=-1).sum() / max(losses.shape[0], 1)


def _token_mean(losses, keep, max_length, num_tokens):
    return masked_mean(losses, keep)


def _by_tokens_of_batch(losses, keep, max_length, num_tokens):
    return losses.sum() / jnp.maximum(keep.sum() if num_tokens is None else num_tokens, 1)


def _by_longest(losses, keep, max_length, num_tokens):
    return losses.sum() / (max(losses.shape[0], 1) * max_length)


def _sequence_sums(losses, keep, max_length, num_tokens):
    return losses.sum() / max(losses.shape[0], 1)


# Estimates of KL(policy || reference) at each token, from log(policy / reference).


def _k1(log_ratio):
    return kl_estimate(log_ratio, jnp.zeros_like(log_ratio), "k1")


def _k2(log_ratio):
    return kl_estimate(log_ratio, jnp.zeros_like(log_ratio), "k2")


def _k3(log_ratio):
    """Bounded on the side where it holds an exponential, and free on the other, where it is linear."""
    return kl_estimate(jnp.maximum(log_ratio, -LOG_RATIO_LIMIT), jnp.zeros_like(log_ratio), "k3")


def _k3_value_k2_gradient(log_ratio):
    k2 = _k2(log_ratio)
    return jax.lax.stop_gradient(_k3(log_ratio)) + (k2 - jax.lax.stop_gradient(k2))


KL_KINDS = {"k1": _k1, "k2": _k2, "k3": _k3, "k3+": _k3_value_k2_gradient}

LOSSES = {
    "grpo": GroupLoss(_clipped, _of_token, _sequence_means),
    "bnpo": GroupLoss(_clipped, _of_token, _token_mean),
    "dr_grpo": GroupLoss(_clipped, _of_token, _by_longest),
    "dapo": GroupLoss(_clipped, _of_token, _by_tokens_of_batch),
    "gspo": GroupLoss(_clipped, _of_sequence, _sequence_means),
    "gspo_token": GroupLoss(_clipped, _of_sequence_by_token, _sequence_means),
    "cispo": GroupLoss(_capped_weight, _of_token, _by_tokens_of_batch),
    "sapo": GroupLoss(_soft_gate, _of_token, _sequence_means),
    "luspo": GroupLoss(_clipped, _of_sequence, _sequence_sums),
}
