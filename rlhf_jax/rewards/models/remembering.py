"""A function of texts that computes each answer once."""

import collections
import json
from collections.abc import Callable, Hashable, Sequence

import numpy as np

CAPACITY = 2**17  # answers; older ones that nobody asked for again are forgotten


class Remembered:
    """Wraps questions -> [N] answers. Questions are tuples of texts (or messages); those it knows are not asked."""

    def __init__(self, answer: Callable, capacity: int = CAPACITY):
        self._answer, self._capacity, self._known = answer, capacity, collections.OrderedDict()

    def __call__(self, questions: Sequence[tuple]) -> np.ndarray:
        """[N] float32, in order; a question that stands there twice is asked once."""
        keys = [_key(question) for question in questions]
        new = {key: question for key, question in zip(keys, questions, strict=True) if key not in self._known}
        if new:
            answers = np.asarray(self._answer(list(new.values())), np.float32)
            self._known |= zip(new, answers, strict=True)
        found = np.array([self._known[key] for key in keys], np.float32)
        for key in keys:
            self._known.move_to_end(key)
        while len(self._known) > self._capacity:
            self._known.popitem(last=False)
        return found


def _key(question: tuple) -> Hashable:
    return question if all(isinstance(part, str) for part in question) else json.dumps(question)
