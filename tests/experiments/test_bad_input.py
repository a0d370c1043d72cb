"""What a user sees on bad input: status 2 and one message that names the place and what to do, before any training."""

import json
import shutil

import numpy as np
import pytest

from experiments import cli
from experiments import run as run_command
from rlhf_jax.checkpoints import tiny

PAIR = {"input_text": "It was", "candidate_0": " good", "candidate_1": " bad", "choice": 0}
PROMPT = {"input_text": "It was"}
CONTEXT = 256  # tokens, of the tiny model


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
        assert not (workdir / "metrics.jsonl").exists() and not (workdir / "roles").exists()
        return message

    return run


# Data files

KEYS = ("data.preferences", "data.prompts", "data.eval_prompts", "data.eval_preferences")


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_file(refusal, tmp_path, key):
    said = refusal(f"{key}={tmp_path}/nothing.jsonl")
    assert f"{tmp_path}/nothing.jsonl: no such file. The nearest directory that exists is {tmp_path}" in said


@pytest.mark.parametrize("key", KEYS)
def test_a_glob_that_matches_nothing(refusal, tmp_path, key):
    said = refusal(f"{key}={tmp_path}/deep/**/*.jsonl")
    assert f"{tmp_path}/deep/**/*.jsonl: no file matches this pattern" in said and str(tmp_path) in said


def test_a_missing_file_of_supervised_examples(refusal, tmp_path):
    said = refusal("stages=sft,reward_model", f"data.sft={tmp_path}/nothing.jsonl")
    assert "nothing.jsonl: no such file" in said


@pytest.mark.parametrize("file", ["pairs", "prompts"])
def test_malformed_json(refusal, file):
    row = {"pairs": PAIR, "prompts": PROMPT}[file]
    said = refusal(**{file: [row, '{"input_text": "It was\n', row]})
    assert f"{file}.jsonl, line 2: not JSON" in said
    assert "Correct or delete this line; the other lines of the file are not affected" in said


@pytest.mark.parametrize(
    "change, field, reason",
    [
        ({"candidate_1": ...}, "candidate_1", "is missing; a line of Vertex preferences holds"),
        ({"input_text": ...}, "input_text", "is missing"),
        ({"input_text": 3}, "input_text", "is 3; expected a string"),
        ({"candidate_0": None}, "candidate_0", "is null; expected a string"),
        ({"candidate_0": ""}, "candidate_0", "is empty; expected text"),
        ({"input_text": " \n"}, "input_text", "is empty; expected text"),
        ({"choice": 2}, "choice", "is 2; expected 0 or 1, the index of the better candidate"),
        ({"choice": -1}, "choice", "is -1; expected 0 or 1"),
        ({"choice": "1"}, "choice", "is '1'; expected 0 or 1"),
        ({"choice": True}, "choice", "is True; expected 0 or 1"),
        ({"choice": ...}, "choice", "is missing"),
    ],
)
def test_a_field_of_a_preference(refusal, change, field, reason):
    wrong = {name: value for name, value in (PAIR | change).items() if value is not ...}
    said = refusal(pairs=[PAIR, PAIR, wrong, PAIR])
    assert f"pairs.jsonl, line 3: '{field}' {reason}" in said
    assert "Correct or delete this line" in said


@pytest.mark.parametrize(
    "wrong, reason",
    [
        ({"input_txt": "x"}, "'input_text' is missing"),
        ({"input_text": 7}, "'input_text' is 7; expected a string"),
        ({"input_text": ""}, "'input_text' is empty; expected text"),
    ],
)
def test_a_field_of_a_prompt(refusal, wrong, reason):
    assert f"prompts.jsonl, line 2: {reason}" in refusal(prompts=[PROMPT, wrong])


def test_files_of_another_format(refusal):
    said = refusal(prompts=[{"question": "x", "answer": "y"}])
    assert "prompts.jsonl, line 1: the fields are 'question', 'answer'; expected one of: input_text" in said
    assert "Rename the fields" in said


def test_a_corrected_file_is_taken_in_the_same_workdir(refusal, tmp_path):
    """Nothing was begun, so another path is no contradiction: the next message is of the next mistake."""
    assert "no such file" in refusal(f"data.prompts={tmp_path}/nothing.jsonl")
    assert "'choice' is 2" in refusal(pairs=[PAIR | {"choice": 2}])


# Lengths


def test_lengths_that_the_context_cannot_hold(refusal):
    said = refusal("data.prompt_tokens=250", "data.completion_tokens=6")
    assert (
        f"config.data.prompt_tokens 250 + completion_tokens 6 + 1 is more than the model's context of {CONTEXT}"
        in said
    )
    assert "Traceback" not in said


LONG = "It was good and bad and long. " * 40


@pytest.mark.parametrize("file", ["pairs", "prompts"])
def test_a_prompt_longer_than_allowed_where_that_is_an_error(refusal, file):
    row = {"pairs": PAIR, "prompts": PROMPT}[file]
    said = refusal("data.prompt_overflow=error", **{file: [row, row | {"input_text": LONG}, row]})
    assert f"{file}.jsonl, line 2: The prompt 'It was good" in said
    assert "tokens, more than 16" in said and "config.data.prompt_tokens" in said


@pytest.mark.parametrize("file", ["pairs", "prompts"])
def test_prompts_that_are_all_too_long_where_those_are_dropped(refusal, file):
    row = {"pairs": PAIR, "prompts": PROMPT}[file] | {"input_text": LONG}
    said = refusal("data.prompt_overflow=drop", **{file: [row] * 3})
    assert "None of the 3 prompts has at most config.data.prompt_tokens 16 tokens" in said
    assert "Raise the former" in said


# Config


@pytest.mark.parametrize(
    "override, message",
    [
        ("nope=1", "--config.nope: no such key; keys here: "),
        ("ppo.kl_coef=1", "--config.ppo.kl_coef: no such key; did you mean ppo.kl_coeff?"),
        ("ppo.steps=many", "--config.ppo.steps: 'many' is not a int"),
        ("ppo.gamma=2.0", "config.ppo.gamma is 2.0; expected a number between 0 and 1"),
        (
            "data.prompt_overflow=cut",
            "config.data.prompt_overflow is 'cut'; expected one of truncate_left, error, drop",
        ),
        ("data.max_bad_records=1.5", "config.data.max_bad_records is 1.5; expected a number between 0 and 1"),
    ],
)
def test_keys_and_values_of_the_config(refusal, override, message):
    said = refusal(override)
    assert message in said and said.count("\n") == 1


def test_a_workdir_that_is_a_file(refusal, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(NotADirectoryError):  # the check for files inside, after the message was seen
        (tmp_path / "run" / "x").stat()
    said = refusal()
    assert f"--workdir: {tmp_path}/run" in said


# Checkpoints


def edit(directory, file="config.json", **fields):
    path = directory / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"model_type": "gpt2"},
            "model_type is 'gpt2'; only 'llama' is supported. This loader reads Llama-family",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}; only None is supported"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "rope scaling 'yarn' is not supported; supported:",
        ),
        ({"num_hidden_layers": None}, "num_hidden_layers is None; expected a positive whole number"),
        ({"hidden_size": "64"}, "hidden_size is '64'; expected a positive whole number"),
    ],
)
def test_settings_of_a_checkpoint(refusal, model, fields, message):
    edit(model, **fields)
    said = refusal(model=model)
    assert f"{model}/config.json: {message}" in said


def test_a_gpt2_checkpoint_as_it_is_published(refusal, model):
    """Its config has other names for everything; the message is about the architecture, not the first name."""
    gpt2 = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": 12,
        "n_embd": 768,
        "n_head": 12,
    }
    (model / "config.json").write_text(json.dumps(gpt2))
    assert "model_type is 'gpt2'; only 'llama' is supported" in refusal(model=model)


def test_a_config_that_is_not_json(refusal, model):
    (model / "config.json").write_text('{"model_type":\n "llama",')
    assert f"{model}/config.json, line 2: not JSON" in refusal(model=model)


def test_a_checkpoint_without_a_config_or_that_is_not_there(refusal, model):
    (model / "config.json").unlink()
    assert f"{model}/config.json does not exist" in refusal(model=model)
    said = refusal(model=f"{model}/nowhere")
    assert "nowhere is not a directory. Expected a directory with config.json" in said


def change_tensors(directory, change):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_wrong_tensors_are_listed_together(refusal, model):
    def change(tensors):
        tensors.pop("model.norm.weight")
        tensors["model.extra.weight"] = np.zeros(3, np.float32)
        tensors["model.layers.0.input_layernorm.weight"] = np.zeros(5, np.float32)

    change_tensors(model, change)
    said = refusal(model=model)
    assert str(model) in said
    assert "model.norm.weight: missing, expected [64]" in said
    assert "model.extra.weight" in said
    assert "model.layers.0.input_layernorm.weight: found [5], expected [64]" in said
    assert f"Check that {model}/config.json belongs to these files" in said


def test_a_tokenizer_larger_than_the_embedding(refusal, model):
    """The checkpoint is sound by itself; the tokenizer beside it belongs to another."""
    change_tensors(
        model, lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"][:100]})
    )
    edit(model, vocab_size=100)
    said = refusal(model=model)
    assert "The tokenizer has " in said and "the model's embedding only 100 rows" in said
    assert "Use the tokenizer that belongs to this checkpoint" in said


def test_a_checkpoint_without_a_tokenizer(refusal, model):
    (model / "tokenizer.json").unlink()
    said = refusal(model=model)
    assert f"No tokenizer at {model}" in said and "needs tokenizer.json" in said
