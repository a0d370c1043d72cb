"""Runs of the tiny size cut down to seconds, and how their results are compared."""

import functools
import os
import shutil

import jax
import numpy as np
from ml_collections.config_dict import ConfigDict

from experiments import cli, pipeline
from experiments import run as run_command
from rlhf_jax.checkpoints.store import CheckpointStore
from rlhf_jax.parallel import mesh
from rlhf_jax.training import online
from rlhf_jax.training.metrics import read_metrics

SMALL = [
    "sft.steps=12",
    "preferences.num_pairs=64",
    "preferences.batch_size=32",
    "reward_model.steps=6",
    "gate.on_refusal=warn",  # six steps teach nothing
    "gate.preview_prompts=8",
    "gate.preview_completions=4",
    "ppo.steps=4",
    "ppo.batch_size=16",
    "ppo.rollout_epochs=2",
    "ppo.eval_every_steps=4",
    "quark.reference_steps=1",
    "data.held_out_prompts=16",
    "data.held_out_pairs=32",
    "evaluation.batch_size=16",
    "evaluation.num_completions=2",
    "logging.save_every_steps=2",
    "logging.samples_every_steps=2",
]


def overrides(config, *more):
    """Flags of the config with what SMALL has for its sections, and `more`."""
    spec = f"configs/{config}.py:tiny"
    sections = cli.load_config(spec, [])
    fitting = [item for item in SMALL if item.partition(".")[0] in sections]
    return [f"--config={spec}", *(f"--config.{item}" for item in (*fitting, *more))]


def run_small(workdir, *more, config="pipeline"):
    run_command.command([*overrides(config, *more), f"--workdir={workdir}"])


def begun(finished, workdir):
    """A workdir with what a finished run has made before it tunes a policy."""
    for part in ("base", "roles/sft", "roles/reward_model"):
        shutil.copytree(finished / part, workdir / part)
    for part in ("preferences.jsonl", "preferences_held_out.jsonl", "gate.json"):
        shutil.copy(finished / part, workdir)
    return workdir


def on_one_device(patch):
    """Runs from here on use the first device alone, for which programs compile in half the time."""
    alone = functools.partial(mesh.make_mesh, 1, 1, 1, jax.devices()[:1])
    patch.setattr(mesh, "make_mesh", lambda **_: alone())


class Placements:
    """Notes, whenever a state is saved, the large arrays there are that lie whole on every device, or on one alone."""

    LARGE = 4096  # values; those of the tiny size have 3 to 260 thousand, its batches up to 3

    def __init__(self, patch):
        self.before, self.whole, self.seen = jax.live_arrays(), set(), 0
        held, save = {id(x) for x in self.before}, CheckpointStore.save

        def noting(store, position, state, *more):
            for x in jax.live_arrays():
                if id(x) in held or x.size < self.LARGE:
                    continue
                self.seen += 1
                if x.is_fully_replicated:
                    self.whole.add((str(x.dtype), x.shape))
            save(store, position, state, *more)

        patch.setattr(CheckpointStore, "save", noting)


class Reads:
    """Notes which keys of which section the code asks for while it is active; check_config, which reads all, aside."""

    def __init__(self, patch):
        self.keys, self.noting = set(), True
        get, to_dict, check = ConfigDict.__getitem__, ConfigDict.to_dict, pipeline.check_config

        def noted_get(section, key):
            if self.noting:
                self.keys.add((frozenset(section.keys()), key))
            return get(section, key)

        def noted_to_dict(section, *args, **kwargs):
            whole = "stages" in section.keys()  # written to config.json
            if self.noting and not whole:
                self.keys |= {(frozenset(section.keys()), key) for key in section.keys()}
            return self.quietly(to_dict, section, *args, **kwargs)

        patch.setattr(ConfigDict, "__getitem__", noted_get)
        patch.setattr(ConfigDict, "to_dict", noted_to_dict)
        patch.setattr(pipeline, "check_config", lambda *args: self.quietly(check, *args))
        patch.setattr(cli, "override", functools.partial(self.quietly, cli.override))

    def quietly(self, function, *args, **kwargs):
        before, self.noting = self.noting, False
        try:
            return function(*args, **kwargs)
        finally:
            self.noting = before

    def unread(self, section, where="config"):
        for key, value in section.items():
            if hasattr(value, "items"):
                yield from self.unread(value, f"{where}.{key}")
            elif (frozenset(section.keys()), key) not in self.keys:
                yield f"{where}.{key}"


def role_tensors(workdir, stage):
    from safetensors.numpy import load_file

    return load_file(os.path.join(workdir, "roles", stage, "adapter_model.safetensors"))


def assert_same_policy(one, other, stage="ppo"):
    a, b = role_tensors(one, stage), role_tensors(other, stage)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def copy_without(finished, workdir, *gone):
    shutil.copytree(finished, workdir)
    for name in gone:
        path = workdir / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return workdir


def stop_after_each_step(monkeypatch, module=online):
    """Every run of an online stage (or of one of `module`) is stopped by a signal during its first step."""
    real = module.train

    def stopping(*args, **kwargs):
        step_fn = args[2]

        def step(state, position):
            kwargs["stop"].requested = True
            return step_fn(state, position)

        return real(args[0], args[1], step, **kwargs)

    monkeypatch.setattr(module, "train", stopping)


def timeless(workdir, stage):
    """The metrics of a stage without what depends on the clock."""
    rows = [m for m in read_metrics(workdir / "metrics.jsonl") if m["stage"] == stage]
    return [without_clock(m) for m in rows]


def without_clock(row):
    """A row of metrics.jsonl without what differs from one run to the next."""
    return {name: v for name, v in row.items() if name not in CLOCK and not name.startswith("time/")}


CLOCK = ("time", "step_seconds", "tokens_per_second", "mfu")
