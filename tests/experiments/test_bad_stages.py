"""What a user sees on bad input in the files of later stages, lengths, workdirs and checkpoints."""

import json
import shutil

import numpy as np
import pytest

from experiments import cli
from experiments import run as run_command
from rlhf_jax.checkpoints import tiny

PAIR = {"input_text": "It was", "candidate_0": " good", "candidate_1": " bad", "choice": 0}
PROMPT = {"input_text": "It was"}
LONG = "It was good and bad and long. " * 40
KEYS = ("data.preferences", "data.prompts", "data.eval_prompts", "data.eval_preferences")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A sound checkpoint of our own; a test that damages it takes a copy."""
    return tiny.make(
        str(tmp_path_factory.mktemp("base") / "model"), ["It was good.", "It was bad."], vocab_size=300
    )


@pytest.fixture
def model(base, tmp_path):
    """A copy of the sound checkpoint."""
    return shutil.copytree(base, tmp_path / "model")


@pytest.fixture
def refusal(base, tmp_path, capsys):
    """Runs the command on sound data but for what the call changes; returns the message of its refusal."""

    def lines(name, rows):
        path = tmp_path / name
        path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
        return str(path)

    def run(*overrides, pairs=(PAIR,) * 6, prompts=(PROMPT,) * 6, model=base):
        sound = (
            "stages=reward_model,ppo",
            f"model.path={model}",
            f"data.preferences={lines('pairs.jsonl', pairs)}",
            f"data.prompts={lines('prompts.jsonl', prompts)}",
        )
        workdir = tmp_path / "run"
        argv = ["--config=configs/ppo.py:tiny", f"--workdir={workdir}"]
        with pytest.raises(SystemExit) as ended:
            cli.main(
                run_command.command, argv + [f"--config.{override}" for override in (*sound, *overrides)]
            )
        message = capsys.readouterr().err
        assert ended.value.code == 2
        assert message.startswith("error: ") and message.count("error: ") == 1 and "Traceback" not in message
        assert (
            not (workdir / "metrics.jsonl").exists() and not (workdir / "roles").exists()
        )  # nothing was trained
        return message

    return run


@pytest.mark.parametrize("key", KEYS)
def test_a_file_or_glob_of_any_stage_is_missed_before_training(refusal, tmp_path, key):
    said = refusal(f"{key}={tmp_path}/nothing.jsonl")
    assert f"{tmp_path}/nothing.jsonl: no such file. The nearest directory that exists is {tmp_path}" in said
    # Nothing was begun, so another path in the same workdir is no contradiction.
    assert f"{tmp_path}/deep/**/*.jsonl: no file matches this pattern" in refusal(
        f"{key}={tmp_path}/deep/**/*.jsonl"
    )


@pytest.mark.parametrize(
    "wrong, reason",
    [
        ({"input_txt": "x"}, "'input_text' is missing"),
        ({"input_text": 7}, "'input_text' is 7; expected a string"),
        ({"input_text": ""}, "'input_text' is empty; expected text"),
        ('{"input_text": "It was\n', "not JSON"),
    ],
)
def test_a_row_of_the_prompts(refusal, wrong, reason):
    said = refusal(prompts=[PROMPT, wrong])
    assert f"prompts.jsonl, line 2: {reason}" in said and "Correct or delete this line" in said


def test_files_of_another_format(refusal):
    said = refusal(prompts=[{"headline": "x", "body": "y"}])
    assert "prompts.jsonl, line 1: the fields are 'headline', 'body'; expected one of: input_text" in said


@pytest.mark.parametrize("file", ["pairs", "prompts"])
def test_prompts_longer_than_allowed(refusal, file):
    row = {"pairs": PAIR, "prompts": PROMPT}[file]
    long = row | {"input_text": LONG}
    said = refusal("data.prompt_overflow=error", **{file: [row, long, row]})
    assert f"{file}.jsonl, line 2: The prompt 'It was good" in said
    assert "tokens, more than 16" in said and "config.data.prompt_tokens" in said
    said = refusal("data.prompt_overflow=drop", **{file: [long] * 3})
    assert "None of the 3 prompts has at most config.data.prompt_tokens 16 tokens" in said


def test_a_workdir_that_is_a_file(refusal, tmp_path):
    (tmp_path / "run").write_text("")
    assert f"--workdir: {tmp_path}/run cannot be made a directory" in refusal()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}; only None is supported"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None; expected a positive whole number"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps is 'tiny'; expected a number"),
        ({"rope_scaling": 2}, "the rope settings are 2; expected a JSON object"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; expected a token id, or a list of them"),
        ({"attention_bias": "no"}, "attention_bias is 'no'; expected true or false"),
    ],
)
def test_settings_of_a_checkpoint(refusal, model, fields, message):
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    assert f"{path}: {message}" in refusal(model=model)


def test_a_gpt2_config_as_it_is_published(refusal, model):
    """It has other names for everything; the message is about the architecture, not about the first name."""
    gpt2 = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": 12,
        "n_embd": 768,
        "n_head": 12,
    }
    (model / "config.json").write_text(json.dumps(gpt2))
    assert "model_type is 'gpt2'; only 'llama' is supported" in refusal(model=model)


def test_missing_surplus_and_misshapen_tensors_are_listed_together(refusal, model):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tensors.pop("model.norm.weight")
    tensors["model.extra.weight"] = np.zeros(3, np.float32)
    tensors["model.layers.0.input_layernorm.weight"] = np.zeros(5, np.float32)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    said = refusal(model=model)
    assert "model.norm.weight: missing, expected [64]" in said and "model.extra.weight" in said
    assert "model.layers.0.input_layernorm.weight: found [5], expected [64]" in said
    assert f"Check that {model}/config.json belongs to these files" in said


def test_a_checkpoint_without_a_tokenizer(refusal, model):
    (model / "tokenizer.json").unlink()
    said = refusal(model=model)
    assert f"No tokenizer at {model}" in said and "needs tokenizer.json" in said
