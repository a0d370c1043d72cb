"""What a run is rewarded for: components by name, mixed, with the fields of the prompts' own records."""

import numpy as np
import pytest
from ml_collections import config_dict

from rlhf_jax.data.formats import Prompt
from rlhf_jax.data.sources import Row
from rlhf_jax.errors import InputError
from rlhf_jax.training import scoring

MODULE = """
def ends_with(completions, ending):
    return [float(text.endswith(end)) for text, end in zip(completions, ending, strict=True)]
"""


def section(*components, weights=None, normalise="none", clip=()):
    weights = (1.0,) * len(components) if weights is None else weights
    return config_dict.ConfigDict(
        dict(
            components=components,
            weights=weights,
            normalise=normalise,
            clip=clip,
            timeout_seconds=20.0,
            failure_score=0.0,
        )
    )


def prompts(**fields):
    size = len(next(iter(fields.values())))
    rows = [{name: column[i] for name, column in fields.items()} for i in range(size)]
    return [Prompt(f"prompt {i}", Row("a.jsonl", i + 1, row)) for i, row in enumerate(rows)]


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "my_rewards"


def test_the_learned_reward_alone_needs_no_text():
    with scoring.Rewards(section("learned"), print) as rewards:
        assert rewards.plain and rewards.learned
    for changed in (
        section("learned", weights=(2.0,)),
        section("learned", normalise="group"),
        section("learned", "sentiment"),
    ):
        with scoring.Rewards(changed, print) as rewards:
            assert rewards.learned and not rewards.plain


def test_learned_rule_and_function_add_up_by_weight(module):
    asked = section("learned", "length:target=2", f"{module}:ends_with", weights=(1.0, 10.0, 100.0))
    learned = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    texts = [["a b", "a"], ["a b !", "a ?"]]
    with scoring.Rewards(asked, print) as rewards:
        total, metrics = rewards.total(learned, prompts(ending=["b", "!"]), texts)
    length, ends = np.array([[1.0, 0.5], [0.5, 1.0]]), np.array([[1.0, 0.0], [1.0, 0.0]])
    np.testing.assert_allclose(total, learned + 10 * length + 100 * ends, rtol=1e-6)
    assert metrics["reward/learned"] == 2.5 and metrics["reward/ends_with"] == 0.5
    np.testing.assert_allclose(metrics["reward"], np.mean(total), rtol=1e-6)
    assert metrics["failed_reward_fraction"] == 0


def test_normalised_components_are_trained_on_and_plain_ones_told():
    asked = section("length:target=2", normalise="group")
    texts = [["a b", "a", ""], ["a", "a", "a"]]
    with scoring.Rewards(asked, print) as rewards:
        total, metrics = rewards.total(None, prompts(x=[0, 0]), texts)
        plain, _ = rewards.total(None, prompts(x=[0, 0]), texts, normalise=False)
    np.testing.assert_allclose(np.asarray(total)[0], [1, 0, -1], atol=1e-3)
    assert not np.asarray(total)[1].any()
    np.testing.assert_allclose(metrics["reward"], 0.5)
    np.testing.assert_allclose(plain, [[1, 0.5, 0], [0.5, 0.5, 0.5]])


def test_clips_are_of_each_component_in_the_units_after_normalising():
    texts = [["a b", "a", ""], ["a", "a", "a"]]  # 1, 0.5, 0 and 0.5 each
    with scoring.Rewards(section("length:target=2", "length:target=1", clip=(0.75, 0.0)), print) as rewards:
        total, metrics = rewards.total(None, prompts(x=[0, 0]), texts)
        np.testing.assert_allclose(total, [[0.75, 1.5, 0], [1.5, 1.5, 1.5]])
        np.testing.assert_allclose(metrics["reward/length"], 0.5)  # as it came
    with scoring.Rewards(section("length:target=2", normalise="group", clip=(0.5,)), print) as rewards:
        total, _ = rewards.total(None, prompts(x=[0, 0]), texts)
        plain, _ = rewards.total(None, prompts(x=[0, 0]), texts, normalise=False)
    np.testing.assert_allclose(total, [[0.5, 0, -0.5], [0, 0, 0]])
    np.testing.assert_allclose(plain, [[1, 0.5, 0], [0.5, 0.5, 0.5]])
    with scoring.Rewards(section("learned", clip=(3.0,)), print) as rewards:
        assert not rewards.plain


def test_a_field_that_one_record_lacks_costs_that_record_alone(module):
    said, asked = [], section(f"{module}:ends_with")
    records = prompts(ending=["b", "!"]) + [Prompt("no record", None)]
    with scoring.Rewards(asked, said.append) as rewards:
        total, metrics = rewards.total(None, records, [["a b"], ["a b"], ["a"]])
    assert np.asarray(total).ravel().tolist() == [1.0, 0.0, 0.0]
    np.testing.assert_allclose(metrics["failed_reward_fraction"], 1 / 3)
    assert "no record" in said[0]
    with scoring.Rewards(asked, said.append) as rewards, pytest.raises(InputError, match="needs 'ending'"):
        rewards.total(None, prompts(answer=["b"]), [["a b"]])


def test_fields_are_checked_before_anything_is_sampled(module):
    with scoring.Rewards(section("learned", f"{module}:ends_with"), print) as rewards:
        rewards.check_fields(prompts(ending=["b"]))
        with pytest.raises(InputError, match="my_rewards:ends_with' needs the field 'ending'.*give answer"):
            rewards.check_fields(prompts(answer=["b"]))


def test_the_same_rule_twice_has_two_names():
    with scoring.Rewards(section("length:target=1", "length:target=9"), print) as rewards:
        assert [one.name for one in rewards.components] == ["length", "length_2"]


@pytest.mark.parametrize(
    "asked, message",
    [
        (section(), "config.rewards.components is empty"),
        (section("learned", weights=(1.0, 2.0)), "weights has 2 values for 1 components"),
        (section("sentimant"), "did you mean 'sentiment'"),
        (section("learned", normalise="all"), "normalise is 'all'"),
        (section("learned", clip=(1.0, 2.0)), "clip has 2 values for 1 components"),
        (section("learned", clip=(-1.0,)), "clip is \\(-1.0,\\); expected numbers of 0 or more"),
        (section("length:target=x"), "target is 'x'; expected a whole number"),
    ],
)
def test_what_is_refused_at_config_load(asked, message):
    with pytest.raises(InputError, match=message):
        scoring.check(asked)
