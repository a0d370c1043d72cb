"""PairRM: both candidates in one input, compared. Jiang et al. 2023, "LLM-Blender", arXiv:2306.02561.

A completion's reward is its mean advantage over the others of its prompt: the tournament of the paper, whose ranking
is by the same sums."""

import jax
import numpy as np

from rlhf_jax.checkpoints.encoders import load_encoder, model_of
from rlhf_jax.data.formats import readable
from rlhf_jax.errors import InputError
from rlhf_jax.models import encoder_heads
from rlhf_jax.rewards.models import comparing, reading
from rlhf_jax.rewards.models.pairs_of_texts import SequenceTokenizer
from rlhf_jax.rewards.models.remembering import Remembered


class Comparison:
    """What the network reads of two candidates and what it says of them, the same in training and at use."""

    def __init__(self, config, tokenizer: SequenceTokenizer, source_tokens=1224, candidate_tokens=412):
        self._model, self._markers, self._tokenizer = model_of(config), config.marker_ids, tokenizer
        self._limits = (source_tokens, candidate_tokens)

    def input(self, prompt, first: str, second: str) -> tuple[list[int], list[int]]:
        """(ids, type ids)."""
        tokenizer, (source, candidate) = self._tokenizer, self._limits
        parts = (
            tokenizer.plain(readable(prompt))[-source:],
            tokenizer.plain(first)[:candidate],
            tokenizer.plain(second)[:candidate],
        )
        ids = []
        for marker, text in zip(self._markers, parts, strict=True):
            ids += [tokenizer.cls_id, marker, *text, tokenizer.sep_id]
        return ids, [0] * len(ids)

    def advantage(self, params: dict, head: dict, ids, mask, type_ids=None):
        """[N] float32 logits of inputs [N, T]: how much better the first candidate is. PairRM reads no types."""
        hidden = self._model.apply({"params": params}, ids, mask)
        scores = encoder_heads.pair_scores(head, hidden, ids, mask, self._markers).mean(-1)
        return scores[:, 0] - scores[:, 1]


class PairRM:
    least = 2

    def __init__(
        self,
        path: str,
        *,
        source_tokens: int = 1224,
        candidate_tokens: int = 412,
        batch_size: int = 8,
        mesh=None,
    ):
        """
        Args:
          path: directory or hub id, `llm-blender/PairRM-hf` or `llm-blender/PairRM`.
          source_tokens, candidate_tokens: the most that is read of a prompt (its end) and of a completion (its start).
          batch_size: comparisons.
        Raises: InputError if it is no PairRM.
        """
        config, params, head = load_encoder(path, mesh=mesh)
        if config.head != "pairrm":
            raise InputError(f"{path} is no PairRM; a classifier is named encoder:path=...")
        tokenizer = SequenceTokenizer(path)
        self.comparison = Comparison(config, tokenizer, source_tokens, candidate_tokens)
        forward = jax.jit(lambda weights, batch: self.comparison.advantage(*weights, *batch))
        weights, how = (params, head), dict(batch_size=batch_size, pad_id=tokenizer.pad_id, mesh=mesh)

        def answer(questions):
            asked = [self.comparison.input(*question) for question in questions]
            return reading.sequences(lambda batch: forward(weights, batch), asked, **how)

        self._remembered = Remembered(answer)

    def score(self, prompts, completions) -> np.ndarray:
        """Logits: the mean over the others of how much better it is than they, both orders averaged."""
        return comparing.against_the_others(self._remembered, prompts, completions, even=0.0)
