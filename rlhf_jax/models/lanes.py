"""Completions of a prompt one after the other in lanes, so that short ones do not pay for the longest.

The decoder reads L lanes of W slots in the place of G rows of R tokens; a token reads the prompt and its own
completion, as ever. Everything outside the decoder goes on in [B, G, R]. Where completions stand is for the data to say
(data/packing.py)."""

import jax.numpy as jnp

from rlhf_jax.types import GroupedBatch


def packed(batch: GroupedBatch) -> GroupedBatch:
    """The same prompts with lanes as their completions, [B, L, W]; a completion's number is its segment's, from 1."""
    (L, W), start = batch.lanes.shape, batch.lanes.start
    B, G, R = batch.completion_ids.shape
    length = batch.completion_mask.sum(-1)
    token = (
        jnp.arange(L * W)[None, None] - start[..., None]
    )  # [B, G, L * W], which of a completion's stands there
    inside = (token >= 0) & (token < length[..., None])
    number = jnp.arange(G)[None, :, None]
    segments = jnp.where(inside, number + 1, 0).sum(1)
    source = jnp.where(inside, number * R + token, 0).sum(1)
    ids = jnp.take_along_axis(batch.completion_ids.reshape(B, G * R), source, axis=1)
    lanes = lambda x: x.reshape(B, L, W).astype(jnp.int32)
    mask = segments > 0
    return GroupedBatch(
        batch.prompt_ids,
        batch.prompt_mask,
        lanes(jnp.where(mask, ids, 0)),
        lanes(mask),
        segments=lanes(segments),
    )


def unpacked(batch: GroupedBatch, x):
    """[B, L, W, ...] of lanes -> [B, G, R, ...] of the batch's completions, 0 in the padding."""
    B, G, R = batch.completion_ids.shape
    L, W = batch.lanes.shape
    slot = batch.lanes.start[..., None] + jnp.arange(R)[None, None]
    flat, slot = x.reshape(B, L * W, *x.shape[3:]), jnp.minimum(slot, L * W - 1).reshape(B, G * R)
    more = (1,) * (x.ndim - 3)
    found = jnp.take_along_axis(flat, slot.reshape(B, G * R, *more), axis=1).reshape(B, G, R, *x.shape[3:])
    return jnp.where(batch.completion_mask.reshape(B, G, R, *more) > 0, found, 0)


def predicting(first, hidden, segments):
    """[B, L, W, D], what predicts the token in each slot: the state before it, and the prompt's `first` [B, D] where a
    completion begins. hidden: [B, L, W, D], the slots' own."""
    before = jnp.pad(hidden[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0)))
    begins = jnp.diff(segments, axis=-1, prepend=-1) != 0
    return jnp.where(begins[..., None], first[:, None, None], before)
