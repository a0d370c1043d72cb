"""The parts that BERT, RoBERTa, DeBERTa and T5 are built of: linear maps, norms, activations, the scanned stack.

Logical axis names only; reductions (norms, softmax) in float32. Knows no config but their common fields, and nothing
of positions, heads or files."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlhf_jax.models.attention import MASKED
from rlhf_jax.models.llama import contract, over_last

ACTIVATIONS: dict[str, Callable] = {  # the names of Hugging Face's configs
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_new": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu,
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.silu,
    "tanh": jnp.tanh,
}
IN = (("embed",), ("heads", "head_size"))  # logical names of a map from the width to the heads, and so on
OUT = (("heads", "head_size"), ("embed",))
UP, DOWN = (("embed",), ("mlp",)), (("mlp",), ("embed",))


class Linear(nn.Module):
    """x W + b for kernels [*inputs, *outputs]; names: the logical axes of both."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    names: tuple[tuple, tuple]
    std: float
    bias: bool = True

    @nn.compact
    def __call__(self, x):
        init = nn.with_logical_partitioning(nn.initializers.normal(self.std), self.names[0] + self.names[1])
        y = contract(x, self.param("kernel", init, self.inputs + self.outputs), len(self.inputs))
        if self.bias:
            init = nn.with_logical_partitioning(nn.initializers.zeros, self.names[1])
            y = y + over_last(self.param("bias", init, self.outputs), y)
        return y


class LayerNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x):
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, ("norm",)), shape)
        bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)), shape)
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (over_last(scale, wide) * wide + over_last(bias, wide)).astype(x.dtype)


def embedding(rows: int, width: int, std: float, dtype, names=(None, "embed")) -> nn.Embed:
    """A table [rows, width]. Its rows are not split: published encoders have 30522, 50265 or 128100 of them."""
    init = nn.with_logical_partitioning(nn.initializers.normal(std), names)
    return nn.Embed(rows, width, embedding_init=init, dtype=dtype)


class PostNormBlock(nn.Module):
    """One layer of BERT's kind: each part is added to its input, then normalised. `attention`: the module of it."""

    config: object
    attention: type[nn.Module]

    @nn.compact
    def __call__(self, x, context):
        c = self.config
        linear = lambda name, *shape: Linear(*shape, std=c.initializer_range, name=name)
        D, F = (c.hidden_size,), (c.intermediate_size,)
        out = linear("out", (c.num_heads, c.head_dim), D, OUT)
        y = self.attention(c, name="attention")(x, context)
        x = LayerNorm(c.layer_norm_eps, name="attention_norm")(x + out(y))
        y = ACTIVATIONS[c.activation](linear("up", D, F, UP)(x))
        x = LayerNorm(c.layer_norm_eps, name="mlp_norm")(x + linear("down", F, D, DOWN)(y))
        return nn.with_logical_constraint(x, ("batch", "tokens", "width")), None


def stack(block: type[nn.Module], remat: str, length: int, name: str | None = None, **settings) -> nn.Module:
    """`length` blocks, scanned: called with (x, context), of which every layer reads the same context."""
    return nn.scan(
        rematerialised(block, remat),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )(**settings, name=name)


def rematerialised(block: type[nn.Module], remat: str) -> type[nn.Module]:
    if remat == "none":
        return block
    saveable = {
        "full": jax.checkpoint_policies.nothing_saveable,
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    }[remat]
    return nn.remat(block, prevent_cse=False, policy=saveable)


def attend(q_BTHC, k_BSHC, v_BSHC, allowed, scale: float = 1.0, bias=None):
    """[B, T, H, C]: softmax(scale * (q k + bias)) v over what `allowed` [B or 1, 1, T or 1, S] shows; the products in
    float32. bias: [B or 1, H, T, S] float32 or None."""
    scores = jnp.einsum("bthc,bshc->bhts", q_BTHC, k_BSHC, preferred_element_type=jnp.float32)
    scores = scale * (scores if bias is None else scores + bias)
    share = jax.nn.softmax(jnp.where(allowed, scores, MASKED), axis=-1).astype(v_BSHC.dtype)
    return jnp.einsum("bhts,bshc->bthc", share, v_BSHC)


def readable(mask_BS):
    """[B, 1, 1, S] bool: keys that are tokens."""
    return mask_BS[:, None, None, :] > 0
