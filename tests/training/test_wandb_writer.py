"""Weights & Biases, by a module that stands in for it: what is sent, and that no failure of it ends a run."""

import sys
import types

import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.training import wandb_writer


class FakeRun:
    def __init__(self, sent, fail=False):
        self.sent, self.fail = sent, fail

    def log(self, values, step):
        if self.fail:
            raise OSError("no network")
        self.sent.append((step, values))

    def finish(self):
        self.sent.append("finished")


@pytest.fixture
def fake(monkeypatch):
    module = types.ModuleType("wandb")
    module.asked, module.sent, module.fail = [], [], False

    def init(**settings):
        module.asked.append(settings)
        return FakeRun(module.sent, module.fail)

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_metrics_carry_their_stage_and_a_resumed_run_goes_on_in_the_same_one(fake, tmp_path):
    for step in (1, 2):
        writer = wandb_writer.WandbWriter("project", str(tmp_path / "mine"), "ppo", pytest.fail)
        writer.write(step, {"kl": 0.5})
        writer.close()
    assert fake.sent == [(1, {"ppo/kl": 0.5}), "finished", (2, {"ppo/kl": 0.5}), "finished"]
    assert fake.asked[0] == fake.asked[1] and fake.asked[0]["resume"] == "allow"
    assert fake.asked[0]["name"] == "mine/ppo"
    wandb_writer.WandbWriter("project", str(tmp_path / "other"), "ppo", pytest.fail)
    assert fake.asked[2]["id"] != fake.asked[0]["id"]


def test_a_failure_is_told_once_and_ends_nothing(fake, tmp_path):
    fake.fail, said = True, []
    writer = wandb_writer.WandbWriter("project", str(tmp_path), "ppo", said.append)
    for step in range(3):
        writer.write(step, {"kl": 0.5})
    writer.close()
    assert said == ["wandb: OSError: no network; training goes on without it."]


def test_a_project_without_the_package_is_refused(monkeypatch):
    monkeypatch.setattr(wandb_writer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"rlhf_jax\[wandb\]"):
        wandb_writer.check_installed()
