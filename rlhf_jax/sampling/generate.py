"""The sampler: prefill each prompt once, decode its G completions in one jitted loop that stops when all are done.
All at once or some at a time (slots.py): what is sampled is the same.

Returns the log-probabilities of what was sampled, and a head's values if one is given, so that nobody has to
compute them again. Knows no algorithm."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp

from rlhf_jax.errors import InputError
from rlhf_jax.models import heads, llama, lora, placement
from rlhf_jax.models.llama import Llama, empty_cache
from rlhf_jax.models.roles import last_state
from rlhf_jax.parallel import sharding
from rlhf_jax.sampling import filters, slots
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
    slots: int = 0  # completions that are decoded together, while others wait for one to end; 0: all
    halvings: int = (
        0  # how often what is left goes on as a batch of half the size, when none waits; -1: as it pays
    )
    by_layer: bool | None = None  # each layer decodes with arrays of its own; None: on one CPU, where it pays

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
            "slots must be 0 (all at once) or more": self.slots >= 0,
            "halvings must be -1 (as it pays), 0 (none) or more": self.halvings >= -1,
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
    ways = placement.ways("batch") if B % placement.ways("batch") == 0 else 1
    n = B * G // ways  # completions a way
    automatic = slots.automatic_halvings(n, R, jax.default_backend())
    halvings = automatic if c.halvings < 0 else c.halvings
    sizes = slots.sizes(n, B // ways, -(-c.slots // ways), halvings)
    size, in_place = sizes[0], sizes[0] == n
    apply = functools.partial(model.apply, {"params": params})

    def choose(hidden, own):
        """((tokens, log-probabilities, values) of the slots `own`, from their states [S, D], slots)."""
        with sharding.decoding(model.config, len(hidden)):
            logits = apply(hidden, method=Llama.logits).astype(jnp.float32)
        # Never split unevenly: the partitioner gets rows wrong that are padded.
        even = len(hidden) % placement.ways("draws") == 0
        logits = placement.constrain(logits, "draws" if even else "batch", None)
        scaled = allowed = logits / (c.temperature or 1.0)
        step, seen = own.step + 1, own.seen
        if seen is not None:
            allowed = filters.penalise(logits, seen, c.repetition_penalty) / (c.temperature or 1.0)
        allowed = filters.within(allowed, c.vocab_size)
        if c.min_new_tokens:
            allowed = filters.forbid(allowed, c.eos_ids, (step < c.min_new_tokens)[:, None])
        if c.temperature == 0:
            tokens = jnp.argmax(allowed, axis=-1).astype(jnp.int32)
        else:
            allowed = filters.restrict(allowed, top_k=c.top_k, top_p=c.top_p, min_p=c.min_p)
            of_all = own.number + jnp.repeat(jnp.arange(ways) * n, len(hidden) // ways)
            key = lambda number, step: jax.random.fold_in(jax.random.fold_in(rng, number), step)
            tokens = filters.draw(allowed, jax.vmap(key)(of_all, step))
        chosen = jnp.take_along_axis(scaled, tokens[:, None], axis=-1)[:, 0]
        logprobs = chosen - jax.nn.logsumexp(scaled, axis=-1)
        values = None if head is None else heads.apply(head, hidden)
        if seen is not None:
            seen = seen.at[jnp.arange(len(seen)), tokens].set(True)
        return (tokens, logprobs, values), own.replace(seen=seen)

    def record(state, hidden, column):
        drawn, own = choose(hidden.reshape(-1, hidden.shape[-1]), state.slots)
        return slots.record(state.replace(slots=own), column, drawn, c.eos_ids, c.pad_id)

    def advance(state, in_place=False):
        """Every slot by one token. in_place: all completions are in their first places, and at the same token."""
        clock, own = state.clock, state.slots
        shape = len(own.prompt_mask), own.number.size // len(own.prompt_mask)
        tokens, age = own.tokens.reshape(shape), None if in_place else own.step.reshape(shape)
        with sharding.decoding(model.config, tokens.size):
            hidden, cache = apply(
                tokens,
                own.prompt_mask,
                clock,
                own.prompt_cache,
                own.cache,
                at_hand,
                age,
                layers,
                method=Llama.decode,
            )
        state = state.replace(slots=own.replace(cache=cache), clock=clock + 1)
        return record(state, hidden, clock + 1 if in_place else None)

    def with_cache(state, X, Y):
        cache = empty_cache(model.config, X, Y, R)
        if layers is not None:
            cache = llama.by_layer(jax.tree.map(lambda x: x.reshape(x.shape[0], X * Y, *x.shape[3:]), cache))
        return state.replace(slots=state.slots.replace(cache=cache))

    hidden, prompt_cache = apply(prompt_ids, prompt_mask, adapters, method=Llama.prefill)
    with sharding.decoding(model.config, size * ways):
        at_hand = None if adapters is None else lora.gathered(adapters)
    layers = None
    if _by_layer(c):
        layers = llama.by_layer((params["layers"], None if at_hand is None else at_hand.scaled()))
        prompt_cache = llama.by_layer(prompt_cache)
    first = jnp.broadcast_to(last_state(hidden, prompt_mask)[:, None], (B, G, hidden.shape[-1]))
    seen = None
    if c.repetition_penalty != 1.0:
        V = model.config.vocab_size
        # Padding goes to a column past the last, which is then cut: it is no token of the prompt.
        ids = jnp.where(prompt_mask > 0, prompt_ids, V)
        seen = jnp.zeros((B, V + 1), bool).at[jnp.arange(B)[:, None], ids].set(True)[:, :V]
        seen = jnp.repeat(seen, G, axis=0)
    everyone = slots.Slots(
        number=jnp.tile(jnp.arange(n, dtype=jnp.int32), ways),
        step=jnp.full(B * G, -1, jnp.int32),
        tokens=jnp.zeros(B * G, jnp.int32),
        prompt_mask=prompt_mask,
        prompt_cache=prompt_cache,
        seen=seen,
    )
    nothing = Completions(
        ids=jnp.full((ways, n, R), c.pad_id, jnp.int32),
        mask=jnp.zeros((ways, n, R), jnp.int32),
        logprobs=jnp.zeros((ways, n, R), jnp.float32),
        finished=jnp.zeros((ways, n), bool),
        values=None if head is None else jnp.zeros((ways, n, R), jnp.float32),
    )
    state = record(slots.State(nothing, everyone, jnp.int32(0)), first, 0)
    state = with_cache(state, B, G) if in_place else with_cache(slots.wait(state, size), size * ways, 1)
    state = slots.run(functools.partial(advance, in_place=in_place), state, sizes[1] if sizes[1:] else 0)
    for less, fewer in itertools.pairwise([*sizes[1:], 0]):
        state = slots.run(advance, slots.shrink(state, less), fewer)
    return jax.tree.map(lambda x: x.reshape(B, G, *x.shape[2:]), state.made)


def _by_layer(config: SamplingConfig) -> bool:
    if config.by_layer is not None:
        return config.by_layer
    return jax.default_backend() == "cpu" and jax.sharding.get_abstract_mesh().size <= 1
