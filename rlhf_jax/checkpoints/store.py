"""The steps of one stage on disk: what a run resumes from, bit for bit.

Orbax writes and reads the arrays. It does not checksum them, casts dtypes without a word, and declines saves without
an error, so everything it promises is checked here: each leaf has a digest, made on the device before the save and
compared after the restore; a step that fails is kept aside in corrupt/ and the one before it is used.
Knows nothing of what a state means, or of when to save. The directory is one that every process of the run sees."""

import contextlib
import gc
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.checkpoints import quiet, record
from rlhf_jax.checkpoints.digest import digest, named_leaves
from rlhf_jax.checkpoints.record import one_line
from rlhf_jax.errors import InputError, StorageError
from rlhf_jax.parallel import hosts

CORRUPT, TRASH = "corrupt", "trash"
SPARE_BYTES = 1 << 20  # for what surrounds the arrays
NOT_DAMAGE = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED")  # the step may be sound: no reason to pass it over
FOUND, DAMAGED, UNREADABLE = 0, 1, 2


class Restored(NamedTuple):
    step: int
    state: Any
    meta: dict  # as given to save


class CheckpointStore:
    """Steps of one stage under `directory`; use it as a context manager, or an unfinished save is lost.

    Saves are asynchronous: a step counts (acknowledged_step) once wait() returns, which save() does for the save
    before it. Kept are the newest `keep_latest` steps and the `keep_best` best of those whose `best_metric` is finite.
    In a run of several processes every process makes the same calls.
    """

    def __init__(
        self,
        directory: str,
        *,
        keep_latest: int = 2,
        keep_best: int = 1,
        best_metric: str | None = None,
        best_mode: str = "max",
        log: Callable[[str], None] = print,
    ):
        if keep_latest < 1 or keep_best < 0 or best_mode not in ("max", "min"):
            raise InputError(
                f"keep_latest is {keep_latest}, keep_best {keep_best}, best_mode {best_mode!r}; "
                "expected at least 1, at least 0, 'max' or 'min'."
            )
        self.directory = os.path.abspath(directory)  # a relative path fails in orbax, late and in a thread
        self._keep_latest, self._keep_best = keep_latest, keep_best
        self._best_metric, self._sign = best_metric, 1 if best_mode == "max" else -1
        self._log = log
        self._contents = {}  # {acknowledged step: what its meta item holds}
        self._pending = None  # (step, contents) of the save under way
        self._manager = None
        quiet.quiet_orbax()
        try:
            os.makedirs(self.directory, exist_ok=True)
            self._list()
        except OSError as error:
            raise StorageError(f"{self.directory} cannot be used for checkpoints: {error}") from error
        self._open()

    def __enter__(self):
        return self

    def __exit__(self, kind, *exception):
        if kind is not None and hosts.several():
            return  # the others may not be here: whoever waited for them would never say why it ends
        try:
            self.close()
        except StorageError as error:
            if kind is None:
                raise
            self._log(str(error))  # the exception under way says more about the end of the run

    # What there is

    def steps(self) -> list[int]:
        """Acknowledged steps, oldest first."""
        return sorted(self._contents)

    @property
    def acknowledged_step(self) -> int | None:
        """The newest step that is on disk for certain."""
        return max(self._contents, default=None)

    latest_step = acknowledged_step

    @property
    def best_step(self) -> int | None:
        """By `best_metric`; None if no step has a finite one."""
        return next(iter(self._best_first(self._contents)), None)

    def read_meta(self, step: int) -> dict:
        """The meta given to save.  Raises: InputError if there is no such step."""
        return self._content(step)["meta"]

    # Saving

    def save(self, step: int, state, meta: dict, metrics: dict | None = None) -> None:
        """Start to write a step, after the save before it is done. The state may be donated as soon as this returns.

        Args:
          step: larger than every step there is.
          state: pytree of arrays: floats, ints, bools, typed PRNG keys, of any shape.
          meta: JSON.
          metrics: numbers; those that are not finite count as absent.
        Raises: StorageError if this save cannot be made or the one before it failed; the last good step stays.
        """
        self.wait()
        meta = json.loads(json.dumps(meta, allow_nan=False))  # as it will be read back
        leaves = named_leaves(state)
        self._check_room(step, leaves)
        content = record.make(step, leaves, digest(state), meta, metrics)
        self._pending = (step, content)  # first: the keep policy runs inside manager.save
        import orbax.checkpoint as ocp

        arrays = {name: x for name, x in leaves.items() if x.size}  # orbax refuses arrays of size 0
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays),
            meta=ocp.args.JsonSave(record.sealed(content)),
        )
        try:
            accepted = self._manager.save(step, args=items)
        except Exception as error:  # orbax raises of every class
            self._pending = None
            raise self._failed(f"step {step} could not be saved: {one_line(error)}") from error
        if not accepted:
            self._pending = None
            raise self._failed(f"step {step} was declined by orbax, which found a newer step")

    def wait(self) -> None:
        """Until the save under way is on disk.  Raises: StorageError if it failed."""
        if self._pending is None:
            return
        (step, content), self._pending = self._pending, None
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(f"step {step} could not be saved: {one_line(error)}") from error
        _, reason = record.read(self._path(step))
        if hosts.agree(DAMAGED if reason else FOUND) != FOUND:
            raise self._failed(
                f"step {step} could not be saved: {reason or 'another process cannot read it'}"
            )
        self._contents[step] = content
        self._contents = {s: c for s, c in self._contents.items() if os.path.isdir(self._path(s))}
        self._empty_trash()

    def close(self) -> None:
        """Wait, then let go of orbax. May be called again."""
        if self._manager is None:
            return
        try:
            self.wait()
        finally:
            manager, self._manager = self._manager, None
            with contextlib.suppress(Exception):  # repeats what wait has reported
                manager.close()

    # Restoring

    def restore(self, abstract_state, step: int | None = None) -> Restored | None:
        """The newest good step (or the one asked for); None if there is none yet.

        Args:
          abstract_state: pytree of jax.ShapeDtypeStruct. Without a sharding a leaf goes to the first local device;
            a run of several processes gives them all.
        Raises: InputError if the checkpoint is sound but of another tree, shape or dtype, or `step` is not there;
          StorageError if steps are there and none is sound.
        """
        self.wait()
        if step is not None:
            self._content(step)
        return self._first_good(
            sorted(self._contents, reverse=True) if step is None else [step], abstract_state
        )

    def restore_best(self, abstract_state) -> Restored | None:
        """As restore, by `best_metric`: the next best if the best is damaged, None if no step has the metric."""
        self.wait()
        return self._first_good(self._best_first(self._contents), abstract_state)

    def _first_good(self, order: list[int], abstract_state) -> Restored | None:
        asked, structure = named_leaves(abstract_state), jax.tree.structure(abstract_state)
        asked = {name: _placed(name, x) for name, x in asked.items()}
        problems = []
        for step in order:
            content = self._contents[step]
            self._check_asked(step, content["leaves"], asked)
            leaves, reason = self._read_leaves(step, content["leaves"], asked)
            if reason is None:
                for problem in problems:
                    self._log(f"{problem}; using step {step} instead")
                return Restored(step, jax.tree.unflatten(structure, leaves), content["meta"])
            problems.append(self._pass_over(step, reason))
        if problems:
            raise StorageError(
                f"{self.directory}: no sound step among those tried. " + "; ".join(problems) + ". "
                f"Steps left: {self.steps() or 'none'}. Put a copy of a good step back, or run again to go on "
                "from what is left (from the beginning of the stage if nothing is)."
            )
        return None

    def _check_asked(self, step: int, stored: dict, asked: dict) -> None:
        differ = record.differences(stored, asked)
        if differ:
            raise InputError(
                f"{self._path(step)} is sound, but of another config: {'; '.join(differ[:5])}"
                f"{f'; and {len(differ) - 5} more leaves' if len(differ) > 5 else ''}. "
                "Use the config it was saved with, or another --workdir."
            )

    def _read_leaves(self, step: int, stored: dict, asked: dict) -> tuple[list, str | None]:
        """(leaves in the order asked for, None), or ([], what is wrong with the step), the same on all processes."""
        import orbax.checkpoint as ocp

        arrays, code, reason = {}, FOUND, None
        wanted = {name: x for name, x in asked.items() if math.prod(x.shape)}
        with quiet.no_unraisable():
            try:
                item = ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
                arrays = dict(self._manager.restore(step, args=item)["state"])
                for name in asked.keys() - wanted.keys():
                    empty = np.zeros(asked[name].shape, asked[name].dtype)
                    arrays[name] = jax.make_array_from_callback(
                        empty.shape, asked[name].sharding, empty.__getitem__
                    )
                jax.block_until_ready(arrays)
            except Exception as error:  # of every class: JSONDecodeError, KeyError, bare Exception, ...
                known = any(words in str(error) for words in NOT_DAMAGE)
                mild = known or isinstance(error, (MemoryError, PermissionError))
                code, reason = UNREADABLE if mild else DAMAGED, one_line(error)
            if code != FOUND:
                gc.collect()  # orbax leaves coroutines half run; each would print a traceback when it goes
        code = hosts.agree(code)
        if code == UNREADABLE:
            raise StorageError(
                f"{self._path(step)} could not be read: {reason or 'another process could not read it'}. It may be "
                "sound and is left where it is: free memory, or correct its permissions, and run again."
            )
        if code == FOUND:
            # With one of its files gone, orbax gives keys back as plain integers.
            bad = [
                name
                for name, x in asked.items()
                if (arrays[name].shape, arrays[name].dtype) != (x.shape, x.dtype)
            ]
            found = digest(arrays)
            bad += [name for name in asked if found[name] != stored[name]["digest"]]
            if not bad:
                return [arrays[name] for name in asked], None
            others = len(set(bad)) - 1
            reason = (
                f"leaf {bad[0]}{f' and {others} others' if others else ''}: not the values that were saved"
            )
        return [], reason or "another process could not read it"

    # Directories

    def _path(self, step: int | str) -> str:
        return os.path.join(self.directory, str(step))

    def _content(self, step: int) -> dict:
        if step not in self._contents:
            raise InputError(f"{self.directory} has no step {step}; it has {self.steps() or 'none'}.")
        return self._contents[step]

    def _list(self) -> None:
        """Orbax counts every directory with a number for a name; we count those whose meta item is whole."""
        moved = []
        if hosts.is_first():
            for name in sorted(filter(str.isdigit, os.listdir(self.directory))):
                _, reason = record.read(self._path(name))
                if reason:
                    moved.append(
                        f"checkpoint {name} is not whole ({reason}); kept in {self._move_aside(name)}"
                    )
        hosts.sync()
        names = sorted(filter(str.isdigit, os.listdir(self.directory)), key=int)
        self._contents = {int(name): record.read(self._path(name))[0] for name in names}
        for line in moved:
            self._log(f"{line}; newest step: {self.latest_step}")
        self._empty_trash()

    def _pass_over(self, step: int, reason: str) -> str:
        with contextlib.suppress(Exception):
            self._manager.close()
        del self._contents[step]
        place = self._move_aside(str(step)) if hosts.is_first() else CORRUPT
        hosts.sync()
        self._open()
        return f"checkpoint step {step} is damaged ({reason}; kept in {place})"

    def _move_aside(self, name: str) -> str:
        os.makedirs(os.path.join(self.directory, CORRUPT), exist_ok=True)
        names = itertools.chain([name], (f"{name}.{n}" for n in itertools.count(1)))
        place = next(
            path for x in names if not os.path.lexists(path := os.path.join(self.directory, CORRUPT, x))
        )
        os.rename(os.path.join(self.directory, name), place)
        return os.path.relpath(place, self.directory)

    def _empty_trash(self) -> None:
        """Orbax renames an old step to trash/ first, so that a kill cannot leave half a step; the rest is here."""
        if hosts.is_first():
            shutil.rmtree(os.path.join(self.directory, TRASH), ignore_errors=True)

    def _check_room(self, step: int, leaves: dict) -> None:
        latest = self.latest_step
        if latest is not None and step <= latest:
            raise self._failed(f"step {step} cannot be saved: step {latest} is there already")
        needed = sum(_num_bytes(x) for x in leaves.values())
        needed += needed // 100 + SPARE_BYTES
        try:
            # Here, where the error is plain: in orbax's threads it would hold the interpreter for minutes at exit.
            probe = os.path.join(self.directory, f".probe.{jax.process_index()}")
            with contextlib.suppress(FileNotFoundError):  # there if a run was killed right here
                os.rmdir(probe)
            os.mkdir(probe)
            os.rmdir(probe)
            free, reason = shutil.disk_usage(self.directory).free, None
        except OSError as error:
            free, reason = needed, f"step {step} cannot be saved: {error}"
        if free < needed:
            reason = (
                f"no room for step {step}: it needs {needed} bytes, {free} are free. Delete something else on this "
                f"disk, or {os.path.join(self.directory, CORRUPT)} if it is there; keep the last good step"
            )
        if hosts.agree(reason is not None):
            raise self._failed(
                reason or f"step {step} cannot be saved: another process cannot write there, or has no room"
            )

    def _failed(self, what: str) -> StorageError:
        good = f"The last good step is {self.latest_step}" if self._contents else "There is no good step yet"
        return StorageError(
            f"{self.directory}: {what}. {good}; run the same command again to go on from there."
        )

    # Orbax

    def _open(self) -> None:
        import orbax.checkpoint as ocp

        options = ocp.CheckpointManagerOptions(
            cleanup_tmp_directories=True,
            todelete_subdir=TRASH,
            preservation_policy=_Policy(self),
            save_root_metadata=False,
        )
        self._manager = ocp.CheckpointManager(self.directory, item_names=("state", "meta"), options=options)

    def _best_first(self, contents: dict) -> list[int]:
        """Steps with a finite metric; the newer of two equals first."""
        metric = {step: content["metrics"].get(self._best_metric) for step, content in contents.items()}
        ranked = [step for step, value in metric.items() if value is not None]
        return sorted(ranked, key=lambda step: (self._sign * metric[step], step), reverse=True)

    def _kept(self, steps: list[int], contents: dict) -> set[int]:
        return {*sorted(steps)[-self._keep_latest :], *self._best_first(contents)[: self._keep_best]}


class _Policy:
    """Orbax's preservation protocol. Its own LatestN and BestN would rank NaN, and read metrics nobody has checked."""

    def __init__(self, store: CheckpointStore):
        self.store = store

    def should_preserve(self, checkpoints, *, context):
        store = self.store
        contents = dict([*store._contents.items(), *([store._pending] if store._pending else [])])
        kept = store._kept([info.step for info in checkpoints], contents)
        return [info.step in kept for info in checkpoints]


def _placed(name: str, x):
    sharding = getattr(x, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        sharding.shard_shape(x.shape)
    except ValueError as error:
        raise InputError(f"{name} of shape {x.shape} does not fit this mesh: {one_line(error)}") from None
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _num_bytes(x) -> int:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return x.size * 16
    return x.size * x.dtype.itemsize
