"""Beam search against transformers, against a slow float64 reference, and against all sequences there are."""

import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from rlhf_jax.checkpoints import huggingface
from rlhf_jax.errors import InputError
from rlhf_jax.models.llama import Llama, LlamaConfig
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.parallel import sharding
from rlhf_jax.sampling.beam import BeamConfig, beam_search
from rlhf_jax.sampling.generate import SamplingConfig, generate
from tests.sampling import beam_reference

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
PROMPTS = jnp.array([[0, 0, 5, 6], [9, 8, 7, 6], [0, 1, 2, 3]])
MASK = jnp.array([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
V, R, END = 4, 4, 2  # of the toy


def golden(file):
    with np.load(GOLDEN / file) as arrays:
        names = sorted({key.split("/")[0] for key in arrays})
        return {n: {k.split("/")[1]: arrays[k] for k in arrays if k.startswith(n + "/")} for n in names}


CASES = golden("beam.npz") | golden("beam_groups.npz")
LOADED = {}


@pytest.mark.parametrize("name", CASES)
def test_sequences_and_scores_are_those_of_transformers(name):
    case = CASES[name]
    settings = json.loads(str(case["settings"]))
    checkpoint = settings.pop("model")
    if checkpoint not in LOADED:
        LOADED[checkpoint] = huggingface.load_llama(str(GOLDEN / checkpoint))
    config, params = LOADED[checkpoint]
    ids, mask = jnp.asarray(case["prompt_ids"]), jnp.asarray(case["prompt_mask"])
    made = jax.device_get(beam_search(Llama(config), params, ids, mask, BeamConfig(pad_id=1, **settings)))
    ids = made.ids
    if "num_groups" in settings:  # transformers' groups write the first end token for any
        ids = np.where(np.isin(ids, settings["eos_ids"]), settings["eos_ids"][:1] or 0, ids)
    np.testing.assert_array_equal(ids, case["ids"])
    np.testing.assert_allclose(made.scores, case["scores"], atol=1e-4)
    ends = np.isin(made.ids, settings["eos_ids"]) & (made.mask > 0)
    np.testing.assert_array_equal(ends.any(-1), made.finished)
    assert (ends.sum(-1) == made.finished).all()
    np.testing.assert_array_equal(made.ids == 1, made.mask == 0)  # nothing but what follows the end is pad
    if "num_groups" not in settings:  # there, scores have the penalty in them
        score = made.logprobs.sum(-1) / made.mask.sum(-1) ** settings["length_penalty"]
        np.testing.assert_allclose(made.scores, score, rtol=1e-5)


# Against every sequence that there is


@pytest.fixture(scope="module")
def toy():
    """(Llama, params, prompts [2, 3], their tables of next log-probabilities) of a vocabulary of 4."""
    config = LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
        initializer_range=0.5, eos_ids=(END,),
    )  # fmt: skip
    model, prompts = Llama(config), jnp.array([[0, 1, 3], [3, 3, 1]])
    params = nn.meta.unbox(model.init(jax.random.key(3), prompts, prompts)["params"])
    tails = np.array(list(itertools.product(range(V), repeat=R - 1)))
    rows = np.concatenate([np.repeat(prompts, len(tails), 0), np.tile(tails, (2, 1))], axis=1)
    logits = np.array(model.apply({"params": params}, rows, np.ones_like(rows)), np.float64)[:, 2:]
    logprobs = (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).reshape(2, len(tails), R, V)
    tables = [
        {tuple(t[:i]): logprobs[b, n, i] for n, t in enumerate(tails.tolist()) for i in range(R)}
        for b in (0, 1)
    ]
    return model, params, prompts, tables


def found_by(toy, config, prompts=None):
    model, params, all_prompts, _ = toy
    prompts = all_prompts if prompts is None else prompts
    made = beam_search(model, params, prompts, jnp.ones_like(prompts), config, None, jax.random.key(0))
    return jax.device_get(made)


def tokens_of(made, b, k):
    return tuple(made.ids[b, k][made.mask[b, k] > 0].tolist())


@pytest.mark.parametrize("length_penalty", [0.0, 1.5])
def test_a_beam_as_wide_as_the_tree_finds_the_best_sequence(toy, length_penalty):
    width = V ** (R - 1)
    settings = dict(num_beams=width, num_return=3, length_penalty=length_penalty, early_stopping="never")
    made = found_by(toy, BeamConfig(R, eos_ids=(END,), **settings))
    for b, table in enumerate(toy[3]):
        sums = beam_reference.sequences(table, V, (END,), R)
        scores = {tokens: total / len(tokens) ** length_penalty for tokens, total in sums.items()}
        ranked = sorted(scores, key=scores.get, reverse=True)[:3]
        assert [tokens_of(made, b, k) for k in range(3)] == ranked
        np.testing.assert_allclose(made.scores[b], [scores[tokens] for tokens in ranked], rtol=1e-5)


@pytest.mark.parametrize(
    ("beams", "groups", "penalty", "length_penalty", "early"),
    [(3, 1, 0.0, 1.0, False), (4, 2, 0.8, 0.5, True), (6, 3, 0.3, 1.0, "never")],
)
def test_follows_the_slow_reference(toy, beams, groups, penalty, length_penalty, early):
    config = BeamConfig(R, beams, beams, length_penalty, early, groups, penalty, eos_ids=(END,))
    made = found_by(toy, config)
    for b, table in enumerate(toy[3]):
        expected = beam_reference.search(table, V, (END,), R, beams, length_penalty, early, groups, penalty)
        assert [tokens_of(made, b, k) for k in range(len(expected))] == [tokens for _, tokens in expected]
        scores = [score for score, _ in expected] + [-np.inf] * (beams - len(expected))
        np.testing.assert_allclose(made.scores[b], scores, rtol=1e-5)
        assert (made.mask[b, len(expected) :] == 0).all()


def test_stochastic_beams_are_samples_without_replacement(toy):
    """4,000 pairs of one prompt: distinct, the first as the model has it, and each sequence as often as it should."""
    n = 4000
    prompts = jnp.tile(toy[2][:1], (n, 1))
    made = found_by(toy, BeamConfig(R, 2, 2, eos_ids=(END,), stochastic=True), prompts)
    sums = beam_reference.sequences(toy[3][0], V, (END,), R)
    p = {tokens: np.exp(total) for tokens, total in sums.items()}
    assert abs(sum(p.values()) - 1) < 1e-5
    pairs = [(tokens_of(made, b, 0), tokens_of(made, b, 1)) for b in range(n)]
    assert all(first != second for first, second in pairs)
    assert (made.scores[:, 0] > made.scores[:, 1]).all()
    totals = [[sums[tokens] for tokens in pair] for pair in pairs]
    np.testing.assert_allclose(made.logprobs.sum(-1), totals, atol=1e-4)
    # The second comes from what is left: p_i (1 + sum over the others of p_j / (1 - p_j)) in all.
    odds = {tokens: x / (1 - x) for tokens, x in p.items()}
    among = {tokens: x * (1 + sum(odds.values()) - odds[tokens]) for tokens, x in p.items()}
    assert abs(sum(among.values()) - 2) < 1e-5
    for expected, drawn in ((p, [a for a, _ in pairs]), (among, [x for pair in pairs for x in pair])):
        counts = {tokens: drawn.count(tokens) for tokens in expected}
        for tokens, x in expected.items():
            assert abs(counts[tokens] - n * x) <= 5 * np.sqrt(n * x * (1 - x)) + 1, tokens
    # The best of all noise is a standard Gumbel variable: mean 0.577, deviation 1.283.
    assert abs(made.scores[:, 0].mean() - 0.5772) < 5 * 1.283 / n**0.5


# Against the sampler


def test_one_beam_is_greedy(tiny_llama):
    model, params = tiny_llama
    ends = dict(eos_ids=tuple(range(2, 20)), min_new_tokens=2, pad_id=63, vocab_size=50)
    greedy = generate(
        model, params, PROMPTS, MASK, jax.random.key(0), SamplingConfig(8, temperature=0, **ends)
    )
    made = beam_search(model, params, PROMPTS, MASK, BeamConfig(8, 1, early_stopping="never", **ends))
    for name in ("ids", "mask", "finished"):
        np.testing.assert_array_equal(getattr(made, name), getattr(greedy, name))
    np.testing.assert_allclose(made.logprobs, greedy.logprobs, atol=1e-5)


def test_eight_devices_find_the_same(tiny_llama):
    model, params = tiny_llama
    prompts, mask = (np.array(jnp.concatenate([x, x[:1]])) for x in (PROMPTS, MASK))
    config = BeamConfig(6, 4, 2, eos_ids=(2, 3))
    alone = beam_search(model, params, jnp.array(prompts), jnp.array(mask), config)
    mesh = meshes.make_mesh(data=2, fsdp=2, tensor=2)
    with meshes.activate(mesh):
        spread = jax.device_put(params, sharding.llama_shardings(model.config, mesh))
        split = beam_search(model, spread, *sharding.put_batch((prompts, mask), mesh), config)
    np.testing.assert_array_equal(alone.ids, split.ids)
    np.testing.assert_allclose(alone.scores, split.scores, atol=1e-5)


@pytest.mark.parametrize(
    "bad",
    [
        {"num_return": 5},
        {"num_groups": 3},
        {"early_stopping": "no"},
        {"diversity_penalty": 0.5},
        {"min_new_tokens": 9},
    ],
)
def test_impossible_settings_are_refused(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        BeamConfig(**({"max_new_tokens": 8, "num_beams": 4} | bad))
