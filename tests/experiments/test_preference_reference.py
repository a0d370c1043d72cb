"""DPO from a config whose reference is kept from before, or follows the policy: same figures, resume, damage."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import run as run_command
from rlhf_jax.checkpoints import kept
from rlhf_jax.errors import Interrupted
from rlhf_jax.training import offline, stages
from rlhf_jax.training.metrics import read_metrics
from tests.experiments.small_runs import without_clock

STEPS = 4


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """(directory with pairs, the plain run's workdir)."""
    where = tmp_path_factory.mktemp("reference")
    write_pairs(where / "pairs.jsonl")
    return where, tune(where, "plain")


def write_pairs(path, **more):
    words = ("good", "bad", "fine", "poor", "a fine day", "it was bad", "great fun", "no")
    rows = [
        {"prompt": f"The film was {words[i % 8]} and", "chosen": words[i % 5], "rejected": words[-1 - i % 7]}
        | more
        for i in range(20)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def tune(where, name, *more, pairs="pairs.jsonl"):
    workdir = where / name
    if name != "plain":
        workdir.mkdir(exist_ok=True)
        shutil.copytree(where / "plain" / "base", workdir / "base", dirs_exist_ok=True)
    settings = (
        f"data.preferences={where / pairs}",
        "stages=('dpo',)",
        f"dpo.steps={STEPS}",
        "dpo.batch_size=8",
        "dpo.eval_every_steps=2",
        "logging.save_every_steps=1",
        *more,
    )
    arguments = [f"--config.{item}" for item in settings]
    run_command.command(["--config=configs/dpo.py:tiny", f"--workdir={workdir}", *arguments])
    return workdir


def rows(workdir):
    return [without_clock(row) for row in read_metrics(workdir / "metrics.jsonl")]


def assert_same(one, other, rtol=1e-6):
    assert len(rows(one)) == len(rows(other)) == STEPS
    for a, b in zip(rows(one), rows(other), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if key != "stage":
                np.testing.assert_allclose(a[key], b[key], rtol=rtol, atol=1e-6, err_msg=key)


def adapter(workdir):
    return load_file(workdir / "roles" / "dpo" / "adapter_model.safetensors")


def test_cached_log_probabilities_change_no_figure_and_are_made_once(started, monkeypatch):
    """Nor do batches that are only as long as their records ask for."""
    where, plain = started
    changed = ("dpo.reference=cached", "data.length_buckets=3")
    cached = tune(where, "cached", *changed)
    assert_same(plain, cached)
    file, saves = cached / "reference" / "dpo.npz", []
    real = kept.save
    monkeypatch.setattr(kept, "save", lambda *args: (saves.append(1), real(*args)))

    def again():
        for part in ("roles/dpo", "checkpoints"):
            shutil.rmtree(cached / part)
        (cached / "metrics.jsonl").unlink()
        tune(where, "cached", *changed)
        assert_same(plain, cached)
        return len(saves)

    assert again() == 0
    file.write_bytes(file.read_bytes()[:-100])
    assert again() == 1


@pytest.mark.parametrize("mix", [0.6, pytest.param(1.0, marks=pytest.mark.slow)])
def test_a_following_reference_is_resumed_to_the_bit(started, one_device, monkeypatch, mix):
    where, plain = started
    change = ("dpo.reference_sync_steps=2", f"dpo.reference_sync_mix={mix}")
    unbroken, real = tune(where, f"unbroken{mix}", *change), offline.train
    before, after = rows(plain), rows(unbroken)
    assert before[0]["grad_norm"] == pytest.approx(
        after[0]["grad_norm"], rel=1e-5
    )  # two programs: not to the bit
    assert before[2]["margin"] != after[2]["margin"]
    assert before[0]["margin"] == 0 and (after[2]["margin"] == 0) == (mix == 1)  # just copied

    def stopping(*args, **kwargs):
        step_fn = args[2]

        def step(state, position):
            kwargs["stop"].requested = position == 2  # after the reference has moved
            return step_fn(state, position)

        return real(args[0], args[1], step, **kwargs)

    monkeypatch.setattr(offline, "train", stopping)
    with pytest.raises(Interrupted):
        tune(where, f"broken{mix}", *change)
    monkeypatch.undo()
    broken = tune(where, f"broken{mix}", *change)
    assert rows(broken) == after
    one, other = adapter(unbroken), adapter(broken)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.parametrize("loss_type, read", [("sigmoid", True), ("hinge", False)])
def test_soft_labels_of_a_file_reach_the_records(started, one_device, monkeypatch, capsys, loss_type, read):
    where, _ = started
    write_pairs(where / "soft.jsonl", soft_label=0.7)
    with (where / "soft.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "A", "chosen": "b", "rejected": "c"}) + "\n")
    seen = []
    monkeypatch.setattr(stages, "offline", lambda run, name, train, test, *more: seen.extend([*train, *test]))
    tune(where, loss_type, f"dpo.loss_type={loss_type}", "dpo.label_smoothing=0.1", pairs="soft.jsonl")
    assert [record[2:] for record in seen] == [
        ({"soft_labels": x},) if read else () for x in [0.7] * 20 + [0.9]
    ]
    assert ("soft_label" in capsys.readouterr().out) != read
