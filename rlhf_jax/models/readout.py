"""From what a reward head puts out to one score a completion, and from the scores of several models to one.

A Readout says how and is saved with its role, so that whoever scores needs to know nothing else. Knows arrays; no
decoder, no loss. Gate: Wang et al. 2024 (ArmoRM), arXiv:2406.12845. Ensembles: Coste et al. 2023, arXiv:2310.02743."""

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax.errors import InputError

TOKENS = -1  # of Readout.verbosity: the completion's length itself
ENSEMBLES = ("mean_std", "mean_variance", "worst")


@dataclasses.dataclass(frozen=True)
class Readout:
    """How a score is read from outputs [..., K].

    name: scalar (no K: the output itself); logit, probability (of class 1 of 2); mean (of aspects); gated; or, of
      several models' scores, one of ENSEMBLES.
    """

    name: str = "scalar"
    temperature: float = 10.0  # gated: of the softmax over aspects
    verbosity: int | None = None  # gated: the output that measures length, TOKENS, or None
    spread_coeff: float = 1.0  # ensembles but worst: what a unit of disagreement costs


def score(readout: Readout, outputs, head: dict, gate: dict | None, prompt_state, tokens) -> jax.Array:
    """[B, G] float32.

    Args:
      outputs: [B, G, K]. head: its "penalty" [K], if gated. prompt_state: [B, D], at the prompt's last token.
      tokens: [B, G], of each completion.
    """
    if readout.name in ("logit", "probability"):
        logit = outputs[..., 1] - outputs[..., 0]
        return logit if readout.name == "logit" else jax.nn.sigmoid(logit)
    if readout.name == "mean":
        return outputs.mean(-1)
    assert readout.name == "gated", readout
    rewards = outputs
    if readout.verbosity is not None:
        rewards = outputs - verbosity(readout, outputs, tokens)[..., None] * head["penalty"][None, None]
    weights = gate_weights(gate, prompt_state, readout.temperature)
    return jnp.exp(gate["log_scale"]) * jnp.einsum("bgk,bk->bg", rewards, weights)


def verbosity(readout: Readout, outputs, tokens):
    """[B, G]: what aspects are freed of, the output that measures it or the number of tokens."""
    return tokens.astype(jnp.float32) if readout.verbosity == TOKENS else outputs[..., readout.verbosity]


def init_gate(rng, width: int, outputs: int, hidden: int, layers: int) -> dict:
    """An MLP of `layers` hidden layers of that width, from a prompt's state [D] to K, and the log of what its sum of
    rewards is multiplied by."""
    sizes = [width, *[hidden] * layers, outputs]
    gate = {"log_scale": jnp.zeros(())}
    for n, (inputs, units) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        key = jax.random.fold_in(rng, n)
        gate[f"kernel_{n}"] = jax.random.normal(key, (inputs, units), jnp.float32) * (2 / inputs) ** 0.5
        gate[f"bias_{n}"] = jnp.zeros((units,))
    return gate


def gate_weights(gate: dict, prompt_state, temperature: float) -> jax.Array:
    """[B, D] -> [B, K] float32, positive, each row of sum 1: what an aspect is worth for this prompt."""
    x, last = prompt_state.astype(jnp.float32), (len(gate) - 1) // 2 - 1
    for n in range(last + 1):
        x = jnp.matmul(x, gate[f"kernel_{n}"], precision=jax.lax.Precision.HIGHEST)
        x = x + jnp.broadcast_to(gate[f"bias_{n}"], x.shape)
        x = x if n == last else jax.nn.relu(x)
    return jax.nn.softmax(x / temperature)


def combined(readout: Readout, scores, statistics: dict) -> tuple[jax.Array, jax.Array]:
    """(score, disagreement: the deviation between members), both of the shape [...] of a member's scores.

    mean_std: mean - coeff * deviation; mean_variance: mean - coeff * variance, Coste et al.'s uncertainty-weighted
    optimisation; worst: the lowest, their worst-case optimisation.

    Args:
      scores: [N, ...], of N members.
      statistics: mean and std [N] of each member's scores on the training records. A member's score has a zero and
        a unit of its own, which would count as disagreement.
    """
    spread = lambda x: x.reshape(-1, *[1] * (scores.ndim - 1))
    scores = (scores - spread(statistics["mean"])) / spread(statistics["std"])
    mean, variance = scores.mean(0), scores.var(0)
    # The root has no finite slope at 0, where members agree.
    deviation = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1.0)), 0.0)
    if readout.name == "worst":
        return scores.min(0), deviation
    return mean - readout.spread_coeff * (deviation if readout.name == "mean_std" else variance), deviation


def linear_head(readout: Readout, head: dict | None) -> dict:
    """The head {"kernel": [D], "bias": []} whose output is the score.

    Raises: InputError if no such head is the score: a value head must be one.
    """
    if readout.name == "scalar":
        return head
    if readout.name == "logit":
        return {
            "kernel": head["kernel"][:, 1] - head["kernel"][:, 0],
            "bias": head["bias"][1] - head["bias"][0],
        }
    raise InputError(
        f"value is 'reward', but the reward model's score is not linear in its state (it is read as {readout.name!r}: "
        "a probability, a gate or several models). Choose value=own or value=shared."
    )
