"""Scalar heads on hidden states: a reward or a value a token.

Knows the width of the decoder and nothing else."""

import jax
import jax.numpy as jnp


def init_reward(rng, width: int) -> dict:
    """kernel [D] ~ N(0, 1/sqrt(D+1)), bias 0: OpenAI's code (the paper's 1/(D+1) is a misprint of it)."""
    return {
        "kernel": jax.random.normal(rng, (width,), jnp.float32) * (width + 1) ** -0.5,
        "bias": jnp.zeros(()),
    }


def init_value(width: int) -> dict:
    """All zero, so that the first values are 0 (Ziegler et al. 2019)."""
    return {"kernel": jnp.zeros((width,), jnp.float32), "bias": jnp.zeros(())}


def apply(head: dict, hidden) -> jax.Array:
    """[..., D] -> [...] float32, reward units."""
    return jnp.einsum("...d,d->...", hidden.astype(jnp.float32), head["kernel"]) + head["bias"]


def normalised(head: dict, mean, std) -> dict:
    """The head whose output is (old output - mean) / std."""
    return {"kernel": head["kernel"] / std, "bias": (head["bias"] - mean) / std}


def logical_axes(head: dict) -> dict:
    return {"kernel": ("norm",), "bias": ()}
