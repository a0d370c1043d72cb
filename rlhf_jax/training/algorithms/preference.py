"""Rows that tune a policy on pairs themselves: the DPO family, KTO, and the reference-free ones.

Completion 0 of each group was chosen, 1 rejected; KTO takes groups of one too, whose label says which it was. The
reference is the base without an adapter, what is known of it from before the training (batch.ref_logprobs), or the
role frozen["reference"]; see training/reference.py."""

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax.losses import preference, reference_free, unpaired
from rlhf_jax.losses.masking import masked_mean
from rlhf_jax.losses.sequence import length_desensitised_sums, sequence_mean, sequence_sum, wpo_weights
from rlhf_jax.models import roles
from rlhf_jax.training.algorithms.row import Algorithm, Settings
from rlhf_jax.training.algorithms.shared import sequences
from rlhf_jax.training.algorithms.supervised import over_pairs


@dataclasses.dataclass(frozen=True)
class ReferenceSettings(Settings):
    """What the policy is measured from."""

    reference: str = "base"  # or cached: the base's log-probabilities, computed once before the first step
    reference_sync_steps: int = 0  # TR-DPO: the reference moves to the policy each so many steps; 0: never
    reference_sync_mix: float = 0.6  # of the policy in the reference then; 1: a copy of the policy

    def check(self) -> str | None:
        if self.reference_sync_mix > 1:
            return f"reference_sync_mix is {self.reference_sync_mix}; expected above 0, at most 1."
        if self.reference == "cached" and self.reference_sync_steps:
            return (
                f"reference is 'cached' with reference_sync_steps {self.reference_sync_steps}: what is computed once "
                "cannot follow the policy; set reference=base or reference_sync_steps=0."
            )
        return None


@dataclasses.dataclass(frozen=True)
class DPOSettings(ReferenceSettings):
    """Rafailov et al. 2023, arXiv:2305.18290, and its relatives by loss_type (losses/preference.py)."""

    loss_type: str = "sigmoid"  # several with commas are weighted and added
    loss_weights: tuple[float, ...] = (1.0,)  # one a loss
    beta: float = 0.1  # reward units a nat
    label_smoothing: float = 0.0  # probability that a label is wrong
    discopop_tau: float = 0.05
    f_divergence: str = "reverse_kl"
    f_alpha: float = 0.5
    tail_weight: float = 1.0  # LD-DPO: of tokens beyond the shorter completion's length; 1: as all others
    wpo: bool = False  # weigh pairs by how likely the policy would write them
    num_microbatches: int = 1

    def check(self) -> str | None:
        names, weights = self.losses, self.loss_weights
        if len(set(names)) < len(names):
            return f"loss_type is {self.loss_type!r}; name each loss once."
        if len(weights) != len(names) or not all(w >= 0 for w in weights) or not sum(weights) > 0:
            return (
                f"loss_weights is {tuple(weights)}; expected {len(names)} number(s) from 0, not all 0: one a loss of "
                f"loss_type {self.loss_type!r}."
            )
        said = super().check() or _said(lambda x: self.loss([x] * 4, [x] * 2, self.label_smoothing))
        if said is not None:
            return said
        rows = [preference.LOSSES[name] for name in names]
        sorts = f"loss_type {self.loss_type!r} sorts whole batches"
        if self.num_microbatches > 1 and any(row.whole_batch for row in rows):
            return f"num_microbatches is {self.num_microbatches}; {sorts}: 1."
        if self.wpo and any(row.whole_batch for row in rows):
            return f"wpo is {self.wpo}; {sorts}, so that no loss is a pair's own: False."
        if self.tail_weight != 1 and any(row.averaged or (row.either and len(rows) > 1) for row in rows):
            return (
                f"tail_weight is {self.tail_weight}; loss_type {self.loss_type!r} takes means over tokens: 1."
            )
        return None

    @property
    def losses(self) -> list[str]:
        return [name.strip() for name in self.loss_type.split(",")]

    @property
    def mixed(self) -> bool:
        """Several losses, or means of an f-divergence: these take sums and lengths."""
        averaged = any(name in preference.LOSSES and preference.LOSSES[name].averaged for name in self.losses)
        return len(self.losses) > 1 or (averaged and self.f_divergence != "reverse_kl")

    @property
    def reads_soft_labels(self) -> bool:
        """A pair's own probability of a wrong label stands for label_smoothing in "sigmoid", and there alone."""
        return [name for name in self.losses if preference.LOSSES[name].smoothed] == ["sigmoid"]

    def numbers(self, logprobs, mask):
        """[2 B, R] nats to (chosen, rejected), [B]: sums over tokens, or means where one loss alone takes those."""
        if self.tail_weight != 1:
            return length_desensitised_sums(
                logprobs[::2], mask[::2], logprobs[1::2], mask[1::2], tail_weight=self.tail_weight
            )
        averaged = preference.LOSSES[self.losses[0]].averaged and not self.mixed
        made = (sequence_mean if averaged else sequence_sum)(logprobs, mask)
        return made[::2], made[1::2]

    def loss(self, numbers, lengths, label_smoothing):
        """numbers: chosen and rejected of the policy, then of the reference, [B] each; lengths: tokens, [B] each."""
        names = ("beta", "discopop_tau", "f_divergence", "f_alpha")
        values = {name: getattr(self, name) for name in names} | {"label_smoothing": label_smoothing}
        if self.mixed:
            weights = dict(zip(self.losses, self.loss_weights, strict=True))
            return preference.combined_preference_loss(*numbers, *lengths, loss_weights=weights, **values)
        losses, *rewards = preference.preference_loss(*numbers, loss_type=self.losses[0], **values)
        return self.loss_weights[0] * losses, *rewards


@dataclasses.dataclass(frozen=True)
class KTOSettings(ReferenceSettings):
    """Ethayarajh et al. 2024, arXiv:2402.01306: what was chosen or accepted is desirable, all else is not."""

    reads_labels = True

    loss_type: str = "kto"  # or apo_zero_unpaired
    beta: float = 0.1  # reward units a nat
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    num_microbatches: int = 1

    def check(self) -> str | None:
        said = super().check() or _said(lambda x: self.loss(x, x, x, 0.0, x))
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
    logprobs, _, states = network.logprobs(frozen["base"], trained["policy"], batch)
    collision = network.log_collision(frozen["base"], trained["policy"], states) if settings.wpo else None
    return dpo_loss(settings, batch, logprobs, _reference(network, frozen, batch), collision)


def dpo_loss(settings, batch, policy, reference, collision=None):
    """(mean loss, (pairs, metrics)) from log-probabilities of all completions, [B, 2, R]. collision: WPO's, as they."""
    policy, reference, mask = sequences(policy), sequences(reference), _mask(batch)
    numbers = (*settings.numbers(policy, mask), *settings.numbers(reference, mask))
    lengths = mask.sum(-1)
    smoothing = settings.label_smoothing if batch.soft_labels is None else 1.0 - batch.soft_labels
    losses, chosen, rejected = settings.loss(numbers, (lengths[::2], lengths[1::2]), smoothing)
    more = {"chosen_logprob": numbers[0], "rejected_logprob": numbers[1]}
    if collision is not None:
        sides = [x[i::2] for i in (0, 1) for x in (policy, sequences(collision), mask)]
        more["wpo_weight"] = wpo_weights(*sides)
        losses = losses * more["wpo_weight"]
    return over_pairs(batch, losses, chosen, rejected, more)


def kto_objective(settings, network, trained, frozen, controllers, batch, rng):
    mask, real = _mask(batch), batch.weights.reshape(-1)
    logprobs, _, _ = network.logprobs(frozen["base"], trained["policy"], batch)
    kl, reference = 0.0, None
    if unpaired.LOSSES[settings.loss_type].reads_kl:
        kl, reference = _mismatched_kl(network, trained, frozen, batch)
    reference = _reference(network, frozen, batch) if reference is None else reference
    policy, reference = (sequence_sum(sequences(x), mask) for x in (logprobs, reference))
    paired = batch.completion_ids.shape[1] == 2
    desirable = jnp.arange(policy.shape[0]) % 2 == 0 if paired else batch.soft_labels > 0.5
    losses, rewards = settings.loss(policy, reference, desirable, kl, real)
    if paired:
        more = {"chosen_logprob": policy[::2], "rejected_logprob": policy[1::2]}
        _, (_, metrics) = over_pairs(batch, losses[::2], rewards[::2], rewards[1::2], more)
    else:
        metrics = _over_labels(rewards - settings.beta * kl, desirable, real)
    return masked_mean(losses, real), (real.sum(), metrics | {"reference_kl": jnp.float32(kl)})


def _over_labels(rewards, desirable, real):
    """Metrics of completions judged one by one: how many, and by how much, lie on their side of the reference point.
    Means over all, since a batch may have none of a kind."""
    margins = jnp.where(desirable, rewards, -rewards)
    metrics = {
        "accuracy": margins > 0,
        "margin": margins,
        "desirable_fraction": desirable,
    }  # a tie counts as wrong
    return {name: masked_mean(x.astype(jnp.float32), real) for name, x in metrics.items()}


def reference_free_objective(settings, network, trained, frozen, controllers, batch, rng):
    logprobs, _, _ = network.logprobs(frozen["base"], trained["policy"], batch)
    logprobs, mask = sequences(logprobs), _mask(batch)
    means = sequence_mean(logprobs, mask)
    averaged = reference_free.LOSSES[settings.loss_type].averaged
    numbers = means if averaged else sequence_sum(logprobs, mask)
    losses, chosen, rejected = settings.loss(numbers[::2], numbers[1::2], -means[::2])
    more = {"chosen_logprob": numbers[::2], "rejected_logprob": numbers[1::2]}
    return over_pairs(batch, losses, chosen, rejected, more)


def _reference(network, frozen, batch):
    """Log-probabilities of the completions, [B, G, R] nats: those of before the training, or made here."""
    logprobs = batch.ref_logprobs
    if logprobs is None:
        logprobs, _, _ = network.logprobs(frozen["base"], frozen.get("reference", roles.Role()), batch)
    return jax.lax.stop_gradient(logprobs)


def _mismatched_kl(network, trained, frozen, batch):
    """(KL that KTO measures from; the reference's log-probabilities of the batch itself [B, G, R], made on the way).

    Each prompt with the completions of the next one, which nobody judged for it. The reference scores them and the
    prompt's own in one pass. The policy does not: a prompt saved costs less than a backward pass through completions
    that carry no gradient.
    """
    ids, counts, weights = (
        jnp.roll(x, -1, axis=0) for x in (batch.completion_ids, batch.completion_mask, batch.weights)
    )
    other = batch.replace(
        completion_ids=ids, completion_mask=counts, weights=batch.weights * weights, ref_logprobs=None
    )
    policy, _, _ = network.logprobs(frozen["base"], trained["policy"], other)
    if batch.ref_logprobs is None:
        both = (jnp.concatenate(x, 1) for x in ((batch.completion_ids, ids), (batch.completion_mask, counts)))
        both = batch.replace(**dict(zip(("completion_ids", "completion_mask"), both, strict=True)))
        own, apart = jnp.split(_reference(network, frozen, both), 2, axis=1)
    else:
        own, apart = batch.ref_logprobs, _reference(network, frozen, other)
    sums = (sequence_sum(sequences(x), _mask(other)) for x in (policy, apart))
    return unpaired.mismatched_kl(*sums, other.weights.reshape(-1)), own


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
