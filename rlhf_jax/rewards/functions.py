"""A reward on text as the run sees it: one score a completion, whatever the function does.

A function that raises, hangs, dies or returns nonsense costs the samples that made it do so `failure_score`, and is
reported with them. Knows nothing of algorithms, groups or weights."""

import math
import time
from collections.abc import Callable

import numpy as np

from rlhf_jax.errors import InputError
from rlhf_jax.rewards import specs, worker
from rlhf_jax.rewards.process import Lost, WorkerProcess

REPORTED = 5  # failures that are spelt out, a batch
MOST_RESTARTS = 8  # a batch; what is left of it then counts as failed
SHARE = 0.25  # of the time left, that one sample alone may take


class RewardFunction:
    """Calls the reward named by a spec (specs.py): rules that cannot hang here, all else in a process of its own.

    The function gets by name those columns that its signature has (all, if it has **fields): `prompts`,
    `completions` and the fields of the prompts' records. `required` names those that it cannot do without. A batch
    that failed as a whole is scored again one sample at a time, so that only the sample at fault fails; a function
    must not depend on its neighbours for its scale. Use it in a `with`, or close() it; its process ends with the run
    in any case, also if the run is killed.
    """

    def __init__(
        self,
        spec: str,
        log: Callable[[str], None],
        timeout_seconds: float = 60.0,
        failure_score: float = 0.0,
    ):
        """Starts the worker, so that a function that cannot be imported ends the run here.

        Args:
          log: called with one line a failure (at most a few a batch, then a count), with its sample.
          timeout_seconds: for a batch; one that failed gets as much again for its samples one by one. Does not bind
            rules that run in process, which take no time.
          failure_score: reward units, of a sample that could not be scored; NaN takes it out of loss and statistics.
        Raises: InputError for a bad spec or value, or a function that cannot be imported.
        """
        if not 0 < timeout_seconds < math.inf:
            raise InputError(f"reward {spec!r}: timeout_seconds is {timeout_seconds}; expected more than 0.")
        if math.isinf(failure_score):
            raise InputError(f"reward {spec!r}: failure_score is {failure_score}; expected a number, or nan.")
        parsed = specs.parse(spec)
        self.name, self._log = parsed.name, log
        self._timeout, self._failure = float(timeout_seconds), float(failure_score)
        if parsed.in_process:
            self._process, self._function = None, parsed.load()
            self.required, self._accepted = worker.arguments(self._function)
        else:
            self._process = WorkerProcess(parsed.text)
            self.required, self._accepted = self._loaded(spec)

    def _loaded(self, spec: str):
        """(names the function must be given, names it may be given; None: any), once its worker is up."""
        try:
            ready = self._process.start()
        except Lost as error:
            raise InputError(
                f"reward {spec!r} cannot be loaded: {error}. Correct the function or its path."
            ) from None
        if ready["accepted"] is not None and "completions" not in ready["accepted"]:
            self.close()
            raise InputError(
                f"reward {spec!r}: the function takes {', '.join(ready['accepted']) or 'nothing'}; it is called by "
                "name, as score(prompts=..., completions=...). Give it an argument `completions`."
            )
        return ready["required"], ready["accepted"]

    def score(
        self, prompts: list[str], completions: list[str], fields: dict[str, list] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores N completions, in order.

        Args:
          prompts, completions: N texts each. fields: columns of the prompts' records, N values each.
        Returns: (scores [N] float32, reward units; failed [N] bool, True where the score is `failure_score`). Takes
          at most 2 * timeout_seconds, and a start of the worker for each sample that hung or killed it.
        Raises: InputError if the function needs a field that the records lack, ValueError if lengths differ.
        """
        columns = self._columns({**(fields or {}), "prompts": prompts, "completions": completions})
        batch_error, entries = self._entries(columns, len(completions))
        failed = np.array([isinstance(entry, str) for entry in entries], bool)
        scores = np.array(
            [self._failure if isinstance(entry, str) else entry for entry in entries], np.float32
        )
        for n in np.flatnonzero(failed)[:REPORTED]:
            self._log(
                f"reward {self.name}: {entries[n]}; the sample counts as {self._failure:g}. "
                f"Prompt {_short(prompts[n])}, completion {_short(completions[n])}"
            )
        if failed.sum() > REPORTED:
            self._log(
                f"reward {self.name}: {failed.sum()} of {failed.size} samples of this batch failed in all, "
                f"each counts as {self._failure:g}"
            )
        if batch_error and not failed.any():
            self._log(
                f"reward {self.name}: {batch_error}, for a batch of {failed.size}; scored one by one, none failed. "
                f"First prompt {_short(prompts[0])}, completion {_short(completions[0])}"
            )
        return scores, failed

    def close(self) -> None:
        """Ends the worker; more than once does no harm."""
        if self._process is not None:
            self._process.stop()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _columns(self, columns: dict[str, list]) -> dict[str, list]:
        """Those that the function takes, all of one length."""
        for name in self.required:
            if name not in columns:
                raise InputError(
                    f"reward {self.name} needs {name!r}, which the prompts' records do not have; they give "
                    f"{', '.join(sorted(columns))}. Add the field, or take another reward."
                )
        sizes = {name: len(column) for name, column in columns.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"reward {self.name}: columns of different lengths: {sizes}")
        return {k: v for k, v in columns.items() if self._accepted is None or k in self._accepted}

    def _entries(self, columns, size) -> tuple[str | None, list[float | str]]:
        """(what was wrong with the batch as a whole, one score or reason a sample)."""
        if not size:
            return None, []
        answer = self._ask(columns, self._timeout)
        if "scores" in answer:
            return None, answer["scores"]
        error = answer["error"]
        return error, [error] if size == 1 else self._one_by_one(columns, size, error)

    def _one_by_one(self, columns, size, error) -> list[float | str]:
        deadline, restarts, entries = time.monotonic() + self._timeout, 0, []
        for n in range(size):
            left = deadline - time.monotonic()
            if left <= 0 or restarts == MOST_RESTARTS:
                entries.append(f"no time left to score it alone, after the batch failed ({error})")
                continue
            answer = self._ask(
                {k: v[n : n + 1] for k, v in columns.items()}, max(SHARE, 1 / (size - n)) * left
            )
            restarts += "lost" in answer
            entries.append(answer["scores"][0] if "scores" in answer else answer["error"])
        return entries

    def _ask(self, columns, limit) -> dict:
        if self._process is None:
            return worker.evaluate(self._function, columns)
        try:
            return self._process.ask(columns, limit)
        except Lost as error:
            return {"error": str(error), "lost": True}
        except (TypeError, ValueError, RecursionError) as error:
            return {"error": f"the sample's fields cannot be sent to the worker: {error}"}


def _short(text: str, most: int = 100) -> str:
    """Quoted and on one line, control characters escaped."""
    return repr(text if len(text) <= most else text[:most] + "...")
