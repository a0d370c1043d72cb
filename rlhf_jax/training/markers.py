"""The text of each reward quantile, in tokens that the tokenizer has: what a policy reads after a prompt to know how
good its completion is to be. Knows no algorithm."""

import dataclasses

import numpy as np

from rlhf_jax.errors import InputError
from rlhf_jax.training.run import Run


@dataclasses.dataclass(frozen=True)
class Markers:
    texts: tuple[str, ...]  # of each quantile, the worst first
    ids: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, run: Run, template: str, number: int) -> "Markers":
        """template: a text in which {} is the quantile, 1 to `number`.

        Raises: InputError if two quantiles have the same tokens, or the context is too short for them.
        """
        texts = tuple(template.replace("{}", str(k + 1)) for k in range(number))
        ids = tuple(tuple(run.tokenizer.encode_completion(text, add_eos=False)) for text in texts)
        if not all(ids) or len(set(ids)) < number:
            raise InputError(
                f"config.quark.reward_token is {template!r}; this tokenizer does not tell its {number} quantiles "
                "apart. Give a text with {} in it, in the place of which stands the number of the quantile."
            )
        made = cls(texts, ids)
        longest = run.prompt_length + made.length + run.config.data.completion_tokens + 1
        if longest > run.model.config.max_position:
            raise InputError(
                f"config.quark.reward_token takes {made.length} tokens, which with the prompt's {run.prompt_length} "
                f"and config.data.completion_tokens {run.config.data.completion_tokens} + 1 is more than the model's "
                f"context of {run.model.config.max_position}."
            )
        return made

    @property
    def best(self) -> tuple[int, ...]:
        return self.ids[-1]

    @property
    def length(self) -> int:
        return max(map(len, self.ids))

    def padded(self, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, mask) [K, M] int32, padded on the right."""
        ids = np.full((len(self.ids), self.length), pad_id, np.int32)
        mask = np.zeros_like(ids)
        for row, one in enumerate(self.ids):
            ids[row, : len(one)], mask[row, : len(one)] = one, 1
        return ids, mask
