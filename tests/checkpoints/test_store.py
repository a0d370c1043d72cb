"""What is restored is exactly what was saved, or an error: damage, kills, full disks, other meshes, other configs."""

import collections
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax.checkpoints import store as stores
from rlhf_jax.checkpoints.digest import digest
from rlhf_jax.checkpoints.store import CheckpointStore
from rlhf_jax.errors import InputError, StorageError


@flax.struct.dataclass
class State:
    weights: dict
    opt_state: object
    rng: jax.Array
    head: object = None


@jax.jit
def make(step):
    w = jax.random.normal(jax.random.key(step), (8, 16))
    weights = {
        "w": w.at[0, 0].set(jnp.nan),
        # Larger than orbax keeps in its checksummed index: only our digest guards these.
        "large": jax.random.normal(jax.random.key(step + 100), (32, 64)),
        "half": w.astype(jnp.bfloat16),
        "flags": w > 0,
        "small": (w * 50).astype(jnp.int8),
        "step": jnp.int32(step),
        "empty": jnp.zeros((0, 3)),
        "none": {},
    }
    return State(weights, optax.adam(0.1).init(w), jax.random.split(jax.random.key(step), 2))


def abstract(state, sharding=None):
    where = (lambda x: x.sharding) if sharding is None else lambda x: sharding
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where(x)), state)


def bits(state):
    """Host bytes of every leaf: an independent notion of equality, NaN included."""
    raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    leaves, structure = jax.tree.flatten(state)
    return structure, [(str(x.dtype), x.shape, np.asarray(raw(x)).tobytes()) for x in leaves]


def open_store(directory, log=None, **options):
    return CheckpointStore(str(directory), log=(log if log is not None else []).append, **options)


@pytest.fixture(scope="module")
def states():
    return {step: make(step) for step in (1, 2, 3)}


@pytest.fixture(scope="module")
def two_steps(states, tmp_path_factory):
    """A directory with steps 1 and 2; tests copy it."""
    directory = tmp_path_factory.mktemp("two_steps")
    with open_store(directory) as store:
        for step in (1, 2):
            store.save(step, states[step], {"position": step}, {"reward": step})
    return directory


def test_round_trip_is_exact(states, tmp_path):
    meta = {"position": 7, "text": 'é "quoted"\n', "pair": [1, 0.1]}
    with open_store(tmp_path) as store:
        assert store.restore(abstract(states[1])) is None
        store.save(1, states[1], meta, {"reward": float("nan")})
        assert store.acknowledged_step is None and store.steps() == []
        store.wait()
        assert store.acknowledged_step == store.latest_step == 1
    store.close()
    with open_store(tmp_path) as store:
        step, state, found = store.restore(abstract(states[1]))
        assert (step, found) == (1, meta) and store.read_meta(1) == meta
        assert bits(state) == bits(states[1])
        assert isinstance(state, State) and state.head is None and state.weights["none"] == {}
        # The key still draws what it drew.
        assert jax.random.bits(state.rng[1]) == jax.random.bits(states[1].rng[1])


def test_numpy_leaves_and_donation(tmp_path):
    state = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": jnp.arange(4), "c": np.int32(3)}
    expected = bits(state)[1]
    with open_store(tmp_path) as store:
        store.save(1, state, {})
        state["a"][:] = -1
        jax.jit(lambda b: b + 1, donate_argnums=0)(state["b"])
        asked = {k: jax.ShapeDtypeStruct(np.shape(v), v.dtype) for k, v in state.items()}
        assert bits(store.restore(asked).state)[1] == expected


def test_what_cannot_be_kept_is_refused(tmp_path):
    with open_store(tmp_path) as store:
        for bad in (1.5, "text", np.zeros(2), jnp.zeros(2, jnp.complex64)):
            with pytest.raises(TypeError, match="inner/bad"):
                store.save(1, {"inner": {"bad": bad}}, {})
        with pytest.raises(ValueError, match="same path|the path"):
            store.save(1, {"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}, {})
        with pytest.raises(ValueError):
            store.save(1, {"a": jnp.ones(1)}, {"nan": float("nan")})
        store.save(1, {"a": jnp.ones(1)}, {})


@pytest.mark.parametrize(
    ("mode", "kept", "best"), [("max", [3, 5, 6], 3), ("min", [5, 6], 6), (None, [5, 6], None)]
)
def test_keeps_the_newest_and_the_best_finite(mode, kept, best, tmp_path):
    nan = float("nan")
    options = {"best_metric": "reward" if mode else None, "best_mode": mode or "max"}
    with open_store(tmp_path, **options) as store:
        for step, reward in enumerate([0.5, nan, 0.9, nan, 0.7, 0.1], start=1):
            store.save(step, {"x": jnp.int32(step)}, {}, {"reward": reward, "other": step})
        store.wait()
        assert store.steps() == kept and store.best_step == best
    asked = {"x": jax.ShapeDtypeStruct((), jnp.int32)}
    with open_store(tmp_path, **options) as store:  # metrics are read back
        assert store.steps() == kept and store.best_step == best
        assert store.restore(asked).step == 6
        restored = store.restore_best(asked)
        assert (restored and (restored.step, int(restored.state["x"]))) == (best and (best, best))
        assert int(store.restore(asked, step=5).state["x"]) == 5
        with pytest.raises(InputError, match="no step 4.*5, 6"):
            store.restore(asked, step=4)
    assert sorted(filter(str.isdigit, os.listdir(tmp_path))) == [str(step) for step in kept]
    assert not (tmp_path / "trash").exists()


def damages(path, seed):
    """(name, function that damages the file)."""
    size, rng = path.stat().st_size, random.Random(seed)

    def flip(target):
        content = bytearray(target.read_bytes())
        content[rng.randrange(size)] ^= 1 << rng.randrange(8)
        target.write_bytes(content)

    yield "delete", lambda target: target.unlink()
    if size:
        yield "truncate", lambda target: target.write_bytes(target.read_bytes()[: size // 2])
        yield "zero", lambda target: target.write_bytes(bytes(size))
        yield "flip", flip
        yield "flip again", flip


def test_damage_is_found_and_passed_over(states, two_steps, tmp_path):
    outcomes = collections.Counter()
    files = sorted(path.relative_to(two_steps) for path in two_steps.glob("[12]/**/*") if path.is_file())
    assert len(files) > 20
    for number, file in enumerate(files):
        for name, damage in damages(two_steps / file, number):
            if file.parts[0] == "1" and name not in ("delete", "flip"):
                continue  # the older step only has to stay out of the way
            directory, log = tmp_path / f"{number}{name}", []
            shutil.copytree(two_steps, directory)
            damage(directory / file)
            with open_store(directory, log) as store:
                restored = store.restore(abstract(states[1]))
                assert bits(restored.state) == bits(states[restored.step]), (file, name)
                assert restored.meta == {"position": restored.step}, (file, name)
                if restored.step == 1:
                    assert file.parts[0] == "2" and (directory / "corrupt" / "2").is_dir()
                    assert len(log) == 1 and re.search("2 is .*corrupt/2.*step:? 1", log[0]), log
                if name in ("delete", "flip again"):
                    step = restored.step + 1
                    store.save(step, states[step], {"position": step})
                    store.wait()
                    assert bits(store.restore(abstract(states[1])).state) == bits(states[step])
            outcomes[file.parts[0], restored.step] += 1
            shutil.rmtree(directory)
    # The rest of the files orbax does not need: it merges what they hold.
    assert outcomes["1", 1] == 0 and outcomes["2", 1] >= 20, outcomes


def test_flipped_bits_of_array_data_never_pass(states, two_steps, tmp_path):
    directory, rng = tmp_path / "flips", random.Random(0)
    shutil.copytree(two_steps, directory)
    log = []
    for _ in range(12):
        largest = max(data_files(directory / "2"), key=lambda path: path.stat().st_size)
        assert largest.stat().st_size > 7000
        sound = largest.read_bytes()
        content = bytearray(sound)
        content[rng.randrange(len(sound))] ^= 1 << rng.randrange(8)
        largest.write_bytes(content)
        with open_store(directory, log) as store:
            restored = store.restore(abstract(states[1]))
        # Some bits of the file nobody reads (a twelfth of them): step 2 is then as it was saved.
        assert bits(restored.state) == bits(states[restored.step])
        if restored.step == 1:
            (directory / "corrupt" / "2").rename(directory / "2")
        largest.write_bytes(sound)
    assert len(log) >= 8
    assert any("leaf weights/large: not the values" in line for line in log)  # orbax saw nothing


def data_files(step_directory):
    return [path for path in step_directory.glob("state/**/d/*") if path.is_file()]


def damage_all(step_directory):
    for path in data_files(step_directory):
        path.write_bytes(path.read_bytes()[:-3])


def test_no_sound_step_is_an_error_then_a_fresh_start(states, two_steps, tmp_path):
    directory = tmp_path / "all"
    shutil.copytree(two_steps, directory)
    damage_all(directory / "1")
    damage_all(directory / "2")
    with open_store(directory) as store:
        with pytest.raises(StorageError, match=r"corrupt/2.*corrupt/1.*Steps left: none"):
            store.restore(abstract(states[1]))
        assert store.restore(abstract(states[1])) is None
        store.save(1, states[1], {})
        store.wait()
    damage_all(directory / "1")  # a name that corrupt/ has already
    with open_store(directory) as store, pytest.raises(StorageError, match=r"corrupt/1\.1"):
        store.restore(abstract(states[1]))


def test_best_falls_back_to_the_next_best(states, two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path / "best")
    damage_all(tmp_path / "best" / "2")
    log = []
    with open_store(tmp_path / "best", log, best_metric="reward") as store:
        assert store.best_step == 2
        assert store.restore_best(abstract(states[1])).step == 1
    assert "using step 1" in log[0]


def test_swapped_steps_and_stray_directories_are_set_aside(states, two_steps, tmp_path):
    directory, log = tmp_path / "stray", []
    shutil.copytree(two_steps, directory)
    (directory / "99999").mkdir()
    (directory / "7").mkdir()
    (directory / "7" / "state").mkdir()
    (directory / "8").write_text("a file")
    (directory / "0002").mkdir()
    (directory / "3.orbax-checkpoint-tmp").mkdir()
    (directory / "notes").mkdir()
    shutil.copytree(directory / "1", directory / "5")  # whole, but not step 5
    with open_store(directory, log) as store:
        assert store.steps() == [1, 2]
        assert store.restore(abstract(states[1])).step == 2
        store.save(3, states[3], {})
    assert sorted(os.listdir(directory / "corrupt")) == ["0002", "5", "7", "8", "99999"]
    assert sorted(os.listdir(directory)) == ["2", "3", "corrupt", "notes"] and len(log) == 5


def test_another_config_is_not_damage(states, two_steps, tmp_path):
    directory = tmp_path / "config"
    shutil.copytree(two_steps, directory)
    asked = abstract(states[1])

    def changed(**leaves):
        return asked.replace(weights=asked.weights | leaves)

    one = jax.ShapeDtypeStruct
    cases = [
        (
            changed(w=one((8, 17), jnp.float32)),
            r"weights/w: found float32\[8, 16\], expected float32\[8, 17\]",
        ),
        (changed(w=one((8, 16), jnp.int32)), r"weights/w: found float32\[8, 16\], expected int32\[8, 16\]"),
        (changed(half=one((8, 16), jnp.float32)), r"weights/half: found bfloat16"),
        (changed(more=one((), jnp.float32)), r"weights/more: not in the checkpoint"),
        (changed(w=None), r"weights/w: in the checkpoint, not expected"),
        (asked.replace(rng=one((2, 2), jnp.uint32)), r"rng: found key<fry>\[2\], expected uint32\[2, 2\]"),
    ]
    mesh = Mesh(np.array(jax.devices()[:3]), ("x",))
    cases.append(
        (changed(w=one((8, 16), jnp.float32, sharding=NamedSharding(mesh, P("x")))), "weights/w.*mesh")
    )
    with open_store(directory) as store:
        for wanted, message in cases:
            with pytest.raises(InputError, match=message):
                store.restore(wanted)
        assert bits(store.restore(asked).state) == bits(states[2])
    assert sorted(os.listdir(directory)) == ["1", "2"]


def test_out_of_memory_is_not_damage(states, two_steps, tmp_path, monkeypatch):
    directory = tmp_path / "memory"
    shutil.copytree(two_steps, directory)
    with open_store(directory) as store:

        def restore(*arguments, **named):
            raise ValueError("RESOURCE_EXHAUSTED: out of memory")

        monkeypatch.setattr(store._manager, "restore", restore)
        with pytest.raises(StorageError, match="left where it is"):
            store.restore(abstract(states[1]))
        assert store.steps() == [1, 2]


def test_full_disk_is_seen_before_writing(states, two_steps, tmp_path, monkeypatch):
    directory = tmp_path / "full"
    shutil.copytree(two_steps, directory)
    needed = sum(x.nbytes for x in jax.tree.leaves(states[1].weights))
    with open_store(directory) as store:
        usage = collections.namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1234, 1234))
        with pytest.raises(StorageError) as full:
            store.save(3, states[3], {})
        assert full.value.status == 74
        amounts = [int(x) for x in re.findall(r"(\d+) (?:bytes|are free)", str(full.value))]
        assert needed < amounts[0] < needed + 10**7 and amounts[1] == 1234
        assert "last good step is 2" in str(full.value) and "corrupt" in str(full.value)
        assert sorted(os.listdir(directory)) == ["1", "2"]
        monkeypatch.undo()
        store.save(3, states[3], {})


def test_declined_and_failed_saves_are_errors(states, tmp_path, monkeypatch):
    with open_store(tmp_path / "a") as store:
        store.save(2, states[2], {})
        with pytest.raises(StorageError, match="step 1 cannot be saved.*step 2"):
            store.save(1, states[1], {})
        monkeypatch.setattr(store._manager, "save", lambda *arguments, **named: False)
        with pytest.raises(StorageError, match="declined.*last good step is 2"):
            store.save(3, states[3], {})
    with open_store(tmp_path / "b") as store:
        shutil.rmtree(tmp_path / "b")
        with pytest.raises(StorageError, match="no good step yet"):
            store.save(1, states[1], {})


def test_failed_background_write_ends_with_one_error_and_no_wait(tmp_path):
    """In a child, because of what it leaves behind: the file size limit makes the write fail in orbax's thread."""
    code = """
import resource, signal, sys
import jax.numpy as jnp
from rlhf_jax.checkpoints.store import CheckpointStore
from rlhf_jax.errors import StorageError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    with CheckpointStore(sys.argv[1]) as store:
        store.save(1, {"x": jnp.arange(10)}, {})
        store.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        store.save(2, {"x": jnp.arange(1 << 18) * 7919}, {})
except StorageError as error:
    print(error)
    sys.exit(error.status)
"""
    began = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 74 and time.monotonic() - began < 30
    assert "step 2 could not be saved" in ended.stdout and "last good step is 1" in ended.stdout
    assert "Traceback" not in ended.stderr
    with open_store(tmp_path) as store:
        assert store.steps() == [1]


def test_error_of_the_run_is_not_hidden_by_the_store(states, tmp_path, monkeypatch):
    log = []
    with pytest.raises(KeyError), open_store(tmp_path, log) as store:
        store.save(1, states[1], {})

        def fail():
            raise OSError("no such device")

        monkeypatch.setattr(store._manager, "wait_until_finished", fail)
        raise KeyError
    assert "no such device" in log[0]
    store.close()


def test_meshes(tmp_path):
    """Saved on 2x4, restored on one device, 8 and 4x2: same bits, same digest."""
    devices = np.array(jax.devices())
    mesh = Mesh(devices.reshape(2, 4), ("a", "b"))
    kinds = {"w": P("a", "b"), "half": P("b"), "step": P(), "rng": P()}
    state = {
        "w": make(1).weights["w"],
        "half": make(1).weights["half"],
        "step": jnp.int32(3),
        "rng": jax.random.key(9),
    }
    state = {k: jax.device_put(x, NamedSharding(mesh, kinds[k])) for k, x in state.items()}
    with open_store(tmp_path) as store:
        store.save(1, state, {})
        one = Mesh(devices[:1].reshape(1, 1), ("a", "b"))
        for other in (one, Mesh(devices.reshape(8, 1), ("a", "b")), Mesh(devices.reshape(4, 2), ("a", "b"))):
            asked = {
                k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(other, kinds[k]))
                for k, x in state.items()
            }
            restored = store.restore(asked).state
            assert bits(restored) == bits(state) and digest(restored) == digest(state)
            assert all(restored[k].sharding == asked[k].sharding for k in asked)
        bare = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in state.items()}
        assert bits(store.restore(bare).state) == bits(state)


def test_meta_item_is_plain_json_that_names_every_leaf(states, two_steps):
    item = json.loads((two_steps / "2" / "meta" / "metadata").read_text())
    leaves = item["content"]["leaves"]
    assert leaves["weights/w"]["shape"] == [8, 16] and leaves["weights/half"]["dtype"] == "bfloat16"
    assert {name: leaf["digest"] for name, leaf in leaves.items()} == digest(states[2])
    assert item["sha256"] == stores._seal(item["content"])
