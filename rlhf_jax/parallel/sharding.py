"""Which mesh axis each logical name is laid on, and the shardings of weights, adapters, optimizer state and batches.

One table, RULES. A name that is not in it is refused: linen would replicate it in silence."""

import contextlib
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf_jax.errors import InputError
from rlhf_jax.models import heads, lora, quantise
from rlhf_jax.models.config import LlamaConfig
from rlhf_jax.models.llama import Llama
from rlhf_jax.models.roles import Role
from rlhf_jax.parallel import hosts

RULES = (
    ("batch", ("data", "fsdp")),
    ("rows", ("data", "fsdp")),  # of a batch, in what linear maps read and write; see decoding()
    ("lookup", "data"),  # of a batch, while token ids become rows of a table that fsdp splits
    ("draws", ("data", "fsdp", "tensor")),  # rows of logits: each device draws for its own
    ("embed", "fsdp"),  # of weights
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("embed_blocks", "fsdp"),  # of 64 weights with one scale (models/quantise.py)
    ("mlp_blocks", "tensor"),
    ("head_size_blocks", None),
    ("vocab", "tensor"),
    ("width", None),  # of activations
    ("width_of_weights", None),  # when they are used: gathered, layer by layer
    ("tokens", None),
    ("head_size", None),
    ("layers", None),
    ("rank", None),
    # Of adapters, whose other side has no width that fsdp could split; gathered when they are used.
    ("mlp_of_adapter", ("tensor", "fsdp")),
    ("head_size_of_adapter", "fsdp"),
    ("norm", None),
)

# Kept whole along mesh axes that do not divide them: a copy of few heads, as every grouped-query model needs, or of few
# numbers.
MAY_BE_WHOLE = ("kv_heads", "mlp_of_adapter", "head_size_of_adapter", "embed_blocks", "mlp_blocks")

# While few rows at a time are decoded, weights stay where they are and the few activations travel instead: the
# weight-stationary layout in two dimensions of Pope et al. 2022, arXiv:2211.05102. Attention stays split by rows.
DECODING = {"rows": "data", "width": "fsdp", "width_of_weights": "fsdp"}


@contextlib.contextmanager
def decoding(config: LlamaConfig, rows: int):
    """Trace the decoding of one token for each of `rows` inside this: it chooses what travels between devices, per
    token and layer, by its size. Nothing changes without an active mesh (mesh.activate)."""
    rules = dict(nn.get_logical_axis_rules())
    if rules:
        weights = sum(math.prod(i) * math.prod(o) for i, o in lora.shapes(config).values())
        activations = sum(math.prod(i) + math.prod(o) for i, o in lora.shapes(config).values())
        rows_a_device = rows / jax.sharding.get_abstract_mesh().shape.get("data", 1)
        if rows_a_device * activations < weights:
            rules |= DECODING
    with nn.logical_axis_rules(tuple(rules.items())):
        yield


def spec(names, shape, mesh: Mesh, where: str = "") -> PartitionSpec:
    """The partition of an array whose axes have these logical names.

    Raises: InputError for a name without a rule, or a size that its mesh axes do not divide, but for MAY_BE_WHOLE.
    """
    table, parts = dict(RULES), []
    for name, size in zip(names, shape, strict=True):
        if name is not None and name not in table:
            raise InputError(f"{where}: logical axis {name!r} has no rule in RULES.")
        axes = table.get(name) or ()
        axes = (axes,) if isinstance(axes, str) else axes
        while size % (ways := math.prod(mesh.shape[a] for a in axes)):
            if name not in MAY_BE_WHOLE:
                raise InputError(
                    f"{where}: axis {name!r} of size {size} cannot be split {ways} ways over {table[name]}."
                )
            axes = axes[:-1]
        parts.append(axes[0] if len(axes) == 1 else axes or None)
    return PartitionSpec(*parts)


def named(names_tree, shapes_tree, mesh: Mesh):
    """NamedShardings for a tree of logical names and a tree of arrays (or shapes) of the same structure."""

    def one(path, names, array):
        return NamedSharding(mesh, spec(names, array.shape, mesh, jax.tree_util.keystr(path)))

    return jax.tree_util.tree_map_with_path(one, names_tree, shapes_tree, is_leaf=_is_names)


def llama_abstract(config: LlamaConfig, dtype=jnp.float32, quantised: str = "none"):
    """(shapes, logical names) of the base's parameters, nothing allocated. quantised: one of quantise.KINDS."""
    shapes, names = module_abstract(Llama(config), num_inputs=2, dtype=dtype)
    names = quantise.logical_axes(names, config, quantised)
    return jax.eval_shape(lambda params: quantise.quantise(params, config, quantised), shapes), names


def module_abstract(module: nn.Module, num_inputs: int, dtype=jnp.float32):
    """The same of any module whose first `num_inputs` arguments are ids and masks [B, T]."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    boxed = jax.eval_shape(module.init, jax.random.key(0), *[ids] * num_inputs)["params"]
    # Not nn.meta.unbox: inside a mesh context it would put a sharding constraint on an array that is not there.
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.value.shape, dtype), boxed, is_leaf=_is_boxed)
    names = jax.tree.map(lambda x: tuple(nn.get_partition_spec(x)), boxed, is_leaf=_is_boxed)
    return shapes, names


def llama_shardings(config: LlamaConfig, mesh: Mesh, quantised: str = "none"):
    """NamedShardings of the base's parameters. Codes and scales are split as the kernels they stand for."""
    shapes, names = llama_abstract(config, quantised=quantised)
    return named(names, shapes, mesh)


def module_shardings(module: nn.Module, mesh: Mesh, num_inputs: int = 2):
    """NamedShardings of an encoder's parameters; T5 takes 3 inputs."""
    shapes, names = module_abstract(module, num_inputs)
    return named(names, shapes, mesh)


def adapter_shardings(config: LlamaConfig, settings: lora.LoraConfig, mesh: Mesh) -> lora.Adapter:
    """NamedShardings of an adapter that is not there yet."""
    shapes = jax.eval_shape(lambda rng: lora.init(rng, config, settings), jax.random.key(0))
    return named(lora.logical_axes(shapes), shapes, mesh)


def role_shardings(role: Role, config: LlamaConfig, mesh: Mesh) -> Role:
    """NamedShardings of a role: adapters split as the kernels they stand beside."""
    adapter = None if role.adapter is None else named(lora.logical_axes(role.adapter), role.adapter, mesh)
    small = lambda part: None if part is None else named(heads.logical_axes(part), part, mesh)
    base = None if role.base is None else llama_shardings(config, mesh)
    members = tuple(role_shardings(member, config, mesh) for member in role.members)
    return role.replace(
        adapter=adapter, head=small(role.head), base=base, gate=small(role.gate), members=members
    )


def optimizer_shardings(optimizer: optax.GradientTransformation, trained, shardings, mesh: Mesh):
    """Moments lie as the parameters they belong to; counters are replicated. A role may have none (optax.partition)."""
    absent = lambda x: isinstance(x, optax.MaskedNode)
    state = jax.eval_shape(optimizer.init, trained)
    return optax.tree_map_params(
        optimizer,
        lambda moment, sharding: moment if absent(moment) else sharding,
        state,
        shardings,
        transform_non_params=lambda _: replicated(mesh),
        is_leaf=absent,
    )


def in_place(update):
    """update(state, ...) -> (state, metrics), jitted: the state is donated, and the new one lies as the first one did.
    Left to choose, the partitioner may copy to every device what it finds handy there."""
    compiled = None

    def jitted(state):
        nonlocal compiled
        if compiled is None:
            where = jax.tree.map(lambda x: x.sharding, state)
            compiled = jax.jit(update, donate_argnums=0, out_shardings=(where, None))
        return compiled

    def call(state, *more):
        return jitted(state)(state, *more)

    call.trace = lambda state, *more: jitted(state).trace(state, *more)  # as of any jitted function
    return call


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Of arrays [B, ...], split over B; axis: where B stands."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, dict(RULES)["batch"]))


def batch_ways(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[a] for a in dict(RULES)["batch"])


def put_batch(batch, mesh: Mesh, axis: int = 0):
    """Host arrays [B, ...] of a batch onto the mesh, split over B; axis: where B stands. Each process sends the rows of
    its own devices."""
    axes, ways = dict(RULES)["batch"], batch_ways(mesh)

    def put(x):
        if x.shape[axis] % ways:
            raise InputError(
                f"a batch of {x.shape[axis]} rows cannot be split over {ways} devices (mesh axes {axes}); "
                f"make the stage's batch_size a multiple of {ways}, or change config.mesh."
            )
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, batch_sharding(mesh, axis))
        return place(np.asarray(x), batch_sharding(mesh, axis))

    return jax.tree.map(put, batch)


def place(tree, shardings):
    """jax.device_put, also where devices are other processes'. What is on the host is the same in all of them, and each
    puts what its own devices hold. shardings: a tree, or a prefix of it."""
    if not hosts.several():
        return jax.device_put(tree, shardings)
    return jax.tree.map(lambda to, part: jax.tree.map(lambda x: _place(x, to), part), shardings, tree)


def _place(x, to: NamedSharding):
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.device_put(x, to)
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = _place(jax.random.key_data(x), to)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, to, x.__getitem__)


def _is_names(x):
    return isinstance(x, tuple) and all(name is None or isinstance(name, str) for name in x)


def _is_boxed(x):
    return isinstance(x, nn.meta.AxisMetadata)
