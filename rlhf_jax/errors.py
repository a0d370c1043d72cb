"""The ways a run may end that are not bugs, each with its exit status.

A message says what is wrong, where (file, line, field, config key) and what to do. Knows nothing of who raises
or who prints."""


class RunError(Exception):
    """Ends a run with one clear message and no traceback. `status` is the process's exit status."""

    status = 1


class InputError(RunError, ValueError):
    """Bad usage, config, data or model file: nothing was started, or nothing already computed is lost."""

    status = 2


class NumericsError(RunError):
    """Stopped by a numerics policy; the last good state is saved."""

    status = 3


class Refused(RunError):
    """Judged unfit to go on with; what was made is saved, and the message says how to go on all the same."""

    status = 3


class StorageError(RunError):
    """A checkpoint could not be written or read; the message names the last good step."""

    status = 74


class Interrupted(RunError):
    """SIGTERM or Ctrl-C: the state is saved, run the same command again."""

    status = 75


class PeerLost(RunError):
    """Another process of the run is gone, or nothing moved within the watchdog's limit: run again."""

    status = 76
