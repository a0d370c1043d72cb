"""RLHF in JAX: reward models, PPO and its relatives, on one frozen base with LoRA roles."""

__version__ = "0.1.0"
