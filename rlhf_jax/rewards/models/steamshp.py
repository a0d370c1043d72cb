"""SteamSHP: a Flan-T5 that was taught to say which of two responses to a post is better.

Ethayarajh et al. 2022, "Understanding dataset difficulty with V-usable information", and the model card of
stanfordnlp/SteamSHP-flan-t5-xl, whose input this is. The answer is the token A or B at the first decoder step."""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.checkpoints.encoders import load_t5
from rlhf_jax.data.formats import readable
from rlhf_jax.errors import InputError
from rlhf_jax.models.t5 import T5
from rlhf_jax.rewards.models import comparing, reading
from rlhf_jax.rewards.models.pairs_of_texts import SequenceTokenizer
from rlhf_jax.rewards.models.remembering import Remembered


def wording(prompt, first: str, second: str) -> tuple[str, str, str, str]:
    """What is read: the post, both responses, the question. Texts without line ends, as the model was trained on."""
    post, first, second = (" ".join(text.split()) for text in (readable(prompt), first, second))
    question = "\n\n Which response is better? RESPONSE"
    return f"POST: {post}", f"\n\n RESPONSE A: {first}", f"\n\n RESPONSE B: {second}", question


class Question:
    """What the network reads of two responses and what it says of them, the same in training and at use."""

    def __init__(self, config, tokenizer: SequenceTokenizer, max_tokens: int = 512):
        """Raises: InputError if A and B are not one token each."""
        self._model, self._tokenizer, self._max_tokens = T5(config), tokenizer, max_tokens
        letters = [tokenizer.plain(letter)[-1:] for letter in "AB"]
        if letters[0] == letters[1] or not all(letters):
            raise InputError("this T5's tokenizer has no tokens of their own for A and B; use another.")
        self._letters = jnp.array([one for (one,) in letters])

    def input(self, prompt, first: str, second: str) -> tuple[list[int], list[int]]:
        """(ids, type ids)."""
        most = self._max_tokens
        post, first, second, question = map(self._tokenizer.plain, wording(prompt, first, second))
        rest = [*first[: most // 3], *second[: most // 3], *question, self._tokenizer.eos_id]
        ids = [*post[max(0, len(post) - (most - len(rest))) :], *rest]
        return ids, [0] * len(ids)

    def answers(self, params: dict, ids, mask, type_ids=None):
        """[N, 2] float32, nats, of inputs [N, T]: log-probability of A and of B, among all tokens."""
        logits = self._model.apply({"params": params}, ids, mask, method=T5.first_step_logits)
        return jax.nn.log_softmax(logits.astype(jnp.float32))[:, self._letters]


class SteamSHP:
    least = 1

    def __init__(self, path: str, *, max_tokens: int = 512, batch_size: int = 8, mesh=None):
        """
        Args:
          path: directory or hub id of a T5 or Flan-T5.
          max_tokens: of an input, as it was trained; a response has at most a third of it, the post's beginning is cut.
          batch_size: comparisons.
        Raises: InputError if A and B are not one token each.
        """
        config, params = load_t5(path, mesh=mesh)
        tokenizer = SequenceTokenizer(path)
        self.question = Question(config, tokenizer, max_tokens)

        @jax.jit
        def forward(params, batch):
            found = self.question.answers(params, *batch)
            return jax.nn.sigmoid(found[:, 0] - found[:, 1])

        how = dict(batch_size=batch_size, pad_id=tokenizer.pad_id, mesh=mesh)

        def answer(questions):
            asked = [self.question.input(*question) for question in questions]
            return reading.sequences(lambda batch: forward(params, batch), asked, **how)

        self._remembered = Remembered(answer)

    def score(self, prompts, completions) -> np.ndarray:
        """The mean probability, over the others of its prompt, of being called better; both orders averaged.

        A completion without others is compared with a full stop, as the model card does it.
        """
        if len(completions[0]) == 1:
            asked = [(prompt, text, ".") for prompt, (text,) in zip(prompts, completions, strict=True)]
            return self._remembered(asked).reshape(-1, 1)
        return comparing.against_the_others(self._remembered, prompts, completions, even=0.5)
