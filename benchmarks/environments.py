"""The peers' own virtual environments, made from package names when they are first needed."""

import os
import subprocess
import sys

TORCH = ("torch==2.13.0", "transformers==5.23.0", "peft==0.21.2")
PACKAGES = {
    "trl": ("trl==1.16.0", *TORCH),
    "trl_ppo": ("trl==1.12.0", *TORCH),  # the last with PPO
    "tunix": ("google-tunix==0.1.7",),
}


def python_of(name: str, folder: str) -> str:
    """The interpreter of an environment; of ours, this one."""
    if name == "ours":
        return sys.executable
    path = os.path.join(folder, name)
    python = os.path.join(path, "bin", "python")
    made = os.path.join(path, ".made")
    if not os.path.exists(made):
        print(f"making the environment {path}: {' '.join(PACKAGES[name])}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", path], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES[name]], check=True)
        open(made, "w").close()
    return python


def versions(name: str, folder: str) -> str:
    """What the sides ran on, for the table."""
    wanted = {"ours": ("jax", "flax"), "tunix": ("google-tunix", "jax", "flax")}.get(
        name, ("trl", "transformers", "torch", "peft")
    )
    code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    done = subprocess.run(
        [python_of(name, folder), "-c", code, *wanted], check=True, capture_output=True, text=True
    )
    return ", ".join(f"{name} {found}" for name, found in zip(wanted, done.stdout.split(), strict=True))
