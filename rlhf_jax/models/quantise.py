"""A frozen base in 8 or 4 bits: the kernels of its projections as codes and scales, turned back just before the matmul.

int8: symmetric, one scale an output channel, the largest absolute weight over 127. nf4: the 16 levels of a normal
distribution, one scale a block of 64 weights along the input (QLoRA: Dettmers et al. 2023, arXiv:2305.14314; without
its second quantisation, of the scales). Norms, embeddings and the head stay as they are. In the place of
`kernel` [*in, *out] a projection holds `codes` and `scales`; the decoder sees from these names which it is given.
Knows kernels and their logical axes; no file, adapter or mesh."""

import math

import jax
import jax.numpy as jnp

from rlhf_jax.errors import InputError
from rlhf_jax.models.config import LlamaConfig
from rlhf_jax.models.lora import ATTENTION, shapes

KINDS = ("none", "int8", "nf4")
BLOCK = 64  # weights a scale of nf4; where the input is no multiple of it, the largest power of two that divides it
# Quantiles of N(0, 1), scaled to [-1, 1], 0 exact: appendix E of the paper.
NF4_LEVELS = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
              -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
              0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
              0.7229568362236023, 1.0)  # fmt: skip


def quantise_kernel(kernel, num_inputs: int, kind: str) -> dict:
    """{"codes", "scales"} of one kernel [*in, *out].

    int8: codes int8 [*in, *out], scales [*out]. nf4: codes uint8 [*in, *out], two weights a byte along the last input
    axis, of each block the first half low and the second high; scales the same with one entry a block. float32 scales.
    Raises: InputError for nf4 of an odd number of inputs.
    """
    wide = kernel.astype(jnp.float32)
    if kind == "int8":
        inputs = tuple(range(num_inputs))
        scales = jnp.max(jnp.abs(wide), axis=inputs) / 127.0
        spread = scales.reshape((1,) * num_inputs + scales.shape)
        codes = jnp.round(jnp.where(spread > 0, wide / jnp.where(spread > 0, spread, 1.0), 0.0))
        return {"codes": jnp.clip(codes, -127, 127).astype(jnp.int8), "scales": scales}
    axis = num_inputs - 1
    block = _block(kernel.shape[axis])
    cut = _split(wide, axis, kernel.shape[axis] // block)
    scales = jnp.max(jnp.abs(cut), axis=axis + 1, keepdims=True)
    unit = cut / jnp.where(scales > 0, scales, 1.0)
    middles = [(low + high) / 2 for low, high in zip(NF4_LEVELS[:-1], NF4_LEVELS[1:], strict=True)]
    codes = sum((unit > middle).astype(jnp.uint8) for middle in middles)
    low, high = jnp.split(codes, 2, axis=axis + 1)
    packed = (low | (high << 4)).astype(jnp.uint8)
    return {"codes": _join(packed, axis), "scales": jnp.squeeze(scales, axis + 1)}


def dequantise(held: dict, num_inputs: int, dtype=jnp.float32):
    """The kernel [*in, *out] that {"codes", "scales"} stand for, exact in float32, then in `dtype`."""
    codes, scales = held["codes"], held["scales"].astype(jnp.float32)
    if codes.dtype == jnp.int8:
        spread = scales.reshape((1,) * num_inputs + scales.shape)
        return (codes.astype(jnp.float32) * spread).astype(dtype)
    axis = num_inputs - 1
    cut = _split(codes, axis, scales.shape[axis])
    cut = jnp.concatenate([cut & 15, cut >> 4], axis=axis + 1)
    return _join((_level(cut) * jnp.expand_dims(scales, axis + 1)).astype(dtype), axis)


def quantise(params: dict, config: LlamaConfig, kind: str) -> dict:
    """The whole base, one layer at a time. `params` is left as it is."""
    if kind == "none":
        return params
    change = lambda kernels, inputs: jax.lax.map(lambda x: quantise_kernel(x, len(inputs), kind), kernels)
    return _each(params, config, change)


def logical_axes(names: dict, config: LlamaConfig, kind: str) -> dict:
    """A tree of logical names of the base's arrays, with those of codes and scales in the place of the kernels'."""

    def one(kernel, inputs):
        blocked = len(inputs)  # the last of the input axes; the first of all is that of the layers
        lead, outputs = kernel[1:blocked], kernel[blocked + 1 :]
        scales = outputs if kind == "int8" else (*lead, f"{kernel[blocked]}_blocks", *outputs)
        return {"codes": kernel, "scales": (kernel[0], *scales)}

    return names if kind == "none" else _each(names, config, one)


def _each(tree, config, change):
    """The tree with change(kernel, input sizes) in the place of each projection's kernel."""
    layers = dict(tree["layers"])
    for room in ("attention", "mlp"):
        layers[room] = dict(layers[room])
        for name in shapes(config):
            if (name in ATTENTION) == (room == "attention"):
                held = dict(layers[room][name])
                held |= change(held.pop("kernel"), shapes(config)[name][0])
                layers[room][name] = held
    return {**tree, "layers": layers}


def _block(size):
    block = math.gcd(size, BLOCK)
    if block < 2:
        raise InputError(
            f"config.model.quantise is 'nf4', which packs two weights of a block in a byte; a projection of this "
            f"model has {size} inputs to cut into blocks, expected an even number. Use int8."
        )
    return block


def _split(x, axis, count):
    return x.reshape(*x.shape[:axis], count, x.shape[axis] // count, *x.shape[axis + 1 :])


def _join(x, axis):
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _level(codes):
    """NF4_LEVELS[codes], by a tree of selections: a gather of single numbers is slow on a TPU."""
    values = [jnp.float32(level) for level in NF4_LEVELS]
    for bit in range(4):
        chosen = (codes >> bit) & 1 == 1
        values = [jnp.where(chosen, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0]
