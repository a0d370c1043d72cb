"""A process that is killed while it saves: nothing it was told is saved is lost."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.checkpoints.store import CheckpointStore

KILLS = """
import os, random, signal, sys, time, traceback
import jax, jax.numpy as jnp
import orbax.checkpoint
from rlhf_jax.checkpoints.store import CheckpointStore

directory, acknowledged = sys.argv[1], sys.argv[2]

def state_of(step):
    return {"x": jnp.arange(4096) * step, "k": jax.random.key(step)}

def child():
    with open(acknowledged) as file:
        promised = int(file.read() or 0)
    with CheckpointStore(directory, best_metric="reward", log=lambda line: os._exit(9)) as store:
        asked = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state_of(0))
        restored = store.restore(asked)
        step = restored.step if restored else 0
        if step < promised:
            os._exit(8)
        if restored and not (restored.state["x"] == state_of(step)["x"]).all():
            os._exit(7)
        os.write(ready, b"x")
        while True:
            step += 1
            store.save(step, state_of(step), {"step": step}, {"reward": -step})
            done = str(store.acknowledged_step or 0)
            with open(acknowledged + ".new", "w") as file:
                file.write(done)
            os.replace(acknowledged + ".new", acknowledged)

rng, kills, promised = random.Random(0), 0, 0
while kills < 5 or promised < 5:  # a busy machine gets through fewer saves between kills
    wait, ready = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            child()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(6)
    os.close(ready)
    os.read(wait, 1)
    time.sleep(rng.uniform(0.05, 0.6))
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    os.close(wait)
    if not os.WIFSIGNALED(status):
        sys.exit(f"child ended by itself: {os.WEXITSTATUS(status)}")
    with open(acknowledged) as file:
        kills, promised = kills + 1, int(file.read())
"""


def test_kills_during_saves_lose_nothing_acknowledged(tmp_path):
    acknowledged = tmp_path / "acknowledged"
    acknowledged.write_text("0")
    directory = tmp_path / "steps"
    command = [sys.executable, "-c", KILLS, str(directory), str(acknowledged)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr[-2000:]
    promised = int(acknowledged.read_text())
    log = []
    with CheckpointStore(str(directory), log=log.append) as store:
        asked = {
            "x": jax.ShapeDtypeStruct((4096,), jnp.int32),
            "k": jax.ShapeDtypeStruct((), jax.random.key(0).dtype),
        }
        restored = store.restore(asked)
        assert restored.step >= promised and log == []
        np.testing.assert_array_equal(restored.state["x"], np.arange(4096) * restored.step)
        store.save(restored.step + 1, restored.state, {})
    left = {path.name for path in pathlib.Path(directory).iterdir()}
    assert not any("tmp" in name for name in left) and "corrupt" not in left and "trash" not in left


def test_what_a_kill_leaves_of_the_write_test_stops_no_later_save(tmp_path, monkeypatch):
    """The directory is tried with a mkdir before each save; a kill may come before its rmdir."""
    state = {"x": jnp.arange(4)}
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt), CheckpointStore(str(tmp_path), log=print) as store:
            store.save(1, state, {})
    with CheckpointStore(str(tmp_path), log=print) as store:
        store.save(1, state, {})
    with CheckpointStore(str(tmp_path), log=print) as store:
        assert store.steps() == [1]
