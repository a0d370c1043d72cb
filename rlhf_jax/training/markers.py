"""The text of each reward quantile, in tokens that the tokenizer has: what a policy reads after a prompt to know how
good its completion is to be. Knows no algorithm."""

import dataclasses

import numpy as np

from rlhf_jax.data.tokenization import TextTokenizer
from rlhf_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Markers:
    texts: tuple[str, ...]  # of each quantile, the worst first
    ids: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tokenizer: TextTokenizer, template: str, number: int, room: int) -> "Markers":
        """template: a text in which {} is the quantile, 1 to `number`. room: tokens that the context has for it.

        Raises: InputError if two quantiles have the same tokens, or the context is too short for them.
        """
        texts = tuple(template.replace("{}", str(k + 1)) for k in range(number))
        ids = tuple(tuple(tokenizer.encode_completion(text, add_eos=False)) for text in texts)
        if not all(ids) or len(set(ids)) < number:
            raise InputError(
                f"config.quark.reward_token is {template!r}; this tokenizer does not tell its {number} quantiles "
                "apart. Give a text with {} in it, in the place of which stands the number of the quantile."
            )
        made = cls(texts, ids)
        if made.length > room:
            raise InputError(
                f"config.quark.reward_token takes {made.length} tokens, and config.data.prompt_tokens and "
                f"completion_tokens leave {max(room, 0)} of the model's context. Lower one of these."
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
