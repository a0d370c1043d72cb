"""The sampler: its log-probabilities, its stops, its independence of neighbours, its filters and its draw."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.checkpoints import huggingface
from rlhf_jax.errors import InputError
from rlhf_jax.losses.logprobs import token_logprobs
from rlhf_jax.models import heads, roles
from rlhf_jax.models.llama import Llama
from rlhf_jax.sampling import filters
from rlhf_jax.sampling.generate import SamplingConfig, generate
from rlhf_jax.types import GroupedBatch

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
PROMPTS = jnp.array([[0, 0, 5, 6], [9, 8, 7, 6], [0, 1, 2, 3]])
MASK = jnp.array([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])


def teacher_forced(model, params, made, temperature):
    batch = GroupedBatch(PROMPTS, MASK, made.ids, made.mask)
    states = roles.predicting_states(model, params, roles.Role(), batch)
    logits = model.apply({"params": params}, states, method=Llama.logits)
    return token_logprobs(logits, made.ids, temperature)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_a_teacher_forced_forward(tiny_llama, temperature):
    model, params = tiny_llama
    config = SamplingConfig(12, temperature=temperature, num_completions=3, eos_ids=(2, 3))
    made = generate(model, params, PROMPTS, MASK, jax.random.key(0), config)
    real = np.array(made.mask, bool)
    expected = teacher_forced(model, params, made, temperature)
    np.testing.assert_allclose(made.logprobs[real], expected[real], atol=1e-4)
    assert (np.array(made.logprobs)[~real] == 0).all()


def test_a_filter_changes_the_draw_and_not_the_reported_logprobs(tiny_llama):
    model, params = tiny_llama
    config = SamplingConfig(8, top_k=3, num_completions=2)
    made = generate(model, params, PROMPTS, MASK, jax.random.key(0), config)
    np.testing.assert_allclose(made.logprobs, teacher_forced(model, params, made, 1.0), atol=1e-4)


def test_values_are_the_head_at_the_state_that_chose_the_token(tiny_llama):
    model, params = tiny_llama
    head = heads.init_reward(jax.random.key(4), 32)
    made = generate(
        model, params, PROMPTS, MASK, jax.random.key(0), SamplingConfig(6, num_completions=2), None, head
    )
    batch = GroupedBatch(PROMPTS, MASK, made.ids, made.mask)
    expected = heads.apply(head, roles.predicting_states(model, params, roles.Role(), batch))
    np.testing.assert_allclose(made.values, expected, atol=1e-4)


def test_stops_at_an_end_token_and_pads_after_it(tiny_llama):
    model, params = tiny_llama
    config = SamplingConfig(16, temperature=2.0, num_completions=8, eos_ids=(2, 3, 4, 5), pad_id=63)
    made = jax.device_get(generate(model, params, PROMPTS, MASK, jax.random.key(1), config))
    ends = np.isin(made.ids, config.eos_ids) & (made.mask > 0)
    assert made.finished.any() and not made.finished.all()
    for b in range(3):
        for g in range(8):
            length = made.mask[b, g].sum()
            assert (made.mask[b, g, :length] == 1).all()  # contiguous from the start
            assert (made.ids[b, g, length:] == 63).all()
            assert ends[b, g].sum() == made.finished[b, g]
            assert ends[b, g, length - 1] == made.finished[b, g]
            assert made.finished[b, g] or length == 16


def test_min_new_tokens_holds_the_end_back(tiny_llama):
    model, params = tiny_llama
    every = tuple(range(60))  # nearly everything ends
    made = generate(
        model, params, PROMPTS, MASK, jax.random.key(1), SamplingConfig(6, eos_ids=every, min_new_tokens=3)
    )
    assert (np.array(made.mask).sum(-1) >= 4).all()
    assert (np.array(made.ids)[..., :3] >= 60).all()


def test_same_seed_same_tokens_whatever_else_is_in_the_batch(tiny_llama):
    model, params = tiny_llama
    config = SamplingConfig(10, num_completions=2)
    key = jax.random.key(7)
    together = generate(model, params, PROMPTS, MASK, key, config)
    others = PROMPTS.at[1:].set(11)
    np.testing.assert_array_equal(together.ids[0], generate(model, params, others, MASK, key, config).ids[0])
    alone = generate(model, params, PROMPTS[:1], MASK[:1], key, config)
    np.testing.assert_array_equal(together.ids[0], alone.ids[0])
    wider = jnp.pad(PROMPTS, ((0, 0), (3, 0))), jnp.pad(MASK, ((0, 0), (3, 0)))
    np.testing.assert_array_equal(together.ids, generate(model, params, *wider, key, config).ids)


def test_equal_prompts_get_different_samples(tiny_llama):
    model, params = tiny_llama
    made = generate(
        model, params, jnp.tile(PROMPTS[1:2], (4, 1)), jnp.tile(MASK[1:2], (4, 1)), jax.random.key(0),
        SamplingConfig(12, num_completions=2),
    )  # fmt: skip
    rows = {tuple(row) for row in np.array(made.ids).reshape(8, 12).tolist()}
    assert len(rows) == 8


def test_greedy_is_the_argmax_at_every_step(tiny_llama):
    model, params = tiny_llama
    made = generate(model, params, PROMPTS, MASK, jax.random.key(0), SamplingConfig(8, temperature=0))
    batch = GroupedBatch(PROMPTS, MASK, made.ids, made.mask)
    states = roles.predicting_states(model, params, roles.Role(), batch)
    logits = model.apply({"params": params}, states, method=Llama.logits)
    np.testing.assert_array_equal(made.ids, logits.argmax(-1))


def test_padding_of_the_vocabulary_is_never_sampled(tiny_llama):
    model, params = tiny_llama
    sampling = SamplingConfig(12, temperature=5.0, num_completions=8, vocab_size=10)
    made = generate(model, params, PROMPTS, MASK, jax.random.key(0), sampling)
    assert np.array(made.ids).max() < 10
    # A filter like any other: the trainer, which knows nothing of it, finds the same log-probabilities.
    batch = GroupedBatch(PROMPTS, MASK, made.ids, made.mask)
    states = roles.predicting_states(model, params, roles.Role(), batch)
    logits = model.apply({"params": params}, states, method=Llama.logits)
    expected = jnp.where(made.mask > 0, token_logprobs(logits, made.ids, temperature=5.0), 0.0)
    np.testing.assert_allclose(made.logprobs, expected, atol=1e-4)


def test_top_k_and_top_p_by_hand():
    logits = jnp.log(jnp.array([[0.5, 0.2, 0.2, 0.1], [0.05, 0.9, 0.03, 0.02]]))
    kept = lambda x: np.isfinite(np.array(x)).tolist()
    assert kept(filters.restrict(logits, top_k=1)) == [
        [True, False, False, False],
        [False, True, False, False],
    ]
    # Ties stay together; 0.5 alone does not reach 0.6, so the next (and its tie) is needed.
    assert kept(filters.restrict(logits, top_p=0.6)) == [
        [True, True, True, False],
        [False, True, False, False],
    ]
    assert kept(filters.restrict(logits, top_p=0.95)) == [[True] * 4, [True, True, False, False]]
    assert kept(filters.restrict(logits, top_p=1e-6)) == [
        [True, False, False, False],
        [False, True, False, False],
    ]


@pytest.mark.parametrize("vocabulary", [7, 1000])
def test_draw_has_the_right_frequencies(vocabulary):
    """20,000 draws: each frequency within five standard errors; what has no probability never comes."""
    logits = jax.random.normal(jax.random.key(0), (vocabulary,)) * 2
    logits = logits.at[jnp.array([0, vocabulary - 1])].set(-jnp.inf)
    n = 20_000
    # An argument: as a constant, XLA would work out every row's sums while it compiles.
    draw = jax.jit(lambda logits, keys: filters.draw(jnp.broadcast_to(logits, (n, vocabulary)), keys))
    counts = np.bincount(draw(logits, jax.random.split(jax.random.key(1), n)), minlength=vocabulary)
    p = np.exp(np.float64(logits) - np.float64(jax.nn.logsumexp(logits)))
    assert counts[0] == counts[-1] == 0
    assert (np.abs(counts - n * p) <= 5 * np.sqrt(n * p * (1 - p)) + 1).all()


@pytest.mark.parametrize(
    "bad", [{"temperature": -1.0}, {"top_p": 0.0}, {"min_new_tokens": 9}, {"top_k": -1}, {"min_p": 2}]
)
def test_impossible_settings_are_refused(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        SamplingConfig(**({"max_new_tokens": 8} | bad))


@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_greedy_tokens_are_those_of_transformers(name):
    config, params = huggingface.load_llama(str(GOLDEN / name))
    with np.load(GOLDEN / f"{name}.npz") as file:
        prompts, mask, expected = (jnp.asarray(file[k]) for k in ("prompt_ids", "prompt_mask", "greedy_ids"))
    made = generate(
        Llama(config),
        params,
        prompts,
        mask,
        jax.random.key(0),
        SamplingConfig(expected.shape[1], temperature=0),
    )
    np.testing.assert_array_equal(made.ids[:, 0], expected)


def test_filters_are_those_of_transformers():
    with np.load(GOLDEN / "filters.npz") as file:
        g = dict(file)
    logits = jnp.asarray(g["logits"])
    seen = jnp.zeros(logits.shape, bool).at[jnp.arange(len(logits))[:, None], g["seen"]].set(True)
    for penalty in (1.3, 0.7):
        np.testing.assert_allclose(
            filters.penalise(logits, seen, penalty), g[f"repetition_{penalty}"], rtol=1e-6
        )
    for min_p in (0.05, 0.5):
        np.testing.assert_array_equal(filters.restrict(logits, min_p=min_p), g[f"min_p_{min_p}"])
    both = filters.restrict(logits, top_p=0.9, min_p=0.1)
    np.testing.assert_array_equal(both, g["top_p_0.9_min_p_0.1"])


def test_repetition_penalty_counts_prompt_and_completion_and_no_padding():
    config, params = huggingface.load_llama(str(GOLDEN / "llama2"))
    with np.load(GOLDEN / "filters.npz") as file:
        prompts, expected = jnp.asarray(file["repetition_prompts"]), file["repetition_greedy"]
    sampling = SamplingConfig(expected.shape[1], temperature=0, repetition_penalty=1.5)
    # Padded with a token that the answers hold, which would be penalised if padding were read.
    padded = jnp.pad(prompts, ((0, 0), (2, 0)), constant_values=int(expected[0, 0]))
    mask = jnp.pad(jnp.ones_like(prompts), ((0, 0), (2, 0)))
    made = generate(Llama(config), params, padded, mask, jax.random.key(0), sampling)
    np.testing.assert_array_equal(made.ids[:, 0], expected)
