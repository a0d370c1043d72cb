"""Which completions are decoded together: how waiting ones take the places of those that end, and how what is left of
a batch goes on as a smaller one.

The rows of a batch are split W ways over devices, n completions each, and so are slots: a completion runs where its
prompt lies, and no cache moves between devices. Knows no model and no draw."""

import flax.struct
import jax
import jax.numpy as jnp

from rlhf_jax.models import placement
from rlhf_jax.types import Completions

PROMPT_CACHE, CACHE = (("layers", "batch", *more, "kv_heads", None, None) for more in ((), (None,)))
FEWEST = 4  # slots a way; fewer are decoded in about the same time


@flax.struct.dataclass
class Slots:
    """S slots, each with one completion that is being decoded or with none, as X prompts with Y slots each.

    Y is 1 where completions have left their first places: each slot then has a copy of its prompt's cache. Caches may
    be lists, of each layer's own (Llama.decode)."""

    number: jax.Array  # [S] int32, which of its way's completions; n: none
    step: jax.Array  # [S] int32, which of the completion's tokens `tokens` is
    tokens: jax.Array  # [S] int32, the last ones, to be decoded next
    prompt_mask: jax.Array  # [X, P]
    prompt_cache: tuple  # keys and values [L, X, K, P, C]
    seen: jax.Array | None  # [S, V] bool, tokens of prompt and completion, where a penalty asks for them
    cache: tuple | None = (
        None  # keys and values [L, X, Y, K, R, C]: a ring of R columns, written at one for all
    )


AXES = Slots(0, 0, 0, 0, 1, 0, 1)  # of prompts or slots
BY_LAYER = AXES.replace(prompt_cache=0, cache=0)


@flax.struct.dataclass
class Queue:
    """Completions that have their first token and no slot yet."""

    everyone: Slots  # all completions, without caches of their own
    order: jax.Array  # [W, n] int32, of each way those first that need a slot
    count: jax.Array  # [W] int32, how many of them do
    given: jax.Array  # [W] int32, to how many of these one was given


@flax.struct.dataclass
class State:
    """Of the sampling loop."""

    made: Completions  # of arrays [W, n, R] and [W, n]
    slots: Slots
    clock: jax.Array  # int32 scalar, tokens decoded by every slot
    queue: Queue | None = None

    @property
    def idle(self):
        """[W, S / W] bool."""
        ways, n = self.made.finished.shape
        return self.slots.number.reshape(ways, -1) == n

    @property
    def can_refill(self):
        """[W] bool: a way has an idle slot, and a completion for it."""
        return jnp.any(self.idle, axis=1) & self.waits

    @property
    def waits(self):
        """[W] bool."""
        return self.queue.given < self.queue.count


def sizes(n: int, prompts: int, slots: int, halvings: int) -> list[int]:
    """Slots a way of each stage of the loop, of n completions of so many prompts: the first as asked (0: n), of the
    others at most half of the one before, and no more than prompts: each slot there has a copy of its prompt's cache,
    which completions in their first places share."""
    found = [min(slots, n) if slots else n]
    while len(found) <= halvings and (size := min(found[-1] // 2, prompts)) >= FEWEST:
        found.append(size)
    return found


def automatic_halvings(n: int, R: int, platform: str) -> int:
    """What pays, and costs next to nothing where all completions have full length: each stage has to be compiled, and
    away from CPUs few rows are not decoded much faster than many."""
    return 3 if platform == "cpu" and n >= 16 and R >= 64 else 0


def run(advance, state: State, fewer: int) -> State:
    """advance(state) until no way has more than `fewer` completions that run, and none that wait."""
    many = lambda state: jnp.any((~state.idle).sum(1) > fewer)
    if state.queue is None:
        return jax.lax.while_loop(many, advance, state)
    goes_on = lambda state: jnp.any(state.waits) | many(state)
    until_one_ends = lambda state: goes_on(state) & ~jnp.any(state.can_refill)
    cycle = lambda state: jax.lax.while_loop(until_one_ends, advance, _refill(state))
    return jax.lax.while_loop(goes_on, cycle, state).replace(queue=None)


def wait(state: State, size: int) -> State:
    """All completions wait, and `size` slots a way are idle."""
    (ways, n), done = state.made.finished.shape, state.idle
    empty = lambda axis, x: jnp.zeros((*x.shape[:axis], ways * size, *x.shape[axis + 1 :]), x.dtype)
    queue = Queue(
        everyone=state.slots,
        order=jnp.argsort(done, axis=1, stable=True).astype(jnp.int32),
        count=(~done).sum(1).astype(jnp.int32),
        given=jnp.zeros(ways, jnp.int32),
    )
    slots = _each(empty, state.slots).replace(number=jnp.full(ways * size, n, jnp.int32))
    return state.replace(slots=slots, queue=queue)


def shrink(state: State, size: int) -> State:
    """`size` slots a way, with those in them that run; there must be no more of these."""
    # In the order of their numbers, of which that of what is idle is the largest.
    _, which = jax.lax.top_k(-state.slots.number.reshape(len(state.idle), -1), size)
    if isinstance(state.slots.cache, list):
        return state.replace(slots=_take(state.slots, which))
    flat = jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]), state.slots.cache)
    kept = _take(state.slots.replace(cache=flat), which)
    cache = jax.tree.map(lambda x: placement.constrain(x[:, :, None], *CACHE), kept.cache)
    return state.replace(slots=kept.replace(cache=cache))


def record(state: State, column, drawn, eos_ids, pad_id) -> State:
    """With the tokens drawn, each after the one that its slot had.

    Args:
      column: where they are written, if it is the same for all and all are in their first places; None: where each
        stands.
      drawn: tokens, log-probabilities and values (or None), [S] each.
    """
    made, slots = state.made, state.slots
    ways, n, R = made.ids.shape
    tokens, logprobs, values = drawn
    step, live = slots.step + 1, slots.number < n
    ended = live & jnp.any(tokens[:, None] == jnp.array(eos_ids, jnp.int32)[None], axis=-1)
    split = lambda x: x.reshape(ways, -1)

    def put(whole, new, otherwise=0):
        new = jnp.where(live, new, otherwise).astype(whole.dtype)
        if column is not None:
            return jax.lax.dynamic_update_index_in_dim(whole, split(new), column, 2)
        # What has the number n is dropped.
        one = lambda whole, number, step, new: whole.at[number, step].set(new, mode="drop")
        return jax.vmap(one)(whole, split(slots.number), split(step), split(new))

    if column is not None:
        finished = made.finished | split(ended)
    else:
        one = lambda whole, number, new: whole.at[number].set(new, mode="drop")
        finished = jax.vmap(one)(made.finished, split(slots.number), split(ended))
    made = Completions(
        ids=put(made.ids, tokens, pad_id),
        mask=put(made.mask, live),
        logprobs=put(made.logprobs, logprobs),
        finished=finished,
        values=None if values is None else put(made.values, values),
    )
    number = jnp.where(ended | (step == R - 1), n, slots.number)
    return state.replace(made=made, slots=slots.replace(number=number, step=step, tokens=tokens))


def _refill(state):
    """One slot of each way that can gets its next completion."""
    slots, queue, can = state.slots, state.queue, state.can_refill
    # There is no slot of the number S / W: what is put there is dropped.
    free = jnp.where(can, jnp.argmax(state.idle, axis=1), state.idle.shape[1])
    which = jnp.take_along_axis(queue.order, queue.given[:, None], axis=1, mode="clip")

    def put(axis, x, new):
        one = lambda x, i, new: x.at[(slice(None),) * axis + (i,)].set(new, mode="drop")
        return _by_way(one, axis, x, free[:, None], new)

    filled = _each(put, slots.replace(cache=None), _take(queue.everyone, which))
    return state.replace(
        slots=filled.replace(cache=slots.cache), queue=queue.replace(given=queue.given + can)
    )


def _take(slots, which):
    """The slots `which` [W, m] of each way, each with its own prompt (Y = 1)."""
    S = slots.number.size

    def of(axis, x):
        get = lambda x, i: x.at[(slice(None),) * axis + (i,)].get(mode="promise_in_bounds")
        return _by_way(get, axis, x, which // (S // x.shape[axis]))

    return _each(of, slots)


def _each(function, *slots):
    """function(axis of prompts or slots, array, ...) of every array."""
    whole = lambda axis, *parts: jax.tree.map(lambda *x: function(axis, *x), *parts)
    if isinstance(slots[0].prompt_cache, list):
        return jax.tree.map(whole, BY_LAYER, *slots)
    found = jax.tree.map(whole, AXES, *slots)
    laid = lambda x: placement.constrain(x, *PROMPT_CACHE)
    return found.replace(prompt_cache=jax.tree.map(laid, found.prompt_cache))


def _by_way(function, axis, x, index, *more):
    """function(x, index, ...) of each way's part of x along `axis`, and the results side by side; index: [W, m]."""
    index = placement.constrain(
        index, "batch", None
    )  # or caches are split and sent as their indices happen to be
    split = lambda x: x.reshape(*x.shape[:axis], len(index), -1, *x.shape[axis + 1 :])
    found = jax.vmap(function, (axis, 0, *[axis] * len(more)), axis)(split(x), index, *map(split, more))
    return found.reshape(*found.shape[:axis], -1, *found.shape[axis + 2 :])
