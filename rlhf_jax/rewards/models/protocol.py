"""What every model that judges text has in common."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

Prompt = str | list[dict]  # text, or messages [{"role": ..., "content": ...}]


class TextReward(Protocol):
    least: int  # completions of a prompt that it needs at once: 2 where it compares them

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[str]]) -> np.ndarray:
        """B prompts with G completions each: [B, G] float32, in the units of the model.

        NaN where it could not give one. Depends on nothing but the texts of the group.
        """
