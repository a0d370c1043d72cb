"""Heads on an encoder's hidden states: those of Hugging Face's classifiers, mean pooling, and PairRM's.

A head is {"dense": {"kernel", "bias"}, "out": {"kernel", "bias"}}, without "dense" for the mean; which kind it is, the
config says. Knows widths and kinds; what a score is worth is for losses to say."""

import jax
import jax.numpy as jnp

from rlhf_jax.models.encoder_config import HEAD_KINDS
from rlhf_jax.models.encoder_layers import ACTIVATIONS

_BETWEEN = {"cls_tanh": "tanh", "cls_gelu": "gelu", "pairrm": "tanh"}  # "gelu" is the exact one


def init(rng, kind: str, width: int, num_labels: int = 1, std: float = 0.02) -> dict:
    """A new head for hidden states [..., width]; kind: one of HEAD_KINDS.

    dense [D, D] (PairRM's [2D, D]) ~ N(0, std); out [D, K] ~ N(0, 1/sqrt(D+1)) as our other reward heads; biases 0.
    """
    one, two = jax.random.split(rng)
    make = lambda key, shape, std: {
        "kernel": jax.random.normal(key, shape, jnp.float32) * std,
        "bias": jnp.zeros(shape[1:]),
    }
    head = {"out": make(two, (width, num_labels), (width + 1) ** -0.5)}
    if (inputs := dense_inputs(kind, width)) is not None:
        head["dense"] = make(one, (inputs, width), std)
    return head


def dense_inputs(kind: str, width: int) -> int | None:
    """How many values the head's first map reads; None if it has none."""
    _check(kind)
    return {"mean": None, "pairrm": 2 * width}.get(kind, width)


def sequence_score(head: dict, kind: str, hidden, mask) -> jax.Array:
    """Scores of whole sequences.

    Args:
      kind: "cls_tanh" (BERT, RoBERTa) and "cls_gelu" (DeBERTa) read the first real token, where [CLS] stands whatever
        the padding; "mean" is the mean over real tokens.
      hidden: [B, T, D]; entries outside the mask are never read, NaN included.
      mask: [B, T], 1 where the token counts. A row without tokens scores as an all-zero mean, or its first slot.
    Returns: [B, K] float32; logits of classes, or reward units.
    """
    _check(kind)
    if kind == "pairrm":
        raise ValueError("a PairRM head compares two candidates of one input: call pair_scores.")
    if kind == "mean":
        inside = mask[..., None] > 0
        total = jnp.where(inside, hidden.astype(jnp.float32), 0.0).sum(1)
        return _linear(head["out"], total / jnp.maximum(mask.sum(-1), 1)[:, None])
    return _two_maps(head, kind, _state_at(hidden, jnp.argmax(mask > 0, axis=1)))


def pair_scores(head: dict, hidden, ids, mask, marker_ids: tuple[int, int, int]) -> jax.Array:
    """PairRM's score of each of two candidates that stand in one input. Jiang et al. 2023, arXiv:2306.02561.

    Args:
      hidden: [B, T, D] of `[CLS] <|source|> x [SEP] [CLS] <|candidate1|> A [SEP] [CLS] <|candidate2|> B [SEP]`.
      marker_ids: of those three tokens. The first of each inside the mask is read; a row without one scores NaN.
    Returns: [B, 2, K] float32. The first candidate is better by the difference; swapping the two does not exactly
      swap the scores, so callers average both orders.
    """
    states, found = [], True
    for marker in marker_ids:
        here = (ids == marker) & (mask > 0)
        states.append(_state_at(hidden, jnp.argmax(here, axis=1)))
        found = found & here.any(1)
    source, *candidates = states
    scores = [_two_maps(head, "pairrm", jnp.concatenate([source, own], axis=-1)) for own in candidates]
    return jnp.where(found[:, None, None], jnp.stack(scores, axis=1), jnp.nan)


def logical_axes(head: dict) -> dict:
    """Names for parallel/sharding.py: the input axes are split, as the backbone's are."""
    return {part: {"kernel": ("embed", None), "bias": (None,)} for part in head}


def _two_maps(head, kind, state):
    return _linear(head["out"], ACTIVATIONS[_BETWEEN[kind]](_linear(head["dense"], state)))


def _linear(part, x):
    y = jnp.einsum("...d,dk->...k", x.astype(jnp.float32), part["kernel"].astype(jnp.float32))
    return y + part["bias"].astype(jnp.float32).reshape((1,) * (y.ndim - 1) + (-1,))


def _state_at(hidden_BTD, index_B):
    return jnp.take_along_axis(hidden_BTD, index_B[:, None, None], axis=1)[:, 0]


def _check(kind):
    if kind not in HEAD_KINDS:
        raise ValueError(f"head kind {kind!r}; expected one of {', '.join(HEAD_KINDS)}.")
