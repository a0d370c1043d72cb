"""SFT on packed rows against one example a row: real tokens a second of the same update, alternating, same process.

python -m benchmarks.packing [--rounds=7]   A random Llama of 4.5 million values; log-normal lengths."""

import argparse
import functools
import statistics
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data import batching, packing
from rlhf_jax.models.llama import Llama, LlamaConfig
from rlhf_jax.models.roles import Role
from rlhf_jax.training.algorithms import ALGORITHMS, Network
from rlhf_jax.training.optimizer import make_optimizer
from rlhf_jax.training.state import TrainState
from rlhf_jax.training.update import make_update

PROMPT, COMPLETION, ROW, ROWS = 128, 256, 384, 8  # tokens; a batch is ROWS rows of ROW tokens either way


def make_examples(rng, count):
    """Log-normal lengths, median 24 and 48, cut at PROMPT and COMPLETION."""
    size = lambda median, most: int(np.clip(rng.lognormal(np.log(median), 0.8), 1, most))
    draw = lambda n: rng.integers(0, 4096, n).tolist()
    return [(draw(size(24, PROMPT)), [draw(size(48, COMPLETION))]) for _ in range(count)]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    config = LlamaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=704, num_layers=3, num_heads=4, num_kv_heads=4,
        head_dim=64, initializer_range=0.02, eos_ids=(2,),
    )  # fmt: skip
    model = Llama(config)
    ids = jnp.zeros((1, 1), jnp.int32)
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), ids, ids)["params"])
    row = ALGORITHMS["sft"]
    optimizer = make_optimizer(lambda step: 1e-4)
    trained = {"policy": Role(base=params)}
    state = TrainState(trained, optimizer.init(trained), jnp.int32(0), jax.random.key(0), {})
    update = jax.jit(make_update(functools.partial(row.objective, row.settings(), Network(model)), optimizer))
    examples = make_examples(np.random.default_rng(0), 600)
    batches_of = lambda items: [items[i : i + ROWS] for i in range(0, len(items), ROWS)]
    group = functools.partial(
        batching.group, prompt_length=PROMPT, completion_length=COMPLETION, pad_id=0, batch_size=ROWS
    )
    plain = [group(*zip(*some, strict=True)) for some in batches_of(examples)]
    rows = packing.pack(examples, ROW)
    print(f"{len(examples)} examples: {len(rows)} packed rows, {packing.fill_fraction(rows, ROW):.1%} full")
    rows_to_batch = functools.partial(packing.batch, row_tokens=ROW, pad_id=0, batch_size=ROWS)
    packed = [rows_to_batch(some) for some in batches_of(rows)]
    tokens = {
        "plain": lambda batch: batch.prompt_mask.sum() + batch.completion_mask.sum(),
        "packed": lambda batch: (batch.segments > 0).sum(),
    }
    rates = {"plain": [], "packed": []}
    for turn in range(rounds + 1):  # the first compiles
        for name, batches in (("plain", plain), ("packed", packed)):
            batch = batches[turn % len(batches)]
            start = time.perf_counter()
            jax.block_until_ready(update(state, {"base": None}, batch))
            rates[name].append(float(tokens[name](batch)) / (time.perf_counter() - start))
    medians = {name: statistics.median(found[1:]) for name, found in rates.items()}
    for name, median in medians.items():
        print(f"{name:>7}: {median:8.0f} tokens/s (median of {rounds})")
    print(f"  ratio: {medians['packed'] / medians['plain']:.2f}")


if __name__ == "__main__":
    main()
