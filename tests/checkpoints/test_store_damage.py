"""Damage, full disks, failed writes: what is restored is sound, what cannot be saved is an error, nothing is lost."""

import collections
import os
import random
import re
import shutil
import subprocess
import sys
import time

import jax
import pytest

from rlhf_jax.errors import StorageError
from tests.checkpoints.made_states import abstract, bits, open_store


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
        yield "flip", flip


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
                if name in ("delete", "flip"):
                    step = restored.step + 1
                    store.save(step, states[step], {"position": step})
                    store.wait()
                    assert bits(store.restore(abstract(states[1])).state) == bits(states[step])
            outcomes[file.parts[0], restored.step] += 1
            shutil.rmtree(directory)
    # The rest of the files orbax does not need: it merges what they hold.
    assert outcomes["1", 1] == 0 and outcomes["2", 1] >= 12, outcomes


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
