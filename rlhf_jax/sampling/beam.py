"""Beam search, diverse beam search and stochastic beam search: one jitted prefill and decode loop.

Each prompt is computed once and its cache shared; only the completions' caches follow the beams. Ranking, length
penalty and stopping are those of transformers' beam search. Knows no algorithm."""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp

from rlhf_jax.errors import InputError
from rlhf_jax.models import lora, placement
from rlhf_jax.models.llama import Llama, empty_cache
from rlhf_jax.models.roles import last_state
from rlhf_jax.parallel import sharding
from rlhf_jax.sampling import filters


@dataclasses.dataclass(frozen=True)
class BeamConfig:
    """How to search. Lengths in tokens, the end token included."""

    max_new_tokens: int
    num_beams: int = 4
    num_return: int = 1  # the best so many of the beams
    length_penalty: float = (
        1.0  # a score is its sum of logprobs / length**length_penalty; above 0 favours length
    )
    # When a prompt has num_beams complete beams. True: stop. False: stop if the best open one scores less than the
    # worst complete one, at its present length. "never": stop only if no open one can still win.
    early_stopping: bool | str = False
    num_groups: int = 1  # that the beams are dealt into; more: diverse beam search
    diversity_penalty: float = (
        0.0  # nats off a token for each beam of an earlier group that takes it at this step
    )
    stochastic: bool = (
        False  # samples without replacement instead of the best; the three settings above are not read
    )
    eos_ids: tuple[int, ...] = ()
    min_new_tokens: int = 0  # no end token before so many others
    pad_id: int = 0  # written after the end
    vocab_size: int | None = None  # ids from here on are padding of the embedding and never chosen

    def __post_init__(self):
        object.__setattr__(self, "eos_ids", tuple(self.eos_ids))  # a list could not be a static argument
        checks = {
            "max_new_tokens must be at least 1": self.max_new_tokens >= 1,
            "num_beams must be at least 1": self.num_beams >= 1,
            "num_return must be between 1 and num_beams": 1 <= self.num_return <= self.num_beams,
            "length_penalty must be finite": abs(self.length_penalty) < float("inf"),
            "early_stopping must be True, False or 'never'": self.early_stopping in (True, False, "never"),
            "num_groups must divide num_beams": self.num_groups >= 1
            and self.num_beams % self.num_groups == 0,
            "diversity_penalty must be 0 or more": 0 <= self.diversity_penalty < float("inf"),
            "diversity_penalty needs num_groups above 1": self.diversity_penalty == 0 or self.num_groups > 1,
            "stochastic needs num_groups 1": not self.stochastic or self.num_groups == 1,
            "min_new_tokens must be between 0 and max_new_tokens": 0
            <= self.min_new_tokens
            <= self.max_new_tokens,
        }
        for message, fine in checks.items():
            if not fine:
                raise InputError(f"beam search: {message}; got {dataclasses.asdict(self)}.")


@flax.struct.dataclass
class BeamCompletions:
    """The K returned of each prompt, best first. Ids after the end are pad; the mask covers the end token itself."""

    ids: jax.Array  # [B, K, R] int32
    mask: jax.Array  # [B, K, R] int32
    scores: (
        jax.Array
    )  # [B, K] float32, what they are ranked by; -inf: fewer than K sequences exist, and this is none
    logprobs: (
        jax.Array
    )  # [B, K, R] float32, nats, under the model: of nothing filtered, penalised or perturbed
    finished: jax.Array  # [B, K] bool, True where it ends in an end token


@flax.struct.dataclass
class _Beams:
    """n partial or complete completions of each prompt, best first."""

    ids: jax.Array  # [B, n, R]
    logprobs: jax.Array  # [B, n, R]
    length: jax.Array  # [B, n]
    ended: jax.Array  # [B, n]
    scores: jax.Array  # [B, n]; -inf: an empty place
    mass: jax.Array | None = None  # [B, n] log-probability under what is drawn from; stochastic only


@functools.partial(jax.jit, static_argnums=(0, 4))
def beam_search(
    model, params, prompt_ids, prompt_mask, beam_config, adapters=None, rng=None
) -> BeamCompletions:
    """The best `num_return` completions that a beam search finds for each of B prompts.

    A score is the sum of log-probabilities (at temperature 1) over length**length_penalty, as transformers has it.
    With groups, each takes its turn at every step and the penalty is counted into the scores (Vijayakumar et al. 2016,
    arXiv:1610.02424, Hamming diversity); the best are then taken from all groups. With `stochastic`, num_beams
    sequences are drawn without replacement, and a score is the sequence's log-probability plus Gumbel noise, largest
    first (Kool et al. 2019, arXiv:1903.06059); the first alone is then an ordinary sample.

    Args:
      model: Llama. params: its weights. adapters: lora.Adapter or None.
      prompt_ids, prompt_mask: [B, P]; padding on either side.
      beam_config: BeamConfig, static.
      rng: a key, of which the draws of row b depend on (rng, b) alone; needed by `stochastic`, else not read.
    Returns: BeamCompletions.
    """
    c = beam_config
    if c.stochastic and rng is None:
        raise InputError("beam search: stochastic draws need rng; give a key.")
    B, N, R = prompt_ids.shape[0], c.num_beams, c.max_new_tokens
    apply = functools.partial(model.apply, {"params": params})
    keys = jax.vmap(lambda b: jax.random.fold_in(rng, b))(jnp.arange(B)) if c.stochastic else None

    def choose(hidden, step, running, complete, open_):
        """Every beam by one token: (running, complete, open_, which beam each running one goes on from [B, N])."""
        with sharding.decoding(model.config, B * N):
            logits = apply(hidden.reshape(B * N, -1), method=Llama.logits).astype(jnp.float32)
        # All beams of a prompt are ranked on its device.
        logits = placement.constrain(logits.reshape(B, N, -1), "batch", None, None).reshape(B * N, -1)
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        allowed = filters.within(logprobs, c.vocab_size)
        if c.min_new_tokens:
            allowed = filters.forbid(allowed, c.eos_ids, step < c.min_new_tokens)
        logprobs, allowed = (x.reshape(B, N, -1) for x in (logprobs, allowed))
        if c.stochastic:
            return _draw(c, running, logprobs, allowed, step, keys)
        return _rank(c, running, complete, open_, logprobs, allowed, step)

    def advance(carry):
        step, running, complete, open_, parents, cache = carry
        cache = jax.tree.map(lambda x: jax.vmap(_take, (0, None))(x, parents), cache)
        tokens = jax.lax.dynamic_index_in_dim(running.ids, step - 1, 2, keepdims=False)
        with sharding.decoding(model.config, B * N):
            hidden, cache = apply(
                tokens, prompt_mask, step - 1, prompt_cache, cache, at_hand, method=Llama.decode
            )
        return step + 1, *choose(hidden, step, running, complete, open_), cache

    hidden, prompt_cache = apply(prompt_ids, prompt_mask, adapters, method=Llama.prefill)
    first = jnp.broadcast_to(last_state(hidden, prompt_mask)[:, None], (B, N, hidden.shape[-1]))
    with sharding.decoding(model.config, B * N):
        at_hand = None if adapters is None else lora.gathered(adapters)
    cache = empty_cache(model.config, B, N, R)
    nothing = _Beams(
        ids=jnp.full((B, N, R), c.pad_id, jnp.int32),
        logprobs=jnp.zeros((B, N, R), jnp.float32),
        length=jnp.zeros((B, N), jnp.int32),
        ended=jnp.zeros((B, N), bool),
        scores=jnp.full((B, N), -jnp.inf),
    )
    # All beams of a group start at the prompt; one counts, or the group would be copies of one.
    start = jnp.tile(jnp.where(jnp.arange(N) % (N // c.num_groups) == 0, 0.0, -jnp.inf), (B, 1))
    running = nothing.replace(scores=start)
    if c.stochastic:  # the largest of all the noise; with it, scores are log-probabilities plus Gumbel noise
        root = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, R)))(keys)
        running = running.replace(scores=start + root[:, None], mass=jnp.zeros((B, N)))
    carry = (1, *choose(first, 0, running, nothing, jnp.ones((B, c.num_groups), bool)), cache)
    unfinished = lambda carry: (carry[0] < R) & jnp.any(carry[3])
    _, running, complete, *_ = jax.lax.while_loop(unfinished, advance, (jnp.int32(1), *carry[1:]))
    best, _ = _best(running if c.stochastic else complete, c.num_return)
    mask = (jnp.arange(R)[None, None] < best.length[..., None]) & (best.scores > -jnp.inf)[..., None]
    return BeamCompletions(
        ids=jnp.where(mask, best.ids, c.pad_id),
        mask=mask.astype(jnp.int32),
        scores=best.scores,
        logprobs=jnp.where(mask, best.logprobs, 0.0),
        finished=best.ended & (best.scores > -jnp.inf),
    )


def _rank(c, running, complete, open_, logprobs, allowed, step):
    """One step of beam search. open_ [B, num_groups]: whether the group of this prompt may still change."""
    B, N, V = logprobs.shape
    M = N // c.num_groups
    taken = jnp.zeros((B, V), jnp.float32)  # by how many beams of the groups before
    groups = []
    for g in range(c.num_groups):
        own = lambda tree, g=g: jax.tree.map(lambda x: x[:, g * M : (g + 1) * M], tree)
        penalised = own(allowed) - c.diversity_penalty * taken[:, None]
        *group, tokens = _rank_group(
            c, own(running), own(complete), open_[:, g], own(logprobs), penalised, step
        )
        groups.append((*group[:3], group[3] + g * M))
        if c.diversity_penalty:
            # Those that go on, as in transformers: neither the ones that end nor those of a group that is done.
            counted = open_[:, g, None] & (group[0].scores > -jnp.inf)
            taken = taken + jnp.where(counted[..., None], jax.nn.one_hot(tokens, V), 0.0).sum(1)
    running, complete, parents = (_join([group[i] for group in groups]) for i in (0, 1, 3))
    return running, complete, jnp.stack([group[2] for group in groups], 1), parents


def _rank_group(c, running, complete, open_, logprobs, allowed, step):
    """(running, complete, open_ [B], parents [B, M], tokens [B, M]) after one more token a beam."""
    M, V = logprobs.shape[1:]
    # Enough that M go on even if all end tokens of all beams are among the best.
    n = min(max(2, 1 + len(c.eos_ids)) * M, M * V)
    scores = running.scores[..., None] + allowed
    candidates, parents, tokens = _grow(c, running, scores, logprobs, step, n)
    stops = candidates.ended | (step + 1 == c.max_new_tokens)
    # Of what ends, only the M best candidates count; the others stand by for them.
    ends = stops & (jnp.arange(n) < M)[None] & open_[:, None]
    length = jnp.float32(step + 1)
    final = jnp.where(ends, candidates.scores / length**c.length_penalty, -jnp.inf)
    complete, _ = _best(_join([complete, candidates.replace(scores=final)]), M)
    running, index = _best(
        candidates.replace(scores=jnp.where(candidates.ended, -jnp.inf, candidates.scores)), M
    )
    parents, tokens = _take(parents, index), _take(tokens, index)

    best, worst = running.scores[:, 0], complete.scores[:, -1]  # worst is -inf until there are M
    if c.early_stopping is True or c.num_beams == 1:  # one beam is greedy search
        improvable = worst == -jnp.inf
    elif c.early_stopping == "never" and c.length_penalty > 0:
        improvable = best / float(c.max_new_tokens) ** c.length_penalty > worst
    else:
        improvable = best / length**c.length_penalty > worst
    return running, complete, open_ & improvable & (best > -jnp.inf), parents, tokens


def _draw(c, running, logprobs, allowed, step, keys):
    """One step of stochastic beam search; beams that have ended stay, and compete as they are."""
    B, N, V = logprobs.shape
    # Renormalised over what may follow: the children's probabilities have to add up to their parent's.
    child = jax.nn.log_softmax(allowed, axis=-1)
    mass = running.mass[..., None] + child
    noise = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, step), (N, V)))(keys)
    scores = _with_maximum(mass + noise, running.scores)
    # A complete beam has one child, itself.
    itself = jnp.where(jnp.arange(V)[None, None] == 0, running.scores[..., None], -jnp.inf)
    scores = jnp.where(running.ended[..., None], itself, scores)
    mass = jnp.where(running.ended[..., None], running.mass[..., None], mass)
    running, parents, _ = _grow(c, running, scores, logprobs, step, N, mass)
    open_ = jnp.any(~running.ended & (running.scores > -jnp.inf), axis=-1, keepdims=True)
    return running, None, open_, parents


def _with_maximum(perturbed, maximum):
    """Gumbel variables [..., V] given that the largest is `maximum` [...]; Kool et al. 2019, appendix B.3."""
    largest = jnp.max(perturbed, axis=-1, keepdims=True)
    maximum = maximum[..., None]
    x = perturbed - largest
    log1mexp = jnp.where(x > -0.6931472, jnp.log(-jnp.expm1(x)), jnp.log1p(-jnp.exp(x)))
    v = maximum - perturbed + log1mexp
    return maximum - jnp.maximum(v, 0.0) - jnp.log1p(jnp.exp(-jnp.abs(v)))


def _grow(c, beams, scores, logprobs, step, n, mass=None):
    """The n best children by `scores` [B, M, V]: (_Beams, their parents [B, n], their last tokens [B, n])."""
    B, _, V = scores.shape
    flat = lambda x: x.reshape(B, -1)
    best, at = jax.lax.top_k(flat(scores), n)
    parents, tokens = at // V, (at % V).astype(jnp.int32)
    beams = _take(beams, parents)
    live = ~beams.ended
    tokens = jnp.where(live, tokens, c.pad_id)
    put = lambda whole, new: jax.lax.dynamic_update_index_in_dim(whole, new, step, 2)
    is_end = jnp.any(tokens[..., None] == jnp.array(c.eos_ids, jnp.int32)[None, None], axis=-1)
    children = beams.replace(
        ids=put(beams.ids, tokens),
        logprobs=put(beams.logprobs, jnp.where(live, _take(flat(logprobs), at), 0.0)),
        length=beams.length + live,
        ended=beams.ended | is_end,
        scores=best,
        mass=None if mass is None else _take(flat(mass), at),
    )
    return children, parents, tokens


def _best(beams, n):
    """(the n of highest score, where they were)."""
    _, index = jax.lax.top_k(beams.scores, n)
    return _take(beams, index), index


def _take(tree, index):
    """Leaves [B, n, ...] at index [B, m] -> [B, m, ...], row by row: no row leaves its device."""
    row = lambda x, i: x.at[i].get(mode="promise_in_bounds")
    return jax.tree.map(lambda x: jax.vmap(row)(x, index), tree)


def _join(trees):
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *trees)
