"""Every kind of reward model from its config: feedback, training, held-out figures, and a policy trained on it."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from experiments import cli, pipeline
from rlhf_jax.checkpoints import roles as role_files
from rlhf_jax.errors import InputError
from rlhf_jax.training import feedback
from rlhf_jax.training.algorithms.reward_models import TEXT_KINDS
from rlhf_jax.training.checks import check_config
from rlhf_jax.training.metrics import read_metrics
from tests.experiments.small_runs import run_small

KINDS = sorted(path.stem for path in pathlib.Path("configs/reward_models").glob("[a-z]*.py"))
# Those whose feedback, objective or way to be read is their own; the others run with these or in test_pipeline.py.
RUN = ("token_level", "ranking", "classification", "regression")
SMALLER = ("reward_model.steps=2", "preferences.num_pairs=32", "data.held_out_pairs=32")


def losses(workdir, stage):
    return [m["loss"] for m in read_metrics(workdir / "metrics.jsonl") if m["stage"] == stage]


def test_configs_load_at_every_size_and_every_kind_has_one():
    found = set()
    for name in KINDS:
        for size in ("tiny", "smollm2", "llama2_7b"):
            config = cli.load_config(f"configs/reward_models/{name}.py:{size}", [])
            check_config(config, tuple(pipeline.STAGES))
        found.add(config.reward_model.kind)
    assert found == {*feedback.FEEDBACK, *TEXT_KINDS}


@pytest.mark.parametrize("name", RUN)
def test_kinds_run_from_their_configs(finished, one_device, tmp_path, name):
    workdir = tmp_path
    shutil.copytree(finished / "base", workdir / "base")
    stages = ("stages=('preferences','reward_model','gate')", "gate.preview_prompts=0")
    run_small(workdir, *SMALLER, *stages, config=f"reward_models/{name}")
    assert len(losses(workdir, "reward_model")) == 2 and np.isfinite(losses(workdir, "reward_model")).all()
    made = json.loads((workdir / "reward_model.json").read_text())
    assert (
        made["kind"] == name
        and 0 <= made["accuracy"] <= 1
        and len(made["gold"]) == 2 * made["held_out_pairs"]
    )
    assert made["ceiling"] > 0.5
    judged = json.loads((workdir / "gate.json").read_text())["measures"]  # by the same pairs
    assert judged["held_out_pairs"] == made["held_out_pairs"]
    assert judged["ceiling"] == pytest.approx(made["ceiling"])
    assert judged["probabilities"] == (name in ("token_level", "ranking"))
    own = {"ranking": "top1_accuracy", "classification": "label_accuracy", "regression": "aspects"}.get(name)
    assert list(made["own"]) == ([own] if own else [])
    last = read_metrics(workdir / "metrics.jsonl")[-1]
    assert last["eval/accuracy"] == pytest.approx(made["accuracy"], abs=0.02)  # of a ranking a mean of means


def test_a_gated_ensemble_rewards_a_policy_and_resumes(finished, one_device, tmp_path):
    """Two values of the config do it; killed before its role is written, the stage ends with the same."""
    workdir = tmp_path
    for part in ("base", "roles/sft"):
        shutil.copytree(finished / part, workdir / part)
    changes = ("reward_model.kind=multi_objective", "reward_model.members=2", "reward_model.gate_steps=2",
               "ppo.eval_every_steps=0")  # fmt: skip
    run_small(workdir, *SMALLER, *changes, config="ppo")
    for stage in ("reward_model", "reward_model_gate", "reward_model_member_1", "reward_model_member_1_gate"):
        assert len(losses(workdir, stage)) == 2, stage
    assert losses(workdir, "reward_model") != losses(workdir, "reward_model_member_1")
    rows = [m for m in read_metrics(workdir / "metrics.jsonl") if m["stage"] == "ppo"]
    assert len(rows) == 4 and all(m["reward_disagreement"] > 0 and np.isfinite(m["loss"]) for m in rows)
    made = json.loads((workdir / "reward_model.json").read_text())
    assert len(made["own"]["members"]["accuracy"]) == 2 and made["own"]["members"]["disagreement"] > 0
    assert set(made["own"]["aspects"]) == {"sentiment", "length:target=12", "length:target=4"}

    role = workdir / "roles" / "reward_model"
    files = sorted(path.relative_to(role) for path in role.rglob("*.safetensors"))
    assert [str(f) for f in files].count("member_1/gate.safetensors") == 1 and len(files) == 7
    before = {file: (role / file).read_bytes() for file in files}
    assert before[files[1]] != before[files[4]]
    shutil.rmtree(role)
    run_small(workdir, *SMALLER, *changes, config="ppo")
    assert role_files.exists(str(role)) and {file: (role / file).read_bytes() for file in files} == before


def test_values_that_cannot_begin_as_the_reward_model_are_refused(finished, tmp_path):
    for change in ("reward_model.members=2", "reward_model.kind=multi_objective"):
        with pytest.raises(InputError, match="config.ppo.value is 'reward'.*no linear head.*own or shared"):
            run_small(tmp_path, change, "ppo.value=reward")
    with pytest.raises(
        InputError, match="config.reward_model.huber_delta is 1.0, which only kind regression has"
    ):
        run_small(tmp_path, "reward_model.huber_delta=1.0")
