"""The files that a run writes while it trains: whole JSON lines, cut on resume, tags that TensorBoard
finds."""

import glob
import json
import os
import struct
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import StorageError
from rlhf_jax.training import metrics


def read_events(folder):
    """Event protos of all files in a folder: each record is length, its checksum, data, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted(glob.glob(os.path.join(folder, "*tfevents*"))):
        with open(path, "rb") as file:
            data = file.read()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return events


def scalars(folder):
    return {(event.step, v.tag): v.simple_value for event in read_events(folder) for v in event.summary.value}


def test_line_holds_stage_step_time_and_plain_numbers(tmp_path):
    with metrics.MetricsWriter(tmp_path, "ppo") as writer:
        writer.write(jnp.int32(3), {"reward": jnp.float32(0.1), "kl": np.float64(2.5), "tokens": 7})
        [line] = (tmp_path / "metrics.jsonl").read_text().splitlines()  # flushed before close
    record = json.loads(line)
    assert record.pop("time") > 1.6e9
    assert record == {"stage": "ppo", "step": 3, "reward": 0.1, "kl": 2.5, "tokens": 7}
    assert '"reward": 0.1,' in line  # not 0.10000000149011612


def test_float32_reads_back_to_the_same_bits(tmp_path):
    values = np.random.default_rng(0).normal(size=50).astype(np.float32) * np.float32(10.0) ** np.arange(
        -25, 25
    )
    values = values.astype(np.float32)
    with metrics.MetricsWriter(tmp_path, "sft") as writer:
        for i, value in enumerate(values):
            writer.write(i, {"loss": value})
    read = [row["loss"] for row in metrics.read_metrics(tmp_path / "metrics.jsonl")]
    np.testing.assert_array_equal(np.array(read, np.float32), values)


def test_nan_and_infinity_become_null_and_are_named(tmp_path):
    with metrics.MetricsWriter(tmp_path, "ppo") as writer:
        writer.write(1, {"loss": jnp.nan, "kl": jnp.float32(-jnp.inf), "reward": 1.0})
    refuse = lambda name: pytest.fail(f"{name} is not JSON")
    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (record["loss"], record["kl"], record["reward"]) == (None, None, 1.0)
    assert record["nonfinite"] == ["loss", "kl"]


def test_reserved_names_are_refused(tmp_path):
    with metrics.MetricsWriter(tmp_path, "ppo") as writer, pytest.raises(ValueError, match="step"):
        writer.write(1, {"step": 2.0})


def test_event_files_hold_stage_tags_and_bare_aliases(tmp_path):
    aliases = {"loss": "rank_loss", "learning_rate": "learning_rate", "absent": "never"}
    with metrics.MetricsWriter(tmp_path, "reward_model", aliases) as writer:
        writer.write(10, {"loss": 0.5, "learning_rate": jnp.float32(1e-4), "accuracy": 0.75})
        writer.write(20, {"loss": 0.25})
    found = scalars(tmp_path / "tensorboard" / "reward_model")
    assert {tag for _, tag in found} == {
        "reward_model/loss",
        "reward_model/learning_rate",
        "reward_model/accuracy",
        "rank_loss",
        "learning_rate",
    }
    assert found[20, "rank_loss"] == found[20, "reward_model/loss"] == 0.25
    assert found[10, "learning_rate"] == pytest.approx(1e-4)


def test_resumed_event_file_hides_later_steps_and_keeps_the_first_file(tmp_path):
    folder = tmp_path / "tensorboard" / "ppo"
    for start in (0, 40):
        with metrics.MetricsWriter(tmp_path, "ppo", start_step=start) as writer:
            writer.write(start + 1, {"loss": 1.0})
    sessions = [event for event in read_events(folder) if event.HasField("session_log")]
    assert [(event.step, event.session_log.status) for event in sessions] == [(41, 1)]  # 1 is START
    assert {step for step, _ in scalars(folder)} == {1, 41}


class FullDisk:
    """Takes `room` bytes and then fails, as a file on a full disk does."""

    def __init__(self, room=0):
        self.room, self.data = room, b""

    def write(self, data):
        if not self.room:
            raise OSError(28, "No space left on device")
        taken = data[: self.room]
        self.room -= len(taken)
        self.data += taken
        return len(taken)

    def flush(self):
        raise OSError(28, "No space left on device")

    close = flush


def test_full_disk_warns_once_and_the_run_goes_on(tmp_path):
    said = []
    writer = metrics.MetricsWriter(tmp_path, "ppo", warn=said.append)
    writer._lines._file.close()
    writer._lines._file = FullDisk()
    writer._events._writer._py_recordio_writer._writer = FullDisk()
    for step in range(30):  # more than any queue holds
        writer.write(step, {"loss": 1.0})
    writer.close()
    assert len(said) == 1
    assert "No space left" in said[0]
    assert "metrics.jsonl" in said[0]


def test_logging_resumes_after_half_a_line_was_written(tmp_path):
    said = []
    writer = metrics.MetricsWriter(tmp_path, "ppo", warn=said.append)
    disk = FullDisk(room=20)
    real, writer._lines._file = writer._lines._file, disk
    writer.write(1, {"loss": 1.0})
    real.write(disk.data)
    writer._lines._file = real
    writer.write(2, {"loss": 2.0})
    writer.close()
    assert [row["step"] for row in metrics.read_metrics(tmp_path / "metrics.jsonl")] == [2]
    assert len(said) == 1


def test_unwritable_workdir_only_warns(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with metrics.MetricsWriter(tmp_path / "file" / "run", "ppo") as writer:
            writer.write(1, {"loss": 1.0})
    assert len(caught) == 1
    assert caught[0].category is RuntimeWarning


def test_truncate_drops_later_steps_of_the_stage_later_stages_and_torn_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        b'{"stage":"reward_model", "step": 90}\n',  # odd spacing: bytes are kept
        b'{"stage": "ppo", "step": 1}\n',
        b'{"stage": "ppo", "ste\n',
        b'{"stage": "ppo", "step": 2}\n',
        b'{"stage": "ppo", "step": 3}\n',
        b'{"stage": "final", "step": 1}\n',
        b'{"stage": "ppo", "step": 1}',  # whole JSON, but no newline: the end of the line may be missing
    ]
    path.write_bytes(b"".join(lines))
    assert metrics.truncate_after(path, "ppo", 2, later_stages=("final",)) == 4
    assert path.read_bytes() == lines[0] + lines[1] + lines[3]
    assert metrics.truncate_after(path, "ppo", 2, later_stages=("final",)) == 0
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_truncate_before_the_first_step_and_of_missing_file(tmp_path):
    path = str(tmp_path / "metrics.jsonl")
    assert metrics.truncate_after(path, "ppo", 5) == 0
    assert not os.path.exists(path)
    with metrics.MetricsWriter(tmp_path, "ppo") as writer:
        writer.write(0, {"loss": 1.0})
    assert metrics.truncate_after(path, "ppo", -1) == 1
    assert metrics.read_metrics(path) == []


def test_failed_truncation_keeps_the_file_and_says_what_to_do(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "ppo", "step": 9}\n')

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics.os, "fsync", fail)
    with pytest.raises(StorageError, match="Free space"):
        metrics.truncate_after(path, "ppo", 3)
    assert path.read_text() == '{"stage": "ppo", "step": 9}\n'


def test_completions_round_trip_and_are_cut_without_a_stage_field(tmp_path):
    rows = [
        {"prompt": "a\u2028b", "completion": "שלום 🎈", "reward": jnp.float32(1.5), "kl": float("nan")},
        {"prompt": "half an emoji \ud83c", "completion": "", "reward": 0, "kl": 1, "gold_reward": -0.5},
    ]
    with metrics.CompletionsLog(tmp_path, "ppo") as log:
        log.write(1, rows)
        log.write(2, rows[:1])
    path = tmp_path / "completions" / "ppo.jsonl"
    read = metrics.read_metrics(path)
    assert [row["step"] for row in read] == [1, 1, 2]
    assert read[0]["prompt"] == rows[0]["prompt"]
    assert read[0]["completion"] == rows[0]["completion"]
    assert (read[0]["reward"], read[0]["kl"], read[0]["nonfinite"]) == (1.5, None, ["kl"])
    assert read[1]["prompt"] == rows[1]["prompt"]
    assert "שלום" in path.read_text(encoding="utf-8")  # readable with less
    assert metrics.truncate_after(path, "ppo", 1) == 1
    assert len(metrics.read_metrics(path)) == 2


def test_a_killed_line_is_not_glued_to_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"stage": "ppo", "step": 1}\n{"stage": "p')
    with metrics.MetricsWriter(tmp_path, "ppo") as writer:
        writer.write(2, {"loss": 1.0})
    assert [row["step"] for row in metrics.read_metrics(path)] == [1, 2]
