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
from rlhf_jax.losses.advantages import group_relative
from rlhf_jax.losses.masking import masked_mean

NORMALISATIONS = ("none", "batch", "group")


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

    def as_it_comes(self) -> "Component":
        """Without normalising, and without a clip that was in the units after it."""
        if self.normalise == "none":
            return self
        return dataclasses.replace(self, normalise="none", clip_low=-math.inf, clip_high=math.inf)

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
        spread = jnp.square(raw - metrics[f"reward/{one.name}"])
        metrics[f"reward/{one.name}_std"] = jnp.sqrt(masked_mean(spread, counted))
        if one.weight:
            score = jnp.clip(normalised(raw, counted, one.normalise), one.clip_low, one.clip_high)
            total = total + one.weight * jnp.where(finite, score, jnp.nan)
    return total, metrics


def normalised(scores: jax.Array, counted: jax.Array, over: str) -> jax.Array:
    """[B, G]: scores less their mean, over their deviation (over n - 1) plus 1e-4, of the batch or of each group.

    Args:
      counted: [B, G] bool, what enters mean and deviation; all of it finite, and all else gets 0. over: of
        NORMALISATIONS.
    Equal scores give exactly 0, and so does one alone.
    """
    if over == "none":
        return scores
    shape = scores.shape if over == "group" else (1, scores.size)
    return group_relative(scores.reshape(shape), weights=counted.reshape(shape)).reshape(scores.shape)
