"""Criticism and rewriting, and a judge in the place of people: what is written, read again and resumed."""

import json

import pytest

from experiments import cli
from rlhf_jax.data import formats, sources
from rlhf_jax.errors import InputError, Interrupted
from rlhf_jax.training import constitution
from rlhf_jax.training.checks import check_config
from rlhf_jax.training.loop import StopRequest
from tests.experiments.small_runs import begun, run_small

SMALL = (
    "constitution.num_prompts=32",
    "constitution.critique_tokens=8",
    "constitution.rounds=2",
    "preferences.num_pairs=32",
    "ppo.steps=1",
    "ppo.eval_every_steps=0",
)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rewritings_become_examples_and_pairs_and_a_killed_stage_goes_on(
    finished, one_device, tmp_path, monkeypatch
):
    workdir = begun(finished, tmp_path / "run")
    run = lambda where: run_small(where, *SMALL, "stages=('sft','constitution')", config="constitutional")
    run(workdir)
    examples, pairs = (lines(workdir / constitution.FILES[name]) for name in ("sft", "pairs"))
    assert 16 <= len(examples) == len(pairs) <= 32 and not list(workdir.glob("*partial*"))
    principles = {row["critique"] for row in constitution.read_principles("")}
    for example, pair in zip(examples, pairs, strict=True):
        assert example["completion"] == pair["chosen"] and example["principle"] in principles
    assert any(pair["chosen"] != pair["rejected"] for pair in pairs)
    assert len(formats.pairs(sources.read_rows(str(workdir / constitution.FILES["pairs"])))) == len(pairs)

    broken, real = begun(finished, tmp_path / "broken"), StopRequest.check

    def second(stop, what):
        if "batch 1" in what:
            stop.requested = True
        return real(stop, what)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(StopRequest, "check", second)
        run(broken)
    assert len(lines(broken / "constitution_partial.jsonl")) <= 16
    run(broken)
    assert lines(broken / constitution.FILES["sft"]) == examples


def test_a_judge_labels_pairs_and_its_doubt_reaches_the_reward_model(finished, one_device, tmp_path, capsys):
    workdir = begun(finished, tmp_path / "run")
    for file in ("preferences.jsonl", "preferences_held_out.jsonl"):
        (workdir / file).unlink()
    for part in workdir.glob("roles/reward_model/*"):
        part.unlink()
    (workdir / "roles" / "reward_model").rmdir()
    judge = f"preferences.labeller=judge:path={finished / 'base'}"
    run_small(workdir, *SMALL, judge, "stages=('sft','preferences','reward_model')", config="constitutional")
    rows = lines(workdir / "preferences.jsonl")
    assert all(0.5 <= row["soft_label"] <= 1 and row["choice"] == 0 for row in rows)
    assert any(row["soft_label"] < 0.999 for row in rows) and "gold_1" in rows[0]
    found = json.loads((workdir / "reward_model.json").read_text())
    assert found["ceiling"] is None and "agrees with the gold reward" in capsys.readouterr().out


def test_principles_and_labellers_that_do_not_fit_are_named(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"critique": "a", "revision": "b"}\n{"critique": "a"}\n')
    with pytest.raises(InputError, match="p.jsonl, line 2: 'revision' is None"):
        constitution.read_principles(str(tmp_path / "p.jsonl"))
    for change, said in (
        ("preferences.labeller=sentiment", "expected a judge"),
        (
            "preferences.labeller=judge:path=a/b --config.reward_model.kind=ranking",
            "does not learn from pairs",
        ),
    ):
        overrides = [part.removeprefix("--config.") for part in change.split()]
        config = cli.load_config("configs/pipeline.py:tiny", overrides)
        with pytest.raises(InputError, match=said):
            check_config(config, config.stages)


def test_braces_of_a_model_are_text():
    fields = {
        "prompt": "{critique}",
        "response": "\x00{prompt}",
        "critique": "C",
        "criticism": "",
        "revision": "",
    }
    filled = constitution._filled(constitution.ASK, fields)
    assert filled == "Request: {critique}\n\nResponse: \x00{prompt}\n\nC\n"
