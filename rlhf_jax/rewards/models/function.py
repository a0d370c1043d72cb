"""A model that judges text, as the run sees it: loaded when it is first asked, its failures counted and reported."""

from collections.abc import Callable, Sequence

import numpy as np

from rlhf_jax.checkpoints import huggingface
from rlhf_jax.errors import InputError
from rlhf_jax.rewards import specs
from rlhf_jax.rewards.models.catalogue import LEAST


class ModelFunction:
    """What functions.RewardFunction is for rules and functions. `least`: completions of a prompt that it needs."""

    required = ()  # fields of the prompts' records

    def __init__(self, spec: str, log: Callable[[str], None], failure_score: float = 0.0, mesh=None):
        """Args as RewardFunction's. Raises: InputError for a bad spec; a checkpoint is read at the first score."""
        self._spec, self._log, self._failure, self._mesh = specs.parse(spec), log, failure_score, mesh
        self.name, self.least = self._spec.name, LEAST.get(self._spec.name, 1)
        self._model = None

    def check(self) -> None:
        """Raises: InputError if its checkpoint is not there. Fetches one that is on the hub."""
        path = self._spec.load.keywords["path"]
        if path != "smollm2":
            huggingface.resolve(path)

    def score(self, prompts: Sequence, completions: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
        """Scores of B prompts with G completions each, flat: (scores [B * G] float32, failed [B * G] bool).

        Raises: InputError if there are fewer than `least` completions, or the checkpoint cannot be read.
        """
        if len(completions[0]) < self.least:
            raise InputError(
                f"reward {self._spec.text!r} compares the completions of a prompt; there is {len(completions[0])}, "
                f"and it needs {self.least} or more."
            )
        if self._model is None:
            self._model = self._spec.load(mesh=self._mesh)
        scores = np.asarray(self._model.score(prompts, completions), np.float32).ravel()
        failed = ~np.isfinite(scores)
        if failed.any():
            first = int(np.flatnonzero(failed)[0]) // len(completions[0])
            self._log(
                f"reward {self.name}: {failed.sum()} of {failed.size} scores are not finite, and count as "
                f"{self._failure:g}. First prompt {prompts[first]!r:.100}"
            )
        return np.where(failed, np.float32(self._failure), scores), failed

    def close(self) -> None:
        """Nothing runs on its own."""
