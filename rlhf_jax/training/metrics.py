"""What a run writes down while it trains: metrics.jsonl, TensorBoard event files, completions/STAGE.jsonl.

Every line is whole JSON, flushed as it is written, so that a killed run keeps its history. A full disk never
stops training. Knows nothing of losses, models or what the numbers mean."""

import json
import math
import numbers
import os
import time
import warnings

import numpy as np

from rlhf_jax.errors import StorageError

METRICS_FILE = "metrics.jsonl"
RESERVED = ("stage", "step", "time", "nonfinite")
EVENT_FLUSH_SECONDS = 5.0  # flushing an event file waits for the disk, so not at each step


class MetricsWriter:
    """Appends the metrics of one stage to metrics.jsonl and to the event files under tensorboard/STAGE."""

    def __init__(self, workdir, stage, aliases=None, start_step=0, warn=None):
        """Opens both; nothing that fails here or later ends the run.
        Args:
          workdir: directory of the run, made if missing.
          stage: its name; the TensorBoard tags are "STAGE/name".
          aliases: {metric name: second, bare TensorBoard tag}, for dashboards made for other trainers.
          start_step: step this run goes on from; TensorBoard hides what a killed run wrote after it.
          warn: called with one sentence at the first failure; warnings.warn if None.
        """
        self.stage = stage
        self.aliases = dict(aliases or {})
        warn_once = _WarnOnce(warn, "metrics")
        self._lines = _LineFile(os.path.join(workdir, METRICS_FILE), warn_once)
        self._events = _EventFile(os.path.join(workdir, "tensorboard", stage), start_step, warn_once)

    def write(self, step, metrics):
        """One line and one event. Values: anything that float() takes, jax and numpy scalars too.
        Raises: ValueError if a metric has the name of one of the line's own fields."""
        taken = [name for name in RESERVED if name in metrics]
        if taken:
            raise ValueError(f"metric names {taken} are fields of a metrics.jsonl line; rename the metric.")
        now = time.time()
        values = {name: _number(value) for name, value in metrics.items()}
        record = {"stage": self.stage, "step": int(step), "time": round(now, 3), **values}
        self._lines.append(record)
        tags = {f"{self.stage}/{name}": value for name, value in values.items()}
        tags.update({tag: values[name] for name, tag in self.aliases.items() if name in values})
        self._events.append(int(step), now, tags)

    def close(self):
        self._lines.close()
        self._events.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


class CompletionsLog:
    """Appends samples to completions/STAGE.jsonl, to be read beside the curves."""

    def __init__(self, workdir, stage, warn=None):
        path = os.path.join(workdir, "completions", f"{stage}.jsonl")
        self._lines = _LineFile(path, _WarnOnce(warn, "sampled completions"))

    def write(self, step, rows):
        """rows: dicts with prompt, completion, reward, kl and, where known, gold_reward."""
        for row in rows:
            clean = {name: value if isinstance(value, str) else _number(value) for name, value in row.items()}
            self._lines.append({"step": int(step), **clean})

    def close(self):
        self._lines.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def read_metrics(path):
    """The lines of a metrics.jsonl or completions file as dicts, without torn ones; [] if it is missing."""
    if not os.path.exists(path):
        return []
    with open(path, "rb") as file:
        return [record for record in map(_parse, file) if record is not None]


def truncate_after(path, stage, step, later_stages=()):
    """Makes a log agree with a restored checkpoint, so that each (stage, step) is there once.

    Drops lines of `stage` after `step`, all lines of `later_stages`, and torn lines; other stages' lines keep
    their bytes. A line without a stage (completions/STAGE.jsonl) counts as of `stage`. The file is replaced
    as a whole or not at all.
    Returns: how many lines were dropped.
    Raises: StorageError if the file cannot be read or replaced.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        return 0
    try:
        with open(path, "rb") as file:
            lines = file.readlines()
        kept = [line for line in lines if _survives(_parse(line), stage, step, later_stages)]
        if len(kept) < len(lines):
            _replace(path, kept)
    except OSError as error:
        raise StorageError(
            f"{path} could not be cut back to step {step} of stage {stage}: {error}. Checkpoints are not "
            "affected. Free space or mend the permissions, and run the same command again."
        ) from error
    return len(lines) - len(kept)


def _survives(record, stage, step, later_stages):
    if record is None or record.get("stage") in later_stages:
        return False
    return record.get("stage", stage) != stage or record.get("step", 0) <= step


def _replace(path, lines):
    with open(path + ".new", "wb") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".new", path)
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename too must outlive a power cut
    finally:
        os.close(folder)


def _parse(line):
    """A line as a dict; None if it is torn: no newline at its end, or not a JSON object."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _number(value):
    """A Python number. Values of 32 bits or fewer keep the shortest digits that read back the same (0.1, not
    0.10000000149011612): half the file."""
    if isinstance(value, (bool, numbers.Integral)):
        return int(value)
    dtype = getattr(value, "dtype", None)
    if dtype is not None and dtype.itemsize < 8:
        return float(str(np.float32(value)))
    return float(value)


def _finite(record):
    """JSON has no NaN and no infinity: null, and the names under "nonfinite"."""
    bad = [name for name, value in record.items() if isinstance(value, float) and not math.isfinite(value)]
    return {**record, **dict.fromkeys(bad), "nonfinite": bad} if bad else record


class _WarnOnce:
    """The first failure is worth a line; the same one at each step is not."""

    def __init__(self, warn, what):
        self._warn, self._what, self._said = warn, what, False

    def __call__(self, path, error):
        if self._said:
            return
        self._said = True
        message = (
            f"{path}: {self._what} cannot be written ({error}); training goes on without, this is said once."
        )
        if self._warn is None:
            warnings.warn(message, RuntimeWarning, stacklevel=4)
        else:
            self._warn(message)


class _LineFile:
    """A JSON-lines file opened for appending. Each write is tried, so that logging resumes once there is
    space."""

    def __init__(self, path, warn_once):
        self._path, self._warn_once, self._file = path, warn_once, None
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            # Unbuffered: a line is in the file when append() returns, and no half line waits in a buffer.
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - open for as long as the run
            self._torn = self._ends_torn()
        except OSError as error:
            warn_once(path, error)

    def _ends_torn(self):
        """True if a killed run left half a line, to which the next one must not be glued."""
        with open(self._path, "rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return False
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"

    def append(self, record):
        if self._file is None:
            return
        # Text stays readable; half an emoji (a lone surrogate), which UTF-8 cannot hold, becomes a JSON
        # escape.
        text = json.dumps(_finite(record), allow_nan=False, ensure_ascii=False) + "\n"
        line = b"\n" * self._torn + text.encode("utf-8", "backslashreplace")
        try:
            written = self._file.write(line)
        except OSError as error:
            self._warn_once(self._path, error)
            return
        self._torn = written < len(line)  # a disk that fills up takes the beginning of a line
        if self._torn:
            self._warn_once(self._path, "only part of a line fitted")

    def close(self):
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:
                self._warn_once(self._path, error)
            self._file = None


class _EventFile:
    """TensorBoard's file, written in the caller's thread.

    tensorboardX's SummaryWriter hands events to a thread; if the disk fills up that thread dies, its queue
    fills, and the training loop then waits for ever. The writer below it has no thread and raises."""

    def __init__(self, folder, start_step, warn_once):
        self._folder, self._warn_once, self._writer = folder, warn_once, None
        try:
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2, summary_pb2
        except ImportError as error:
            warn_once(folder, error)
            return
        self._event, self._summary, self._log = event_pb2.Event, summary_pb2.Summary, event_pb2.SessionLog
        self._flushed = 0.0
        try:
            os.makedirs(folder, exist_ok=True)
            # The process number: a run restarted within a second must not write over its own file.
            self._writer = EventsWriter(os.path.join(folder, "events"), f".{os.getpid()}.{time.time_ns()}")
            if start_step:
                session = self._log(status=self._log.START)
                self._writer.write_event(
                    self._event(wall_time=time.time(), step=start_step + 1, session_log=session)
                )
            self._writer.flush()
        except OSError as error:
            self._give_up(error)

    def append(self, step, now, tags):
        if self._writer is None:
            return
        summary = self._summary(value=[self._summary.Value(tag=t, simple_value=v) for t, v in tags.items()])
        try:
            self._writer.write_event(self._event(wall_time=now, step=step, summary=summary))
            if time.monotonic() - self._flushed > EVENT_FLUSH_SECONDS:
                self._writer.flush()
                self._flushed = time.monotonic()
        except OSError as error:
            self._give_up(error)  # a reader stops at a torn record, so nothing after it would be seen

    def _give_up(self, error):
        self._warn_once(self._folder, error)
        self._writer = None

    def close(self):
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError as error:
                self._give_up(error)
            self._writer = None
