"""The DPO family: losses on pairs of completions, from four log-probabilities a pair.

Knows sums (or averages) of log-probabilities over completions, one number each; nothing of tokens, masks, models or
how a pair was labelled. `LOSSES` is the table: a new loss is a small function and a row.

Sources: DPO (Rafailov et al. 2023, arXiv:2305.18290), cDPO (Mitchell 2023), robust (Chowdhury et al. 2024,
arXiv:2403.00409), hinge (SLiC, Zhao et al. 2023, arXiv:2305.10425), IPO (Azar et al. 2023, arXiv:2310.12036), EXO (Ji
et al. 2024, arXiv:2402.00856), NCA (Chen et al. 2024, arXiv:2402.05369), BCO (Jung et al. 2024, arXiv:2404.04656), SPPO
(Wu et al. 2024, arXiv:2405.00675), AOT (Melnyk et al. 2024, arXiv:2406.05882), APO (D'Oosterlinck et al. 2024,
arXiv:2408.06266), DiscoPOP (Lu et al. 2024, arXiv:2406.08414), f-DPO (Wang et al. 2023, arXiv:2309.16240), mixtures
(MPO, Wang et al. 2024, arXiv:2411.10442)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.losses.stable import box_cox


def preference_loss(
    policy_chosen_logprobs: jax.Array,
    policy_rejected_logprobs: jax.Array,
    ref_chosen_logprobs: jax.Array,
    ref_rejected_logprobs: jax.Array,
    *,
    beta: float | jax.Array = 0.1,
    label_smoothing: float | jax.Array = 0.0,
    loss_type: str = "sigmoid",
    discopop_tau: float | jax.Array = 0.05,
    f_divergence: str = "reverse_kl",
    f_alpha: float | jax.Array = 0.5,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One loss a pair, and the rewards that the policy implies.

    Args:
      policy_chosen_logprobs, policy_rejected_logprobs: [B] nats; the only arguments that carry gradient. Sums over
        completion tokens, but averages over them where `LOSSES[loss_type].averaged` ("ipo", "sigmoid_norm"). "sft"
        takes either, and its loss is then a pair's sum or mean over tokens.
      ref_chosen_logprobs, ref_rejected_logprobs: [B] nats, the same under the reference.
      beta: reward units a nat; larger holds the policy closer to the reference.
      label_smoothing: probability that a label is wrong. Only rows with `smoothed` read it: "sigmoid" (then cDPO),
        "robust" (not at 1/2), "exo_pair" (above 0, below 1), "aot", "aot_unpaired".
      loss_type: a key of `LOSSES`.
      discopop_tau: temperature of "discopop"'s mixing weight.
      f_divergence: a key of `SCORES`: what holds the policy to the reference. Each side's log ratio is replaced by its
        f'(ratio), arXiv:2309.16240, table 1. Only rows that see the two through their difference (`divergent`) allow
        it: f' is the reward up to a term of the prompt, which nothing but that difference cancels.
      f_alpha: of "alpha": 1 is reverse KL, 0 forward KL; 1 minus the paper's alpha, as in TRL.
    Returns: (losses [B], chosen_rewards [B], rejected_rewards [B]), float32. Rewards are beta * log ratio, whatever the
      divergence (it does not change their order), and carry no gradient. Where `whole_batch` ("aot", "aot_unpaired"),
      the pairs of the batch are sorted and matched anew: a loss depends on all of them, losses[i] belongs to the i-th
      quantile, and only their mean has a meaning.
    Raises: ValueError for an unknown loss_type or f_divergence, for another divergence than reverse KL with a row that
      is not `divergent`, or is `averaged` (f' is of the whole ratio: `combined_preference_loss` has it), or for a
      label_smoothing at which the formula is infinite (checked unless traced). AssertionError if the shapes differ.
    """
    _check_arguments(loss_type, label_smoothing, f_divergence)
    if f_divergence != "reverse_kl" and LOSSES[loss_type].averaged:
        raise ValueError(
            f"f_divergence is {f_divergence!r} with loss_type {loss_type!r}, whose averages f' cannot take; "
            "use combined_preference_loss, which takes sums and lengths."
        )
    logprobs = (policy_chosen_logprobs, policy_rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    coefficients = dict(beta=beta, label_smoothing=label_smoothing, discopop_tau=discopop_tau)
    pairs = _pairs(logprobs, coefficients, f_divergence, f_alpha)
    return LOSSES[loss_type].loss(pairs), *_rewards(pairs)


def combined_preference_loss(
    policy_chosen_logprobs: jax.Array,
    policy_rejected_logprobs: jax.Array,
    ref_chosen_logprobs: jax.Array,
    ref_rejected_logprobs: jax.Array,
    chosen_lengths: jax.Array,
    rejected_lengths: jax.Array,
    *,
    loss_weights: dict[str, float | jax.Array],
    beta: float | jax.Array = 0.1,
    label_smoothing: float | jax.Array = 0.0,
    discopop_tau: float | jax.Array = 0.05,
    f_divergence: str = "reverse_kl",
    f_alpha: float | jax.Array = 0.5,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Several losses of the same pairs, weighted and added; MPO is sigmoid .8, bco_pair .2, sft 1 (arXiv:2411.10442).

    Args:
      policy_..., ref_...: [B] nats, as in `preference_loss`, but always sums.
      chosen_lengths, rejected_lengths: [B] tokens that the sums are over. Rows with `averaged`, and "sft", take sums,
        or their f', by token; a length of 0 counts as 1.
      loss_weights: {key of `LOSSES`: weight}, at least one; they need not add up to 1.
      beta, label_smoothing, discopop_tau, f_divergence, f_alpha: as in `preference_loss`, for all rows.
    Returns: as `preference_loss`. With a `whole_batch` row among them, only the mean of the losses has a meaning.
    Raises: as `preference_loss`, for each row; ValueError if loss_weights is empty. Averaged rows take any divergence.
    """
    if not loss_weights:
        raise ValueError(f"loss_weights is empty; give at least one of {', '.join(LOSSES)} a weight.")
    for loss_type in loss_weights:
        _check_arguments(loss_type, label_smoothing, f_divergence)
    logprobs = (policy_chosen_logprobs, policy_rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    chex.assert_equal_shape([*logprobs, chosen_lengths, rejected_lengths])
    coefficients = dict(beta=beta, label_smoothing=label_smoothing, discopop_tau=discopop_tau)
    summed = _pairs(logprobs, coefficients, f_divergence, f_alpha)
    averaged = _pairs(logprobs, coefficients, f_divergence, f_alpha, (chosen_lengths, rejected_lengths))
    losses = jnp.zeros_like(summed.chosen)
    for loss_type, weight in loss_weights.items():
        row = LOSSES[loss_type]
        losses = losses + weight * row.loss(averaged if row.averaged or row.either else summed)
    return losses, *_rewards(summed)


class Pairs(NamedTuple):
    """What a row of the table may read: [B] float32 in nats, and the coefficients."""

    chosen: jax.Array  # log ratio of policy to reference
    rejected: jax.Array
    delta: jax.Array  # their difference, or that of their f'
    policy_chosen: jax.Array  # log-probability
    policy_margin: jax.Array  # chosen minus rejected, each side for itself
    ref_margin: jax.Array
    beta: Any
    label_smoothing: Any
    discopop_tau: Any

    @property
    def logits(self):
        """The log-odds, by the policy's rewards, that chosen is the better one."""
        return self.beta * self.delta


class PreferenceLoss(NamedTuple):
    """A row: the loss of [B] pairs, and what its caller has to know of it."""

    loss: Callable[[Pairs], jax.Array]
    averaged: bool = False  # takes log-probabilities averaged over tokens instead of summed
    smoothed: bool = False  # reads label_smoothing
    whole_batch: bool = False  # a pair's loss depends on the other pairs: cut no microbatches
    divergent: bool = False  # reads chosen and rejected through delta alone, so that any f-divergence will do
    either: bool = False  # takes sums or averages; averages in a mixture


def _pairs(logprobs, coefficients, f_divergence, f_alpha, lengths=None):
    chex.assert_rank(logprobs, 1)
    chex.assert_equal_shape(logprobs)
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = (jnp.asarray(x, jnp.float32) for x in logprobs)
    ref_chosen, ref_rejected = jax.lax.stop_gradient((ref_chosen, ref_rejected))
    by_chosen = by_rejected = lambda x: x
    if lengths is not None:
        by_chosen, by_rejected = (lambda x, n=n: x / jnp.maximum(n, 1).astype(jnp.float32) for n in lengths)
    chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    score = SCORES[f_divergence]
    return Pairs(
        chosen=by_chosen(chosen),
        rejected=by_rejected(rejected),
        delta=by_chosen(score(chosen, f_alpha)) - by_rejected(score(rejected, f_alpha)),
        policy_chosen=by_chosen(policy_chosen),
        policy_margin=by_chosen(policy_chosen) - by_rejected(policy_rejected),
        ref_margin=by_chosen(ref_chosen) - by_rejected(ref_rejected),
        **coefficients,
    )


def _rewards(pairs):
    return jax.lax.stop_gradient((pairs.beta * pairs.chosen, pairs.beta * pairs.rejected))


def _check_arguments(loss_type, label_smoothing, f_divergence):
    if loss_type not in LOSSES:
        raise ValueError(f"loss_type is {loss_type!r}; expected one of {', '.join(LOSSES)}.")
    if f_divergence not in SCORES:
        raise ValueError(f"f_divergence is {f_divergence!r}; expected one of {', '.join(SCORES)}.")
    if f_divergence != "reverse_kl" and not LOSSES[loss_type].divergent:
        able = ", ".join(name for name, row in LOSSES.items() if row.divergent)
        raise ValueError(
            f"f_divergence is {f_divergence!r} with loss_type {loss_type!r}, which reads more than the difference of "
            f"chosen and rejected; use reverse_kl, or one of {able}."
        )
    _check_label_smoothing(loss_type, label_smoothing)


def _check_label_smoothing(loss_type, label_smoothing):
    if not LOSSES[loss_type].smoothed or isinstance(label_smoothing, jax.core.Tracer):
        return
    if loss_type == "exo_pair" and not 0.0 < label_smoothing < 1.0:
        raise ValueError(
            f"label_smoothing is {label_smoothing} with loss_type 'exo_pair', which takes its logarithm; "
            "set it above 0 and below 1 (1e-3 is usual)."
        )
    if loss_type == "robust" and label_smoothing == 0.5:
        raise ValueError(
            "label_smoothing is 0.5 with loss_type 'robust', which divides by 1 - 2 * label_smoothing; "
            "set it below 0.5."
        )


# The rows. sigma(-x) is written for 1 - sigma(x), which rounds to 0 from x = 17 on.
_log_sigmoid, _sigmoid = jax.nn.log_sigmoid, jax.nn.sigmoid


def _smoothed_sigmoid(logits, label_smoothing):
    return -(1.0 - label_smoothing) * _log_sigmoid(logits) - label_smoothing * _log_sigmoid(-logits)


def _robust(p):
    """Unbiased under labels flipped with probability label_smoothing."""
    e = p.label_smoothing
    return (-(1.0 - e) * _log_sigmoid(p.logits) + e * _log_sigmoid(-p.logits)) / (1.0 - 2.0 * e)


def _ipo(p):
    """Eq. 17. On averages the target 1 / (2 beta) does not depend on length; the paper has sums."""
    return jnp.square(p.delta - 1.0 / (2.0 * p.beta))


def _exo_pair(p):
    """Eq. 16 for two candidates: KL from the policy's preference to (1 - e, e)."""
    e = jnp.asarray(p.label_smoothing, jnp.float32)
    chosen = _sigmoid(p.logits) * (_log_sigmoid(p.logits) - jnp.log1p(-e))
    rejected = _sigmoid(-p.logits) * (_log_sigmoid(-p.logits) - jnp.log(e))
    return chosen + rejected


def _nca_pair(p):
    chosen, rejected = p.beta * p.chosen, p.beta * p.rejected
    return -_log_sigmoid(chosen) - 0.5 * _log_sigmoid(-chosen) - 0.5 * _log_sigmoid(-rejected)


def _bco_pair(p):
    """Without the paper's running mean of rewards, as TRL has it: a loss keeps no state."""
    return -_log_sigmoid(p.beta * p.chosen) - _log_sigmoid(-p.beta * p.rejected)


def _sppo_hard(p):
    """Eq. 4.7 with the winner's probability set to 1."""
    return jnp.square(p.chosen - 0.5 / p.beta) + jnp.square(p.rejected + 0.5 / p.beta)


def _aot(p):
    """The policy's margins should dominate the reference's, quantile by quantile."""
    delta = jnp.sort(p.policy_margin) - jnp.sort(p.ref_margin)
    return _smoothed_sigmoid(p.beta * delta, p.label_smoothing)


def _aot_unpaired(p):
    """The log ratios of the chosen should dominate those of the rejected, whichever prompt they answer."""
    delta = jnp.sort(p.chosen) - jnp.sort(p.rejected)
    return _smoothed_sigmoid(p.beta * delta, p.label_smoothing)


def _apo_zero(p):
    """Eq. 7: chosen up, rejected down; for chosen better than what the policy writes."""
    return _sigmoid(-p.beta * p.chosen) + _sigmoid(p.beta * p.rejected)


def _apo_down(p):
    """Eq. 8: both down, rejected further; for chosen worse than what the policy writes."""
    return _sigmoid(p.beta * p.chosen) + _sigmoid(-p.logits)


def _discopop(p):
    """Eq. 5. The product sigma(h / tau) exp(-h) is taken in logs: at h = -1000 its factors are 0 and inf."""
    h, modulation = p.logits, p.logits / p.discopop_tau
    return _sigmoid(-modulation) * -_log_sigmoid(h) + jnp.exp(_log_sigmoid(modulation) - h)


SCORES = {  # f_divergence -> f'(ratio) from its log, 0 at 1: (log ratio, f_alpha) -> score
    "reverse_kl": lambda log_ratio, alpha: log_ratio,
    "forward_kl": lambda log_ratio, alpha: box_cox(log_ratio, -1.0),  # 1 - 1 / ratio
    "js": lambda log_ratio, alpha: jnp.log(2.0) + _log_sigmoid(log_ratio),
    "alpha": lambda log_ratio, alpha: box_cox(log_ratio, alpha - 1.0),
}

LOSSES = {
    "sigmoid": PreferenceLoss(
        lambda p: _smoothed_sigmoid(p.logits, p.label_smoothing), smoothed=True, divergent=True
    ),
    "hinge": PreferenceLoss(lambda p: jax.nn.relu(1.0 - p.logits), divergent=True),
    "ipo": PreferenceLoss(_ipo, averaged=True, divergent=True),
    "ipo_sum": PreferenceLoss(_ipo, divergent=True),
    "robust": PreferenceLoss(_robust, smoothed=True, divergent=True),
    "exo_pair": PreferenceLoss(_exo_pair, smoothed=True, divergent=True),
    "nca_pair": PreferenceLoss(_nca_pair),
    "bco_pair": PreferenceLoss(_bco_pair),
    "sppo_hard": PreferenceLoss(_sppo_hard),
    "aot": PreferenceLoss(_aot, smoothed=True, whole_batch=True),
    "aot_unpaired": PreferenceLoss(_aot_unpaired, smoothed=True, whole_batch=True),
    "apo_zero": PreferenceLoss(_apo_zero),
    "apo_down": PreferenceLoss(_apo_down),
    "discopop": PreferenceLoss(_discopop, divergent=True),
    "sigmoid_norm": PreferenceLoss(lambda p: -_log_sigmoid(p.logits), averaged=True, divergent=True),
    "sft": PreferenceLoss(lambda p: -p.policy_chosen, divergent=True, either=True),
}
