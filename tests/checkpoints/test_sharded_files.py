"""What each host reads of a checkpoint is what its devices hold; beside that there is one tensor in memory."""

import math
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.checkpoints import huggingface, peft, roles, tensors
from rlhf_jax.models import heads, lora
from rlhf_jax.models.roles import Role
from rlhf_jax.parallel import sharding
from rlhf_jax.parallel.mesh import make_mesh
from tests.checkpoints.made_models import config_of, random_params

SIZES = dict(hidden_size=32, intermediate_size=64, vocab_size=96, num_heads=8, num_kv_heads=8, head_dim=4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(directory of several files, config, params)"""
    config = config_of(**SIZES)
    params, path = random_params(config), str(tmp_path_factory.mktemp("sharded") / "model")
    huggingface.save_llama(path, config, params, shard_bytes=20_000)
    return path, config, params


@pytest.fixture
def read(monkeypatch):
    """Bytes that are read of stored tensors from here on: a list, one number a read."""
    sizes, original = [], tensors.Stored.read

    def counting(stored, slices=None):
        block = original(stored, slices)
        sizes.append(block.nbytes)
        return block

    monkeypatch.setattr(tensors.Stored, "read", counting)
    return sizes


def host_arrays(path, config, shardings, devices):
    """{path of an array: {index: values}} that a process with these devices alone would make of a checkpoint."""
    found = huggingface.stored_tensors(path)
    read = lambda name, slices: found[name].read(slices)
    made = {}
    for leaf in huggingface.leaves_of(config):
        places = tensors.get(shardings, leaf.path).devices_indices_map(leaf.shape)
        made[leaf.path] = tensors.host_parts(leaf, read, np.dtype(np.float32), [places[d] for d in devices])
    return made


@pytest.mark.parametrize(
    "shape, share", [((1, 8, 1), 0.5), ((2, 2, 2), 1.0), ((1, 1, 8), 0.5), ((1, 4, 2), 0.5)]
)
def test_a_host_reads_what_its_devices_hold(checkpoint, read, shape, share):
    """Two hosts of four devices each: half of all that is split between them, and each its copy of the rest."""
    path, config, params = checkpoint
    mesh = make_mesh(*shape)
    shardings = sharding.llama_shardings(config, mesh)
    hosts = np.array(mesh.devices.flat).reshape(2, 4)
    total = sum(x.nbytes for x in jax.tree.leaves(params))
    norms = sum(x.nbytes for name, x in jax.tree_util.tree_leaves_with_path(params) if "norm" in str(name))
    for host in hosts:
        read.clear()
        made = host_arrays(path, config, shardings, host)
        assert sum(read) == pytest.approx(share * (total - norms) + norms)
        for name, parts in made.items():
            whole = tensors.get(params, name)
            assert parts
            for index, values in parts.items():
                np.testing.assert_array_equal(values, whole[tuple(slice(*i) for i in index)])


def test_a_load_onto_a_mesh_reads_every_byte_once_and_holds_one_tensor_more(tmp_path, read):
    config = config_of(hidden_size=128, intermediate_size=512, num_layers=12, num_heads=8, head_dim=16)
    params, path, mesh = random_params(config), str(tmp_path / "model"), make_mesh(1, 4, 2)
    sizes = [x.nbytes for x in jax.tree.leaves(params)]
    huggingface.save_llama(path, config, params)
    load = lambda: jax.block_until_ready(huggingface.load_llama(path, mesh=mesh)[1])
    load()  # imports
    read.clear()
    tracemalloc.start()
    try:
        loaded = load()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert sum(read) == sum(sizes) and max(read) <= max(sizes) // config.num_layers
    # On a CPU the arrays that were filled become those of the devices. One stack of layers would be 3 MB more.
    assert sum(sizes) > 10_000_000 and peak < sum(sizes) + 1_000_000


def test_saving_holds_one_tensor_at_a_time(checkpoint, tmp_path, monkeypatch):
    """Of sharded arrays, too: the files are those of whole ones."""
    path, config, params = checkpoint
    mesh, made, original = make_mesh(2, 2, 2), [], tensors.stored_arrays
    _, placed = huggingface.load_llama(path, mesh=mesh)
    largest = max(math.prod(leaf.stored_shape) for leaf in huggingface.leaves_of(config)) * 4

    def watched(leaves, tree):
        def counting(make):
            array = make()
            made.append(array.nbytes)
            return array

        return [(*item[:3], lambda make=item[3]: counting(make)) for item in original(leaves, tree)]

    monkeypatch.setattr(tensors, "stored_arrays", watched)
    huggingface.save_llama(str(tmp_path / "again"), config, placed, shard_bytes=20_000)
    assert max(made) == largest and sum(made) == sum(x.nbytes for x in jax.tree.leaves(params))
    for file in sorted((tmp_path / "again").glob("model*")):
        assert file.read_bytes() == open(f"{path}/{file.name}", "rb").read()


def test_roles_go_straight_into_their_shards(checkpoint, tmp_path, read):
    """An adapter, weights of one's own, and the members of an ensemble; no array of them is whole on a device."""
    _, config, params = checkpoint
    mesh, settings = make_mesh(1, 4, 2), lora.LoraConfig(rank=4)
    adapter = lora.init(jax.random.key(0), config, settings)
    head = heads.init_reward(jax.random.key(1), 32)
    member = Role(adapter=adapter, head=head)
    for name, role in {"full": Role(base=params, head=head), "many": Role(members=(member, member))}.items():
        path = str(tmp_path / name)
        roles.save_role(path, role, config, settings if role.members else None, None, {})
        read.clear()
        loaded, _, _ = roles.load_role(path, config, jnp.float32, mesh)
        jax.tree.map(np.testing.assert_array_equal, loaded, role)
        placed = sharding.role_shardings(role, config, mesh)
        for x, expected in zip(jax.tree.leaves(loaded), jax.tree.leaves(placed), strict=True):
            assert x.ndim < 2 or x.sharding.is_equivalent_to(expected, x.ndim)
        assert max(read) <= 4 * 64 * 96  # never a stack of layers
    loaded, _ = peft.load_adapter(str(tmp_path / "many" / "member_0"), config)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapter)
