"""How long the parts of a step take on the device, found without making the loop wait for it.

A thread of its own waits for what each part puts out, in the order in which the parts were begun, and notes when it was
there. Knows no algorithm, and nothing of what the parts compute."""

import threading
import time
from concurrent.futures import Future
from queue import SimpleQueue

import jax


class Parts:
    """Of one step, the parts in their order."""

    def __init__(self, queue: SimpleQueue):
        self.outputs: dict[str, list] = {}  # by the name of the part; one entry a mark
        self._queue, self._waits = queue, []
        self._put("other", time.monotonic())

    def mark(self, name: str, outputs=()) -> None:
        """A part that is over once `outputs` are there, a pytree; without any, once all before it are. Never of arrays
        that are donated: these cannot be waited for, and the part is left out. Parts of one name add up."""
        self.outputs.setdefault(name, []).append(outputs)
        self._put(name, outputs)

    def seconds(self) -> dict[str, float]:
        """{"time/NAME": seconds}, parts waited for. From when what came before was done, of this step or the one before
        (or, where the device had nothing to do, when the step began) to when the part was; so work of the host is in
        the part that waits for it. time/other: how long the device was idle before the step began; not of the first
        step, before which there is none."""
        total = {}
        for name, done in self._waits:
            took = done.result()
            if took is not None:
                total[f"time/{name}"] = total.get(f"time/{name}", 0.0) + took
        return total

    def _put(self, name, what):
        done = Future()
        self._waits.append((name, done))
        self._queue.put((done, name, what))


class _Untimed:
    def mark(self, name: str, outputs=()) -> None:
        pass


UNTIMED = _Untimed()  # in the place of Parts


class Clock:
    """In a `with`: parts = clock.begin() at the start of each step, then parts.mark(...), and parts.seconds() late."""

    def __init__(self):
        self._queue, self.current = SimpleQueue(), UNTIMED  # current: the parts of the step begun last
        self._thread = threading.Thread(target=_notice, args=(self._queue,), daemon=True, name="clock")

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._queue.put(None)
        self._thread.join(timeout=1.0)  # at once, unless the device is still at work on what nobody will read

    def begin(self) -> Parts:
        self.current = Parts(self._queue)
        return self.current


def _notice(queue: SimpleQueue) -> None:
    """Fulfils, one after the other, the futures that the parts put into the queue; None ends it."""
    free = None  # when the device had done all that was asked of it
    while (one := queue.get()) is not None:
        future, name, what = one
        if name == "other":
            future.set_result(None if free is None else max(what - free, 0.0))
            free = what if free is None else max(free, what)
        else:
            try:
                jax.block_until_ready(what)
                now = time.monotonic()
                future.set_result(now - free)
                free = now
            except Exception:  # donated, or what made it failed: the loop hears of that where it reads it
                future.set_result(None)
        del one, future, what  # nothing is kept while waiting
