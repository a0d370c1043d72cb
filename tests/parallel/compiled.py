"""Programs compiled for a mesh with nothing allocated, and what their devices send each other."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.models import heads, lora
from rlhf_jax.models.llama import Llama, LlamaConfig
from rlhf_jax.models.roles import Role
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.parallel import sharding
from rlhf_jax.sampling.generate import SamplingConfig, generate
from rlhf_jax.training.algorithms import ALGORITHMS, Network
from rlhf_jax.training.optimizer import make_optimizer
from rlhf_jax.training.state import TrainState
from rlhf_jax.training.update import make_update
from rlhf_jax.types import GroupedBatch

# No two alike, nor alike when they are split, so that a shape says what an array is.
B, G, P, R, D, F, V, H, C, L, RANK = 16, 2, 5, 11, 64, 640, 192, 8, 12, 2, 7
T = P + G * (R - 1)  # the last token of a completion is read by nobody
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    kind: str
    shapes: tuple[tuple[int, ...], ...]
    op: str  # where in the program

    @property
    def in_loop(self):
        return "while/body" in self.op


def collectives(hlo: str) -> list[Collective]:
    found = []
    for line in hlo.splitlines():
        match = re.search(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(", line)
        if match:
            shapes = (
                tuple(int(n) for n in dims.split(",") if n)
                for dims in re.findall(r"\w+\[([\d,]*)\]", match[1])
            )
            op = re.search(r'op_name="([^"]*)"', line)
            found.append(Collective(match[2], tuple(shapes), op[1] if op else ""))
    return found


def shapes_in(hlo: str) -> set[tuple[int, ...]]:
    """Of all arrays of a program."""
    return {tuple(map(int, dims.split(","))) for dims in re.findall(r"\w\[(\d[\d,]*)\]", hlo)}


@functools.cache
def decode(shape: tuple[int, int, int], kv_heads: int = H) -> str:
    """The sampler on a mesh of this shape."""
    mesh, model, base, policy, put, key = parts(shape, kv_heads)
    prompts, sampling = put(B, P), SamplingConfig(R, num_completions=G, eos_ids=(2,))
    with meshes.activate(mesh):
        return (
            generate.lower(model, base, prompts, prompts, key, sampling, policy.adapter).compile().as_text()
        )


@functools.cache
def update(shape: tuple[int, int, int]) -> str:
    """PPO's update of an adapter and a head."""
    mesh, model, base, policy, put, key = parts(shape)
    everywhere = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.replicated(mesh))
    value = Role(head=jax.tree.map(everywhere, jax.eval_shape(lambda: heads.init_value(D))))
    trained, row = {"policy": policy, "value": value}, ALGORITHMS["ppo"]
    optimizer = make_optimizer(optax.constant_schedule(1e-2), clip_norm=1.0)
    moments = sharding.optimizer_shardings(
        optimizer, trained, jax.tree.map(lambda x: x.sharding, trained), mesh
    )
    scalar = lambda dtype: jax.ShapeDtypeStruct((), dtype, sharding=sharding.replicated(mesh))
    controllers = {"kl_coeff": scalar(jnp.float32)}
    opt_state = placed(jax.eval_shape(optimizer.init, trained), moments)
    state = TrainState(trained, opt_state, scalar(jnp.int32), key, controllers)
    notes = ("old_logprobs", "ref_logprobs", "advantages", "returns", "old_values")
    batch = GroupedBatch(put(B, P), put(B, P), put(B, G, R), put(B, G, R), put(B, G, dtype=jnp.float32))
    batch = batch.replace(**{name: put(B, G, R, dtype=jnp.float32) for name in notes})
    objective = functools.partial(row.objective, row.settings(), Network(model))
    with meshes.activate(mesh):
        made = jax.jit(make_update(objective, optimizer), donate_argnums=0)
        return made.lower(state, {"base": base}, batch).compile().as_text()


def parts(shape, kv_heads=H):
    """(mesh, model, base, policy, batch arrays of a shape, key), all abstract and placed."""
    mesh = meshes.make_mesh(*shape)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=F,
        num_layers=L,
        num_heads=H,
        num_kv_heads=kv_heads,
        head_dim=C,
        eos_ids=(2,),
        remat="full",
    )
    base = placed(sharding.llama_abstract(config)[0], sharding.llama_shardings(config, mesh))
    role = Role(adapter=jax.eval_shape(lambda: lora.init(jax.random.key(0), config, lora.LoraConfig(RANK))))
    policy = placed(role, sharding.role_shardings(role, config, mesh))
    by_row = sharding.batch_sharding(mesh)
    put = lambda *sizes, dtype=jnp.int32: jax.ShapeDtypeStruct(sizes, dtype, sharding=by_row)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(mesh))
    return mesh, Llama(config), base, policy, put, key


def placed(shapes, shardings):
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
