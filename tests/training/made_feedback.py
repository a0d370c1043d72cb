"""A trunk that costs nothing, and batches of every kind of feedback, for the tests of reward models."""

import jax.numpy as jnp
import numpy as np

from rlhf_jax.types import GroupedBatch

B, P, R, WIDTH, VOCABULARY, PAD = 4, 3, 5, 6, 40, 1


def hidden(xp, table, batch):
    """[B, G, R + 1, D]: the mean of the prompt's embeddings, those of the completion's tokens so far, and the own."""
    ids, mask = batch.completion_ids, batch.completion_mask[..., None]
    weight = batch.prompt_mask[..., None]
    prompt = (table[batch.prompt_ids] * weight).sum(1) / weight.sum(1)
    own = table[ids]
    before = xp.cumsum(own * mask, axis=2) - own * mask
    count = (xp.cumsum(mask, axis=2) - mask + 2.0).astype(own.dtype)
    shape = (*ids.shape[:2], 1, own.shape[-1])
    first = xp.broadcast_to(prompt[:, None, None], shape)
    return xp.concatenate([first, (before + own + prompt[:, None, None]) / count], axis=2)


def states(model, frozen_base, role, batch):
    """In the place of rlhf_jax.models.roles.states."""
    return hidden(jnp, role.params(frozen_base)["table"], batch)


def table(seed):
    return {"table": np.random.default_rng(seed).normal(size=(VOCABULARY, WIDTH)).astype(np.float32)}


def group(seed, lengths) -> GroupedBatch:
    """Groups whose completions have `lengths` [B, G] tokens; 0: there is none, and it weighs nothing."""
    rng, lengths = np.random.default_rng(seed), np.array(lengths)
    mask = (np.arange(R) < lengths[..., None]).astype(np.int32)
    ids = np.where(mask, rng.integers(3, VOCABULARY, mask.shape), PAD).astype(np.int32)
    rows = len(lengths)
    prompt_mask = (np.arange(P)[::-1] < rng.integers(1, P + 1, (rows, 1))).astype(np.int32)
    prompts = rng.integers(3, VOCABULARY, (rows, P)).astype(np.int32)
    return GroupedBatch(prompts, prompt_mask, ids, mask, weights=(lengths > 0).astype(np.float32))


def batch_of(kind, settings, seed=0) -> GroupedBatch:
    """Ragged; the last group weighs nothing, and what is not known is NaN."""
    rng, nan = np.random.default_rng(seed + 1), np.nan
    if kind in ("pairwise", "token_level", "gate"):
        batch = group(seed, [[5, 2], [1, 4], [3, 3], [5, 2]])
        batch.completion_ids[1, 0, 0] = batch.completion_ids[1, 1, 0]  # one begins as the other
        if settings.margin_coeff:
            batch = batch.replace(margins=np.float32([0.5, 0.0, -1.0, 2.0]))
        if settings.label_smoothing:
            batch = batch.replace(soft_labels=np.float32([0.9, 0.6, 0.5, 1.0]))
    elif kind == "ranking":
        batch = group(seed, [[5, 2, 1, 3], [1, 4, 2, 0], [3, 3, 0, 0], [5, 2, 2, 2]])
        ratings = np.float32([[3, 2, 2, 1], [5, 4, 1, nan], [2, 1, nan, nan], [4, 3, 2, 1]])
        known = np.float32([[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
        batch = batch.replace(targets=ratings[..., None], target_mask=known[..., None])
    else:
        batch = group(seed, [[5], [1], [3], [4]])
        if kind == "multi_objective":
            targets = rng.normal(size=(B, 1, 3)).astype(np.float32)
            mask = np.float32([[1, 0, 1], [0, 0, 0], [1, 1, 1], [1, 1, 1]])[:, None]
            batch = batch.replace(targets=np.where(mask > 0, targets, nan), target_mask=mask)
        else:
            labels = np.float32([1, 0, 1, 0]) if kind == "classification" else np.float32([2.5, -1, 0.1, 9])
            ones = np.ones((B, 1, 1), np.float32)
            batch = batch.replace(targets=labels[:, None, None], target_mask=ones)
    batch.weights[-1] = 0.0
    return batch
