"""The Llama decoder in linen: scanned layers, rematerialised by policy, on a group of completions at a time.

Params: embed/embedding [V, D]; layers/{attention_norm,mlp_norm}/scale [L, D]; layers/attention/{q,k,v,o}_proj and
layers/mlp/{gate,up,down}_proj kernels [L, *in, *out] (and biases [L, *out]); final_norm/scale [D]; lm_head/kernel
[D, V] unless tied. Touvron et al. 2023, arXiv:2307.09288. Logical axis names only; knows no mesh, loss or file."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from rlhf_jax.models import attention, placement, quantise, splash
from rlhf_jax.models.attention import DecodeContext, GroupContext
from rlhf_jax.models.config import LlamaConfig
from rlhf_jax.models.lora import AXES, Adapter, shapes

# What the backward pass finds where no layer is computed again: what products gave, and the shares of attention.
# Writing the rest (norms, rotations, gates) to memory costs more than computing it again.
KEPT = ("projection", "low_rank", "shares", "attended")
HEADS = ("batch", "tokens", "heads", "head_size")
CACHE = ("layers", "batch", None, "kv_heads", None, None)


class RMSNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x):
        init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        scale = self.param("scale", init, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        # The product is rounded once, and the scale's gradient is a sum over tokens in float32.
        return (over_last(scale, wide) * wide).astype(x.dtype)


class Projection(nn.Module):
    """x W (+ b) (+ x A B): one named linear map of the layer, its adapter beside it. W is what the weights given hold:
    a kernel, or codes and scales of one (quantise.py)."""

    config: LlamaConfig
    target: str
    bias: bool

    @nn.compact
    def __call__(self, x, adapter):
        inputs, outputs = shapes(self.config)[self.target]
        names_in, names_out = AXES[self.target]
        init = nn.with_logical_partitioning(
            nn.initializers.normal(self.config.initializer_range), names_in + names_out
        )
        if self.has_variable("params", "codes"):
            held = {name: self.get_variable("params", name) for name in ("codes", "scales")}
            y = _contract_quantised(x, placement.used_codes(held, names_in, names_out), len(inputs))
        else:
            kernel = self.param("kernel", init, inputs + outputs).astype(x.dtype)  # before it is gathered
            y = contract(x, placement.used(kernel, *names_in, *names_out), len(inputs))
        if self.bias:
            init = nn.with_logical_partitioning(nn.initializers.zeros, names_out)
            wide = y.astype(jnp.float32)  # so that the bias's gradient is summed over tokens in float32
            y = (wide + over_last(self.param("bias", init, outputs), wide)).astype(y.dtype)
        if adapter is not None and self.target in adapter:
            a, b = adapter[self.target]["a"], adapter[self.target]["b"]
            a, b = placement.used(a, *names_in, "rank"), placement.used(b, "rank", *names_out)
            lead = x.shape[: x.ndim - len(inputs)]
            low = _low_rank(
                x.reshape(-1, math.prod(inputs)), a.reshape(-1, a.shape[-1]), b.reshape(b.shape[0], -1)
            )
            y = (y + low.reshape(*lead, *outputs)).astype(x.dtype)
        return placement.activation(checkpoint_name(y, "projection"), *names_out)


class Attention(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x, cache, layer, rotary, context):
        c = self.config
        project = {n: Projection(c, f"{n}_proj", c.attention_bias, name=f"{n}_proj") for n in "qkvo"}
        q, k, v = (project[n](x, layer["adapter"]) for n in "qkv")
        q, k, v = placement.constrain(q, *HEADS), placement.per_device(k), placement.per_device(v)
        q, k = attention.rotate(q, rotary), attention.rotate(k, rotary)
        if isinstance(context, DecodeContext):
            cache, out = _decode(q, k, v, cache, layer, context)
            made = None
        else:
            if c.attention == "plain" or not splash.can_carry(context):
                out = attention.group_attention(q, k, v, context)
            else:
                out = splash.group_attention(q, k, v, context, interpret=c.attention == "interpreted")
            # Only a prefill keeps these; elsewhere they are dead and the compiler drops them.
            made = tuple(y.swapaxes(1, 2) for y in (k, v))
        out = placement.activation(placement.constrain(out, *HEADS), "heads", "head_size")
        return project["o"](out, layer["adapter"]), cache, made


class Mlp(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x, adapter):
        gate, up, down = (
            Projection(self.config, f"{n}_proj", self.config.mlp_bias, name=f"{n}_proj")
            for n in ("gate", "up", "down")
        )
        return down(nn.silu(gate(x, adapter)) * up(x, adapter), adapter)


class Block(nn.Module):
    """One layer. carry: (x, completion caches of all layers); layer: what this layer alone reads; keep: static."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, carry, layer, rotary, context):
        c = self.config
        x, cache = carry
        y, cache, made = Attention(c, name="attention")(
            RMSNorm(c.rms_norm_eps, name="attention_norm")(x), cache, layer, rotary, context
        )
        x = x + y
        x = x + Mlp(c, name="mlp")(RMSNorm(c.rms_norm_eps, name="mlp_norm")(x), layer["adapter"])
        return (placement.activation(x, "embed"), cache), made


class Llama(nn.Module):
    """`apply({"params": params}, token_ids [B, T], attention_mask [B, T], adapters=None) -> logits [B, T, V]`.

    Padding may stand on either side; positions count real tokens. `method=Llama.group` (and prefill, decode, logits)
    are the parts that training and sampling use.
    """

    config: LlamaConfig

    def setup(self):
        c = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(c.initializer_range), ("vocab", "embed"))
        self.embed = nn.Embed(c.vocab_size, c.hidden_size, embedding_init=init, dtype=c.dtype)
        saveable = {
            "full": jax.checkpoint_policies.nothing_saveable,
            "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            "none": jax.checkpoint_policies.save_only_these_names(*KEPT),
        }[c.remat]
        block = nn.remat(Block, prevent_cse=False, policy=saveable)
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=c.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c)
        self.final_norm = RMSNorm(c.rms_norm_eps)
        if not c.tie_embeddings:
            init = nn.with_logical_partitioning(
                nn.initializers.normal(c.initializer_range), ("embed", "vocab")
            )
            wide = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
            self.lm_head = nn.Dense(
                c.vocab_size, use_bias=False, kernel_init=init, dtype=c.dtype, dot_general=wide
            )

    def __call__(self, token_ids, attention_mask, adapters: Adapter | None = None):
        return self.logits(self.hidden(token_ids, attention_mask, adapters))

    def hidden(self, token_ids, attention_mask, adapters=None):
        """[B, T, D] after the final norm."""
        return self._run(token_ids, _positions(attention_mask), GroupContext(attention_mask), adapters)[0]

    def group(self, prompt_ids, prompt_mask, completion_ids, completion_mask, adapters=None, segments=None):
        """(prompt [B, P, D], completions [B, G, R, D]) after the final norm; each prompt is computed once.

        segments: [B, G, R] int32 or None; completions in which several stand one after the other, each a run of one
          number. A token reads the prompt and its own segment; positions start again with each.
        """
        B, G, R = completion_ids.shape
        own = (
            jnp.tile(jnp.arange(R), G)[None] if segments is None else _restarting(segments).reshape(B, G * R)
        )
        after = prompt_mask.sum(-1)[:, None] + own
        positions = jnp.concatenate([_positions(prompt_mask), after.astype(jnp.int32)], axis=1)
        ids = jnp.concatenate([prompt_ids, completion_ids.reshape(B, G * R)], axis=1)
        x, _ = self._run(ids, positions, GroupContext(prompt_mask, completion_mask, segments), adapters)
        P = prompt_ids.shape[1]
        return x[:, :P], x[:, P:].reshape(B, G, R, x.shape[-1])

    def prefill(self, prompt_ids, prompt_mask, adapters=None):
        """(hidden [B, P, D], prompt cache: keys and values [L, B, K, P, C])."""
        return self._run(prompt_ids, _positions(prompt_mask), GroupContext(prompt_mask), adapters)

    def decode(self, token_ids, prompt_mask, step, prompt_cache, cache, adapters=None, age=None, layers=None):
        """Completion tokens [B, G] -> (hidden [B, G, D], cache [L, B, G, K, R, C] with them in column step % R).

        age: [B, G], how many tokens each completion has before this one, all decoded in the steps just before; None:
          they are the `step`-th of all.
        layers: of `by_layer`, of (weights, scaled factors of adapters or None), read in place of the module's own and
          of adapters. Both caches are then by layer too, those of completions [B * G, K, R, C].
        """
        age = jnp.reshape(step, (1, 1)) if age is None else age
        positions = prompt_mask.sum(-1)[:, None] + jnp.broadcast_to(age, token_ids.shape)
        return self._run(
            token_ids,
            positions,
            DecodeContext(prompt_mask, step, age),
            adapters,
            cache=cache,
            prompt_cache=prompt_cache,
            layers=layers,
        )

    def logits(self, hidden):
        """[..., V] float32: rounded to bfloat16, a sampler's log-probabilities would not be those trained on."""
        if self.config.tie_embeddings:
            columns = self.embed.embedding.astype(hidden.dtype).T
            logits = jnp.dot(hidden, columns, preferred_element_type=jnp.float32)
        else:
            logits = self.lm_head(hidden)
        return placement.constrain(logits, "batch", *[None] * (logits.ndim - 2), "vocab")

    def _run(self, ids, positions, context, adapters, cache=None, prompt_cache=None, layers=None):
        x = placement.embedded(self.embed.embedding, ids, self.config.dtype)
        rotary = attention.rotary_tables(positions, self.config)
        if layers is not None:
            x, cache = self._one_by_one(x, layers, cache, prompt_cache, rotary, context)
            return self.final_norm(x), cache
        layer = {
            "adapter": None if adapters is None else adapters.scaled(),
            "prompt_cache": prompt_cache,
            "index": jnp.arange(self.config.num_layers) if cache is not None else None,
        }
        (x, cache), made = self.layers((x, cache), layer, rotary, context)
        return self.final_norm(x), made if cache is None else cache

    def _one_by_one(self, x, layers, caches, prompt_caches, rotary, context):
        block, made = Block(self.config, parent=None), []
        for (weights, adapter), cache, prompt_cache in zip(layers, caches, prompt_caches, strict=True):
            layer = {"adapter": adapter, "prompt_cache": prompt_cache, "index": None}
            (x, cache), _ = block.apply({"params": weights}, (x, cache), layer, rotary, context)
            made.append(cache)
        return x, made


def _low_rank(x, a, b):
    """x A B in float32 for x [N, I], A [I, r], B [r, O]; so their gradients, sums over tokens and devices, are never
    rounded to x's dtype. On a TPU the products themselves are of bfloat16 all the same.

    Contracting A's second axis once transposed makes its gradient come out as [r, I]: on CPU that is up to eight times
    faster than as [I, r], and the result is the same."""
    return checkpoint_name(jnp.einsum("ni,ri->nr", x.astype(jnp.float32), a.T), "low_rank") @ b


def unembedding(params: dict) -> jax.Array:
    """[D, V]: the head's kernel, or the transposed embedding where they are tied."""
    return params["lm_head"]["kernel"] if "lm_head" in params else params["embed"]["embedding"].T


def by_layer(tree) -> list:
    """Arrays [L, ...] as one tree a layer, so that each layer's are buffers of their own.

    On a CPU a product reads buffers: what a loop over layers cuts out of the arrays of all is copied, weights and
    caches alike, for every token. Accelerators read it where it lies, and one layer is compiled sooner than many."""
    (L,) = {len(x) for x in jax.tree.leaves(tree)}
    return [jax.tree.map(lambda x, n=n: x[n], tree) for n in range(L)]


def empty_cache(config: LlamaConfig, B: int, G: int, R: int):
    """Keys and values [L, B, G, K, R, C] for G completions of up to R tokens."""
    shape = (config.num_layers, B, G, placement.kv_heads(config.num_kv_heads), R, config.head_dim)
    return tuple(placement.constrain(jnp.zeros(shape, config.dtype), *CACHE) for _ in "kv")


def _decode(q, k, v, cache, layer, context):
    at = layer["index"]
    if at is None:
        return _decode_with_own(q, k, v, cache, layer["prompt_cache"], context)
    # The caches of all layers travel in the carry and are written at [layer, :, :, :, column]: in place. As scanned
    # inputs and outputs they would be copied whole for every token.
    column = context.step % cache[0].shape[4]
    keys, values = (
        jax.lax.dynamic_update_slice(
            whole, new[None, :, :, :, None].astype(whole.dtype), (at, 0, 0, 0, column, 0)
        )
        for whole, new in zip(cache, (k, v), strict=True)
    )
    keys, values = (placement.constrain(whole, *CACHE) for whole in (keys, values))
    own = (jax.lax.dynamic_index_in_dim(whole, at, keepdims=False) for whole in (keys, values))
    own = (x.reshape(-1, *x.shape[2:]) for x in own)
    return (keys, values), attention.decode_attention(q, *layer["prompt_cache"], *own, context)


def _decode_with_own(q, k, v, cache, prompt_cache, context):
    """With caches [B * G, K, R, C] of this layer alone: as many axes as a product takes, or they would be copied."""
    column = context.step % cache[0].shape[2]
    merged = lambda new: new.reshape(-1, *new.shape[2:])[:, :, None]
    cache = tuple(
        jax.lax.dynamic_update_slice(whole, merged(new).astype(whole.dtype), (0, 0, column, 0))
        for whole, new in zip(cache, (k, v), strict=True)
    )
    return cache, attention.decode_attention(q, *prompt_cache, *cache, context)


def over_last(weights, x):
    """Weights of x's last axes, in x's dtype and with x's rank, so that they broadcast explicitly."""
    return weights.astype(x.dtype).reshape((1,) * (x.ndim - weights.ndim) + weights.shape)


def _positions(mask):
    return jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0).astype(jnp.int32)


def _restarting(segments):
    """[..., R]: how many tokens before this one the run of its number began."""
    index = jnp.zeros_like(segments) + jnp.arange(segments.shape[-1]).reshape(
        (1,) * (segments.ndim - 1) + (-1,)
    )
    begins = jnp.diff(segments, axis=-1, prepend=segments[..., :1] - 1) != 0
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=segments.ndim - 1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def contract(x, kernel, n):
    """The last n axes of x with the first n of the kernel, in x's dtype. Differentiated once, forwards or backwards."""
    return _contract(x, kernel, n)


def _contract(x, kernel, n):
    axes = tuple(range(x.ndim - n, x.ndim)), tuple(range(n))
    return jax.lax.dot_general(x, kernel.astype(x.dtype), (axes, ((), ())))


@functools.partial(contract.defjvp, symbolic_zeros=True)
def _contract_tangent(n, primals, tangents):
    (x, kernel), (of_x, of_kernel) = primals, tangents
    moved = lambda tangent: not isinstance(tangent, jax.custom_derivatives.SymbolicZero)
    tangent = _contract(of_x, kernel, n) if moved(of_x) else 0.0
    if moved(of_kernel):
        tangent += jax.custom_derivatives.linear_call(
            lambda x, of_kernel: _contract(x, of_kernel, n),
            functools.partial(_kernel_gradient, n=n),
            x,
            of_kernel,
        )
    return _contract(x, kernel, n), tangent


def _kernel_gradient(x, g, n):
    """What x and the output's gradient g give the kernel: a sum over tokens. The narrower of the two comes first.

    It is transposed to be multiplied; on a CPU, the other would be computed again in the order of the transpose."""
    tokens = tuple(range(x.ndim - n))
    sums = lambda x, y: jax.lax.dot_general(x, y, ((tokens, tokens), ((), ())))
    inputs, outputs = x.shape[x.ndim - n :], g.shape[x.ndim - n :]
    if math.prod(inputs) <= math.prod(outputs):
        return sums(x, g)
    return jnp.moveaxis(sums(g, x), range(len(outputs)), range(-len(outputs), 0))


def _contract_quantised(x, held, n):
    """`contract` with the kernel that codes and scales stand for. The backward pass makes the kernel again: kept, those
    of all layers together would be the weights that were to be saved."""
    back = lambda x, held: contract(x, quantise.dequantise(held, n, x.dtype), n)
    return jax.checkpoint(back, prevent_cse=False)(x, held)
