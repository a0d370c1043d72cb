"""A BERT, RoBERTa or DeBERTa classifier as a reward: prompt and completion in one sequence, one logit read."""

import jax
import numpy as np

from rlhf_jax.checkpoints.encoders import load_encoder, model_of
from rlhf_jax.errors import InputError
from rlhf_jax.models import encoder_heads
from rlhf_jax.rewards.models import reading
from rlhf_jax.rewards.models.pairs_of_texts import SequenceTokenizer
from rlhf_jax.rewards.models.remembering import Remembered


class Sequence:
    """What the network reads of a prompt with a completion and what it says of it, the same in training and at use."""

    def __init__(self, config, tokenizer: SequenceTokenizer, max_tokens: int = 0):
        """max_tokens: of a sequence; 0: the model's most."""
        self._model, self._kind, self._tokenizer = model_of(config), config.head, tokenizer
        # RoBERTa counts positions from 2.
        most = config.max_position - getattr(config, "position_offset", 0)
        self._max_tokens = min(max_tokens or most, most)

    def input(self, prompt, completion: str) -> tuple[list[int], list[int]]:
        """(ids, type ids)."""
        return self._tokenizer.pair(prompt, completion, self._max_tokens)

    def logits(self, params: dict, head: dict, ids, mask, type_ids):
        """[N, K] float32 of sequences [N, T]."""
        hidden = self._model.apply({"params": params}, ids, mask, type_ids)
        return encoder_heads.sequence_score(head, self._kind, hidden, mask)


def reward_of(logits, output: int = -1):
    """[..., K] -> [...]: one output, or (-1) the only one, or of two classes accepted (1) less rejected (0)."""
    if output >= 0 or logits.shape[-1] == 1:
        return logits[..., output]
    return logits[..., 1] - logits[..., 0]


class Encoder:
    least = 1

    def __init__(self, path: str, *, output: int = -1, max_tokens: int = 0, batch_size: int = 16, mesh=None):
        """
        Args:
          path: directory or hub id with the head of a classifier.
          output: which logit is the reward; -1: the only one, or of two classes accepted (1) less rejected (0).
          max_tokens: of a sequence; 0: the model's most. batch_size: sequences.
        Raises: InputError for a checkpoint without a head, or an output that it does not have.
        """
        config, params, head = load_encoder(path, mesh=mesh)
        if head is None or config.head == "pairrm":
            raise InputError(
                f"{path} has no head that scores one completion. Give a sequence classifier (or pairrm:path=... for "
                "PairRM), or train one with config.reward_model.kind=encoder."
            )
        outputs = config.num_labels
        if output >= outputs or (output < 0 and outputs > 2):
            raise InputError(f"{path} has {outputs} outputs; output={output} names none of them (from 0).")
        tokenizer = SequenceTokenizer(path)
        sequence = Sequence(config, tokenizer, max_tokens)
        forward = jax.jit(lambda weights, batch: reward_of(sequence.logits(*weights, *batch), output))
        weights, how = (params, head), dict(batch_size=batch_size, pad_id=tokenizer.pad_id, mesh=mesh)

        def answer(questions):
            asked = [sequence.input(*question) for question in questions]
            return reading.sequences(lambda batch: forward(weights, batch), asked, **how)

        self._remembered = Remembered(answer)

    def score(self, prompts, completions) -> np.ndarray:
        asked = [(prompt, text) for prompt, texts in zip(prompts, completions, strict=True) for text in texts]
        return self._remembered(asked).reshape(len(prompts), -1)
