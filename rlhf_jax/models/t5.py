"""T5, its v1.1 and Flan-T5 in linen: an encoder, a decoder that reads it, relative position buckets, no 1/sqrt(d).

Params: embed/embedding [V, D]; encoder and decoder /layers/... with {attention,cross}/{q,k,v,o} kernels and
mlp/{gate,up,down}, a norm before each part, relative_bias [buckets, H], final_norm/scale; lm_head/kernel [D, V] unless
tied. Raffel et al. 2020, arXiv:1910.10683; Shazeer 2020, arXiv:2002.05202 (v1.1's gate). Logical axis names only; knows
no mesh, loss or file."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models import placement
from rlhf_jax.models.encoder_config import T5Config
from rlhf_jax.models.encoder_layers import (
    ACTIVATIONS,
    DOWN,
    IN,
    OUT,
    UP,
    Linear,
    attend,
    embedding,
    readable,
    stack,
)
from rlhf_jax.models.llama import RMSNorm


class Attention(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(self, x, read, allowed, bias):
        c = self.config
        D, heads = (c.hidden_size,), (c.num_heads, c.head_dim)
        # Scores are not divided by sqrt(C): the queries' kernel starts that much smaller instead.
        stds = {"q": (c.hidden_size * c.head_dim) ** -0.5, "k": c.hidden_size**-0.5, "v": c.hidden_size**-0.5}
        q, k, v = (
            Linear(D, heads, IN, c.initializer_factor * std, bias=False, name=n)(x if n == "q" else read)
            for n, std in stds.items()
        )
        std = c.initializer_factor * (c.num_heads * c.head_dim) ** -0.5
        return Linear(heads, D, OUT, std, bias=False, name="o")(attend(q, k, v, allowed, bias=bias))


class Mlp(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(self, x):
        c = self.config
        D, F, factor = (c.hidden_size,), (c.intermediate_size,), c.initializer_factor
        up = lambda name: Linear(D, F, UP, factor * c.hidden_size**-0.5, bias=False, name=name)
        act = ACTIVATIONS[c.activation]
        y = act(up("gate")(x)) * up("up")(x) if c.gated else act(up("up")(x))
        return Linear(F, D, DOWN, factor * c.intermediate_size**-0.5, bias=False, name="down")(y)


class Block(nn.Module):
    """One layer, each part added to its input after a norm of its own. context: (allowed, bias, encoded or None)."""

    config: T5Config

    @nn.compact
    def __call__(self, x, context):
        c = self.config
        allowed, bias, encoded = context
        norm = lambda name: RMSNorm(c.layer_norm_eps, name=name)(x)
        y = norm("attention_norm")
        x = x + Attention(c, name="attention")(y, y, allowed, bias)
        if encoded is not None:
            states, mask = encoded
            x = x + Attention(c, name="cross")(norm("cross_norm"), states, readable(mask), None)
        x = x + Mlp(c, name="mlp")(norm("mlp_norm"))
        return nn.with_logical_constraint(x, ("batch", "tokens", "width")), None


class Stack(nn.Module):
    config: T5Config
    causal: bool
    length: int

    @nn.compact
    def __call__(self, x, mask, encoded=None):
        c, T = self.config, x.shape[1]
        std = c.initializer_factor * c.hidden_size**-0.5
        init = nn.with_logical_partitioning(nn.initializers.normal(std), (None, "heads"))
        table = self.param("relative_bias", init, (c.num_buckets, c.num_heads))
        away = np.arange(T)[None] - np.arange(T)[:, None]  # key minus query
        rows = relative_buckets(away, c.num_buckets, c.max_distance, both_sides=not self.causal)
        bias = table[jnp.asarray(rows)].transpose(2, 0, 1)[None].astype(jnp.float32)
        allowed = readable(mask)
        if self.causal:
            allowed = allowed & jnp.tri(T, dtype=bool)[None, None]
        x, _ = stack(Block, c.remat, self.length, config=c, name="layers")(x, (allowed, bias, encoded))
        return RMSNorm(c.layer_norm_eps, name="final_norm")(x)


class T5(nn.Module):
    """`apply({"params": params}, ids [B, S], mask [B, S], decoder_ids [B, T], decoder_mask=None) -> logits [B, T, V]`.

    decoder_ids are what the decoder reads: the targets after `shift_right`. Padding of ids may stand on either side,
    that of decoder_ids on the right. `method=T5.encode` and `T5.decode` are its halves; `T5.first_step_logits` is what
    SteamSHP needs.
    """

    config: T5Config

    def setup(self):
        c = self.config
        self.embed = embedding(c.vocab_size, c.hidden_size, c.initializer_factor, c.dtype, ("vocab", "embed"))
        self.encoder = Stack(c, False, c.num_layers)
        self.decoder = Stack(c, True, c.num_decoder_layers)
        if not c.tie_embeddings:
            std = c.initializer_factor * c.hidden_size**-0.5
            init = nn.with_logical_partitioning(nn.initializers.normal(std), ("embed", "vocab"))
            self.lm_head = nn.Dense(c.vocab_size, use_bias=False, kernel_init=init, dtype=c.dtype)

    def __call__(self, ids, mask, decoder_ids, decoder_mask=None):
        return self.logits(self.decode(decoder_ids, self.encode(ids, mask), mask, decoder_mask))

    def encode(self, ids, mask):
        """[B, S, D], to be read by any number of `decode`s."""
        x = placement.embedded(self.embed.embedding, ids, self.embed.dtype)
        return self.encoder(x, mask)

    def decode(self, decoder_ids, encoded, mask, decoder_mask=None):
        """[B, T, D] of the decoder, after its final norm. mask: [B, S], of the encoder's tokens."""
        own = jnp.ones_like(decoder_ids) if decoder_mask is None else decoder_mask
        x = placement.embedded(self.embed.embedding, decoder_ids, self.embed.dtype)
        return self.decoder(x, own, (encoded, mask))

    def logits(self, hidden):
        """[..., D] -> [..., V] float32."""
        c = self.config
        if c.scale_output:
            hidden = hidden * jnp.asarray(c.hidden_size**-0.5, hidden.dtype)
        return (self.embed.attend(hidden) if c.tie_embeddings else self.lm_head(hidden)).astype(jnp.float32)

    def first_step_logits(self, ids, mask):
        """[B, V] float32: of the first token that the decoder would write."""
        start = jnp.full_like(ids[:, :1], self.config.start_id)
        return self.logits(self.decode(start, self.encode(ids, mask), mask)[:, 0])


def shift_right(targets, config: T5Config):
    """[B, T]: what the decoder reads to predict `targets`, the start token first."""
    return jnp.concatenate([jnp.full_like(targets[:, :1], config.start_id), targets[:, :-1]], axis=1)


def relative_buckets(away: np.ndarray, buckets: int, longest: int, both_sides: bool) -> np.ndarray:
    """int32 rows of the bias table for key minus query: the near half exact, the far half by its logarithm up to
    `longest`. both_sides: the later keys have the upper half of the table; else they are never read. float32, as
    transformers rounds."""
    row = np.zeros_like(away)
    if both_sides:
        buckets //= 2
        row, away = np.where(away > 0, buckets, 0), np.abs(away)
    else:
        away = np.maximum(-away, 0)
    exact = buckets // 2
    ratio = np.log(np.maximum(away, exact).astype(np.float32) / np.float32(exact))
    far = ratio / np.float32(np.log(longest / exact)) * np.float32(buckets - exact)
    far = np.minimum(exact + far.astype(np.int32), buckets - 1)
    return (row + np.where(away < exact, away, far)).astype(np.int32)
