"""The nouns that every room shares: a group of completions, and what a sampler returns.

B prompts, G completions each, P prompt tokens, R completion tokens. Masks are 1 where the token counts; they are
carried from where the lengths are known (tokenizer or sampler) and never re-derived from pad ids."""

import flax.struct
import jax


@flax.struct.dataclass
class Lanes:
    """How the completions of a prompt stand one after the other in L lanes of W slots; models/lanes.py."""

    # [B, G] int32, which of all L * W slots has a completion's first token; the one after its last is free.
    start: jax.Array
    shape: tuple[int, int] = flax.struct.field(pytree_node=False)  # L, W


@flax.struct.dataclass
class GroupedBatch:
    """B prompts with G completions each: the one batch type, for every algorithm."""

    prompt_ids: jax.Array  # [B, P] int32, padded on the left
    prompt_mask: jax.Array  # [B, P] int32
    completion_ids: jax.Array  # [B, G, R] int32, padded on the right
    completion_mask: jax.Array  # [B, G, R] int32
    weights: jax.Array | None = None  # [B, G] float32; 0 takes a completion out of every loss and statistic
    finished: jax.Array | None = None  # [B, G] bool, True where the sampler drew an end token
    scores: jax.Array | None = None  # [B, G] float32, reward units; None until scored
    old_logprobs: jax.Array | None = None  # [B, G, R] float32, nats, under the policy that sampled
    ref_logprobs: jax.Array | None = None  # [B, G, R] float32, nats, under the reference
    ref_states: jax.Array | None = (
        None  # [B, G, R, D], the reference's, that predict each token; for an exact KL
    )
    old_values: jax.Array | None = None  # [B, G, R] float32, reward units, when sampled
    advantages: jax.Array | None = None  # [B, G, R] float32, reward units (whitened where the algorithm says)
    returns: jax.Array | None = None  # [B, G, R] float32, reward units
    # [B, G, R] int32, of packed rows alone, in which a completion is several examples, one after the other: the number
    # of a token's example, 0 in the padding. Tokens read their own example; completion_mask is 1 on what is learned.
    segments: jax.Array | None = None
    lanes: Lanes | None = None  # the decoder reads completions in these, and not in G rows of R
    # The greedy completion of each prompt, scored, G = 1: ReMax's baseline.
    greedy: "GroupedBatch | None" = None
    soft_labels: jax.Array | None = (
        None  # [B] float32, probability that completion 0 of a pair is the better, or that a single one is accepted
    )
    margins: jax.Array | None = None  # [B] float32, how much better completion 0 of a pair was rated
    targets: jax.Array | None = None  # [B, G, K] float32, labels or ratings of a completion, to be predicted
    target_mask: jax.Array | None = None  # [B, G, K] float32, 0 where there is none
    ref_prompt_mask: jax.Array | None = None  # [B, P] int32: what of a prompt the reference reads; None: all


@flax.struct.dataclass
class SequenceBatch:
    """B records as G sequences each, for networks that read prompt and completions in one: encoders and T5."""

    ids: jax.Array  # [B, G, T] int32, padded on the right
    mask: jax.Array  # [B, G, T] int32
    type_ids: jax.Array  # [B, G, T] int32, which text of a pair a token is of
    weights: jax.Array  # [B, G] float32; 0 takes a sequence out of every loss
    # As GroupedBatch's.
    soft_labels: jax.Array | None = None
    margins: jax.Array | None = None
    targets: jax.Array | None = None
    target_mask: jax.Array | None = None


@flax.struct.dataclass
class Completions:
    """What the sampler returns. Ids after the end are pad; the mask covers the end token itself."""

    ids: jax.Array  # [B, G, R] int32
    mask: jax.Array  # [B, G, R] int32
    logprobs: jax.Array  # [B, G, R] float32, nats at the sampling temperature, of the unfiltered distribution
    finished: jax.Array  # [B, G] bool, True where an end token was sampled
    values: jax.Array | None = None  # [B, G, R] float32: a head read at the state that chose each token
