"""What a row of the table is, and what every row is handed."""

import dataclasses
from collections.abc import Callable

import jax

from rlhf_jax.losses.collision import fused_log_collision
from rlhf_jax.losses.forward_kl import fused_forward_kl
from rlhf_jax.losses.full_kl import fused_kl
from rlhf_jax.losses.logprobs import fused_token_logprobs
from rlhf_jax.models import lanes, placement, roles
from rlhf_jax.models.llama import Llama, unembedding


@dataclasses.dataclass(frozen=True)
class Settings:
    """The values of a row; each has the name of its key in the row's section of the config."""

    # Of the rows that have them; without a type these are no fields, hence no keys.
    reference, reference_sync_steps, reads_soft_labels, reads_labels = "base", 0, False, False

    def check(self) -> str | None:
        """What is wrong with them, as "key is value; expected ...", or None."""
        return None


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """One row of the table. `network` below is a Network, `settings` the row's own dataclass."""

    settings: type[Settings]
    # (settings, network, trained, frozen, controllers, batch, rng) -> loss, (weight, metrics)
    objective: Callable
    # (settings, network, frozen, controllers, batch) -> batch, metrics; online only
    prepare: Callable | None = None
    # (settings, controllers, metrics, num_sequences) -> controllers
    control: Callable | None = None
    # as `objective`, on a batch of supervised examples; its gradient is added
    auxiliary_objective: Callable | None = None
    # (settings, memory, batch with targets, rng) -> memory, the batch that is trained on; None: the batch as it is
    select: Callable | None = None
    # (settings, markers, prompt length, completion length) -> what select keeps from step to step, a pytree. A row with
    # it samples given the last marker: the text of each reward quantile (training/markers.py)
    memory: Callable | None = None
    trains: tuple[str, ...] = ("policy",)
    controllers: tuple[str, ...] = ()  # of its own beside those of every online row; they start at 0
    # (settings, AdamW) -> the optimizer in its place; None: AdamW
    optimizer: Callable | None = None
    # (settings, network, trained, frozen, batch) -> {name: what that optimizer reads beside the gradient}
    extras: Callable | None = None
    greedy_baseline: bool = False  # `prepare` reads batch.greedy
    linearises: bool = (
        False  # the decoder, which then must be differentiable forwards too: plain attention only
    )
    # (settings, scored batch) -> [B] bool: the groups that teach; settings.max_refills says how often to draw others in
    # the place of the rest. None: all do
    teaches: Callable | None = None

    @property
    def online(self) -> bool:
        return self.prepare is not None


@dataclasses.dataclass(frozen=True)
class Network:
    """The decoder and how its vocabulary is read."""

    model: Llama
    vocab_chunk: int = 8192  # vocabulary entries at a time; 0: all at once
    temperature: float = 1.0  # of the sampler: log-probabilities are scored at it

    def logprobs(self, base: dict, role: roles.Role, batch):
        """(logprobs, entropy, states) of the completion tokens: [B, G, R] nats, [B, G, R] nats, [B, G, R, D]."""
        head = self.unembedding(base, role)
        read = lambda states, batch: fused_token_logprobs(
            states, head, batch.completion_ids, **self.reading(head)
        )
        if batch.lanes is None:
            states = self.states(base, role, batch)
            return *read(states, batch), states
        packed = lanes.packed(batch)
        states = roles.lane_states(self.model, base, role, packed)
        return tuple(lanes.unpacked(batch, x) for x in (*read(states, packed), states))

    def states(self, base: dict, role: roles.Role, batch):
        """[B, G, R, D]: the states that predict the completion tokens."""
        return roles.predicting_states(self.model, base, role, batch)

    def unembedding(self, base: dict, role: roles.Role):
        """[D, V]: what turns states into logits."""
        return unembedding(role.params(base))

    def reading(self, head) -> dict:
        """How the fused losses read the vocabulary of a head [D, V]."""
        chunk_size = placement.columns_at_a_time(head.shape[-1], self.vocab_chunk)
        return {"chunk_size": chunk_size, "temperature": self.temperature}

    def log_collision(self, base: dict, role: roles.Role, states):
        """log sum_v p(v)^2 of the distributions that `states` [B, G, R, D] predict: [B, G, R] nats, no gradient."""
        head = self.unembedding(base, role)
        return fused_log_collision(states, head, **self.reading(head))

    def full_kl(self, base: dict, role: roles.Role, states, reference_states):
        """[B, G, R] nats: exact KL(role || reference) at each state [B, G, R, D]; gradient to the role alone."""
        head, reference_head = self.unembedding(base, role), self.unembedding(base, roles.Role())
        return fused_kl(states, head, reference_states, reference_head, **self.reading(head))

    def forward_kl(self, base: dict, reference: roles.Role, batch, policy: roles.Role, states):
        """[B, G, R] nats, KL(reference || policy) over the vocabulary. states: the policy's, of `logprobs`."""
        head = self.unembedding(base, policy)
        return fused_forward_kl(
            jax.lax.stop_gradient(self.states(base, reference, batch)),
            self.unembedding(base, reference),
            states,
            head,
            **self.reading(head),
        )
