"""The parameter file of the Vertex AI pipeline: parameters land, mistakes are named, files are written."""

import json

import pytest

from configs import vertex as vertex_config
from experiments import vertex
from rlhf_jax.checkpoints import tiny
from rlhf_jax.errors import InputError
from rlhf_jax.training import algorithms
from rlhf_jax.training.metrics import read_metrics

REQUIRED = {
    "preference_dataset": "p.jsonl",
    "prompt_dataset": "q.jsonl",
    "large_model_reference": "llama-2-7b",
}


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config_of(tmp_path, **parameters):
    return vertex_config.get_config(vertex.read_parameters(write(tmp_path / "p.json", REQUIRED | parameters)))


def test_defaults_are_those_of_the_pipeline(tmp_path):
    config = config_of(tmp_path)
    assert config.stages == ("reward_model", "ppo") and config.data.instruction == ""
    assert (config.data.prompt_tokens, config.data.completion_tokens) == (512, 64)
    assert config.reward_model.steps == config.ppo.steps == 1000
    assert config.reward_model.batch_size == config.ppo.batch_size == 64
    assert config.reward_model.optimizer.learning_rate == 1e-4
    assert config.ppo.optimizer.learning_rate == 5e-4
    assert config.ppo.optimizer.schedule == config.reward_model.optimizer.schedule == "constant"
    assert config.ppo.kl_coeff == 0.1 and config.ppo.num_completions == 1


def test_every_parameter_lands(tmp_path):
    config = config_of(
        tmp_path,
        eval_dataset="e.jsonl",
        instruction="Summarize.",
        prompt_sequence_length=256,
        target_sequence_length=32.0,
        reward_model_learning_rate_multiplier=2,
        reinforcement_learning_rate_multiplier=0.2,
        reward_model_train_steps=1410,
        reinforcement_learning_train_steps=320,
        kl_coeff=0,
        project="p",
        deploy_model=False,
    )
    assert config.stages[-1] == "evaluation" and config.data.eval_prompts == "e.jsonl"
    assert config.data.preferences == "p.jsonl" and config.data.prompts == "q.jsonl"
    assert config.data.instruction == "Summarize."
    assert (config.data.prompt_tokens, config.data.completion_tokens) == (256, 32)
    assert config.reward_model.optimizer.learning_rate == pytest.approx(2e-4)
    assert config.ppo.optimizer.learning_rate == pytest.approx(1e-4)
    assert (config.reward_model.steps, config.ppo.steps) == (1410, 320)
    assert config.ppo.kl_coeff == 0.0 and config.evaluation.temperature == 0.0


@pytest.mark.parametrize(
    "name, dtype",
    [("llama-2-7b", "bfloat16"), ("llama-2-13b-chat", "bfloat16"), ("HuggingFaceTB/SmolLM2-135M", "float32")],
)
def test_models(tmp_path, name, dtype):
    config = config_of(tmp_path, large_model_reference=name)
    assert config.model.path == name and config.model.dtype == dtype
    assert config.reward_model.layers == 0 and config.reward_model.pooling == "last"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kl_coef": 0.1}, "unknown parameter 'kl_coef'; did you mean 'kl_coeff'"),
        ({"prompt_dataset": None}, "'prompt_dataset' is required"),
        ({"large_model_reference": "t5-xxl"}, "not of the Llama family"),
        ({"large_model_reference": "text-bison@001"}, "not of the Llama family"),
        ({"kl_coeff": -1}, "kl_coeff is -1; expected a number from 0"),
        ({"kl_coeff": "0.1"}, 'kl_coeff is "0.1"; expected a number'),
        ({"kl_coeff": True}, "kl_coeff is true"),
        ({"prompt_sequence_length": 10_000}, "from 1 to 8192"),
        ({"target_sequence_length": 0}, "from 1 to 1024"),
        ({"reward_model_train_steps": 1.5}, "expected a whole number"),
        ({"reward_model_learning_rate_multiplier": 0}, "a number above 0"),
        ({"instruction": 3}, "instruction is 3; expected a string"),
    ],
)
def test_mistakes_are_named_with_the_file(tmp_path, change, message):
    with pytest.raises(InputError, match=message) as error:
        config_of(tmp_path, **change)
    assert "p.json" in str(error.value)


@pytest.mark.parametrize("content, message", [("{", "not a JSON file"), ("[1]", "expected one JSON object")])
def test_files_that_are_no_parameters(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        vertex.read_parameters(write(tmp_path / "p.json", content))
    with pytest.raises(InputError, match="does not exist"):
        vertex.read_parameters(str(tmp_path / "absent.json"))


def test_epochs_are_rounded_up_once():
    assert vertex_config.steps_from_epochs(3000, 30) == 1407  # not 30 * ceil(3000 / 64) = 1410
    assert vertex_config.steps_from_epochs(2000, 10) == 313
    assert vertex_config.steps_from_epochs(64, 1) == 1


WORDS = "the soup is warm and good while rain falls on a cold grey street where nobody sings".split()


def some_words(i, n):
    return " ".join(WORDS[(i * 7 + k * 3) % len(WORDS)] for k in range(n))


@pytest.fixture(scope="module")
def course_files(tmp_path_factory):
    """A small checkpoint and the three data sets in the course's form, the preferences in two files for a glob."""
    where = tmp_path_factory.mktemp("course")
    model = tiny.make(str(where / "model"), [some_words(i, 12) for i in range(40)], seed=0)
    pairs = [
        {"input_text": some_words(i, 6), "candidate_0": some_words(i + 1, 4), "candidate_1": some_words(i + 2, 5),
         "choice": i % 2}
        for i in range(64)
    ]  # fmt: skip
    prompts = [{"input_text": some_words(i, 5)} for i in range(32)]
    eval_prompts = [{"input_text": f"eval {some_words(i, 3)}"} for i in range(5)]
    write_lines(where / "pairs-0.jsonl", pairs[:40])
    write_lines(where / "pairs-1.jsonl", pairs[40:])
    return {
        "large_model_reference": model,
        "preference_dataset": str(where / "pairs-*.jsonl"),
        "prompt_dataset": write_lines(where / "prompts.jsonl", prompts),
        "eval_dataset": write_lines(where / "eval.jsonl", eval_prompts),
        "instruction": "Say it in short.",
        "prompt_sequence_length": 24,
        "target_sequence_length": 6,
        "reward_model_train_steps": 2,
        "reinforcement_learning_train_steps": 2,
    }  # fmt: skip


def run(tmp_path, parameters, *overrides):
    path = write(tmp_path / "parameters.json", parameters)
    small = [
        "reward_model.batch_size=8",
        "ppo.batch_size=8",
        "evaluation.batch_size=8",
        "ppo.reward_reference_batches=1",
    ]
    flags = [f"--config.{item}" for item in (*small, *overrides)]
    vertex.command([f"--parameter_values={path}", f"--workdir={tmp_path / 'run'}", *flags])
    return tmp_path / "run"


def test_the_whole_pipeline(course_files, tmp_path, capsys):
    workdir = run(tmp_path, course_files | {"project": "mine", "tensorboard_resource_id": "x"})
    assert "project" in capsys.readouterr().out  # said to have no effect
    rows = read_metrics(workdir / "metrics.jsonl")
    by_stage = {stage: [row for row in rows if row["stage"] == stage] for stage in ("reward_model", "ppo")}
    assert [row["step"] for row in by_stage["reward_model"]] == [1, 2]
    for row in by_stage["reward_model"]:
        assert row["rank_loss"] == row["loss"] and row["learning_rate"] == pytest.approx(1e-4)
    for row in by_stage["ppo"]:
        assert row["kl_loss"] == row["kl"] and row["rl_loss"] == row["loss"] and "reward" in row
        assert row["learning_rate"] == pytest.approx(5e-4)
    sides = [
        [json.loads(line) for line in open(workdir / f"eval_results_{name}.jsonl")]
        for name in ("untuned", "tuned")
    ]
    for side in sides:
        assert len(side) == 5
        for i, row in enumerate(side):
            assert set(row) == {"inputs", "prediction"} and isinstance(row["prediction"], str)
            text = row["inputs"]["inputs_pretokenized"]
            assert text.startswith("Say it in short.") and text.endswith(f"eval {some_words(i, 3)}")
            assert row["inputs"]["targets_pretokenized"] == ""


def test_without_kl_the_reference_is_never_run(course_files, tmp_path, monkeypatch):
    parameters = {name: value for name, value in course_files.items() if name != "eval_dataset"} | {
        "kl_coeff": 0
    }
    adapters = []
    real = algorithms.Network.logprobs

    def spied(self, base, role, batch):
        adapters.append(role.adapter)
        return real(self, base, role, batch)

    monkeypatch.setattr(algorithms.Network, "logprobs", spied)
    workdir = run(tmp_path, parameters)
    assert adapters and all(adapter is not None for adapter in adapters)
    rows = [row for row in read_metrics(workdir / "metrics.jsonl") if row["stage"] == "ppo"]
    assert len(rows) == 2 and not any("kl" in row or "kl_loss" in row for row in rows)
    assert not (workdir / "eval_results_tuned.jsonl").exists()


@pytest.mark.parametrize(
    "row, message",
    [
        ({"choice": 2}, r"bad.jsonl, line 1: .*choice.* 0 or 1"),
        ({"candidate_1": None}, r"bad.jsonl, line 1: .*candidate_1"),
        ({"input_text": ""}, r"bad.jsonl, line 1: .*input_text"),
    ],
)
def test_a_bad_row_is_named(course_files, tmp_path, row, message):
    good = {"input_text": "a", "candidate_0": "b", "candidate_1": "c", "choice": 0}
    path = write_lines(tmp_path / "bad.jsonl", [good | row])
    with pytest.raises(InputError, match=message):
        run(tmp_path, course_files | {"preference_dataset": path})


def test_a_glob_that_matches_nothing(course_files, tmp_path):
    with pytest.raises(InputError, match="none-[*].jsonl"):
        run(tmp_path, course_files | {"preference_dataset": str(tmp_path / "none-*.jsonl")})
