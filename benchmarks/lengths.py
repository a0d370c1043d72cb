"""Sampling completions of unequal length: all at once until the longest ends, against slots and batches that halve.

python -m benchmarks.lengths [--rounds=5] [--prompts=64] [--completions=1] [--full] [--ways=all,all/3,16,16/2]
Shape S of workloads.py with random weights, prompts of 64 tokens, completions of up to 128. One word in 24 ends a
completion, so lengths are geometric with mean 24 (--full: nothing does). Alternating in one process, same draws;
seconds by the clock and of CPU over the number of cores, which other work on the machine disturbs less."""

import argparse
import os
import resource
import statistics
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import workloads
from rlhf_jax.models.llama import Llama, LlamaConfig
from rlhf_jax.sampling.generate import SamplingConfig, generate

PROMPT, COMPLETION, MEAN = 64, 128, 24  # tokens


def cpu_seconds():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return (used.ru_utime + used.ru_stime) / len(os.sched_getaffinity(0))


def random_model():
    """(Llama, params) of shape S."""
    shape = workloads.SHAPES["S"]
    config = LlamaConfig(
        shape.vocab_size, shape.hidden_size, shape.intermediate_size, shape.num_layers, shape.num_heads,
        shape.num_kv_heads, shape.head_dim, tie_embeddings=shape.tied, initializer_range=0.02,
    )  # fmt: skip
    model, ids = Llama(config), jnp.zeros((1, 1), jnp.int32)
    return model, nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), ids, ids)["params"])


def settings_of(name: str, shape, completions: int, full: bool) -> SamplingConfig:
    """name: `all` or a number of slots, then for halvings `/` and how many."""
    first, (slots, _, halvings) = workloads.FIRST_WORD, name.partition("/")
    return SamplingConfig(
        COMPLETION,
        num_completions=completions,
        eos_ids=() if full else tuple(range(first, first + shape.vocab_size // MEAN)),
        slots=0 if slots == "all" else int(slots),
        halvings=int(halvings or 0),
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--completions", type=int, default=1)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--ways", default="all,all/3,8,16,32,16/2,32/2")
    options = parser.parse_args()
    model, params = random_model()
    shape = workloads.SHAPES["S"]
    prompts = jax.random.randint(jax.random.key(1), (options.prompts, PROMPT), 3, shape.vocab_size)
    names = options.ways.split(",")
    wall, cpu, rates = ({name: [] for name in names} for _ in range(3))
    for turn in range(options.rounds + 1):  # the first compiles
        first = None
        for name in names:
            settings = settings_of(name, shape, options.completions, options.full)
            start, used = time.perf_counter(), cpu_seconds()
            made = generate(model, params, prompts, jnp.ones_like(prompts), jax.random.key(turn), settings)
            made = jax.block_until_ready(made)
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(cpu_seconds() - used)
            rates[name].append(float(made.mask.sum()) / cpu[name][-1])
            first = made if first is None else first
            # A draw that falls on the border of two tokens may go either way by rounding: seldom.
            assert np.mean(np.all(np.array(made.ids) == np.array(first.ids), axis=-1)) > 0.95, name
    lengths = np.array(first.mask).sum(-1).ravel()
    print(f"{lengths.size} completions, lengths {lengths.mean():.0f} in the mean, at most {lengths.max()}")
    median = lambda found: statistics.median(found[1:])
    print("               seconds  of CPU  (least-most)  tokens/s  of the first; first call")
    for name in names:
        print(
            f"{name:>12} {median(wall[name]):9.2f} {median(cpu[name]):7.2f}  ({min(cpu[name][1:]):.2f}-"
            f"{max(cpu[name][1:]):.2f}) {median(rates[name]):9.0f} {median(cpu[names[0]]) / median(cpu[name]):8.2f}x"
            f"   {cpu[name][0]:.1f}"
        )


if __name__ == "__main__":
    main()
