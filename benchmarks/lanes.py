"""Training on completions of unequal length: in lanes (`pack_completions`) against one padded row each.

python -m benchmarks.lanes [--rounds=5] [--completions=8] [--mean=24]
Shape S of workloads.py with random weights and LoRA, 4 prompts of 64 tokens, completions of up to 128 of geometric
length. One GRPO iteration after sampling: log-probabilities of the reference and one update. Alternating in one
process, other lengths each round; seconds by the clock, and of CPU over the number of cores."""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import workloads
from benchmarks.lengths import cpu_seconds, random_model
from rlhf_jax.data import packing
from rlhf_jax.models import lora
from rlhf_jax.models.roles import Role
from rlhf_jax.training.algorithms import ALGORITHMS, Network
from rlhf_jax.training.optimizer import make_optimizer
from rlhf_jax.training.rollout import make_prepare
from rlhf_jax.training.state import TrainState
from rlhf_jax.training.update import make_update
from rlhf_jax.types import GroupedBatch

PROMPTS, PROMPT, COMPLETION = 4, 64, 128


def rollout(rng, vocabulary: int, completions: int, mean: int):
    """(batch with scores, [B, G] lengths)."""
    shape = (PROMPTS, completions)
    lengths = np.minimum(rng.geometric(1 / mean, shape), COMPLETION)
    draw = lambda *shape: jnp.asarray(rng.integers(3, vocabulary, shape), jnp.int32)
    batch = GroupedBatch(
        prompt_ids=draw(PROMPTS, PROMPT),
        prompt_mask=jnp.ones((PROMPTS, PROMPT), jnp.int32),
        completion_ids=draw(*shape, COMPLETION),
        completion_mask=jnp.asarray(np.arange(COMPLETION) < lengths[..., None], jnp.int32),
        weights=jnp.ones(shape, jnp.float32),
        finished=jnp.asarray(lengths < COMPLETION),
        scores=jnp.asarray(rng.normal(size=shape), jnp.float32),
        old_logprobs=jnp.full((*shape, COMPLETION), -10.0),
    )
    return batch, lengths


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--mean", type=int, default=24)
    options = parser.parse_args()
    model, base = random_model()
    network = Network(model)
    row = ALGORITHMS["grpo"]
    settings, optimizer = row.settings(kl_coeff=0.0, kl_loss_coeff=0.04), make_optimizer(lambda step: 1e-5)
    policy = Role(
        adapter=lora.init(jax.random.key(1), model.config, lora.LoraConfig(rank=workloads.LORA_RANK))
    )
    trained = {"policy": policy}
    state = TrainState(
        trained, optimizer.init(trained), jnp.int32(0), jax.random.key(0), {"kl_coeff": jnp.float32(0)}
    )
    prepare = make_prepare(row, settings, network)
    update = jax.jit(make_update(functools.partial(row.objective, settings, network), optimizer))

    def seconds(batch):
        start, cpu = time.perf_counter(), cpu_seconds()
        prepared, _ = prepare({"base": base}, state.controllers, batch)
        jax.block_until_ready(update(state, {"base": base}, prepared))
        return time.perf_counter() - start, cpu_seconds() - cpu

    taken, used = {"padded": [], "lanes": []}, []
    for turn in range(options.rounds):
        batch, lengths = rollout(
            np.random.default_rng(turn), model.config.vocab_size, options.completions, options.mean
        )
        lanes = packing.lanes(lengths, COMPLETION)
        used.append(f"{lanes.shape[0]} x {lanes.shape[1]}" if lanes else "none")
        for name, found in (("padded", None), ("lanes", lanes)):
            seconds(batch.replace(lanes=found))  # compiles
            taken[name].append(seconds(batch.replace(lanes=found)))
    print(f"{PROMPTS} x {options.completions}, mean {options.mean}; lanes: {', '.join(used)}")
    medians = {}
    for name, both in taken.items():
        clock, cpu = zip(*both, strict=True)
        medians[name] = statistics.median(cpu)
        spread = f"({min(cpu):.2f}-{max(cpu):.2f})"
        print(f"{name:>7}: clock {statistics.median(clock):.2f} s, CPU {medians[name]:.2f} s {spread}")
    print(f"  ratio: {medians['padded'] / medians['lanes']:.2f}")


if __name__ == "__main__":
    main()
