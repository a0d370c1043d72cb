"""Group attention by the TPU kernels that JAX ships: Pallas splash attention, whose scores never reach memory.

`attention.group_attention` is the reference; this gives the same wherever something is read. What depends on shapes
alone (a completion reads its prompt and itself, causally) is a static mask, whose empty blocks are never visited; what
depends on the batch (padding, packed segments) goes into segment ids, which must be equal for a key to be read.
Knows logical axes, and of a mesh only whether one is active. Dao et al. 2022, arXiv:2205.14135."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec

from rlhf_jax.errors import InputError

LANES = 128  # of a TPU's vector registers: what every block is a multiple of
LONGEST_BLOCK = 512
OUTSIDE = -1  # segment id of what no token of a packed row reads
AXES = ("batch", "tokens", "heads", "head_size")


def choose(attention: str, platform: str) -> str:
    """The form of attention for a config's choice: `auto` is splash on a TPU, and plain elsewhere.

    Raises: InputError if the kernels are asked for where there is no TPU.
    """
    if attention == "auto":
        return "splash" if platform == "tpu" else "plain"
    if attention == "splash" and platform != "tpu":
        raise InputError(
            f"config.model.attention is 'splash', kernels for a TPU, and the devices are of the kind {platform!r}; "
            "expected plain, or auto (splash on a TPU, plain elsewhere)."
        )
    return attention


def can_carry(context) -> bool:
    """Whether the kernels can do this: segments that share a prompt are no function of static mask and segment ids."""
    return context.segments is None or context.prompt_mask.shape[1] == 1


def group_attention(q_BSHC, k_BSKC, v_BSKC, context, interpret: bool = False):
    """As attention.group_attention: [B, S, H, C].

    A token with nothing to read (the padding before a prompt) gives a mean of other padding, not NaN; nothing reads it.
    The prompt of packed rows is one token that must be masked, as data/packing.py makes it; a row in which it is real
    gives NaN. Under a mesh each device attends for its own rows and heads. interpret: run by the Pallas interpreter,
    for tests on a CPU.
    """
    B, P = context.prompt_mask.shape
    H, C, K = *q_BSHC.shape[2:], k_BSKC.shape[2]
    G, R = (0, 0) if context.completion_mask is None else context.completion_mask.shape[1:]
    size, block = blocks(P + G * R)
    readers, read = _segment_ids(context, size)
    pad = ((0, 0), (0, size - (P + G * R)), (0, 0), (0, 0))
    q, k, v = (jnp.pad(x, pad) for x in (q_BSHC * C**-0.5, k_BSKC, v_BSKC))

    def attend(q, k, v, readers, read):
        heads = masks.MultiHeadMask([GroupMask(size, P, G, R)] * q.shape[2])
        # Made anew for each trace: it holds arrays of that trace. The work on the mask itself is cached by JAX.
        kernel = kernels.make_splash_mha(
            heads,
            block_sizes=_block_sizes(block),
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
            residual_checkpoint_name="attended",
        )
        rows = (x.swapaxes(1, 2) for x in (q, k, v))
        return jax.vmap(kernel)(*rows, kernels.SegmentIds(readers, read)).swapaxes(1, 2)

    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        rows, _, heads, _ = _mesh_axes(mesh)
        rows = rows if B % _ways(mesh, rows) == 0 else None
        heads = heads if H % _ways(mesh, heads) == 0 else None
        # With fewer key heads than devices, each holds a copy of the one that its queries read.
        copies = math.lcm(K, _ways(mesh, heads)) // K
        if copies > 1:
            k, v = (jnp.repeat(x, copies, axis=2) for x in (k, v))
        whole, ids = PartitionSpec(rows, None, heads, None), PartitionSpec(rows, None)
        attend = jax.shard_map(
            attend, mesh=mesh, in_specs=(whole, whole, whole, ids, ids), out_specs=whole, check_vma=False
        )
    out = attend(q, k, v, readers, read)[:, : P + G * R]
    if context.segments is not None:
        out = jnp.where(context.prompt_mask[:, :, None, None] > 0, jnp.nan, out)
    return out


@dataclasses.dataclass(frozen=True)
class GroupMask(masks.Mask):
    """Which of `size` tokens may be read by shape alone: prompt, completions one after the other, then padding.

    Computed for the block that is asked for, so a long row costs no memory. Every token may read itself."""

    size: int
    prompt: int
    count: int
    completion: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.size, self.size

    def __getitem__(self, index) -> np.ndarray:
        reader, read = (np.arange(*part.indices(self.size), dtype=np.int32) for part in index)
        reader, read = reader[:, None], read[None]
        shared = (read < self.prompt) & (reader < self.prompt + self.count * self.completion)
        return (read <= reader) & (shared | (self._part(reader) == self._part(read)))

    def _part(self, token):
        """-1 of the prompt, then the number of the completion; `count` is the padding at the end."""
        number = np.minimum((token - self.prompt) // max(self.completion, 1), self.count)
        number = number if self.completion else np.full_like(token, self.count)
        return np.where(token < self.prompt, -1, number)


def blocks(tokens: int) -> tuple[int, int]:
    """(padded length, block): as few blocks of at most LONGEST_BLOCK as hold the tokens. A grid step costs more than
    the arithmetic of a small block, so blocks are large rather than the padding little."""
    count = -(-tokens // LONGEST_BLOCK)
    block = -(-tokens // (count * LANES)) * LANES
    return count * block, block


def _block_sizes(block):
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    return kernels.BlockSizes(**dict.fromkeys((*names, "block_q_dq", "block_kv_dq"), block))


def _segment_ids(context, size):
    """(ids of the tokens as readers, as what is read), each [B, size] int32. With the static mask every token can read
    something: a row of a softmax with nothing in it would be NaN, or have a gradient that means nothing."""
    B, P = context.prompt_mask.shape
    end = lambda x, fill: jnp.pad(x, ((0, 0), (0, size - x.shape[1])), constant_values=fill)
    if context.segments is not None:
        outside = jnp.full((B, P), OUTSIDE, jnp.int32)
        # Padding is a segment too, and each segment reads itself.
        ids = end(jnp.concatenate([outside, context.segments.reshape(B, -1)], 1), OUTSIDE)
        return ids, ids
    prompt = (context.prompt_mask > 0).astype(jnp.int32)
    read, anything = prompt, jnp.cumsum(prompt, 1)
    if context.completion_mask is not None:
        completions = (context.completion_mask > 0).astype(jnp.int32)
        before = anything[:, -1:, None] + jnp.cumsum(completions, 2)
        read, anything = (
            jnp.concatenate([one, other.reshape(B, -1)], 1)
            for one, other in ((prompt, completions), (anything, before))
        )
    # 1 is what counts. Padding is read by nobody but the padding (0) that has nothing real before it.
    return end((anything > 0).astype(jnp.int32), 0), end(read, 0)


def _mesh_axes(mesh):
    """The mesh axes of AXES by the rules that are active; without rules nothing is split."""
    spec = nn.logical_to_mesh_axes(AXES)
    held = lambda axis: axis in mesh.shape
    named = lambda axes: tuple(filter(held, (axes,) if isinstance(axes, str) else axes or ())) or None
    return tuple(named(axes) for axes in tuple(spec))


def _ways(mesh, axes):
    return math.prod(mesh.shape[axis] for axis in axes or ())
