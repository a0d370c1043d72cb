"""BERT and RoBERTa in linen: scanned layers, learned absolute positions counted over real tokens.

Params: words, positions, types /embedding [rows, D]; embedding_norm/{scale,bias} [D]; layers/attention/{q,k,v} kernels
[L, D, H, C], layers/out [L, H, C, D], layers/{up,down}, layers/{attention_norm,mlp_norm}. Devlin et al. 2019,
arXiv:1810.04805; Liu et al. 2019, arXiv:1907.11692. Logical axis names only; knows no mesh, loss, head or file."""

import flax.linen as nn
import jax.numpy as jnp

from rlhf_jax.models.encoder_config import BertConfig
from rlhf_jax.models.encoder_layers import (
    IN,
    LayerNorm,
    Linear,
    PostNormBlock,
    attend,
    embedding,
    readable,
    stack,
)


class SelfAttention(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, x, mask):
        c = self.config
        q, k, v = (
            Linear((c.hidden_size,), (c.num_heads, c.head_dim), IN, c.initializer_range, name=n)(x)
            for n in "qkv"
        )
        return attend(q, k, v, readable(mask), c.head_dim**-0.5)


class Bert(nn.Module):
    """`apply({"params": params}, token_ids [B, T], mask [B, T], type_ids [B, T] or None) -> hidden [B, T, D]`.

    Padding may stand on either side: the first real token has position 0 wherever it stands.
    Raises: ValueError while tracing if T is more than the positions there are.
    """

    config: BertConfig

    def setup(self):
        c = self.config
        table = lambda rows: embedding(rows, c.hidden_size, c.initializer_range, c.dtype)
        self.words, self.positions, self.types = (
            table(rows) for rows in (c.vocab_size, c.max_position, c.type_vocab_size)
        )
        self.embedding_norm = LayerNorm(c.layer_norm_eps)
        self.layers = stack(PostNormBlock, c.remat, c.num_layers, config=c, attention=SelfAttention)

    def __call__(self, token_ids, mask, type_ids=None):
        c = self.config
        check_length(token_ids.shape[1], c.max_position - c.position_offset)
        position = jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0).astype(jnp.int32) + c.position_offset
        types = self.types(jnp.zeros_like(token_ids) if type_ids is None else type_ids)
        x = self.embedding_norm(self.words(token_ids) + self.positions(position) + types)
        x = nn.with_logical_constraint(x, ("batch", "tokens", "width"))
        return self.layers(x, mask)[0]


def check_length(tokens: int, limit: int) -> None:
    """A longer input would read past the table, which JAX clamps in silence."""
    if tokens > limit:
        raise ValueError(
            f"{tokens} tokens in a row, but the encoder has positions for {limit}; cut the input."
        )
