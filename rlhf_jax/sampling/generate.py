"""The sampler: prefill each prompt once, decode its G completions in one jitted loop that stops when all are done.

Returns the log-probabilities of what was sampled, and a head's values if one is given, so that nobody has to
compute them again. Knows no algorithm."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from rlhf_jax.errors import InputError
from rlhf_jax.models import heads, lora, placement
from rlhf_jax.models.llama import Llama, empty_cache
from rlhf_jax.models.roles import last_state
from rlhf_jax.parallel import sharding
from rlhf_jax.sampling import filters
from rlhf_jax.types import Completions


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How to sample. Lengths in tokens."""

    max_new_tokens: int
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0: the whole vocabulary
    top_p: float = 1.0
    min_p: float = 0.0  # of the largest probability, that a token needs; 0: none
    repetition_penalty: float = 1.0  # of tokens that the prompt or the completion has; 1: none
    num_completions: int = 1
    eos_ids: tuple[int, ...] = ()
    min_new_tokens: int = 0  # no end token before so many others
    pad_id: int = 0  # written after the end
    vocab_size: int | None = None  # ids from here on are padding of the embedding and never sampled

    def __post_init__(self):
        object.__setattr__(self, "eos_ids", tuple(self.eos_ids))  # a list could not be a static argument
        checks = {
            "max_new_tokens must be at least 1": self.max_new_tokens >= 1,
            "temperature must be 0 (greedy) or more": 0 <= self.temperature < float("inf"),
            "top_k must be 0 (off) or more": self.top_k >= 0,
            "top_p must be above 0 and at most 1": 0 < self.top_p <= 1,
            "min_p must be between 0 and 1": 0 <= self.min_p <= 1,
            "repetition_penalty must be above 0": 0 < self.repetition_penalty < float("inf"),
            "num_completions must be at least 1": self.num_completions >= 1,
            "min_new_tokens must be between 0 and max_new_tokens": 0
            <= self.min_new_tokens
            <= self.max_new_tokens,
        }
        for message, fine in checks.items():
            if not fine:
                raise InputError(f"sampling: {message}; got {dataclasses.asdict(self)}.")


@functools.partial(jax.jit, static_argnums=(0, 5))
def generate(
    model, params, prompt_ids, prompt_mask, rng, sampling_config, adapters=None, head=None
) -> Completions:
    """Sample G completions for each of B prompts.

    Args:
      model: Llama. params: its weights. adapters: lora.Adapter or None.
      prompt_ids, prompt_mask: [B, P]; padding on either side.
      rng: a key. Completion (b, g) depends on (rng, b, g) and its prompt alone, not on its neighbours.
      sampling_config: SamplingConfig, static.
      head: {"kernel": [D], "bias": []} to read at each state, or None.
    Returns: Completions. logprobs are in nats at the temperature (at 1 when greedy), over the whole vocabulary: a
      filter or penalty changes what is drawn, not what is reported.
    """
    c = sampling_config
    B, G, R = prompt_ids.shape[0], c.num_completions, c.max_new_tokens
    apply = functools.partial(model.apply, {"params": params})
    keys = jax.vmap(lambda i: jax.random.fold_in(rng, i))(jnp.arange(B * G))

    hidden, prompt_cache = apply(prompt_ids, prompt_mask, adapters, method=Llama.prefill)
    first = jnp.broadcast_to(last_state(hidden, prompt_mask)[:, None], (B, G, hidden.shape[-1]))
    with sharding.decoding(model.config, B * G):
        at_hand = None if adapters is None else lora.gathered(adapters)
    cache = empty_cache(model.config, B, G, R)

    def choose(hidden, step, seen):
        with sharding.decoding(model.config, B * G):
            logits = apply(hidden.reshape(B * G, -1), method=Llama.logits).astype(jnp.float32)
        logits = placement.constrain(logits, "draws", None)
        scaled = allowed = logits / (c.temperature or 1.0)
        if seen is not None:
            allowed = filters.penalise(logits, seen, c.repetition_penalty) / (c.temperature or 1.0)
        allowed = filters.within(allowed, c.vocab_size)
        if c.min_new_tokens:
            allowed = filters.forbid(allowed, c.eos_ids, step < c.min_new_tokens)
        if c.temperature == 0:
            tokens = jnp.argmax(allowed, axis=-1).astype(jnp.int32)
        else:
            allowed = filters.restrict(allowed, top_k=c.top_k, top_p=c.top_p, min_p=c.min_p)
            tokens = filters.draw(allowed, jax.vmap(lambda key: jax.random.fold_in(key, step))(keys))
        chosen = jnp.take_along_axis(scaled, tokens[:, None], axis=-1)[:, 0]
        logprobs = chosen - jax.nn.logsumexp(scaled, axis=-1)
        values = None if head is None else heads.apply(head, hidden)
        return tokens.reshape(B, G), logprobs.reshape(B, G), values

    def record(made, step, hidden, seen):
        """Write the step's tokens into the columns; rows that ended before write pad and mask 0."""
        tokens, logprobs, values = choose(hidden, step, seen)
        if seen is not None:
            seen = seen.at[jnp.arange(B * G), tokens.ravel()].set(True)
        live = ~made.finished
        tokens = jnp.where(live, tokens, c.pad_id)
        put = lambda whole, new: jax.lax.dynamic_update_index_in_dim(whole, new.astype(whole.dtype), step, 2)
        ended = jnp.any(tokens[..., None] == jnp.array(c.eos_ids, jnp.int32)[None, None], axis=-1)
        made = Completions(
            ids=put(made.ids, tokens),
            mask=put(made.mask, live),
            logprobs=put(made.logprobs, jnp.where(live, logprobs, 0.0)),
            finished=made.finished | (live & ended),
            values=None if values is None else put(made.values, jnp.where(live, values, 0.0)),
        )
        return tokens, made, seen

    def advance(carry):
        step, tokens, made, seen, cache = carry
        with sharding.decoding(model.config, B * G):
            hidden, cache = apply(
                tokens, prompt_mask, step - 1, prompt_cache, cache, at_hand, method=Llama.decode
            )
        tokens, made, seen = record(made, step, hidden, seen)
        return step + 1, tokens, made, seen, cache

    empty = Completions(
        ids=jnp.full((B, G, R), c.pad_id, jnp.int32),
        mask=jnp.zeros((B, G, R), jnp.int32),
        logprobs=jnp.zeros((B, G, R), jnp.float32),
        finished=jnp.zeros((B, G), bool),
        values=None if head is None else jnp.zeros((B, G, R), jnp.float32),
    )
    seen = None
    if c.repetition_penalty != 1.0:
        V = model.config.vocab_size
        # Padding goes to a column past the last, which is then cut: it is no token of the prompt.
        ids = jnp.where(prompt_mask > 0, prompt_ids, V)
        seen = jnp.zeros((B, V + 1), bool).at[jnp.arange(B)[:, None], ids].set(True)[:, :V]
        seen = jnp.repeat(seen, G, axis=0)
    tokens, made, seen = record(empty, 0, first, seen)
    unfinished = lambda carry: (carry[0] < R) & ~jnp.all(carry[2].finished)
    return jax.lax.while_loop(unfinished, advance, (jnp.int32(1), tokens, made, seen, cache))[2]
