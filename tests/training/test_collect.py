"""One step's rollout: which groups are replaced, what the baseline is, and that nothing else is touched."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data.formats import Prompt
from rlhf_jax.models import lora
from rlhf_jax.models.roles import Role
from rlhf_jax.sampling.generate import SamplingConfig
from rlhf_jax.training.algorithms import ALGORITHMS, Network
from rlhf_jax.training.collect import Collector
from rlhf_jax.training.state import TrainState

B, G, R = 4, 2, 3
EASY = 7  # prompts that begin with it are rewarded the same whatever comes


class Scores:
    """In the place of Rewards: the share of tokens below 32, except for easy prompts."""

    learned, plain = False, False

    def total(self, learned, prompts, texts, mask=None):
        found = np.array(
            [
                [1.0 if prompt.text == "easy" else np.mean([i < 32 for i in text]) for text in group]
                for prompt, group in zip(prompts, texts, strict=True)
            ],
            np.float32,
        )
        return found, {"reward": found.mean(), "reward/share": found.mean()}


def prompts(*kinds):
    return [(Prompt("easy" if kind == EASY else "hard", None), [kind, 4 + n]) for n, kind in enumerate(kinds)]


@pytest.fixture
def make(tiny_llama):
    """(collector, state) of a row of the table."""
    model, base = tiny_llama

    def made(name, pack_completions=False, completions=G, tokens=R, eos_ids=(), **changes):
        run = types.SimpleNamespace(
            base=base,
            gold="",
            eos_ids=(2,),
            prompt_length=2,
            put=lambda batch: jax.tree.map(jnp.asarray, batch),
            sampling=lambda n: SamplingConfig(tokens, num_completions=n, eos_ids=eos_ids),
            tokenizer=types.SimpleNamespace(pad_id=0, decode_completion=lambda ids: ids),
        )
        section = types.SimpleNamespace(
            batch_size=B, num_completions=completions, pack_completions=pack_completions
        )
        row = ALGORITHMS[name]
        settings = row.settings(kl_coeff=0.0, **changes)
        policy = Role(adapter=lora.init(jax.random.key(1), model.config, lora.LoraConfig(rank=2)))
        state = TrainState({"policy": policy}, None, 0, None, {"kl_coeff": jnp.float32(0)})
        network = Network(model, vocab_chunk=0)
        return Collector(run, section, row, settings, network, Scores(), None), state

    return made


KEY = jax.random.key(3)
MIXED = prompts(EASY, 5, EASY, 6)


def fresh(n):
    """All hard, of other first tokens each time."""
    return prompts(*range(10 + 4 * n, 14 + 4 * n)), jax.random.fold_in(jax.random.key(9), n)


def test_b5_groups_of_equal_rewards_are_replaced(make):
    """Dynamic sampling that is only a flag would train on what it was handed."""
    collect, state = make("grpo", max_refills=3, kl_loss_coeff=0.0)
    asked = []
    chosen, batch, metrics = collect(state, MIXED, KEY, lambda n: asked.append(n) or fresh(n))
    assert metrics["zero_variance_fraction"] >= 0.5 and asked == list(range(metrics["refills"]))
    scores = np.asarray(batch.scores)
    assert metrics["filled_fraction"] == (scores[:, 0] != scores[:, 1]).mean() == 1.0
    assert all(prompt.text == "hard" for prompt, _ in chosen)
    # What is told and logged is what is trained on: the prompts of the batch, scores of its own completions.
    np.testing.assert_array_equal(batch.prompt_ids, [ids for _, ids in chosen])
    np.testing.assert_array_equal(
        scores, (batch.completion_ids < 32).mean(-1, where=batch.completion_mask > 0)
    )
    assert (np.asarray(batch.advantages) != 0).any((1, 2)).all()
    # But how good the policy is, is judged before the easy prompts are left out.
    plain, _ = make("grpo", kl_loss_coeff=0.0)
    kept, before, told = plain(state, MIXED, KEY)
    np.testing.assert_allclose(metrics["reward"], told["reward"])
    assert kept is MIXED and "refills" not in told
    # Groups that taught stay where they were.
    stay = np.asarray(before.scores[:, 0] != before.scores[:, 1])
    np.testing.assert_array_equal(batch.completion_ids[stay], before.completion_ids[stay])
    # The same again: nothing is carried from one call to the next.
    again = collect(state, MIXED, KEY, fresh)[1]
    jax.tree.map(np.testing.assert_array_equal, batch, again)


def test_refills_end_at_their_limit_and_what_stays_equal_stays(make):
    collect, state = make("rloo", max_refills=2)
    easy = prompts(*[EASY] * B)
    chosen, batch, metrics = collect(state, easy, KEY, lambda n: (prompts(*[EASY] * B), jax.random.key(n)))
    assert (
        metrics["refills"] == 2 and metrics["filled_fraction"] == 0 and metrics["zero_variance_fraction"] == 1
    )
    assert metrics["reward"] == 1 and not np.asarray(batch.advantages).any() and (batch.weights == 1).all()
    _, _, held_out = collect(state, easy, KEY)  # an evaluation replaces nothing
    assert "refills" not in held_out


def test_remax_judges_by_the_greedy_completion(make):
    collect, state = make("remax")
    seen = {}
    inner = collect.prepare
    collect.prepare = lambda frozen, controllers, batch: (
        seen.update(batch=batch) or inner(frozen, controllers, batch)
    )
    _, batch, metrics = collect(state, MIXED, KEY)
    greedy = seen["batch"].greedy
    once = dataclasses.replace(collect.sampling, temperature=0.0, num_completions=1)
    other = collect.sampling
    collect.sampling = once
    expected = collect.sample(state, MIXED, jax.random.key(77))  # whatever the key
    collect.sampling = other
    np.testing.assert_array_equal(greedy.completion_ids, expected.completion_ids)
    share = (greedy.completion_ids < 32).mean(-1, where=greedy.completion_mask > 0)
    baseline = np.where(np.array([[1], [0], [1], [0]]) > 0, 1.0, share)
    np.testing.assert_allclose(greedy.scores, baseline, rtol=1e-6)
    real = np.asarray(batch.completion_mask) > 0
    expected = np.broadcast_to((np.asarray(batch.scores) - baseline)[..., None], real.shape)
    np.testing.assert_allclose(np.asarray(batch.advantages)[real], expected[real], atol=1e-6)
    assert not np.asarray(batch.advantages)[~real].any() and batch.greedy is None
    np.testing.assert_allclose(metrics["reward"], np.mean(batch.scores), rtol=1e-6)  # of the samples alone
    np.testing.assert_allclose(metrics["baseline"], baseline.mean(), rtol=1e-6)


def test_the_rules_for_scores_hold_for_the_baseline_too(make):
    rules = dict(
        missing_eos_rule="replace", missing_eos_value=-9.0, reward_clip=2.0, overlong_buffer_tokens=1
    )
    collect, state = make("remax", overlong_penalty=0.5, **rules)
    _, batch, metrics = collect(state, MIXED, KEY)
    assert not np.asarray(batch.finished).all()
    cut = ~np.asarray(batch.finished)  # -9, clipped to -2, less the 0.5 of the longest completion
    np.testing.assert_allclose(metrics["baseline"], -2.5)
    np.testing.assert_allclose(np.asarray(batch.advantages)[cut], 0.0, atol=1e-6)
    assert metrics["overlong_fraction"] == (np.asarray(batch.completion_mask).sum(-1) == R).mean()


def test_a_baseline_that_could_not_be_scored_takes_its_prompt_out(make):
    collect, state = make("remax")
    inner = collect.rewards.total

    def total(learned, prompts, texts, mask=None):
        found, metrics = inner(learned, prompts, texts, mask)
        if found.shape[1] == 1:
            found[2] = np.nan
        return found, metrics

    collect.rewards.total = total
    _, batch, metrics = collect(state, MIXED, KEY)
    np.testing.assert_array_equal(batch.weights, [[1, 1], [1, 1], [0, 0], [1, 1]])
    assert np.isfinite(batch.advantages).all() and metrics["invalid_reward_fraction"] == 0.25


@pytest.mark.parametrize("max_refills", [0, 2])
def test_packed_completions_change_no_target(make, max_refills):
    found = []
    for pack in (False, True):
        eos_ids = tuple(range(24, 64))  # most completions end at once
        collect, state = make("grpo", pack, 8, 12, eos_ids, max_refills=max_refills, kl_loss_coeff=0.1)
        found.append(collect(state, MIXED, KEY, fresh)[1:])
    (plain, told), (packed, also_told) = found
    assert plain.lanes is None and packed.lanes.start.shape == (B, 8)
    assert np.prod(packed.lanes.shape) < 8 * 12
    for name in ("scores", "advantages", "ref_logprobs", "completion_ids"):
        real = (
            np.asarray(plain.completion_mask)[..., 0] > 0 if name == "scores" else plain.completion_mask > 0
        )
        one, other = (np.asarray(getattr(batch, name))[real] for batch in (plain, packed))
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5, err_msg=name)
    assert told.keys() == also_told.keys()
