"""One workdir, one run: a lock that names its holder and cannot outlive it.

Knows nothing of what is in the workdir."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time

from rlhf_jax.errors import InputError

FILE = ".lock"
UNSUPPORTED = (
    errno.ENOLCK,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
)  # file systems without flock, some network mounts


class WorkdirLock:
    """Holds workdir/.lock while the block runs.

    The kernel drops the lock when its process ends, SIGKILL included, so a stale file is simply taken over. In a run
    of several jax processes the first one holds it for all.
    Raises: InputError on entry, at once, naming host and pid, if another run holds it.
    """

    def __init__(self, workdir: str):
        self.path = os.path.join(os.path.abspath(workdir), FILE)
        self._descriptor = None
        # A forked child (a data worker, say) shares the lock and may outlive us: it must let go of it.
        os.register_at_fork(after_in_child=self._close)

    def __enter__(self):
        if _speaks_for_the_run():
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                self._take()
            except BaseException:
                self._close()
                raise
        return self

    def __exit__(self, *exception):
        if self._descriptor is not None:
            with contextlib.suppress(OSError):  # a full or vanished disk must not hide why the run ended
                os.ftruncate(self._descriptor, 0)
            self._close()

    def _take(self):
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(self._refusal(self._holder())) from None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            # Second best: believe the file, as far as this host can check it.
            holder = self._holder()
            if holder.get("host") == socket.gethostname() and _is_alive(holder.get("pid")):
                raise InputError(self._refusal(holder)) from None
        record = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        }
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(record).encode(), 0)

    def _holder(self) -> dict:
        """{} if the holder has not written it yet."""
        try:
            holder = json.loads(os.pread(self._descriptor, 4096, 0))
        except ValueError:
            return {}
        return holder if isinstance(holder, dict) else {}

    def _refusal(self, holder: dict) -> str:
        if holder:
            who = f"process {holder.get('pid')} on host {holder.get('host')}, started {holder.get('started')}"
        else:
            who = "another process that has just started"
        return (
            f"{os.path.dirname(self.path)} is in use by {who}. Two runs would overwrite each other's checkpoints. "
            "Wait for it, stop it, or use another --workdir."
        )

    def _close(self):
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _is_alive(pid) -> bool:
    if not isinstance(pid, int) or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # alive, and somebody else's
    return True


def _speaks_for_the_run() -> bool:
    import jax

    # Asked in this order: process_index would start the backend, too early for jax.distributed.
    return not jax.distributed.is_initialized() or jax.process_index() == 0
