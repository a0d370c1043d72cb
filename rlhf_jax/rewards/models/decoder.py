"""A reward model as published: a Llama-family decoder with a linear head, its own tokenizer and chat template.

Reads Hugging Face's LlamaForSequenceClassification, and what experiments.export writes of a reward model of ours."""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.checkpoints import huggingface
from rlhf_jax.data.tokenization import load_tokenizer
from rlhf_jax.errors import InputError
from rlhf_jax.models import roles
from rlhf_jax.models.llama import Llama
from rlhf_jax.rewards.models import reading
from rlhf_jax.rewards.models.remembering import Remembered


class Decoder:
    """Scores at the end token of each completion. Prompts are read once, whatever the number of completions."""

    least = 1

    def __init__(
        self,
        path: str,
        *,
        output: int = 0,
        template: bool = False,
        max_tokens: int = 0,
        batch_size: int = 8,
        mesh=None,
    ):
        """
        Args:
          path: directory or hub id. output: which of the head's outputs is the reward, from 0.
          template: put plain prompts through the chat template, as published models want them; messages always are.
          max_tokens: of prompt and completion together; the beginning of a longer prompt is cut. 0: the model's most.
          batch_size: prompts.
        Raises: InputError for a checkpoint without a head, or an output that it does not have.
        """
        config, params, head, pooling = huggingface.load_scorer(path, mesh=mesh)
        outputs = head.shape[1]
        if not 0 <= output < outputs:
            raise InputError(
                f"the reward model {path} has {outputs} outputs; output={output} is none of them (from 0)."
            )
        self._tokenizer = load_tokenizer(huggingface.resolve(path), config.eos_ids)
        self._tokenizer.check_vocabulary(config.vocab_size)
        self._template, self._max_tokens = (
            template,
            min(max_tokens or config.max_position, config.max_position),
        )
        self._how = dict(batch_size=batch_size, pad_id=self._tokenizer.pad_id, mesh=mesh)
        model = Llama(config)
        role = roles.Role(head={"kernel": head[:, output], "bias": jnp.zeros(())}, pooling=pooling)
        self._weights = params, role
        self._forward = jax.jit(lambda weights, batch: roles.scores(model, *weights, batch))
        self._remembered = Remembered(self._answer)

    def score(self, prompts, completions) -> np.ndarray:
        questions = [
            (prompt, text) for prompt, texts in zip(prompts, completions, strict=True) for text in texts
        ]
        return self._remembered(questions).reshape(len(prompts), -1)

    def _answer(self, questions):
        of_prompt = {}
        for n, (prompt, _) in enumerate(questions):
            of_prompt.setdefault(str(prompt), []).append(n)
        groups, numbers = [], list(of_prompt.values())
        for group in numbers:
            texts = [self._tokenizer.encode_completion(questions[n][1], self._max_tokens // 2, allow_truncation=True)
                     for n in group]  # fmt: skip
            prompt = questions[group[0]][0]
            if self._template and isinstance(prompt, str):
                prompt = [{"role": "user", "content": prompt}]
            room = self._max_tokens - max(map(len, texts))
            groups.append((self._tokenizer.encode_prompt(prompt, room), texts))
        found = reading.groups(lambda batch: self._forward(self._weights, batch), groups, **self._how)
        answers = np.zeros(len(questions), np.float32)
        for group, scores in zip(numbers, found, strict=True):
            answers[group] = scores
        return answers
