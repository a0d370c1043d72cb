"""Mesh sizes: what is filled, what is refused and how it is said; and that constraints count inside activate()."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.parallel import sharding


@pytest.mark.parametrize(
    "asked, sizes",
    [((-1, 2, 1), (4, 2, 1)), ((1, -1, 4), (1, 2, 4)), ((1, 1, -1), (1, 1, 8)), ((2, 2, 2),) * 2],
)
def test_minus_one_takes_what_the_others_leave(asked, sizes):
    mesh = meshes.make_mesh(*asked)
    assert dict(mesh.shape) == dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
    assert list(mesh.devices.flat) == jax.devices()


def test_some_of_the_devices():
    mesh = meshes.make_mesh(data=1, fsdp=-1, tensor=2, devices=jax.devices()[:4])
    assert tuple(mesh.shape.values()) == (1, 2, 2)


@pytest.mark.parametrize(
    "asked, message",
    [
        ((3, 1, 1), "data 3 x fsdp 1 x tensor 1: 3 is not the number of devices, 8"),
        ((2, 2, 1), "data 2 x fsdp 2 x tensor 1: 4 is not the number of devices, 8"),
        ((2, 8, 2), "data 2 x fsdp 8 x tensor 2: 32 is not the number of devices, 8"),
        ((-1, 3, 1), "data -1 x fsdp 3 x tensor 1: 3 does not divide the number of devices, 8"),
        ((1, -1, 16), "data 1 x fsdp -1 x tensor 16: 16 does not divide the number of devices, 8"),
        ((-1, -1, 1), "data -1 x fsdp -1 x tensor 1; .* at most one of them -1"),
        ((0, 8, 1), "data 0 x fsdp 8 x tensor 1; sizes must be 1 or more"),
        ((1, -2, 1), "data 1 x fsdp -2 x tensor 1; sizes must be 1 or more"),
    ],
)
def test_impossible_sizes(asked, message):
    with pytest.raises(InputError, match=f"config.mesh is {message}") as refused:
        meshes.make_mesh(*asked)
    assert refused.value.status == 2


def test_constraints_count_inside_activate_alone():
    """Outside of it linen drops them without a word: with no mesh, with the old `with mesh`, with no rules."""
    mesh, x = meshes.make_mesh(1, 8, 1), jnp.zeros((8, 4))

    def program():
        return jax.jit(lambda x: nn.with_logical_constraint(x + 1, ("batch", "width")))

    with meshes.activate(mesh):
        assert "sharding_constraint" in program().lower(x).as_text()
        y = program()(x)
    assert y.addressable_shards[0].data.shape == (1, 4) and len(y.sharding.device_set) == 8
    with mesh, nn.logical_axis_rules(sharding.RULES):
        assert "sharding_constraint" not in program().lower(x).as_text()
    assert "sharding_constraint" not in program().lower(x).as_text()
