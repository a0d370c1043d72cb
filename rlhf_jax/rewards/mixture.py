"""Several rewards as one: each normalised, clipped and weighted, then added up; each logged as it came.

"Normalise each, then sum" (`normalise` here; GDPO, arXiv:2601.05242, takes group here and then the batch over the
total) and "sum, then normalise" (none here, the algorithm's own after it) differ by options alone. Knows scores, not
where they come from."""

import dataclasses
import math
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.errors import InputError
from rlhf_jax.losses.masking import masked_mean

NORMALISATIONS = ("none", "batch", "group")
EPSILON = 1e-4  # added to a deviation, as in losses.advantages.group_relative


@dataclasses.dataclass(frozen=True)
class Component:
    """How one reward enters the sum."""

    name: str  # its metrics are reward/NAME and reward/NAME_std
    weight: float = 1.0  # per unit after normalising and clipping; 0: measured, never trained on
    normalise: str = (
        "none"  # batch: less the mean, over the deviation, of all completions; group: of each prompt's
    )
    clip_low: float = -math.inf  # in the units after normalising
    clip_high: float = math.inf

    def __post_init__(self):
        where = f"reward {self.name!r}: "
        if not math.isfinite(self.weight):
            raise InputError(f"{where}weight is {self.weight}; expected a finite number.")
        if self.normalise not in NORMALISATIONS:
            raise InputError(
                f"{where}normalise is {self.normalise!r}; expected one of {', '.join(NORMALISATIONS)}."
            )
        if not self.clip_low < self.clip_high:  # NaN fails too
            raise InputError(
                f"{where}clip_low {self.clip_low} is not below clip_high {self.clip_high}. Set either apart."
            )


def mix(
    components: Sequence[Component], scores: Sequence[jax.Array], mask: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted sum of the rewards of G completions for each of B prompts.

    Args:
      components: C of them, of different names.
      scores: C arrays [B, G] (or one [C, B, G]), each in its own reward units. What is not finite could not be scored.
      mask: [B, G], 1 where the completion counts in statistics; None: everywhere.
    Returns: (total [B, G] float32, NaN where a component of weight other than 0 is not finite; metrics: reward/NAME
      and reward/NAME_std, mean and deviation (over n) of the scores as given, finite ones alone).
    Raises: ValueError if the numbers of components and scores differ or a name comes twice.
    """
    names = [one.name for one in components]
    if len(set(names)) != len(names):
        raise ValueError(f"rewards {', '.join(names)}: each needs a name of its own.")
    total, metrics = jnp.zeros(scores[0].shape, jnp.float32), {}
    for one, raw in zip(components, scores, strict=True):
        chex.assert_rank(raw, 2)
        raw = jnp.asarray(raw, jnp.float32)
        chex.assert_equal_shape([raw, total] if mask is None else [raw, total, mask])
        finite = jnp.isfinite(raw)
        counted = finite if mask is None else finite & (mask > 0)
        metrics[f"reward/{one.name}"] = masked_mean(raw, counted)
        spread = centred(raw, counted, axis=None)
        metrics[f"reward/{one.name}_std"] = jnp.sqrt(masked_mean(jnp.square(spread), counted))
        if one.weight:
            score = jnp.clip(normalised(raw, counted, one.normalise), one.clip_low, one.clip_high)
            total = total + one.weight * jnp.where(finite, score, jnp.nan)
    return total, metrics


def normalised(scores: jax.Array, counted: jax.Array, over: str) -> jax.Array:
    """[B, G]: scores less their mean, over their deviation (over n - 1) plus 1e-4, of the batch or of each group.

    Args:
      counted: [B, G] bool, what enters mean and deviation; all of it finite. over: of NORMALISATIONS.
    Equal scores give exactly 0, and so does one alone. A score that is not counted is measured by those that are.
    """
    if over == "none":
        return scores
    axis = 1 if over == "group" else None
    spread = centred(scores, counted, axis)
    squares = jnp.where(counted, jnp.square(spread), 0.0).sum(axis, keepdims=True)
    count = counted.sum(axis, keepdims=True)
    deviation = jnp.sqrt(squares / jnp.maximum(count - 1, 1))
    return spread / jnp.broadcast_to(deviation + EPSILON, spread.shape)


def centred(scores: jax.Array, counted: jax.Array, axis: int | None) -> jax.Array:
    """scores less the mean of those counted along `axis` (None: of all), exactly 0 where these are equal."""
    # First less one of them: the mean of three 0.1 need not be 0.1 in float32.
    largest = jnp.where(counted, scores, -jnp.inf).max(axis, keepdims=True)
    shifted = scores - jnp.broadcast_to(jnp.where(jnp.isfinite(largest), largest, 0.0), scores.shape)
    mean = jnp.expand_dims(masked_mean(shifted, counted, axis), (0, 1) if axis is None else axis)
    return shifted - jnp.broadcast_to(mean, scores.shape)
