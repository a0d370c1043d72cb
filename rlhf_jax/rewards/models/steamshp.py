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

QUESTION = "\n\n Which response is better? RESPONSE"


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
        model, self._tokenizer = T5(config), SequenceTokenizer(path)
        self._max_tokens = max_tokens
        letters = [self._tokenizer.plain(letter)[-1:] for letter in "AB"]
        if letters[0] == letters[1] or not all(letters):
            raise InputError(f"{path}: the tokenizer has no tokens of their own for A and B.")
        columns = jnp.array([one for (one,) in letters])

        @jax.jit
        def forward(params, batch):
            ids, mask, _ = batch
            logits = model.apply({"params": params}, ids, mask, method=T5.first_step_logits)[:, columns]
            return jax.nn.sigmoid((logits[:, 0] - logits[:, 1]).astype(jnp.float32))

        how = dict(batch_size=batch_size, pad_id=self._tokenizer.pad_id, mesh=mesh)

        def answer(questions):
            asked = [self._input(*question) for question in questions]
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

    def _input(self, prompt, first, second):
        plain, most = self._tokenizer.plain, self._max_tokens
        # Texts without line ends, as the model was trained on.
        post, first, second = (" ".join(text.split()) for text in (readable(prompt), first, second))
        first, second = (
            plain(f"\n\n RESPONSE {name}: {text}")[: most // 3]
            for name, text in (("A", first), ("B", second))
        )
        rest = [*first, *second, *plain(QUESTION), self._tokenizer.eos_id]
        post = plain(f"POST: {post}")
        ids = [*post[max(0, len(post) - (most - len(rest))) :], *rest]
        return ids, [0] * len(ids)
