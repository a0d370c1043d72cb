"""Rows that choose among samples by their reward and learn from what was chosen: RAFT, online DPO, Quark.

The reward has no gradient here: it decides what is imitated, preferred, or said to be good. KL to the reference is
measured for all of them, so that reward can be read against distance as with any other row."""

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax.losses import selection
from rlhf_jax.losses.masking import masked_mean
from rlhf_jax.losses.supervised import completion_cross_entropy
from rlhf_jax.models import roles
from rlhf_jax.training.algorithms.preference import DPOSettings, dpo_loss
from rlhf_jax.training.algorithms.row import Algorithm
from rlhf_jax.training.algorithms.shared import (
    CompletionSettings,
    control_kl,
    scored,
    sequences,
    token_mask,
    with_entropy,
)


@dataclasses.dataclass(frozen=True)
class SelectionSettings(CompletionSettings):
    kl_coeff: float = 0.0  # of the KL in the reward that ranks
    stop_approx_kl: float = 0.0

    def check(self) -> str | None:
        if self.stop_approx_kl:
            return f"stop_approx_kl is {self.stop_approx_kl}; this loss has no ratio to the sampler to stop by: 0."
        return super().check()

    @property
    def reads_reference(self) -> bool:
        return True


@dataclasses.dataclass(frozen=True)
class RAFTSettings(SelectionSettings):
    """Dong et al. 2023, arXiv:2304.06767, ranked within each prompt; Llama 2's rejection sampling, 2307.09288."""

    keep: int = 1  # of a prompt's completions, the best
    num_completions: int = 4

    def check(self) -> str | None:
        if self.keep > self.num_completions:
            return f"keep is {self.keep}; expected at most num_completions, {self.num_completions}."
        return super().check()


@dataclasses.dataclass(frozen=True)
class OnlineDPOSettings(SelectionSettings):
    """Guo et al. 2024, arXiv:2402.04792, the reward in the annotator's place; keys of the loss as in DPOSettings."""

    loss_type: str = "sigmoid"
    loss_weights: tuple[float, ...] = (1.0,)
    beta: float = 0.1  # reward units a nat
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05
    f_divergence: str = "reverse_kl"
    f_alpha: float = 0.5
    tail_weight: float = 1.0
    num_microbatches: int = 1
    num_completions: int = 2

    @property
    def pairs(self) -> DPOSettings:
        names = ("loss_type", "loss_weights", "beta", "label_smoothing", "discopop_tau", "f_divergence", "f_alpha",
                 "tail_weight", "num_microbatches")  # fmt: skip
        return DPOSettings(**{name: getattr(self, name) for name in names})

    def check(self) -> str | None:
        if self.num_completions < 2:
            return f"num_completions is {self.num_completions}; expected at least 2, to make a pair of."
        return self.pairs.check() or super().check()


@dataclasses.dataclass(frozen=True)
class QuarkSettings(SelectionSettings):
    """Lu et al. 2022, arXiv:2205.13636.

    The paper gives each quantile a new token before the prompt; here it is a text of the tokens that there are, after
    the prompt: no vocabulary grows, a BOS stays first, and whoever has the prompt can add it.
    """

    num_quantiles: int = 5
    pool_size: int = 4096  # completions; the oldest leave first
    kl_loss_coeff: float = 0.05  # of KL(reference || policy) over the whole vocabulary, nats a token
    batch_size: int = 1
    num_completions: int = 1

    def check(self) -> str | None:
        if self.num_quantiles < 2:
            return f"num_quantiles is {self.num_quantiles}; expected at least 2."
        made = self.batch_size * self.num_completions
        if self.pool_size < made:
            return f"pool_size is {self.pool_size}; expected room for the {made} completions of a step."
        return super().check()


def prepare(settings, network, frozen, controllers, batch):
    """The reward that ranks, less kl_coeff times the KL, in the place of advantages."""
    batch, scores, penalty, metrics = scored(settings, network, frozen, controllers, batch)
    rewards = scores.reshape(batch.weights.shape)
    if settings.kl_coeff:
        rewards = rewards - controllers["kl_coeff"] * penalty.charged.sum(-1).reshape(rewards.shape)
    shape = batch.completion_mask.shape
    return batch.replace(advantages=jnp.broadcast_to(rewards[..., None], shape)), metrics


def raft_select(settings, memory, batch, rng):
    indices, weights = selection.best_of_group(batch.advantages[..., 0], batch.weights, settings.keep)
    return memory, _chosen(batch, indices, weights)


def online_dpo_select(settings, memory, batch, rng):
    indices, weights = selection.best_and_worst(batch.advantages[..., 0], batch.weights)
    return memory, _chosen(batch, indices, jnp.broadcast_to(weights[:, None], indices.shape))


def quark_memory(settings, markers, prompt_length, completion_length):
    """An empty pool. markers: (ids, mask) [K, M] int32, of the text of each quantile, the worst first."""
    N, integers = settings.pool_size, lambda *shape: jnp.zeros(shape, jnp.int32)
    return {
        "marker_ids": jnp.asarray(markers[0], jnp.int32),
        "marker_mask": jnp.asarray(markers[1], jnp.int32),
        "prompt_ids": integers(N, prompt_length),
        "prompt_mask": integers(N, prompt_length),
        "completion_ids": integers(N, completion_length),
        "completion_mask": integers(N, completion_length),
        "scores": jnp.zeros(N),
        "weights": jnp.zeros(N),
        "next": jnp.int32(0),  # where the next completion is written
    }


def quark_select(settings, memory, batch, rng):
    """The rollout goes into the pool; as many completions come out, each with its quantile's text after the prompt."""
    B, G = batch.weights.shape
    repeated = lambda x: jnp.repeat(x, G, axis=0)
    fresh = {
        "prompt_ids": repeated(batch.prompt_ids),
        "prompt_mask": repeated(batch.prompt_mask),
        "completion_ids": sequences(batch.completion_ids),
        "completion_mask": sequences(batch.completion_mask),
        "scores": batch.advantages[..., 0].reshape(-1),
        "weights": batch.weights.reshape(-1),
    }
    N = settings.pool_size
    slots = (memory["next"] + jnp.arange(B * G)) % N
    memory = memory | {name: memory[name].at[slots].set(x) for name, x in fresh.items()}
    memory["next"] = (memory["next"] + B * G) % N
    quantile = selection.quantiles(memory["scores"], memory["weights"], settings.num_quantiles)
    # Without replacement; those that do not count only where the pool has too few.
    lottery = jax.random.uniform(rng, (N,)) + (memory["weights"] > 0)
    drawn = jax.lax.top_k(lottery, B * G)[1]
    marker_ids, marker_mask = (memory[f"marker_{x}"][quantile[drawn]] for x in ("ids", "mask"))
    prompt_ids, prompt_mask = memory["prompt_ids"][drawn], memory["prompt_mask"][drawn]
    taught = batch.replace(
        prompt_ids=jnp.concatenate([prompt_ids, marker_ids], axis=1),
        prompt_mask=jnp.concatenate([prompt_mask, marker_mask], axis=1),
        ref_prompt_mask=jnp.concatenate([prompt_mask, jnp.zeros_like(marker_mask)], axis=1),
        completion_ids=memory["completion_ids"][drawn][:, None],
        completion_mask=memory["completion_mask"][drawn][:, None],
        weights=memory["weights"][drawn][:, None],
        scores=memory["scores"][drawn][:, None],
        finished=None,
        old_logprobs=None,
        ref_logprobs=None,
        advantages=None,
    )
    return memory, taught


def raft_objective(settings, network, trained, frozen, controllers, batch, rng):
    """Cross-entropy on what was kept, nats a token."""
    logprobs, entropy, _ = network.logprobs(frozen["base"], trained["policy"], batch)
    mask = token_mask(batch)
    loss, metrics = completion_cross_entropy(sequences(logprobs), mask), {}
    metrics["chosen_reward"] = masked_mean(batch.advantages[..., 0], batch.weights)
    mean_entropy = masked_mean(sequences(entropy), mask)
    metrics |= {"entropy": mean_entropy, "first_ratio_gap": _ratio_gap(batch, logprobs, mask)}
    return with_entropy(settings, loss, mean_entropy), (mask.sum(), metrics)


def online_dpo_objective(settings, network, trained, frozen, controllers, batch, rng):
    """A DPO loss on the best and the worst completion of each prompt; the reference's were noted with the rollout."""
    logprobs, entropy, _ = network.logprobs(frozen["base"], trained["policy"], batch)
    loss, (weight, metrics) = dpo_loss(settings.pairs, batch, logprobs, batch.ref_logprobs)
    mask = token_mask(batch)
    # By pair, as the loss: a mean over tokens would weigh differently in each microbatch.
    by_pair = masked_mean(sequences(entropy), mask, axis=-1).reshape(-1, 2).mean(-1)
    mean_entropy = masked_mean(by_pair, batch.weights.min(1))
    metrics |= {"entropy": mean_entropy, "first_ratio_gap": _ratio_gap(batch, logprobs, mask)}
    return with_entropy(settings, loss, mean_entropy), (weight, metrics)


def quark_objective(settings, network, trained, frozen, controllers, batch, rng):
    """Cross-entropy given the quantile, and KL from the reference, which is given the prompt alone; nats a token."""
    policy, mask = trained["policy"], token_mask(batch)
    logprobs, entropy, states = network.logprobs(frozen["base"], policy, batch)
    likelihood = completion_cross_entropy(sequences(logprobs), mask)
    mean_entropy = masked_mean(sequences(entropy), mask)
    loss, metrics = with_entropy(settings, likelihood, mean_entropy), {"entropy": mean_entropy}
    metrics["policy_loss"] = likelihood
    if settings.kl_loss_coeff:
        bare = batch.replace(prompt_mask=batch.ref_prompt_mask)
        kl = network.forward_kl(frozen["base"], roles.Role(), bare, policy, states)
        metrics["forward_kl_nats_per_token"] = masked_mean(sequences(kl), mask)
        loss = loss + settings.kl_loss_coeff * metrics["forward_kl_nats_per_token"]
    return loss, (mask.sum(), metrics)


def _chosen(batch, indices, weights):
    """The batch with completions [B, K] of its G, and their weights."""
    take = lambda x: jnp.take_along_axis(x, indices.reshape(*indices.shape, *[1] * (x.ndim - 2)), axis=1)
    shared = ("prompt_ids", "prompt_mask")
    own = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if f.name not in shared}
    taken = {name: take(x) for name, x in own.items() if x is not None}
    return batch.replace(**taken | {"weights": weights})


def _ratio_gap(batch, logprobs, mask):
    """Before the first update the policy is the one that sampled: this is 0 but for rounding, or something is wrong."""
    gap = jnp.where(mask > 0, sequences(logprobs) - sequences(batch.old_logprobs), 0.0)
    return jnp.abs(jnp.expm1(jax.lax.stop_gradient(gap))).max()


ROWS = {
    "raft": Algorithm(RAFTSettings, raft_objective, prepare, control_kl, select=raft_select),
    "online_dpo": Algorithm(
        OnlineDPOSettings, online_dpo_objective, prepare, control_kl, select=online_dpo_select
    ),
    "quark": Algorithm(
        QuarkSettings, quark_objective, prepare, control_kl, select=quark_select, memory=quark_memory
    ),
}
