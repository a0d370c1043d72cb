"""The metrics of a run on Weights & Biases, if the config names a project. One W&B run a workdir, resumed with it.

The package wandb is an extra: pip install 'rlhf_jax[wandb]'."""

import hashlib
import importlib.util
import os

from rlhf_jax.errors import InputError


def check_installed() -> None:
    """Raises: InputError if there is no wandb."""
    if importlib.util.find_spec("wandb") is None:
        raise InputError(
            "config.logging.wandb_project is given, but the package wandb is not installed: "
            "pip install 'rlhf_jax[wandb]', or leave the key empty."
        )


class WandbWriter:
    """Same calls as the other writers; a failure is told once and costs nothing but the plot."""

    def __init__(self, project: str, workdir: str, stage: str, warn):
        import wandb

        self._stage, self._warn, self._run = stage, warn, None
        path = os.path.abspath(workdir)
        try:
            self._run = wandb.init(
                project=project,
                dir=path,
                group=os.path.basename(path),
                name=f"{os.path.basename(path)}/{stage}",
                id=hashlib.sha256(f"{path}/{stage}".encode()).hexdigest()[:16],
                resume="allow",
            )
        except Exception as error:  # of many kinds: no network, no login, a full disk
            self._give_up(error)

    def write(self, step: int, metrics: dict) -> None:
        if self._run is None:
            return
        try:
            self._run.log({f"{self._stage}/{name}": float(x) for name, x in metrics.items()}, step=step)
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()

    def _give_up(self, error) -> None:
        self._warn(f"wandb: {type(error).__name__}: {error}; training goes on without it.")
        self._run = None
