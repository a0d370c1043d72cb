"""DeBERTa-v2 and v3 in linen: attention by content and by relative position, each read against the other.

Params: words/embedding, relative/embedding [2 * span, D] with relative_norm, embedding_norm, layers as in bert.py with
attention/{position_key,position_query} where keys are not shared; with a convolution the first layer is `first`, the
others `layers`, and conv/{kernel [D, D, width], bias}, conv_norm stand beside it. He et al. 2021, arXiv:2006.03654;
arXiv:2111.09543. Logical axis names only; knows no mesh, loss, head or file."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models.bert import check_length
from rlhf_jax.models.encoder_config import DebertaConfig
from rlhf_jax.models.encoder_layers import (
    ACTIVATIONS,
    IN,
    LayerNorm,
    Linear,
    PostNormBlock,
    attend,
    embedding,
    readable,
    rematerialised,
    stack,
)
from rlhf_jax.models.llama import over_last


class DisentangledAttention(nn.Module):
    """softmax((q k + q k_position + k q_position) / sqrt(C * terms)) v, the position that of query minus key."""

    config: DebertaConfig

    @nn.compact
    def __call__(self, x, context):
        c = self.config
        mask, distances = context  # [B, T]; [2T - 1, D]: the embedding of T - 1, ..., 0, ..., 1 - T
        make = lambda name: Linear(
            (c.hidden_size,), (c.num_heads, c.head_dim), IN, c.initializer_range, name=name
        )
        query, key = make("q"), make("k")
        q, k, v = query(x), key(x), make("v")(x)
        bias = None
        if c.relative_attention:
            if "c2p" in c.pos_att_type:
                to_key = (key if c.share_att_key else make("position_key"))(distances)
                bias = _shifted(jnp.einsum("bqhc,rhc->bhqr", q, to_key, preferred_element_type=jnp.float32))
            if "p2c" in c.pos_att_type:
                to_query = (query if c.share_att_key else make("position_query"))(distances[::-1])
                by_key = jnp.einsum("bkhc,rhc->bhkr", k, to_query, preferred_element_type=jnp.float32)
                by_key = _shifted(by_key).swapaxes(-1, -2)
                bias = by_key if bias is None else bias + by_key
        scale = (c.head_dim * (1 + len(c.pos_att_type))) ** -0.5
        return attend(q, k, v, readable(mask), scale, bias)


class Convolution(nn.Module):
    """Along the tokens; what stands outside the mask counts as zero."""

    config: DebertaConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        D, width = c.hidden_size, c.conv_kernel_size
        init = nn.with_logical_partitioning(
            nn.initializers.normal(c.initializer_range), (None, "embed", None)
        )
        kernel = self.param("kernel", init, (D, D, width))
        bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)), (D,))
        y = jax.lax.conv_general_dilated(
            x, kernel.astype(x.dtype), (1,), "SAME", dimension_numbers=("NWC", "OIW", "NWC")
        )
        return y + over_last(bias, y)


class Deberta(nn.Module):
    """`apply({"params": params}, token_ids [B, T], mask [B, T], type_ids [B, T] or None) -> hidden [B, T, D]`.

    Padding may stand on either side. type_ids are read only by checkpoints with types (v3 has none).
    Raises: ValueError while tracing if positions are absolute and T is more than there are.
    """

    config: DebertaConfig

    def setup(self):
        c = self.config
        table = lambda rows, width: embedding(rows, width, c.initializer_range, c.dtype)
        self.words = table(c.vocab_size, c.embedding_size)
        if c.position_biased_input:
            self.positions = table(c.max_position, c.embedding_size)
        if c.type_vocab_size:
            self.types = table(c.type_vocab_size, c.embedding_size)
        if c.embedding_size != c.hidden_size:
            self.embedding_projection = Linear(
                (c.embedding_size,), (c.hidden_size,), ((None,), ("embed",)), c.initializer_range, bias=False
            )
        self.embedding_norm = LayerNorm(c.layer_norm_eps)
        if c.relative_attention:
            self.relative = table(2 * c.position_span, c.hidden_size)
            if c.norm_rel_ebd:
                self.relative_norm = LayerNorm(c.layer_norm_eps)
        layer = dict(config=c, attention=DisentangledAttention)
        scanned = c.num_layers
        if c.conv_kernel_size:
            self.first = rematerialised(PostNormBlock, c.remat)(**layer)
            self.conv, self.conv_norm = Convolution(c), LayerNorm(c.layer_norm_eps)
            scanned -= 1
        if scanned:
            self.layers = stack(PostNormBlock, c.remat, scanned, **layer)

    def __call__(self, token_ids, mask, type_ids=None):
        c = self.config
        T, inside = token_ids.shape[1], mask[..., None] > 0
        x = self.words(token_ids)
        if c.position_biased_input:
            check_length(T, c.max_position)
            x = x + self.positions(jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0).astype(jnp.int32))
        if c.type_vocab_size:
            x = x + self.types(jnp.zeros_like(token_ids) if type_ids is None else type_ids)
        if c.embedding_size != c.hidden_size:
            x = self.embedding_projection(x)
        x = jnp.where(inside, self.embedding_norm(x), 0)
        x = nn.with_logical_constraint(x, ("batch", "tokens", "width"))
        context = (mask, self._distances(T))
        if c.conv_kernel_size:
            y, _ = self.first(x, context)
            beside = ACTIVATIONS[c.conv_activation](jnp.where(inside, self.conv(x), 0))
            x = jnp.where(inside, self.conv_norm(y + beside), 0)
        return self.layers(x, context)[0] if c.num_layers > bool(c.conv_kernel_size) else x

    def _distances(self, T):
        """[2T - 1, D]: embeddings of the distances T - 1 down to 1 - T, or None."""
        c = self.config
        if not c.relative_attention:
            return None
        rows = relative_buckets(np.arange(T - 1, -T, -1), c.position_buckets, c.max_relative_positions)
        table = self.relative(jnp.asarray(np.clip(rows + c.position_span, 0, 2 * c.position_span - 1)))
        return self.relative_norm(table) if c.norm_rel_ebd else table


def relative_buckets(distance: np.ndarray, buckets: int, longest: int) -> np.ndarray:
    """int32, of distance's shape: itself up to half the buckets, beyond that by its logarithm; odd in the distance.

    Each distance of [-longest, longest] has a row of its own if `buckets` is 0. float32, as transformers rounds.
    """
    if not buckets:
        return distance.astype(np.int32)
    middle = buckets // 2
    size = np.maximum(np.abs(distance), middle).astype(np.float32)
    steps = (
        np.log(size / np.float32(middle))
        / np.log(np.float32((longest - 1) / middle))
        * np.float32(middle - 1)
    )
    far = np.sign(distance) * (np.ceil(steps) + middle)
    return np.where(np.abs(distance) <= middle, distance, far).astype(np.int32)


def _shifted(scores):
    """[..., T, 2T - 1] -> [..., T, T]: entry (i, j) is the one in column T - 1 - i + j.

    Scores against every distance, read off by query and key without a gather, whose gradient would be a scatter.
    """
    T = scores.shape[-2]
    padded = jnp.pad(scores, [(0, 0)] * (scores.ndim - 1) + [(0, 1)])
    flat = padded.reshape(*scores.shape[:-2], 2 * T * T)
    return flat[..., T - 1 : 2 * T * T - 1].reshape(scores.shape)[..., :T]
