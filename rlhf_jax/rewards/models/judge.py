"""A language model as the judge (RLAIF): which of two answers does it prefer, read from the logits of two labels.

Lee et al. 2023, arXiv:2309.00267: no text is sampled; P(A) is the softmax over the two labels, and both orders are
asked and averaged, since judges favour a place. Any decoder will do; how well it judges is its own affair."""

import string

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data.formats import readable
from rlhf_jax.data.tokenization import TextTokenizer
from rlhf_jax.errors import InputError
from rlhf_jax.models import roles
from rlhf_jax.models.llama import Llama, unembedding
from rlhf_jax.rewards.models import comparing, reading
from rlhf_jax.rewards.models.remembering import Remembered

QUESTION = """Consider the request and two responses to it. {principle}

Request: {prompt}

Response A: {first}

Response B: {second}
"""
PRINCIPLE = "Which response is more helpful, honest and harmless?"
LABELS = ("A", "B")


class Judge:
    least = 2

    def __init__(
        self,
        model: Llama,
        params: dict,
        tokenizer: TextTokenizer,
        *,
        principle: str = PRINCIPLE,
        template: bool = False,
        max_tokens: int = 0,
        batch_size: int = 8,
        mesh=None,
    ):
        """
        Args:
          principle: the question, in words.
          template: ask in the chat format of the tokenizer.
          max_tokens: of one question; the beginning of a longer one is cut. 0: the model's most.
          batch_size: questions.
        Raises: InputError if no token tells the two labels apart.
        """
        self._principle, self._template, self._tokenizer = principle, template, tokenizer
        self._max_tokens = min(max_tokens or model.config.max_position, model.config.max_position) - 1
        space = "" if template else " "
        one, two = (tokenizer.encode_completion(space + label, add_eos=False) for label in LABELS)
        shared = next((i for i, pair in enumerate(zip(one, two, strict=False)) if pair[0] != pair[1]), None)
        if shared is None:
            raise InputError(
                "the judge's tokenizer does not tell the labels A and B apart; use another model."
            )
        labels, self._lead = (one[shared], two[shared]), one[:shared]
        self._label = labels[0]
        self._how = dict(batch_size=batch_size, pad_id=tokenizer.pad_id, mesh=mesh)
        self._params, columns = params, jnp.array(labels)

        @jax.jit
        def forward(params, batch):
            state = roles.predicting_states(model, params, roles.Role(), batch)[:, :, 0].astype(jnp.float32)
            logits = jnp.einsum("bgd,dk->bgk", state, unembedding(params)[:, columns].astype(jnp.float32))
            return jax.nn.sigmoid(logits[..., 0] - logits[..., 1])

        self._forward = forward
        self._remembered = Remembered(self._answer)

    def score(self, prompts, completions) -> np.ndarray:
        """The share of the other completions of its prompt that each is expected to beat, 0 to 1."""
        return comparing.against_the_others(self._remembered, prompts, completions, even=0.5)

    def prefer(self, prompts, first, second) -> np.ndarray:
        """[N] probability that `first` is better, both orders averaged."""
        there = self._remembered(list(zip(prompts, first, second, strict=True)))
        back = self._remembered(list(zip(prompts, second, first, strict=True)))
        return (there + 1 - back) / 2

    def _answer(self, questions):
        # One token of completion: its own value is not read, only the state that predicts it.
        groups = [(self._question(*question), [[self._label]]) for question in questions]
        found = reading.groups(lambda batch: self._forward(self._params, batch), groups, **self._how)
        return np.concatenate(found)

    def _question(self, prompt, first, second):
        fields = dict(
            principle=self._principle, prompt=readable(prompt), first=first.strip(), second=second.strip()
        )
        text, room = _fill(QUESTION, fields), self._max_tokens - len(self._lead)
        if self._template:
            asked = [{"role": "user", "content": text + "\nAnswer with A or B alone."}]
        else:
            asked = text + "\nThe better response is Response"
        return [*self._tokenizer.encode_prompt(asked, room), *self._lead]


def _fill(template: str, fields: dict[str, str]) -> str:
    """Each {name} once; braces in what is filled in are text."""
    parts = string.Formatter().parse(template)
    return "".join(text + (fields[name] if name else "") for text, name, _, _ in parts)
