"""The pipeline of Vertex AI by its own parameter names: what each one sets, what is refused, and one whole run."""

import json
import math
import shutil

import pytest

from configs import vertex as vertex_config
from experiments import cli, vertex
from rlhf_jax.evaluation.side_by_side import FILES
from rlhf_jax.models.roles import Role
from rlhf_jax.training import algorithms
from rlhf_jax.training.checks import check_config
from rlhf_jax.training.metrics import read_metrics
from tests.experiments.small_runs import on_one_device

PARAMETERS = {
    "preference_dataset": "pairs*.jsonl",
    "prompt_dataset": "prompts.jsonl",
    "large_model_reference": "llama-2-7b",
}
SMALL = ["reward_model.batch_size=8", "ppo.batch_size=8", "evaluation.batch_size=8"]


@pytest.fixture
def written(tmp_path):
    """Writes parameters.json from PARAMETERS with changes (a value of ... takes one out); returns its path."""

    def write(**changes):
        kept = {name: value for name, value in (PARAMETERS | changes).items() if value is not ...}
        path = tmp_path / "parameters.json"
        path.write_text(json.dumps(kept))
        return path

    return write


def start(path, workdir, *overrides):
    vertex.command(
        [f"--parameter_values={path}", f"--workdir={workdir}", *(f"--config.{o}" for o in overrides)]
    )


def refusal(capsys, path, workdir) -> str:
    """What a user sees: status 2 and one message on standard error."""
    with pytest.raises(SystemExit) as ended:
        cli.main(vertex.command, [f"--parameter_values={path}", f"--workdir={workdir}"])
    message = capsys.readouterr().err
    assert ended.value.code == 2
    assert message.startswith("error: ") and "Traceback" not in message
    return message


# From parameters to a config


def config_of(path):
    return vertex_config.get_config(vertex.read_parameters(str(path)))


def at(config, key):
    for name in key.split("."):
        config = config[name]
    return config


@pytest.mark.parametrize(
    "parameter, value, key, expected",
    [
        ("preference_dataset", "a/*.jsonl", "data.preferences", "a/*.jsonl"),
        ("prompt_dataset", "b.jsonl", "data.prompts", "b.jsonl"),
        ("eval_dataset", "c.jsonl", "data.eval_prompts", "c.jsonl"),
        ("eval_dataset", None, "data.eval_prompts", ""),
        ("instruction", "Be brief.", "data.instruction", "Be brief."),
        ("large_model_reference", "org/name", "model.path", "org/name"),
        ("large_model_reference", "llama-2-13b-chat", "model.path", "llama-2-13b-chat"),
        ("prompt_sequence_length", 8192, "data.prompt_tokens", 8192),
        ("prompt_sequence_length", 256.0, "data.prompt_tokens", 256),
        ("target_sequence_length", 1024, "data.completion_tokens", 1024),
        ("reward_model_learning_rate_multiplier", 0.5, "reward_model.optimizer.learning_rate", 0.5e-4),
        ("reward_model_learning_rate_multiplier", 2, "reward_model.optimizer.learning_rate", 2e-4),
        ("reinforcement_learning_rate_multiplier", 0.2, "ppo.optimizer.learning_rate", 1e-4),
        ("reward_model_train_steps", 1410, "reward_model.steps", 1410),
        ("reinforcement_learning_train_steps", 320, "ppo.steps", 320),
        ("kl_coeff", 0, "ppo.kl_coeff", 0.0),
        ("kl_coeff", 0.7, "ppo.kl_coeff", 0.7),
    ],
)
def test_each_parameter_lands(written, parameter, value, key, expected):
    found = at(config_of(written(**{parameter: value})), key)
    assert type(found) is type(expected)
    assert found == (pytest.approx(expected, rel=1e-12) if isinstance(expected, float) else expected)
    assert expected == "" or at(config_of(written()), key) != expected  # so it was the parameter that did it


@pytest.mark.parametrize("reference", [*vertex_config.SIZES, "some/checkpoint", "./folder"])
def test_what_the_pipeline_fixes(written, reference):
    """Batch 64, constant rates 1e-4 and 5e-4, one completion a prompt, greedy inference - whatever the model."""
    config = config_of(written(large_model_reference=reference))
    check_config(config, ("reward_model", "gate", "ppo"))
    assert config.stages == ("reward_model", "gate", "ppo")
    assert (config.data.prompt_tokens, config.data.completion_tokens) == (512, 64)
    assert config.ppo.kl_coeff == 0.1 and config.ppo.num_completions == 1
    assert config.evaluation.temperature == 0.0 and config.evaluation.num_completions == 1
    for section, rate in ((config.reward_model, 1e-4), (config.ppo, 5e-4)):
        assert (section.steps, section.batch_size) == (1000, 64)
        optimizer = section.optimizer
        assert optimizer.learning_rate == pytest.approx(rate, rel=1e-12)
        assert (optimizer.schedule, optimizer.warmup_steps, optimizer.head_multiplier) == ("constant", 0, 1.0)
    # The reward model reads the whole base: the embedded model's 12 layers are not another checkpoint's.
    assert (config.reward_model.layers, config.reward_model.pooling) == (0, "last")


def test_eval_prompts_add_the_evaluation(written):
    config = config_of(written(eval_dataset="eval.jsonl"))
    assert config.stages == ("reward_model", "gate", "ppo", "evaluation")
    check_config(config, config.stages)


def test_llama_names_bring_the_settings_of_a_slice(written):
    assert config_of(written()).model.dtype == "bfloat16"
    assert config_of(written(large_model_reference="./folder")).model.dtype == "float32"


@pytest.mark.parametrize(
    "examples, epochs, steps",
    # The first two are the course's: its event logs end at 1407 and 313. Rounded up once, not once an epoch.
    [(3000, 30, 1407), (2000, 10, 313), (64, 1, 1), (65, 1, 2), (1, 1, 1), (100, 0.5, 1), (64, 10, 10)],
)
def test_epochs_to_steps(examples, epochs, steps):
    assert vertex_config.steps_from_epochs(examples, epochs) == steps == math.ceil(examples * epochs / 64)


# What is refused


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kl_coef": 0.1}, "unknown parameter 'kl_coef'; did you mean 'kl_coeff'?"),
        ({"zzz": 1}, "unknown parameter 'zzz'; the parameters are preference_dataset"),
        ({"preference_dataset": ...}, "'preference_dataset' is required"),
        ({"prompt_dataset": ""}, "'prompt_dataset' is required"),
        ({"large_model_reference": 7}, "'large_model_reference' is required, a non-empty string; found 7"),
        (
            {"large_model_reference": "t5-large"},
            "'t5-large' is not of the Llama family; expected one of llama-2-7b",
        ),
        ({"large_model_reference": "text-bison@001"}, "not of the Llama family"),
        ({"large_model_reference": "chat-bison@001"}, "not of the Llama family"),
        ({"eval_dataset": 3}, "eval_dataset is 3; expected a string"),
        ({"instruction": ["x"]}, 'instruction is ["x"]; expected a string'),
        (
            {"prompt_sequence_length": 8193},
            "prompt_sequence_length is 8193; expected a whole number from 1 to 8192",
        ),
        ({"prompt_sequence_length": "512"}, 'prompt_sequence_length is "512"; expected a whole number'),
        (
            {"target_sequence_length": 1025},
            "target_sequence_length is 1025; expected a whole number from 1 to 1024",
        ),
        ({"target_sequence_length": 0}, "expected a whole number from 1 to 1024"),
        ({"reward_model_train_steps": 2.5}, "reward_model_train_steps is 2.5; expected a whole number"),
        ({"reward_model_train_steps": True}, "reward_model_train_steps is true"),
        (
            {"reinforcement_learning_train_steps": float("inf")},
            "reinforcement_learning_train_steps is Infinity",
        ),
        ({"kl_coeff": -0.1}, "kl_coeff is -0.1; expected a number from 0"),
        ({"kl_coeff": float("nan")}, "kl_coeff is NaN"),
        ({"kl_coeff": None}, "kl_coeff is null"),
        ({"reward_model_learning_rate_multiplier": 0}, "multiplier is 0; expected a number above 0"),
        ({"reinforcement_learning_rate_multiplier": "1"}, 'multiplier is "1"; expected a number above 0'),
    ],
)
def test_parameters_are_refused_by_name(written, tmp_path, capsys, changes, message):
    path, workdir = written(**changes), tmp_path / "run"
    said = refusal(capsys, path, workdir)
    assert str(path) in said and message in said
    assert said.count("\n") == 1 and not workdir.exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"kl_coeff": 0.1,\n "instruction": }', "not a JSON file (Expecting value: line 2"),
        ("[1, 2]", "expected one JSON object"),
        (None, "is not a file"),
    ],
)
def test_parameter_files_that_are_none(tmp_path, capsys, text, message):
    path = tmp_path / "parameters.json"
    if text is not None:
        path.write_text(text)
    said = refusal(capsys, path, tmp_path / "run")
    assert str(path) in said and message in said


# With data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with preferences in two files, prompts and eval prompts; the parameters that name them."""
    folder = tmp_path_factory.mktemp("data")

    def write(name, rows):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    pair = lambda i: {"input_text": f"Post {i} [summary]: ", "candidate_0": "a film", "candidate_1": "good rain",
                      "choice": i % 2}  # fmt: skip
    write("pairs_0.jsonl", map(pair, range(10)))
    write("pairs_1.jsonl", map(pair, range(10, 20)))
    write("prompts.jsonl", ({"input_text": f"Post {i} [summary]: "} for i in range(9)))
    write("eval.jsonl", ({"input_text": f"Unseen {i} [summary]: "} for i in (3, 1, 2)))
    return {
        "preference_dataset": str(folder / "pairs_*.jsonl"),
        "prompt_dataset": str(folder / "prompts.jsonl"),
        "eval_dataset": str(folder / "eval.jsonl"),
        "large_model_reference": "tiny",
        "instruction": "Be brief.",
        "prompt_sequence_length": 32,
        "target_sequence_length": 6,
        "reward_model_train_steps": 2,
        "reinforcement_learning_train_steps": 2,
        "reinforcement_learning_rate_multiplier": 0.2,
        "kl_coeff": 0.2,
    }


@pytest.mark.parametrize("which", ["preference_dataset", "prompt_dataset", "eval_dataset"])
def test_a_glob_without_files_is_told_before_anything_is_trained(data, written, tmp_path, capsys, which):
    nowhere = str(tmp_path / "nothing-*.jsonl")
    said = refusal(capsys, written(**data | {which: nowhere}), tmp_path / "run")
    assert f"{nowhere}: no file matches this pattern. The nearest directory that exists is {tmp_path}" in said
    # Corrected, the same workdir is taken: nothing was begun in it.
    elsewhere = str(tmp_path / "still-nothing-*.jsonl")
    said = refusal(capsys, written(**data | {which: elsewhere}), tmp_path / "run")
    assert f"{elsewhere}: no file matches" in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_wrong_row_is_told_by_file_line_and_field(data, written, tmp_path, capsys):
    rows = [
        {"input_text": "x", "candidate_0": "a", "candidate_1": "b", "choice": choice} for choice in (0, 2)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = written(**data | {"preference_dataset": str(tmp_path / "pairs.jsonl")})
    said = refusal(capsys, path, tmp_path / "run")
    assert "pairs.jsonl, line 2: 'choice' is 2; expected 0 or 1" in said


class Spy:
    """Counts log-probabilities asked of the reference, the role with nothing of its own, while jit traces."""

    def __init__(self, patch):
        self.reference = self.policy = 0
        real = algorithms.Network.logprobs

        def logprobs(network, base, role, batch):
            if role == Role():
                self.reference += 1
            else:
                self.policy += 1
            return real(network, base, role, batch)

        patch.setattr(algorithms.Network, "logprobs", logprobs)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """(workdir of a run with cloud parameters in its file, spy, the run's output)."""
    import contextlib
    import io

    folder, output = tmp_path_factory.mktemp("vertex"), io.StringIO()
    path = folder / "parameters.json"
    cloud = {"project": "p", "location": "l", "deploy_model": True, "tensorboard_resource_id": "t",
             "model_display_name": "m"}  # fmt: skip
    path.write_text(json.dumps(data | cloud))
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        on_one_device(patch)
        spy = Spy(patch)
        start(path, folder / "run", *SMALL)
    return folder / "run", spy, output.getvalue()


def test_the_trainers_tags_are_written(finished):
    rows = read_metrics(finished[0] / "metrics.jsonl")
    assert [(row["stage"], row["step"]) for row in rows] == [
        ("reward_model", 1), ("reward_model", 2), ("ppo", 1), ("ppo", 2)
    ]  # fmt: skip
    for row in rows[:2]:
        assert row["rank_loss"] == row["loss"] and row["learning_rate"] == pytest.approx(1e-4)
    for row in rows[2:]:
        assert row["rl_loss"] == row["loss"] and row["kl_loss"] == row["kl"] and math.isfinite(row["reward"])
        assert row["learning_rate"] == pytest.approx(1e-4) and row["kl_coeff"] == pytest.approx(0.2)


def test_both_eval_files_have_the_same_prompts_in_order(finished):
    sides = {}
    for side, name in FILES.items():
        sides[side] = [json.loads(line) for line in (finished[0] / name).read_text().splitlines()]
        assert name == f"eval_results_{side}.jsonl"
    for rows in sides.values():
        assert [row["inputs"] for row in rows] == [
            {"inputs_pretokenized": f"Be brief.\n\n\nUnseen {i} [summary]: ", "targets_pretokenized": ""}
            for i in (3, 1, 2)
        ]
        for row in rows:
            assert list(row) == ["inputs", "prediction"] and isinstance(row["prediction"], str)
    assert (finished[0] / "report.html").exists()


def test_cloud_parameters_are_named_as_without_effect(finished):
    (note,) = [line for line in finished[2].splitlines() if line.startswith("note:")]
    for name in vertex_config.CLOUD_ONLY:
        assert name in note
    assert "no effect" in note


def test_kl_coeff_0_asks_nothing_of_the_reference(data, finished, one_device, written, tmp_path, monkeypatch):
    workdir, with_reference, _ = finished
    assert with_reference.reference and with_reference.policy
    shutil.copytree(workdir / "roles" / "reward_model", tmp_path / "run" / "roles" / "reward_model")
    shutil.copytree(workdir / "base", tmp_path / "run" / "base")
    spy = Spy(monkeypatch)
    path = written(**data | {"kl_coeff": 0, "eval_dataset": ..., "reinforcement_learning_train_steps": 1})
    start(path, tmp_path / "run", *SMALL)
    (row,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert row["stage"] == "ppo" and "kl" not in row and "kl_loss" not in row
    assert math.isfinite(row["rl_loss"])
    assert spy.reference == 0 and spy.policy
