"""What is restored is exactly what was saved, or an error: which steps are kept, other meshes, other configs."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax.checkpoints import record
from rlhf_jax.checkpoints.digest import digest
from rlhf_jax.errors import InputError
from tests.checkpoints.made_states import State, abstract, bits, make, open_store


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
    assert item["sha256"] == record.seal(item["content"])
