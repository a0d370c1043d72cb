"""Rotary positions and attention over a group: one prompt, G completions that share its keys and values.

Three readers of the same keys: a plain sequence, a whole group at once, and one new token a completion against a
cache. Softmax in float32. Knows nothing of projections, layers or vocabularies."""

import math

import flax.struct
import jax
import jax.numpy as jnp

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
    q = (q_BSHC * C**-0.5).reshape(*q_BSHC.shape[:2], K, M, C)
    q_prompt, k_prompt, v_prompt = q[:, :P], k_BSKC[:, :P], v_BSKC[:, :P]
    readable = context.prompt_mask[:, None, None, None, :] > 0
    allowed = readable & jnp.tri(P, dtype=bool)[None, None, None]
    scores = _wide("btkmc,bskc->bkmts", q_prompt, k_prompt)
    prompt = jnp.einsum("bkmts,bskc->btkmc", _softmax(scores, allowed, q.dtype), v_prompt)
    prompt = prompt.reshape(B, P, -1, C)
    if context.completion_mask is None:
        return prompt
    _, G, R = context.completion_mask.shape
    q_own = q[:, P:].reshape(B, G, R, K, M, C)
    k_own, v_own = (x[:, P:].reshape(B, G, R, K, C) for x in (k_BSKC, v_BSKC))
    scores = jnp.concatenate(
        [_wide("bgrkmc,bpkc->bgkmrp", q_own, k_prompt), _wide("bgrkmc,bgskc->bgkmrs", q_own, k_own)], -1
    )
    if context.segments is None:
        own = context.completion_mask[:, :, None, None, None, :] > 0
    else:  # padding is a segment too, which nothing else reads
        own = context.segments[:, :, None, None, :, None] == context.segments[:, :, None, None, None, :]
    before = jnp.tri(R, dtype=bool)[None, None, None, None] & own
    allowed = jnp.concatenate(
        [
            jnp.broadcast_to(readable[:, None], (B, G, 1, 1, R, P)),
            jnp.broadcast_to(before, (B, G, 1, 1, R, R)),
        ],
        -1,
    )
    share = _softmax(scores, allowed, q.dtype)
    own = _wide("bgkmrp,bpkc->bgrkmc", share[..., :P], v_prompt)
    own = own + _wide("bgkmrs,bgskc->bgrkmc", share[..., P:], v_own)
    return jnp.concatenate([prompt, own.astype(q.dtype).reshape(B, G * R, K * M, C)], axis=1)


def decode_attention(q_BGHC, prompt_keys, prompt_values, own_keys, own_values, context: DecodeContext):
    """One query a completion, against the prompt's cache [B, K, P, C] and its own [B * G, K, R, C]: the last age + 1
    columns of the ring."""
    B, G, _, C = q_BGHC.shape
    K, P = prompt_keys.shape[1:3]
    R = own_keys.shape[2]
    q = (q_BGHC * C**-0.5).reshape(B, G, K, -1, C)
    own = _wide("nkmc,nkrc->nkmr", q.reshape(B * G, K, -1, C), own_keys)
    scores = jnp.concatenate([_wide("bgkmc,bkpc->bgkmp", q, prompt_keys), own.reshape(B, G, K, -1, R)], -1)
    ago = (context.step - jnp.arange(R)) % R
    own = ago[None, None] <= context.age[..., None]
    each = (B, own.shape[1])
    allowed = jnp.concatenate(
        [
            jnp.broadcast_to((context.prompt_mask > 0)[:, None], (*each, P)),
            jnp.broadcast_to(own, (*each, R)),
        ],
        -1,
    )[:, :, None, None, :]
    share = _softmax(scores, allowed, q.dtype)
    out = _wide("bgkmp,bkpc->bgkmc", share[..., :P], prompt_values)
    own = _wide("nkmr,nkrc->nkmc", share[..., P:].reshape(B * G, K, -1, R), own_values)
    out = out + own.reshape(out.shape)
    return out.astype(q.dtype).reshape(B, G, -1, C)


def _wide(spec, x, y):
    """einsum whose sums are kept in float32."""
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


def _softmax(scores, allowed, dtype):
    return jax.nn.softmax(jnp.where(allowed, scores, MASKED), axis=-1).astype(dtype)
