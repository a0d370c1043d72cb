"""What online rows have in common: settings, scores and KL of a rollout, the adaptive coefficient."""

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax.losses import kl
from rlhf_jax.losses.advantages import overlong
from rlhf_jax.losses.masking import masked_mean
from rlhf_jax.models import roles
from rlhf_jax.training.algorithms.row import Settings


@dataclasses.dataclass(frozen=True)
class OnlineSettings(Settings):
    """Units: kl_* in nats of a whole completion, coefficients in reward units a nat."""

    kl_coeff: float = 0.05  # of the KL in the reward; where it starts, if adaptive; 0: none
    kl_kind: str = "k1"
    kl_target: float = 0.0  # adaptive controller's target in nats a sequence; 0: the coefficient is fixed
    kl_horizon: float = 10000.0  # sequences
    reward_clip: float = 0.0  # scores clipped to +-this, 0: none
    missing_eos_rule: str = "none"  # a completion without an end token: none, penalty (subtracted), replace
    missing_eos_value: float = 0.0
    overlong_buffer_tokens: int = (
        0  # the last tokens allowed, in which the penalty grows to its whole; 0: none
    )
    overlong_penalty: float = 1.0  # of a completion of the longest length allowed
    entropy_coeff: float = 0.0

    @property
    def reads_reference(self) -> bool:
        return bool(self.kl_coeff)

    @property
    def reads_policy(self) -> bool:
        """Whether `prepare` needs the policy itself, in frozen["policy"], and not only what it sampled."""
        return False


def scored(settings, network, frozen, controllers, batch):
    """(batch with reference, scores [N] after every rule, metrics) of a rollout of N = B * G completions."""
    mask, finished = token_mask(batch), batch.finished.reshape(-1)
    metrics = _score_metrics(batch, finished, mask)
    scores = ruled_scores(settings, batch).reshape(-1)
    if settings.overlong_buffer_tokens:
        reached = (_overlong(settings, batch) > 0).reshape(-1)
        metrics["overlong_fraction"] = masked_mean(reached, batch.weights.reshape(-1))
    if settings.reads_reference:
        reference, _, _ = network.logprobs(frozen["base"], roles.Role(), batch)
        batch = batch.replace(ref_logprobs=reference)
        old, reference = sequences(batch.old_logprobs), sequences(reference)
        metrics["kl"] = sequence_mean(kl.kl_estimate(old, reference, kind=settings.kl_kind), mask, batch)
        metrics["kl_coeff"] = controllers["kl_coeff"]
    return batch, scores, metrics


def kl_control(settings, controllers, metrics, num_sequences):
    """Ziegler et al. 2019, section 2.2."""
    if not settings.kl_target or not settings.kl_coeff:
        return controllers
    new = kl.adaptive_kl_update(
        controllers["kl_coeff"],
        metrics["kl"],
        target=settings.kl_target,
        horizon=settings.kl_horizon,
        batch_size=num_sequences,
    )
    return controllers | {"kl_coeff": new}


def sequences(x):
    """[B, G, R] -> [B*G, R]: losses know sequences, not groups."""
    return x.reshape(-1, x.shape[-1])


def token_mask(batch):
    return sequences(batch.completion_mask * batch.weights[..., None]).astype(jnp.float32)


def sequence_mean(per_token, mask, batch):
    return masked_mean(jnp.where(mask > 0, per_token, 0.0).sum(-1), batch.weights.reshape(-1))


def ruled_scores(settings, batch):
    """[B, G] scores after every rule: missing end, clip, and after the clip, so that it is always felt, overlong."""
    scores = _missing_eos(settings, batch.scores, batch.finished)
    if settings.reward_clip:
        scores = jnp.clip(scores, -settings.reward_clip, settings.reward_clip)
    if settings.overlong_buffer_tokens:
        scores = scores - settings.overlong_penalty * _overlong(settings, batch)
    return scores


def _overlong(settings, batch):
    mask = batch.completion_mask
    return overlong(mask.sum(-1), mask.shape[-1], settings.overlong_buffer_tokens)


def _missing_eos(settings, scores, finished):
    if settings.missing_eos_rule == "replace":
        return jnp.where(finished, scores, settings.missing_eos_value)
    if settings.missing_eos_rule == "penalty":
        return jnp.where(finished, scores, scores - settings.missing_eos_value)
    return scores


def _score_metrics(batch, finished, mask):
    weights, scores = batch.weights.reshape(-1), batch.scores.reshape(-1)
    mean = masked_mean(scores, weights)
    return {
        "reward": mean,
        "reward_std": jnp.sqrt(masked_mean(jnp.square(scores - mean), weights)),
        "completion_length": masked_mean(mask.sum(-1), weights),
        "finished_fraction": masked_mean(finished.astype(jnp.float32), weights),
        "tokens": jax.lax.stop_gradient(mask.sum()),
    }
