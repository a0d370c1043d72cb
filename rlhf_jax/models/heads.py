"""Heads on hidden states: a reward or a value a token, or several numbers (classes, aspects).

Knows the width of the decoder and nothing else."""

import functools

import jax
import jax.numpy as jnp


def init_reward(rng, width: int, outputs: int | None = None) -> dict:
    """kernel [D], or [D, K] for K outputs, ~ N(0, 1/sqrt(D+1)), bias 0: OpenAI's code (the paper's 1/(D+1) is a
    misprint of it)."""
    more = () if outputs is None else (outputs,)
    return {
        "kernel": jax.random.normal(rng, (width, *more), jnp.float32) * (width + 1) ** -0.5,
        "bias": jnp.zeros(more),
    }


def init_value(width: int) -> dict:
    """All zero, so that the first values are 0 (Ziegler et al. 2019)."""
    return {"kernel": jnp.zeros((width,), jnp.float32), "bias": jnp.zeros(())}


def apply(head: dict, hidden) -> jax.Array:
    """[..., D] -> [...] float32, reward units; with a kernel [D, K] -> [..., K]."""
    exact = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)  # a TPU would round the kernel
    if head["kernel"].ndim == 1:
        return exact("...d,d->...", hidden.astype(jnp.float32), head["kernel"]) + head["bias"]
    found = exact("...d,dk->...k", hidden.astype(jnp.float32), head["kernel"])
    return found + jnp.broadcast_to(head["bias"], found.shape)


def normalised(head: dict, mean, std) -> dict:
    """The head whose output is (old output - mean) / std."""
    return {"kernel": head["kernel"] / std, "bias": (head["bias"] - mean) / std}


def logical_axes(head: dict) -> dict:
    """Of a head, or of any other few arrays beside a decoder: nothing is split."""
    return {name: ("norm",) + (None,) * (x.ndim - 1) if x.ndim else () for name, x in head.items()}
