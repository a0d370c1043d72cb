"""Packed rows against the same examples one a row: states, loss and gradient the same, and nothing read across."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data import batching, packing
from rlhf_jax.models import lora, roles
from rlhf_jax.training.algorithms import Network
from rlhf_jax.training.algorithms.supervised import SFTSettings, sft_objective

LENGTHS = ((3, 4), (1, 1), (2, 6), (5, 2), (1, 3), (4, 1), (2, 2))  # (prompt, completion) tokens
ROW = 14


def make_examples(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda n: rng.integers(0, 64, n).tolist()  # the pad id among them
    return [(draw(p), [draw(c)]) for p, c in LENGTHS]


def plain(examples):
    return batching.group(*zip(*examples, strict=True), prompt_length=6, completion_length=7, pad_id=0)


def packed(examples, batch_size=None):
    rows = packing.pack(examples, ROW)
    assert 1 < len(rows) < len(examples) and packing.fill_fraction(rows, ROW) < 1  # several, and some padding
    return packing.batch(rows, row_tokens=ROW, pad_id=0, batch_size=batch_size)


def make_adapter(config):
    adapter = lora.init(jax.random.key(5), config, lora.LoraConfig(rank=3, alpha=6.0))
    return jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), adapter)


def test_loss_and_gradient_are_those_of_the_examples_apart(tiny_llama):
    """Of adapter and base at once; and a row of nothing, as held-out batches have, counts for nothing."""
    model, params = tiny_llama
    examples = make_examples()
    trained = {"policy": roles.Role(make_adapter(model.config), base=params)}

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def objective(trained, batch):
        return sft_objective(SFTSettings(), Network(model, 0), trained, {"base": None}, {}, batch, None)

    (apart, (weight, metrics)), gradient = objective(trained, plain(examples))
    (together, (same_weight, same_metrics)), same = objective(trained, packed(examples, batch_size=4))
    assert weight == same_weight == sum(c for _, c in LENGTHS)
    np.testing.assert_allclose(together, apart, rtol=1e-6)
    np.testing.assert_allclose(same_metrics["entropy"], metrics["entropy"], rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), same, gradient)
    sizes = [float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient)]
    assert min(sizes) > 1e-3  # far above the tolerance, everywhere


def test_states_are_those_of_the_examples_apart(tiny_llama):
    """Every token's, prompts included: positions start again, and what stands before in the row is not read."""
    model, params = tiny_llama
    examples = make_examples(1)
    states = np.asarray(roles.states(model, params, roles.Role(), packed(examples))[:, 0, 1:])
    texts = [prompt + completion for prompt, (completion,) in examples]
    ids, mask = (x[:, 0] for x in batching.pad_completions([[text] for text in texts], ROW, 0))
    alone = np.asarray(model.apply({"params": params}, ids, mask, method="hidden"))
    for i, row in enumerate(packing.fit([len(text) for text in texts], ROW)):
        start = 0
        for example in row:
            size = len(texts[example])
            found = states[i, start : start + size]
            np.testing.assert_allclose(found, alone[example, :size], atol=1e-5)
            start += size


def test_an_example_changes_nothing_of_another(tiny_llama):
    """To the bit: each token in turn replaced, padding too; states of all other examples of the row stay."""
    model, params = tiny_llama
    batch = jax.tree.map(jnp.asarray, packed(make_examples(2)))
    states = jax.jit(
        lambda ids: roles.states(model, params, roles.Role(), batch.replace(completion_ids=ids))[:, 0, 1:]
    )
    before = np.asarray(states(batch.completion_ids))
    segments = np.asarray(batch.segments[:, 0])
    assert (segments == 0).any() and segments.max() > 1
    for t in range(ROW):
        changed = batch.completion_ids.at[:, 0, t].set((batch.completion_ids[:, 0, t] + 1) % 64)
        moved = (np.asarray(states(changed)) != before).any(-1)
        same_example = segments == segments[:, t : t + 1]
        assert not moved[~same_example].any()
        assert not moved[:, :t].any() and moved[:, t].all()


def test_a_shared_prompt_is_read_by_every_segment(tiny_llama):
    """Segments of a completion with a prompt before them: each is a completion of its own."""
    model, params = tiny_llama
    rng = np.random.default_rng(3)
    prompt, parts = rng.integers(0, 64, 3).tolist(), [rng.integers(0, 64, n).tolist() for n in (4, 2)]
    group = functools.partial(batching.group, prompt_length=4, pad_id=0)
    together = group([prompt], [[sum(parts, [])]], completion_length=6)
    together = together.replace(segments=np.array([[[1] * 4 + [2] * 2]], np.int32))
    apart = group([prompt], [parts], completion_length=4)
    one, two = (roles.states(model, params, roles.Role(), batch)[0, :, 1:] for batch in (together, apart))
    np.testing.assert_allclose(one[0, :4], two[0], atol=1e-5)
    np.testing.assert_allclose(one[0, 4:], two[1, :2], atol=1e-5)
