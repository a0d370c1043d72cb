"""Rotary positions and attention over a group: one prompt, G completions that share its keys and values.

Three readers of the same keys: a plain sequence, a whole group at once, and one new token a completion against a
cache. Softmax in float32. Knows nothing of projections, layers or vocabularies."""

import functools
import math

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from rlhf_jax.models.config import LlamaConfig

MASKED = -1e30  # finite, so that a row with nothing to read gives a mean of values instead of NaN


@flax.struct.dataclass
class GroupContext:
    """Who may be read in a packed group [B, P + G*R]; G*R may be 0: then it is a plain sequence."""

    prompt_mask: jax.Array  # [B, P]
    completion_mask: jax.Array | None = None  # [B, G, R]
    segments: jax.Array | None = None  # [B, G, R] of packed completions: instead of completion_mask


@flax.struct.dataclass
class DecodeContext:
    """One new token for each of G completions, against prompt and completion caches.

    The R columns of the completion caches are a ring: all completions write the `step`-th token of the loop into column
    step % R, wherever in a completion it stands, so that one write does for all.
    """

    prompt_mask: jax.Array  # [B, P]
    step: jax.Array  # int32 scalar
    age: jax.Array  # [B, G], or [1, 1] if all have the same: tokens of the completion before this one, < R


def rotary_tables(positions, config: LlamaConfig):
    """cos and sin [B, S, C/2] float32 for integer positions [B, S]. Su et al. 2021, arXiv:2104.09864."""
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        frequency = frequency / scaling.factor
    if scaling is not None and scaling.kind == "llama3":
        # Long wavelengths are slowed by `factor`, short ones kept, those between interpolated.
        turns = scaling.original_max_position * frequency / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
        frequency = frequency * (keep + (1.0 - keep) / scaling.factor)
    angle = positions.astype(jnp.float32)[..., None] * frequency[None, None]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BSHC, tables):
    """Rotate the two halves of each head (the layout of Hugging Face's weights)."""
    cos, sin = (t[:, :, None, :] for t in tables)
    first, second = jnp.split(x_BSHC.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x_BSHC.dtype)


def group_attention(q_BSHC, k_BSKC, v_BSKC, context: GroupContext):
    """Every prompt token reads the prompt before it; every completion token also its own completion before it,
    or of a packed completion its own segment before it.

    Returns [B, S, H, C]. The same as G independent rows of prompt + completion, the prompt's work done once.
    """
    B, P = context.prompt_mask.shape
    C, K = q_BSHC.shape[-1], k_BSKC.shape[2]
    M = q_BSHC.shape[2] // K  # query heads a key head
    q_BSHC = q_BSHC * C**-0.5
    by_token = lambda x: x.transpose(0, 2, 4, 1, 3, 5).reshape(B, -1, K * M, C)

    def by_head(x, G):  # [B, G * T, K * M, C] -> [B, K, G, M, T, C]
        return x.reshape(B, G, -1, K, x.shape[2] // K, C).transpose(0, 3, 1, 4, 2, 5)

    k, v = (by_head(x[:, :P], 1)[:, :, 0, 0] for x in (k_BSKC, v_BSKC))
    readable = context.prompt_mask[:, None, None, None, None] > 0
    prompt = by_token(_attended(by_head(q_BSHC[:, :P], 1), (k, v, readable & _causal(P))))
    if context.completion_mask is None:
        return prompt
    _, G, R = context.completion_mask.shape
    if context.segments is None:
        own = context.completion_mask[:, None, :, None, None] > 0
    else:  # padding is a segment too, which nothing else reads
        own = (context.segments[..., None] == context.segments[:, :, None])[:, None, :, None]
    k_own, v_own = (by_head(x[:, P:], G)[:, :, :, 0] for x in (k_BSKC, v_BSKC))
    out = _attended(by_head(q_BSHC[:, P:], G), (k, v, readable), (k_own, v_own, own & _causal(R)))
    return jnp.concatenate([prompt, by_token(out)], axis=1)


def decode_attention(q_BGHC, prompt_keys, prompt_values, own_keys, own_values, context: DecodeContext):
    """One query a completion, against the prompt's cache [B, K, P, C] and its own [B * G, K, R, C]: the last age + 1
    columns of the ring."""
    B, G, _, C = q_BGHC.shape
    K, R = own_keys.shape[1:3]
    # As products of matrices with nothing to transpose but queries and outputs: einsum would turn the caches around.
    q = (q_BGHC * C**-0.5).reshape(B, G, K, -1, C).swapaxes(1, 2)  # [B, K, G, M, C]
    each = lambda x: x.swapaxes(1, 2).reshape(B * G, K, *x.shape[3:])  # [B, K, G, ...] to [B * G, K, ...]
    together = lambda x: x.reshape(B, G, K, *x.shape[2:]).swapaxes(1, 2)
    ago = ((context.step - jnp.arange(R)) % R)[None, None]
    own_readable = (ago <= context.age[..., None])[:, None, :, None]
    readable = (context.prompt_mask > 0)[:, None, None, None]
    scores = (
        jnp.where(readable, _dot(q, prompt_keys, True), MASKED),
        jnp.where(own_readable, together(_dot(each(q), own_keys, True)), MASKED),
    )
    of_prompt, of_own = (share.astype(q.dtype) for share in _softmax(scores))
    out = _dot(of_prompt, prompt_values, False) + together(_dot(each(of_own), own_values, False))
    return out.astype(q.dtype).swapaxes(1, 2).reshape(B, G, -1, C)


def _causal(T):
    return jnp.tri(T, dtype=bool)[None, None, None, None]


def _softmax(parts):
    """Over the last axes of all parts together, each part on its own: put in one array, they would have to be copied
    into it and out of it."""
    top = functools.reduce(jnp.maximum, (part.max(-1, keepdims=True) for part in parts))
    mass = [jnp.exp(part - top) for part in parts]
    total = sum(part.sum(-1, keepdims=True) for part in mass)
    return tuple(checkpoint_name(part / total, "shares") for part in mass)


def _attended(q, *parts):
    """[B, K, G, M, T, C] in q's dtype, of queries q of that shape and parts (keys, values, which of them are read).

    Keys and values are [B, K, S, C] where all G read the same, or [B, K, G, S, C]."""
    keys, values, allowed = zip(*parts, strict=True)
    scores = (jnp.where(may, _product(q, k, True), MASKED) for k, may in zip(keys, allowed, strict=True))
    return _mean_values(tuple(scores), values).astype(q.dtype)


@jax.custom_jvp
def _mean_values(scores, values):
    return _with_shares(scores, values)[0]


def _with_shares(scores, values):
    shares = _softmax(scores)
    out = sum(_product(share.astype(v.dtype), v, False) for share, v in zip(shares, values, strict=True))
    return checkpoint_name(out, "attended"), shares


@_mean_values.defjvp
def _mean_values_tangent(primals, tangents):
    """The mean of the scores' tangents is taken off the output, not the shares; so what is summed backwards is as long
    as a head, not as a row of scores (Dao et al. 2022, arXiv:2205.14135, appendix B)."""
    values = primals[1]
    out, shares = _with_shares(*primals)
    moved = [share * of_score for share, of_score in zip(shares, tangents[0], strict=True)]
    mean = sum(part.sum(-1, keepdims=True) for part in moved)
    tangent = sum(_dot(part.astype(v.dtype), v, False) for part, v in zip(moved, values, strict=True))
    tangent -= out * mean
    for share, of_value in zip(shares, tangents[1], strict=True):
        tangent += _by_second(share.astype(of_value.dtype), of_value, False)
    return out, tangent


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _product(x, y, transposed):
    """x [*batch, *rows, I] with y [*batch, I, O], or [*batch, O, I] transposed, summed in float32. Differentiated once,
    forwards or backwards."""
    return _dot(x, y, transposed)


@_product.defjvp
def _product_tangent(transposed, primals, tangents):
    (x, y), (of_x, of_y) = primals, tangents
    return _dot(x, y, transposed), _dot(of_x, y, transposed) + _by_second(x, of_y, transposed)


def _dot(x, y, transposed):
    batch = tuple(range(y.ndim - 2))
    contracted = (x.ndim - 1,), (y.ndim - 1 if transposed else y.ndim - 2,)
    return jax.lax.dot_general(x, y, (contracted, (batch, batch)), preferred_element_type=jnp.float32)


def _by_second(x, y, transposed):
    """_dot(x, y, transposed), linear in y. Its gradient multiplies the transpose of the narrower array, of heads, with
    the wider, of scores, as it lies: on a CPU, that would be computed again in the order of its transpose."""

    def gradient(x, g):
        rows = tuple(range(y.ndim - 2, x.ndim - 1))
        batch = tuple(range(y.ndim - 2))
        narrow, wide = (x, g) if transposed else (g, x)
        narrow, wide = narrow.astype(y.dtype), wide.astype(y.dtype)
        sums = jax.lax.dot_general(
            narrow, wide, ((rows, rows), (batch, batch)), preferred_element_type=jnp.float32
        )
        return sums.swapaxes(-1, -2).astype(y.dtype)

    return jax.custom_derivatives.linear_call(lambda x, y: _dot(x, y, transposed), gradient, x, y)
