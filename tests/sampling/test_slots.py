"""Completions in slots: the same as all at once, whatever takes whose place, and no step more than it takes."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.models import heads, lora
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.parallel import sharding
from rlhf_jax.sampling import slots
from rlhf_jax.sampling.generate import SamplingConfig, generate
from rlhf_jax.types import Completions
from tests.parallel.compiled import collectives

R = 24
PROMPTS = jax.random.randint(jax.random.key(5), (6, 5), 0, 64)
MASK = jnp.array(
    [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 0, 0, 0]]
)
PLAIN = SamplingConfig(R, temperature=1.5, num_completions=3, eos_ids=(2, 3, 4, 5, 6, 7), pad_id=63)
EVERYTHING = SamplingConfig(
    R, temperature=1.2, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.3, num_completions=3,
    eos_ids=(2, 3, 4, 5, 6, 7), min_new_tokens=2, vocab_size=60,
)  # fmt: skip
GREEDY = SamplingConfig(R, temperature=0, num_completions=1, eos_ids=tuple(range(0, 64, 5)))
AT_ONCE = SamplingConfig(R, num_completions=3, eos_ids=tuple(range(56)))  # most end with their first token


@pytest.fixture(scope="module")
def made(tiny_llama):
    """(config, slots, halvings) -> completions."""
    model, params = tiny_llama
    adapter = lora.init(jax.random.key(1), model.config, lora.LoraConfig(rank=2))
    noise = lambda x: x + 0.2 * jax.random.normal(jax.random.key(2), x.shape)
    adapter = adapter.replace(weights=jax.tree.map(noise, adapter.weights))
    more = {EVERYTHING: (adapter, heads.init_reward(jax.random.key(4), 32))}

    @functools.cache
    def make(config, count=0, halvings=0):
        asked = dataclasses.replace(config, slots=count, halvings=halvings)
        key, layered = jax.random.key(0), dataclasses.replace(config, by_layer=None)
        return jax.device_get(generate(model, params, PROMPTS, MASK, key, asked, *more.get(layered, ())))

    return make


def assert_same(found, expected):
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.mask, expected.mask)
    np.testing.assert_array_equal(found.finished, expected.finished)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5)
    if expected.values is not None:
        np.testing.assert_allclose(found.values, expected.values, atol=1e-5)


@pytest.mark.parametrize(
    "config, count, halvings",
    [
        (PLAIN, 1, 0),  # one after the other: some 180 tokens through a ring of 24
        (PLAIN, 0, 2),
        (PLAIN, 17, 1),
        (EVERYTHING, 5, 0),
        (EVERYTHING, 8, 1),
        (GREEDY, 4, 0),
        (AT_ONCE, 2, 0),
    ],
)
def test_the_same_completions_in_slots(made, config, count, halvings):
    """And whether each layer's arrays are its own, as here, or those of all layers are one, as on a mesh."""
    stacked = dataclasses.replace(config, by_layer=False)
    expected, found = made(stacked), made(config, count, halvings)
    assert_same(found, expected)
    lengths = expected.mask.sum(-1)
    assert lengths.min() < lengths.max() and (expected.values is not None) == (config is EVERYTHING)


def test_what_fits_into_the_slots_is_the_same_program(tiny_llama):
    """18 slots for 18 completions change nothing, and neither do halvings of too few."""
    lowered = [
        generate.lower(*tiny_llama, PROMPTS, MASK, jax.random.key(0), config).as_text()
        for config in (PLAIN, dataclasses.replace(PLAIN, slots=18))
    ]
    assert lowered[0] == lowered[1]


def test_stages_halve_and_never_copy_more_caches_than_there_are_prompts():
    assert slots.sizes(7, 7, 9, 3) == slots.sizes(7, 7, 0, 3) == [7]
    assert slots.sizes(64, 64, 0, 3) == [64, 32, 16, 8] and slots.sizes(64, 64, 20, 3) == [20, 10, 5]
    assert slots.sizes(64, 8, 0, 3) == [64, 8, 4] and slots.sizes(64, 32, 0, 1) == [64, 32]
    ways = [(64, 128, "cpu"), (64, 20, "cpu"), (8, 128, "cpu"), (64, 128, "tpu")]
    assert [slots.automatic_halvings(*one) for one in ways] == [3, 0, 0, 0]


@pytest.mark.parametrize("seed, ways", [(0, 1), (1, 1), (2, 3)])
def test_no_slot_is_idle_while_a_completion_waits(seed, ways):
    """Lengths known: the steps are those of a list schedule, and of the halved batch that it ends with."""
    n, size, longest = 20, 8, 30
    lengths = np.minimum(np.random.default_rng(seed).geometric(1 / 8, (ways, n)), longest).astype(np.int32)
    eos = 1

    def advance(state):
        number = jnp.minimum(state.slots.number.reshape(ways, -1), n - 1)
        last = (
            jnp.take_along_axis(jnp.asarray(lengths), number, axis=1).ravel() == state.slots.step + 2
        )  # of the token that is drawn now
        drawn = last.astype(jnp.int32) * eos, state.slots.step + 1.0, None
        slots_of_step.append(len(state.slots.number))
        return slots.record(state.replace(clock=state.clock + 1), None, drawn, (eos,), 9)

    slots_of_step = []
    empty = jnp.zeros((ways, n, longest))
    nothing = Completions(
        jnp.full(empty.shape, 9), jnp.zeros(empty.shape, jnp.int32), empty, empty[..., 0] > 0
    )
    whole = jnp.zeros(ways * n, jnp.int32)
    everyone = slots.Slots(jnp.tile(jnp.arange(n), ways), whole - 1, whole, whole[:, None], (), None)
    first = (jnp.asarray(lengths) == 1).astype(jnp.int32).ravel(), jnp.zeros(ways * n), None
    state = slots.record(slots.State(nothing, everyone, jnp.int32(0)), 0, first, (eos,), 9)
    state = slots.run(advance, slots.wait(state, size), size // 2)
    before = int(state.clock)
    state = state.replace(slots=state.slots.replace(cache=()))
    state = slots.run(advance, slots.shrink(state, size // 2), 0)
    assert slots_of_step == [ways * size, ways * size // 2]  # traced once each
    np.testing.assert_array_equal(state.made.mask.sum(-1), lengths)
    real = np.array(state.made.mask) > 0
    where = np.broadcast_to(np.arange(longest), real.shape)
    np.testing.assert_array_equal(state.made.logprobs, np.where(real, where, 0))  # each token in its place
    np.testing.assert_array_equal(state.made.finished, np.ones((ways, n), bool))

    halved, done = [], []
    for row in lengths:
        free = np.zeros(size, int)
        ends = []
        for length in row[row > 1]:
            slot = free.argmin()
            free[slot] += length - 1
            ends.append(free[slot])
        started = [end - (length - 1) for end, length in zip(ends, row[row > 1], strict=True)]
        step = max(started)  # none waits from here
        while sum(end > step for end in ends) > size // 2:
            step += 1
        halved.append(step)
        done.append(max(ends))
    # Ways wait for each other to become smaller, and none of them for anything else.
    assert before == max(halved) and int(state.clock) == max(done)


@pytest.mark.parametrize("by_layer, layers", [(False, "2,"), (True, "")])
def test_no_step_copies_the_cache_and_no_refill_moves_it(tiny_llama, by_layer, layers):
    """Of the program for one device: the caches of the slots are written in place, in every loop."""
    model, params = tiny_llama
    config = SamplingConfig(R, num_completions=3, eos_ids=(2,), slots=5, by_layer=by_layer)
    hlo = generate.lower(model, params, PROMPTS, MASK, jax.random.key(0), config).compile().as_text()
    caches = rf"f32\[{layers}5,(?:1,)?2,(?:24|5),8\]"
    copies = [line for line in hlo.splitlines() if re.search(rf"= {caches}\S* copy\(", line)]
    inside = [line for line in copies if "while/body" in line]
    assert re.search(caches, hlo) and not inside, inside


def test_the_same_completions_in_slots_on_a_mesh(tiny_llama, monkeypatch):
    """Four ways of 8 completions each in 3 slots, and then 1; a way that has ended waits for the others."""
    monkeypatch.setattr(slots, "FEWEST", 1)
    model, params = tiny_llama
    prompts, mask = PROMPTS[:4], MASK[:4]
    config = SamplingConfig(12, temperature=1.5, num_completions=8, eos_ids=(2, 3, 4, 5, 6, 7))
    adapter = lora.init(jax.random.key(1), model.config, lora.LoraConfig(rank=2))
    alone = jax.device_get(generate(model, params, prompts, mask, jax.random.key(0), config, adapter))
    mesh = meshes.make_mesh(2, 2, 2)
    with meshes.activate(mesh):
        base = jax.device_put(params, sharding.llama_shardings(model.config, mesh))
        place = jax.device_put(adapter, sharding.named(lora.logical_axes(adapter), adapter, mesh))
        arrays = sharding.put_batch((prompts, mask), mesh)
        config = dataclasses.replace(config, slots=12, halvings=1)
        compiled = generate.lower(model, base, *arrays, jax.random.key(0), config, place).compile()
        assert_same(jax.device_get(compiled(base, *arrays, jax.random.key(0), place)), alone)
    # No cache travels: nothing that ends in columns of [C] values.
    shapes = [shape for sent in collectives(compiled.as_text()) for shape in sent.shapes]
    assert shapes and not [shape for shape in shapes if shape[-2:] in ((5, 8), (12, 8))]


@pytest.mark.parametrize("bad", [{"slots": -1}, {"halvings": -2}])
def test_impossible_slots_are_refused(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        SamplingConfig(8, **bad)
