"""The package and its bounds. jax and flax move together: never raise one bound without the other."""

from setuptools import find_packages, setup

setup(
    name="rlhf_jax",
    version="0.1.0",
    description="RLHF in JAX: reward models, PPO and its relatives, on one frozen base with LoRA roles.",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["rlhf_jax*", "experiments*", "configs*"]),
    package_data={"rlhf_jax.data": ["*.jsonl"], "experiments.tpu": ["worker.sh", "jobset.yaml"]},
    install_requires=[
        "jax>=0.10.2,<0.13",  # Python 3.11 resolves to 0.10, 3.12 to 0.12
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "chex>=0.1.92",
        "ml-collections>=1.1",
        "absl-py>=2.3",
        "transformers>=5,<6",  # tokenizers, config files and chat templates; no torch
        "jinja2>=3.1",  # chat templates need it and transformers does not ask for it
        "tokenizers>=0.22",
        "safetensors>=0.8",
        "datasets>=5,<6",
        "tensorflow-datasets>=4.9.10",
        "grain>=0.2.18",
        "gguf>=0.19",
        "rich>=14",
        "matplotlib>=3.9",
        "tensorboardX>=2.6.4",
        "vaderSentiment>=3.3.2",
        "importlib_resources",  # tensorflow-datasets prepares data with it and does not ask for it
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10.2,<0.13"],
        "plan": ["libtpu>=0.0.42,<0.1"],  # compile for a TPU slice on any machine
        "math": ["math-verify>=0.9"],
        "wandb": ["wandb"],
        "test": ["pytest>=8", "pytest-xdist>=3.6", "ruff>=0.12"],
    },
)
