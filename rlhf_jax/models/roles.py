"""Roles: what one frozen base does with an optional adapter and an optional head.

The reference is the empty role; a policy, a value or a reward is an adapter, a head, or both; full fine-tuning is a
role with weights of its own; an ensemble is a role whose members are roles. Returns hidden states, values and scores;
what they are worth is for losses to say."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from rlhf_jax.models import heads, lanes, readout
from rlhf_jax.models.llama import Llama, LlamaConfig
from rlhf_jax.models.lora import Adapter
from rlhf_jax.models.readout import Readout
from rlhf_jax.types import GroupedBatch


@flax.struct.dataclass
class Role:
    adapter: Adapter | None = None
    head: dict | None = (
        None  # {"kernel": [D], "bias": []}, or with K outputs; of an ensemble models/readout.py's
    )
    base: dict | None = None  # weights of its own; None reads the run's frozen base
    depth: int | None = flax.struct.field(pytree_node=False, default=None)  # layers it uses; None: all
    pooling: str = flax.struct.field(pytree_node=False, default="last")  # where a score is read: last or mean
    gate: dict | None = None  # what weighs the outputs of the head, by the prompt
    members: tuple["Role", ...] = ()  # of an ensemble, which has no adapter and no weights beside theirs
    readout: Readout = flax.struct.field(pytree_node=False, default=Readout())  # how outputs become a score

    def params(self, frozen_base: dict) -> dict:
        return frozen_base if self.base is None else self.base

    @property
    def is_head_only(self) -> bool:
        """Reads the states of another role."""
        return self.adapter is None and self.base is None


def states(model: Llama, frozen_base: dict, role: Role, batch: GroupedBatch):
    """[B, G, R + 1, D]: entry t is the state after t completion tokens, so it predicts completion token t."""
    if batch.lanes is None:
        first, completions = _trunk(model, frozen_base, role, batch)
    else:
        first, completions = _trunk(model, frozen_base, role, lanes.packed(batch))
        completions = lanes.unpacked(batch, completions)
    B, G, _, D = completions.shape
    return jnp.concatenate([jnp.broadcast_to(first[:, None, None], (B, G, 1, D)), completions], axis=2)


def predicting_states(model: Llama, frozen_base: dict, role: Role, batch: GroupedBatch):
    """[B, G, R, D]: the states that predict each completion token. Nothing reads the last token's own state."""
    if batch.lanes is not None:
        return lanes.unpacked(batch, lane_states(model, frozen_base, role, lanes.packed(batch)))
    names = ("completion_ids", "completion_mask", "segments")
    shorter = {name: x[..., :-1] for name in names if (x := getattr(batch, name)) is not None}
    return states(model, frozen_base, role, batch.replace(**shorter))


def lane_states(model: Llama, frozen_base: dict, role: Role, packed: GroupedBatch):
    """[B, L, W, D]: the states that predict each token of `lanes.packed`."""
    first, own = _trunk(model, frozen_base, role, packed)
    return lanes.predicting(first, own, packed.segments)


def _trunk(model: Llama, frozen_base: dict, role: Role, batch: GroupedBatch):
    """The states [B, D] of the last prompt token and [B, G, R, D] of the completion tokens."""
    params = role.params(frozen_base)
    if role.depth is not None:
        model = Llama(shallower(model.config, role.depth))
        params = params | {"layers": jax.tree.map(lambda x: x[: role.depth], params["layers"])}
    prompt, completions = model.apply(
        {"params": params},
        batch.prompt_ids,
        batch.prompt_mask,
        batch.completion_ids,
        batch.completion_mask,
        role.adapter,
        batch.segments,
        method=Llama.group,
    )
    return last_state(prompt, batch.prompt_mask), completions


def scores(model: Llama, frozen_base: dict, role: Role, batch: GroupedBatch):
    """[B, G] float32, the head on one state a completion, read as role.readout says; of an ensemble, of all members.

    pooling "last": at the last real completion token (at the prompt's, if there is none); "mean": on the mean state
    of the completion's tokens, which finds what single words carry with far fewer labels.
    """
    if role.members:
        return scores_and_disagreement(model, frozen_base, role, batch)[0]
    return scores_and_outputs(model, frozen_base, role, batch)[0]


def scores_and_outputs(model: Llama, frozen_base: dict, role: Role, batch: GroupedBatch):
    """(scores [B, G], what the head puts out [B, G, K]; K is 1 of a head that gives the score itself)."""
    hidden = states(model, frozen_base, role, batch)
    outputs = heads.apply(role.head, pooled(role, hidden, batch))
    if outputs.ndim == 2:
        return outputs, outputs[..., None]
    tokens = batch.completion_mask.sum(-1)
    return readout.score(role.readout, outputs, role.head, role.gate, hidden[:, 0, 0], tokens), outputs


def scores_and_values(model: Llama, frozen_base: dict, role: Role, batch: GroupedBatch):
    """(scores [B, G], the head at every completion token [B, G, R]: at pads too, which read what is real)."""
    hidden = states(model, frozen_base, role, batch)
    return heads.apply(role.head, pooled(role, hidden, batch)), heads.apply(role.head, hidden[:, :, 1:])


def scores_and_disagreement(model: Llama, frozen_base: dict, role: Role, batch: GroupedBatch):
    """(scores, deviation between the members), both [B, G], in deviations of a member's scores in training."""
    one = lambda member: scores(model, frozen_base, member, batch)
    if any(member.base is not None for member in role.members):
        found = jnp.stack(
            [one(member) for member in role.members]
        )  # whole weights are not copied side by side
    else:  # one program for all; one after the other, so that no more activations are held than of one
        found = jax.lax.map(one, jax.tree.map(lambda *x: jnp.stack(x), *role.members))
    return readout.combined(role.readout, found, role.head)


def pooled(role: Role, hidden, batch: GroupedBatch):
    """[B, G, D], the state that a score is read from."""
    length = batch.completion_mask.sum(-1)
    if role.pooling == "mean":
        inside = batch.completion_mask[..., None] > 0
        total = jnp.where(inside, hidden[:, :, 1:].astype(jnp.float32), 0.0).sum(2)
        return total / jnp.maximum(length, 1)[..., None]
    return jnp.take_along_axis(hidden, length[:, :, None, None], axis=2)[:, :, 0]


def shallower(config: LlamaConfig, depth: int | None) -> LlamaConfig:
    """The config of the first `depth` layers."""
    return config if depth is None else dataclasses.replace(config, num_layers=depth)


def last_state(hidden_BPD, mask_BP):
    """[B, D] at the last real token, wherever the padding stands."""
    P = mask_BP.shape[1]
    last = P - 1 - jnp.argmax(mask_BP[:, ::-1], axis=1)
    return jnp.take_along_axis(hidden_BPD, last[:, None, None], axis=1)[:, 0]


def end_with(batch: GroupedBatch, eos_id: int, eos_ids: tuple[int, ...]) -> GroupedBatch:
    """The batch with every completion ended by an end token, as reward models are trained to read it: [B, G, R + 1].

    A completion that ended by itself keeps its own end token; one that was cut gets `eos_id` after its last token.
    """
    B, G, R = batch.completion_ids.shape
    length = batch.completion_mask.sum(-1, dtype=jnp.int32)
    last = jnp.take_along_axis(batch.completion_ids, jnp.maximum(length - 1, 0)[..., None], axis=-1)[..., 0]
    ended = jnp.any(last[..., None] == jnp.array(eos_ids, jnp.int32)[None, None], axis=-1) & (length > 0)
    slot = jnp.arange(R + 1, dtype=jnp.int32)[None, None]
    ids = jnp.pad(batch.completion_ids, ((0, 0), (0, 0), (0, 1)))
    ids = jnp.where((slot == length[..., None]) & ~ended[..., None], eos_id, ids)
    mask = (slot < (length + ~ended)[..., None]).astype(batch.completion_mask.dtype)
    return GroupedBatch(batch.prompt_ids, batch.prompt_mask, ids, mask, batch.weights, lanes=batch.lanes)


def count(tree) -> int:
    """Number of trained values."""
    return sum(x.size for x in jax.tree.leaves(tree))
