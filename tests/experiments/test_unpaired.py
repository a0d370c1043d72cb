"""KTO from a file of labels, and its warning about imbalance."""

import json
import types

import pytest
from ml_collections.config_dict import ConfigDict

from experiments import run as run_command
from rlhf_jax.data.formats import Labelled
from rlhf_jax.training import stages
from rlhf_jax.training.metrics import read_metrics
from tests.experiments.small_runs import begun

WORDS = ("good", "bad", "fine", "poor", "a fine day", "it was bad", "great fun", "no")


def test_kto_from_labels(finished, one_device, tmp_path, capsys):
    rows = [
        {"prompt": f"The film was {WORDS[i % 8]} and", "completion": WORDS[i % 7], "label": i % 3 == 0}
        for i in range(30)
    ]
    data, workdir = tmp_path / "labels.jsonl", begun(finished, tmp_path / "run")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = (f"data.preferences={data}", "stages=('kto',)", "kto.steps=3", "kto.batch_size=8",
                "kto.eval_every_steps=3", "kto.reference=cached")  # fmt: skip
    run_command.command(
        ["--config=configs/kto.py:tiny", f"--workdir={workdir}", *(f"--config.{item}" for item in settings)]
    )
    found = [m for m in read_metrics(workdir / "metrics.jsonl") if m["stage"] == "kto"]
    # 24 of the 30 are trained on; only what is logged is there, and each batch has its own share of labels.
    assert all(0 < m["desirable_fraction"] < 1 for m in found)
    assert 0 <= found[-1]["eval/accuracy"] <= 1 and found[-1]["eval/desirable_fraction"] == pytest.approx(
        2 / 6
    )
    assert found[0]["margin"] == pytest.approx(0, abs=1e-4) and found[-1]["grad_norm"] > 0
    said = capsys.readouterr()
    assert (said.out + said.err).count("30 rows of labelled completions (prompt, completion, label)") == 1
    assert "8 completions accepted, 16 not" in said.out + said.err
    assert "between 2.00 and 2.67, now 1" in said.out + said.err


@pytest.mark.parametrize(
    "accepted, others, weights, warning",
    [
        (8, 16, (2.5, 1.0), None),  # 2.5 * 8 / 16 = 1.25
        (8, 16, (1.0, 0.5), None),
        (8, 16, (1.0, 1.0), "weigh 0.50 times as much as the others; expected 1 to 1.33"),
        (16, 8, (1.0, 1.0), "between 0.50 and 0.67, now 1"),
        (5, 0, (1.0, 1.0), "all labels are the same"),
    ],
)
def test_imbalance_is_told(accepted, others, weights, warning):
    said = []
    console = types.SimpleNamespace(note=lambda text: None, warn=said.append)
    section = dict(zip(("desirable_weight", "undesirable_weight"), weights, strict=True))
    run = types.SimpleNamespace(config=ConfigDict({"kto": section}), console=console)
    records = [Labelled("p", "c", i < accepted) for i in range(accepted + others)]
    stages.tell_imbalance(run, "kto", records)
    assert not said if warning is None else warning in said[0]
