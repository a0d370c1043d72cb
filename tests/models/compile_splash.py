"""Compiles plain and splash attention for a v5e slice of 4 chips, as test_splash.py asks: one line of JSON."""

import json
import os

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4",
               "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # fmt: skip

import jax
import jax.numpy as jnp
from jax.experimental.topologies import get_topology_desc
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.models import attention, splash
from rlhf_jax.models.attention import GroupContext
from rlhf_jax.parallel import mesh as meshes


def compiled(mesh, form, C, P, G, R, differentiate):
    """(bytes of temporaries, program) of attention over bfloat16 groups, 2 rows, 8 query heads and 4 key heads."""
    place = lambda shape, dtype, *axes: jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(("data", "fsdp"), *axes))
    )
    context = GroupContext(place((2, P), jnp.int32), place((2, G, R), jnp.int32) if G else None)
    q, k = (place((2, P + G * R, heads, C), jnp.bfloat16, None, "tensor") for heads in (8, 4))
    total = lambda *inputs: form(*inputs).astype(jnp.float32).sum()
    function = jax.grad(total, (0, 1, 2)) if differentiate else form
    with meshes.activate(mesh):
        traced = jax.jit(function).trace(q, k, k, context)
    program = traced.lower().compile()
    return program.memory_analysis().temp_size_in_bytes, program.as_text()


if __name__ == "__main__":
    devices = get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = meshes.make_mesh(1, 2, 2, devices=devices)
    _, of_64 = compiled(mesh, splash.group_attention, 64, 300, 3, 70, True)
    memory, text = compiled(mesh, splash.group_attention, 128, 4096, 0, 0, True)
    plain, _ = compiled(mesh, attention.group_attention, 128, 4096, 0, 0, False)
    print(
        json.dumps(
            {
                "kernels": text.count("tpu_custom_call"),
                "kernels_64": of_64.count("tpu_custom_call"),
                "all_gathers": "all-gather" in text,
                "splash_bytes": memory,
                "plain_bytes": plain,
            }
        )
    )
