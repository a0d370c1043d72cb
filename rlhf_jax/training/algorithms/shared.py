"""What online rows have in common: settings, scores and KL of a rollout, the controller of its price."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.losses import kl
from rlhf_jax.losses.advantages import overlong
from rlhf_jax.losses.masking import masked_mean
from rlhf_jax.models import roles
from rlhf_jax.training.algorithms.row import Settings

BUDGET_REACH = 100.0  # a budget keeps its coefficient within this factor of where it started


@dataclasses.dataclass(frozen=True)
class OnlineSettings(Settings):
    """Units: kl_* in nats of a whole completion, coefficients in reward units a nat."""

    kl_coeff: float = 0.05  # of the KL in the reward; where it starts, if controlled; 0: none
    kl_kind: str = "k1"  # k1, k2, k3, or exact: over the whole vocabulary
    kl_control: str = "fixed"  # adaptive (Ziegler et al.), or budget: dual ascent that ends at the target
    kl_target: float = 0.0  # nats a completion, of adaptive and budget
    kl_horizon: float = 10000.0  # completions, adaptive
    kl_budget_rate: float = 0.1  # of dual ascent on the log of the coefficient, a step
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
        return any(self.kl_coefficients.values())

    @property
    def charges_exact_kl(self) -> bool:
        return bool(self.kl_coeff) and self.kl_kind == "exact"

    @property
    def reads_policy(self) -> bool:
        """Whether `prepare` needs the policy itself, in frozen["policy"], and not only what it sampled."""
        return self.charges_exact_kl

    @property
    def keeps_reference_states(self) -> bool:
        """Whether the objective needs the reference's states, in the batch's ref_states."""
        return False

    @property
    def kl_coefficients(self) -> dict[str, float]:
        """Every coefficient of a KL, by its name among the controllers."""
        return {"kl_coeff": self.kl_coeff}

    @property
    def kl_controllers(self) -> dict[str, float]:
        """What the controller of KL carries from step to step, and where it starts."""
        return self.kl_coefficients | ({"kl_previous": 0.0} if self.kl_control == "budget" else {})

    def check(self) -> str | None:
        controlled = self.kl_control != "fixed"
        if controlled and not self.kl_target:
            return f"kl_target is 0, which kl_control {self.kl_control!r} cannot hold; expected nats a completion."
        if controlled and not any(self.kl_coefficients.values()):
            names = " and ".join(f"{name} is 0" for name in self.kl_coefficients)
            return f"{names}, so kl_control {self.kl_control!r} has no price to start from; expected above 0."
        if not controlled and self.kl_target:
            return (
                f"kl_target is {self.kl_target}, which kl_control 'fixed' does not read; expected 0, or "
                "kl_control adaptive or budget."
            )
        return None


@dataclasses.dataclass(frozen=True)
class CompletionSettings(OnlineSettings):
    """Of rows that judge a completion as a whole."""

    def check(self) -> str | None:
        if self.charges_exact_kl:
            # One advantage a completion has no place for each token's own share of it; see _penalty.
            return (
                "kl_kind is 'exact', which needs an advantage for each token; expected k1, k2 or k3 (or, with grpo, "
                "kl_coeff 0 and kl_loss_kind exact)."
            )
        return super().check()


def with_entropy(settings, loss, mean_entropy):
    """The loss with the entropy bonus. Without one, entropy is told and has no gradient, whose zeros would cost as much
    as the gradient of the log-probabilities."""
    return loss - settings.entropy_coeff * mean_entropy if settings.entropy_coeff else loss


class Penalty(NamedTuple):
    """What a rollout pays for its distance from the reference, [B * G, R] nats, 0 where no token is."""

    charged: jax.Array  # subtracted from the reward at each token
    own: jax.Array | None = None  # subtracted from that token's advantage alone; None: nothing


def scored(settings, network, frozen, controllers, batch):
    """(batch with reference, scores [N] after every rule, Penalty, metrics) of a rollout of N = B * G completions."""
    mask, finished = token_mask(batch), batch.finished.reshape(-1)
    metrics = _score_metrics(batch, finished, mask)
    scores = ruled_scores(settings, batch).reshape(-1)
    if settings.overlong_buffer_tokens:
        reached = (_overlong(settings, batch) > 0).reshape(-1)
        metrics["overlong_fraction"] = masked_mean(reached, batch.weights.reshape(-1))
    penalty = Penalty(jnp.zeros(mask.shape, jnp.float32))
    if settings.reads_reference:
        reference, _, states = network.logprobs(frozen["base"], roles.Role(), batch)
        batch = batch.replace(ref_logprobs=reference)
        penalty, distance = _penalty(settings, network, frozen, batch, states, mask)
        metrics["kl"] = sequence_mean(distance, mask, batch)
        metrics["kl_coeff"] = controllers["kl_coeff"]
        if settings.kl_coeff:
            metrics["kl_penalty_nats_per_completion"] = sequence_mean(penalty.charged, mask, batch)
        if settings.keeps_reference_states:
            batch = batch.replace(ref_states=states)
    return batch, scores, penalty, metrics


def _penalty(settings, network, frozen, batch, ref_states, mask):
    """(what is charged, the unbiased KL that is reported [N, R])."""
    real = lambda x: jnp.where(mask > 0, sequences(x), 0.0)
    old, reference = real(batch.old_logprobs), real(batch.ref_logprobs)
    k1 = kl.kl_estimate(old, reference, kind="k1")
    if not settings.charges_exact_kl:
        return Penalty(kl.kl_estimate(old, reference, kind=settings.kl_kind)), k1
    policy = frozen["policy"]
    _, _, states = network.logprobs(frozen["base"], policy, batch)
    exact = real(network.full_kl(frozen["base"], policy, states, ref_states))
    # The exact KL of a state is the same whichever token is drawn there, so as a reward it would never hold back that
    # token, only those that led there. The token's own share, of mean 0, does: with both, the policy gradient is that
    # of the sequence's KL, as k1's is, with the noise of later tokens gone (Amini et al. 2025, arXiv:2504.10637).
    return Penalty(exact, k1 - exact), exact


def control_kl(settings, controllers, metrics, num_sequences):
    """The next price of KL, by kl_control; all coefficients above 0 move by the same rule."""
    if settings.kl_control == "fixed":
        return controllers
    changed = {}
    for name, start in settings.kl_coefficients.items():
        if start and settings.kl_control == "adaptive":
            changed[name] = kl.adaptive_kl_update(
                controllers[name],
                metrics["kl"],
                target=settings.kl_target,
                horizon=settings.kl_horizon,
                batch_size=num_sequences,
            )
        elif start:
            changed[name], changed["kl_previous"] = kl.kl_budget_update(
                controllers[name],
                metrics["kl"],
                target=settings.kl_target,
                rate=settings.kl_budget_rate,
                previous_kl=controllers["kl_previous"],
                bounds=(start / BUDGET_REACH, start * BUDGET_REACH),
            )
    return controllers | changed


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
