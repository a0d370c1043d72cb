"""Rows that tune a policy on pairs themselves: the DPO family, KTO, and the reference-free ones.

Completion 0 of each group was chosen, 1 rejected. The reference is the base without an adapter."""

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax.losses import preference, reference_free, unpaired
from rlhf_jax.losses.masking import masked_mean
from rlhf_jax.losses.sequence import length_desensitised_sums, sequence_mean, sequence_sum
from rlhf_jax.models import roles
from rlhf_jax.training.algorithms.row import Algorithm, Settings
from rlhf_jax.training.algorithms.shared import sequences
from rlhf_jax.training.algorithms.supervised import over_pairs


@dataclasses.dataclass(frozen=True)
class DPOSettings(Settings):
    """Rafailov et al. 2023, arXiv:2305.18290, and its relatives by loss_type (losses/preference.py)."""

    loss_type: str = "sigmoid"
    beta: float = 0.1  # reward units a nat
    label_smoothing: float = 0.0  # probability that a label is wrong
    discopop_tau: float = 0.05
    f_divergence: str = "reverse_kl"
    f_alpha: float = 0.5
    tail_weight: float = 1.0  # LD-DPO: of tokens beyond the shorter completion's length; 1: as all others
    num_microbatches: int = 1

    def check(self) -> str | None:
        said = _said(lambda x: self.loss(x, x, x, x))
        if said is None and self.num_microbatches > 1 and preference.LOSSES[self.loss_type].whole_batch:
            said = f"num_microbatches is {self.num_microbatches}; loss_type {self.loss_type!r} sorts whole batches: 1."
        if said is None and self.tail_weight != 1 and preference.LOSSES[self.loss_type].averaged:
            said = (
                f"tail_weight is {self.tail_weight}; loss_type {self.loss_type!r} takes means over tokens: 1."
            )
        return said

    def loss(self, policy_chosen, policy_rejected, ref_chosen, ref_rejected):
        names = ("beta", "label_smoothing", "loss_type", "discopop_tau", "f_divergence", "f_alpha")
        values = {name: getattr(self, name) for name in names}
        return preference.preference_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, **values)


@dataclasses.dataclass(frozen=True)
class KTOSettings(Settings):
    """Ethayarajh et al. 2024, arXiv:2402.01306: every chosen completion is desirable, every rejected one is not."""

    loss_type: str = "kto"  # or apo_zero_unpaired
    beta: float = 0.1  # reward units a nat
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    num_microbatches: int = 1

    def check(self) -> str | None:
        said = _said(lambda x: self.loss(x, x, x, 0.0, x))
        if said is None and self.num_microbatches > 1 and unpaired.LOSSES[self.loss_type].reads_kl:
            said = f"num_microbatches is {self.num_microbatches}; the KL that KTO measures from is of whole batches: 1."
        return said

    def loss(self, policy, reference, desirable, kl, mask):
        names = ("beta", "desirable_weight", "undesirable_weight", "loss_type")
        values = {name: getattr(self, name) for name in names}
        return unpaired.unpaired_loss(policy, reference, desirable, kl, mask, **values)


@dataclasses.dataclass(frozen=True)
class ReferenceFreeSettings(Settings):
    loss_type: str = "cpo"  # of losses/reference_free.py
    beta: float = 0.1  # reward units a nat; ORPO's lambda
    nll_coeff: float = 1.0  # of the chosen completion's negative log-likelihood, nats a token
    gamma: float = 0.5  # reward units, SimPO's margin
    shape_alpha: float = 0.0  # AlphaPO's; 0: none
    label_smoothing: float = 0.0  # probability that a label is wrong

    def check(self) -> str | None:
        return _said(lambda x: self.loss(x, x, x))

    def loss(self, chosen, rejected, chosen_nll):
        return reference_free.reference_free_loss(
            chosen, rejected, chosen_nll if self.nll_coeff else None, **dataclasses.asdict(self)
        )


@dataclasses.dataclass(frozen=True)
class ORPOSettings(ReferenceFreeSettings):
    """Hong et al. 2024, arXiv:2403.07691."""

    loss_type: str = "orpo"


@dataclasses.dataclass(frozen=True)
class SimPOSettings(ReferenceFreeSettings):
    """Meng et al. 2024, arXiv:2405.14734."""

    loss_type: str = "simpo"
    beta: float = 2.0
    nll_coeff: float = 0.0


def dpo_objective(settings, network, trained, frozen, controllers, batch, rng):
    return dpo_loss(settings, batch, *_policy_and_reference(network, trained, frozen, batch))


def dpo_loss(settings, batch, policy, reference):
    """(mean loss, (pairs, metrics)) from log-probabilities of all completions, [B, 2, R] or [2 B, R] each."""
    averaged = preference.LOSSES[settings.loss_type].averaged
    policy, reference, mask = sequences(policy), sequences(reference), _mask(batch)
    if settings.tail_weight == 1:
        of_completions = sequence_mean if averaged else sequence_sum
        policy, reference = (of_completions(x, mask) for x in (policy, reference))
        numbers = (policy[::2], policy[1::2], reference[::2], reference[1::2])
    else:
        numbers = sum(
            (
                length_desensitised_sums(
                    x[::2], mask[::2], x[1::2], mask[1::2], tail_weight=settings.tail_weight
                )
                for x in (policy, reference)
            ),
            (),
        )
    losses, chosen, rejected = settings.loss(*numbers)
    more = {"chosen_logprob": numbers[0], "rejected_logprob": numbers[1]}
    return over_pairs(batch, losses, chosen, rejected, more)


def kto_objective(settings, network, trained, frozen, controllers, batch, rng):
    mask, real = _mask(batch), batch.weights.reshape(-1)
    policy, reference = _policy_and_reference(network, trained, frozen, batch)
    kl = 0.0
    if unpaired.LOSSES[settings.loss_type].reads_kl:
        # Each prompt with the completions of the next one, which nobody judged for it.
        ids, counts, weights = (
            jnp.roll(x, -1, axis=0) for x in (batch.completion_ids, batch.completion_mask, batch.weights)
        )
        other = batch.replace(completion_ids=ids, completion_mask=counts, weights=batch.weights * weights)
        apart = (
            sequence_sum(x, _mask(other)) for x in _policy_and_reference(network, trained, frozen, other)
        )
        kl = unpaired.mismatched_kl(*apart, other.weights.reshape(-1))
    policy, reference = sequence_sum(policy, mask), sequence_sum(reference, mask)
    desirable = jnp.arange(policy.shape[0]) % 2 == 0
    losses, rewards = settings.loss(policy, reference, desirable, kl, real)
    more = {"chosen_logprob": policy[::2], "rejected_logprob": policy[1::2]}
    _, (_, metrics) = over_pairs(batch, losses[::2], rewards[::2], rewards[1::2], more)
    return masked_mean(losses, real), (real.sum(), metrics | {"reference_kl": jnp.float32(kl)})


def reference_free_objective(settings, network, trained, frozen, controllers, batch, rng):
    logprobs, _, _ = network.logprobs(frozen["base"], trained["policy"], batch)
    logprobs, mask = sequences(logprobs), _mask(batch)
    means = sequence_mean(logprobs, mask)
    averaged = reference_free.LOSSES[settings.loss_type].averaged
    numbers = means if averaged else sequence_sum(logprobs, mask)
    losses, chosen, rejected = settings.loss(numbers[::2], numbers[1::2], -means[::2])
    more = {"chosen_logprob": numbers[::2], "rejected_logprob": numbers[1::2]}
    return over_pairs(batch, losses, chosen, rejected, more)


def _policy_and_reference(network, trained, frozen, batch):
    """Log-probabilities of all completions, [2 B, R] each."""
    policy, _, _ = network.logprobs(frozen["base"], trained["policy"], batch)
    reference, _, _ = network.logprobs(frozen["base"], roles.Role(), batch)
    return sequences(policy), jax.lax.stop_gradient(sequences(reference))


def _mask(batch):
    return sequences(batch.completion_mask * batch.weights[..., None])


def _said(loss) -> str | None:
    """What a loss has against its settings, without computing it."""
    try:
        jax.eval_shape(loss, jax.ShapeDtypeStruct((2,), jnp.float32))
    except ValueError as error:
        return str(error)
    return None


ROWS = {
    "dpo": Algorithm(DPOSettings, dpo_objective),
    "kto": Algorithm(KTOSettings, kto_objective),
    "orpo": Algorithm(ORPOSettings, reference_free_objective),
    "cpo": Algorithm(ReferenceFreeSettings, reference_free_objective),
    "simpo": Algorithm(SimPOSettings, reference_free_objective),
}
