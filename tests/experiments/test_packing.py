"""SFT on packed rows from the command: prompts with completions beside plain text, resume, and wrong row lengths."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import cli
from experiments import run as run_command
from rlhf_jax.checkpoints import tiny
from rlhf_jax.errors import InputError, Interrupted
from rlhf_jax.training import offline
from rlhf_jax.training.metrics import read_metrics
from rlhf_jax.training.run import Run
from tests.experiments.small_runs import without_clock

TEXT = "The film was good and the food was not. "


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.make(str(tmp_path_factory.mktemp("base") / "model"), [TEXT, "good " * 9], vocab_size=300)


@pytest.fixture
def sft(base, tmp_path):
    """Runs the stage in a folder of this name on two files, one of which is a single long text."""
    examples = [{"prompt": "The film" + " was" * n, "completion": " good" * n} for n in range(1, 9)]
    for name, rows in (("text", [{"text": TEXT * 30}]), ("examples", examples * 4)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(name, *changes):
        fixed = (
            f"model.path={base}",
            f"data.sft={tmp_path}/text.jsonl,{tmp_path}/examples.jsonl",
            "sft.batch_size=8",
            "sft.steps=3",
            "logging.save_every_steps=1",
        )
        argv = ["--config=configs/sft.py:tiny", f"--workdir={tmp_path / name}"]
        run_command.command(argv + [f"--config.{change}" for change in (*fixed, *changes)])
        return tmp_path / name

    return run


def test_packed_sft_resumes_with_the_same_bits(sft, monkeypatch, capsys):
    """Stopped after each step but the last."""
    changes = ("sft.packed_tokens=48", "sft.train=lora")
    whole = sft("whole", *changes)
    assert "rows of 48 tokens, 9" in capsys.readouterr().out  # 9x.x% full
    real = offline.train

    def stopping(*args, **kwargs):
        def step(state, position):
            kwargs["stop"].requested = True
            return args[2](state, position)

        return real(args[0], args[1], step, **kwargs)

    monkeypatch.setattr(offline, "train", stopping)
    for _ in range(2):
        with pytest.raises(Interrupted, match="Run the same command"):
            sft("broken", *changes)
    monkeypatch.undo()
    broken = sft("broken", *changes)
    one, other = ([without_clock(row) for row in read_metrics(w / "metrics.jsonl")] for w in (whole, broken))
    assert one == other and [m["step"] for m in one] == [1, 2, 3]
    assert all(0.6 < m["fill_fraction"] <= 1 and m["skipped_updates"] == 0 for m in one)
    adapters = [load_file(w / "roles" / "sft" / "adapter_model.safetensors") for w in (whole, broken)]
    for name, tensor in adapters[0].items():
        np.testing.assert_array_equal(tensor, adapters[1][name], err_msg=name)


def test_texts_are_cut_to_rows_or_to_the_longest_completion_and_nothing_is_lost(base, tmp_path):
    config = cli.load_config("configs/sft.py:tiny", [f"model.path={base}"])
    run = Run(config, str(tmp_path), None, None)
    groups = [("The film", (" was good",)), ("", (TEXT * 30,))]
    for packed_tokens, longest in ((0, config.data.completion_tokens + 1), (48, 47)):
        (prompt, _), *pieces = offline.encode_groups(run, groups, packed_tokens)
        assert prompt == run.tokenizer.encode_prompt("The film")
        lengths = [len(completion) for _, (completion,) in pieces]
        assert set(lengths[:-1]) == {longest} and lengths[-1] <= longest
        learned = [i for _, (completion,) in pieces for i in completion]
        assert pieces[0][0] + learned == run.tokenizer.encode_text(TEXT * 30)


@pytest.mark.parametrize(
    "tokens, why", [(20, "16 . completion_tokens 12 . 1, 29 or more"), (9999, "context of")]
)
def test_rows_too_short_for_an_example_or_longer_than_the_context(sft, tokens, why):
    with pytest.raises(InputError, match=f"config.sft.packed_tokens is {tokens}.*{why}"):
        sft("refused", f"sft.packed_tokens={tokens}")
