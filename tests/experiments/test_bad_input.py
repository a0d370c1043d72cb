"""Bad input at the command line: status 2 and one message that says what is wrong, where, and what to do."""

import json

import pytest

from experiments import cli
from experiments import run as run_command
from rlhf_jax.checkpoints import tiny

PAIR = {"input_text": "The soup", "candidate_0": " is good", "candidate_1": " is cold", "choice": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    return tiny.make(str(path), ["the soup is good", "the soup is cold"], seed=0)


@pytest.fixture
def refused(model, tmp_path, capsys):
    """Runs a command that must be refused; returns its one message."""

    def refused(*overrides, config="configs/reward_model.py:tiny"):
        flags = [f"--config={config}", f"--workdir={tmp_path / 'run'}", f"--config.model.path={model}"]
        with pytest.raises(SystemExit) as ended:
            cli.main(run_command.command, [*flags, *(f"--config.{item}" for item in overrides)])
        assert ended.value.code == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and "Traceback" not in message
        assert not (tmp_path / "run" / "checkpoints").exists()
        return message

    return refused


def lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def preferences(path):
    return ("stages=('reward_model',)", f"data.preferences={path}")


def test_missing_file(refused, tmp_path):
    message = refused(*preferences(tmp_path / "absent.jsonl"))
    assert "absent.jsonl: no such file" in message


def test_glob_without_a_match(refused, tmp_path):
    assert "absent-*.jsonl" in refused(*preferences(tmp_path / "absent-*.jsonl"))


def test_malformed_json(refused, tmp_path):
    message = refused(*preferences(lines(tmp_path / "bad.jsonl", PAIR, '{"input_text": "a",')))
    assert "bad.jsonl, line 2" in message and "JSON" in message


@pytest.mark.parametrize(
    "change, said",
    [
        ({"candidate_1": None}, ("candidate_1",)),
        ({"candidate_0": 3}, ("candidate_0", "3")),
        ({"choice": 7}, ("choice", "7", "0 or 1")),
        ({"choice": "0"}, ("choice",)),
        ({"input_text": ""}, ("input_text", "empty")),
    ],
)
def test_wrong_fields(refused, tmp_path, change, said):
    message = refused(*preferences(lines(tmp_path / "bad.jsonl", PAIR, PAIR, PAIR | change)))
    assert "bad.jsonl, line 3" in message
    assert all(word in message for word in said), message


def test_missing_field(refused, tmp_path):
    row = {name: value for name, value in PAIR.items() if name != "choice"}
    message = refused(*preferences(lines(tmp_path / "bad.jsonl", row)))
    assert "bad.jsonl, line 1" in message and "choice" in message


def test_prompt_longer_than_allowed(refused, tmp_path):
    path = lines(tmp_path / "long.jsonl", PAIR, PAIR | {"input_text": "soup " * 500})
    message = refused(*preferences(path), "data.prompt_overflow=error", "data.prompt_tokens=16")
    assert "16" in message and "long.jsonl, line 2" in message


def test_lengths_beyond_the_context(refused, tmp_path):
    message = refused(*preferences(lines(tmp_path / "p.jsonl", PAIR)), "data.prompt_tokens=4000")
    assert "4000" in message and "256" in message and "prompt_tokens" in message


def test_unknown_key_and_wrong_type(refused):
    assert "did you mean" in refused("reward_model.stepz=3")
    assert "reward_model.steps" in refused("reward_model.steps=many")


def edited(model, tmp_path, **fields):
    import shutil

    copy = tmp_path / "edited"
    shutil.copytree(model, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | fields))
    return copy


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, ("gpt2", "config.json")),
        ({"hidden_act": "gelu"}, ("hidden_act", "gelu")),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, ("yarn",)),
        ({"num_hidden_layers": 3}, ("model.layers.2", "missing")),
        ({"num_hidden_layers": 1}, ("model.layers.1",)),
        ({"intermediate_size": 96}, ("gate_proj", "96")),
    ],
)
def test_checkpoints_that_are_something_else(refused, model, tmp_path, fields, said):
    path = lines(tmp_path / "p.jsonl", *[PAIR] * 8)
    message = refused(*preferences(path), f"model.path={edited(model, tmp_path, **fields)}")
    assert all(word in message for word in said), message


def test_tokenizer_larger_than_the_embedding(refused, model, tmp_path):
    from transformers import AutoTokenizer

    copy = edited(model, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.add_tokens([f"<extra {i}>" for i in range(9)])
    tokenizer.save_pretrained(copy)
    message = refused(*preferences(lines(tmp_path / "p.jsonl", *[PAIR] * 8)), f"model.path={copy}")
    assert "tokenizer" in message and "embedding" in message


def test_directory_without_a_model(refused, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    message = refused(*preferences(lines(tmp_path / "p.jsonl", *[PAIR] * 8)), f"model.path={empty}")
    assert "config.json" in message and "empty" in message


def test_more_layers_than_there_are(refused, tmp_path):
    message = refused(*preferences(lines(tmp_path / "p.jsonl", *[PAIR] * 8)), "reward_model.layers=9")
    assert "reward_model.layers is 9" in message
