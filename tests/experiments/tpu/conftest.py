"""A PATH on which the only gcloud is a fake one, and a clock that only counts."""

import pathlib
import shutil
import sys

import pytest

from experiments.tpu import __main__ as tpu
from experiments.tpu import source

FLAGS = [
    "--name=run1", "--zone=us-west4-a", "--type=v5litepod-16", "--bucket=b", "--workdir=runs/1", "--allow_dirty",
]  # fmt: skip
RUN = ["--", "--config=configs/ppo.py:llama2_7b"]


class Fake:
    """gcloud's place, and what came of a command."""

    def __init__(self, directory: pathlib.Path):
        self.directory, self.waited = directory, []

    def write(self, name: str, text: str = ""):
        (self.directory / name).write_text(text)

    def run(self, action: str, events: str, *more: str):
        self.write("events", events)
        tpu.command([action, *FLAGS, *more, *RUN])

    def calls(self) -> list[str]:
        """What each call did, in a word; looks at the slice are left out."""
        path = self.directory / "calls"
        told = []
        for line in path.read_text().splitlines() if path.exists() else []:
            words = line.split()
            if "describe" in words or " poll" in line or " log " in line:
                continue
            remote = line.rpartition("rlhf_jax_worker.sh ")[2].split() if words[3] == "ssh" else []
            told.append(remote[0].rstrip(";") if remote else words[3])
        return told


@pytest.fixture
def fake(tmp_path, monkeypatch):
    directory = tmp_path / "bin"
    directory.mkdir()
    script = (
        pathlib.Path(__file__).with_name("fake_gcloud.py").read_text().replace("PYTHON", sys.executable, 1)
    )
    (directory / "gcloud").write_text(script)
    (directory / "gcloud").chmod(0o755)
    (directory / "git").symlink_to(shutil.which("git"))
    monkeypatch.setenv("PATH", str(directory))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(source.Bundle, "pack", lambda self, allow_dirty: "abc")
    made = Fake(directory)
    monkeypatch.setattr(tpu, "sleep", made.waited.append)
    return made
