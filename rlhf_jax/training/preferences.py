"""Preferences with a known truth: two samples a prompt from the base, labelled by a gold reward through a coin.

P(first chosen) = sigmoid(coin_scale * (gold of the first - gold of the second)), as in Gao et al. 2022, "Scaling laws
for reward model overoptimization", arXiv:2210.10760. Written batch by batch, so that a killed run goes on."""

import math
import os
import random

import jax

from rlhf_jax.data import writing
from rlhf_jax.data.batching import pad_prompts
from rlhf_jax.data.formats import readable
from rlhf_jax.errors import InputError
from rlhf_jax.models.roles import Role
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.rewards import rules
from rlhf_jax.training import rollout
from rlhf_jax.training.run import Run

FILES = {"train": "preferences.jsonl", "held_out": "preferences_held_out.jsonl"}


def make(run: Run) -> None:
    """Writes both files in Vertex's format with the gold rewards beside it."""
    section, data = run.config.preferences, run.config.data
    if run.config.gold not in rules.RULES:
        raise InputError(
            f"config.gold is {run.config.gold!r}; making preferences needs one of {', '.join(rules.RULES)}. "
            "Or give your own with config.data.preferences and leave the stage out."
        )
    wanted = {"train": section.num_pairs, "held_out": data.held_out_pairs}
    for name, count in wanted.items():
        if count and not run.encoded_prompts[name]:
            raise InputError(
                f"there are no {name} prompts to make {count} pairs of; raise config.data.held_out_prompts (at most a "
                "fifth of the prompts is held out) or set config.data.held_out_pairs=0."
            )
    for name, count in wanted.items():
        _make_file(run, name, -(-count // section.batch_size))


def _make_file(run: Run, name: str, num_batches: int) -> None:
    final = run.path(FILES[name])
    if os.path.exists(final):
        return
    partial, size = final + ".partial", run.config.preferences.batch_size
    done = writing.keep_whole_batches(partial)
    network, sampling, gold = run.network(), run.sampling(2), rules.RULES[run.config.gold]
    rng = jax.random.fold_in(run.rng("preferences"), list(FILES).index(name))
    prompts = run.encoded_prompts[name]
    for number in range(done, num_batches):
        run.stop.check(f"preferences ({name}), batch {number} of {num_batches}")
        # Every prompt once before any twice; a later visit draws other samples.
        chosen = [prompts[(number * size + i) % len(prompts)] for i in range(size)]
        with meshes.activate(run.mesh):
            ids = run.put(pad_prompts([ids for _, ids in chosen], run.prompt_length, run.tokenizer.pad_id))
            batch = rollout.sample(network, run.base, Role(), ids, jax.random.fold_in(rng, number), sampling)
        rows = []
        for (prompt, _), pair in zip(chosen, rollout.texts(run.tokenizer, batch), strict=True):
            if all(text.strip() for text in pair):
                coin = (run.config.seed, name, number, len(rows))
                rows.append(label(prompt.text, pair, gold, run.config.preferences.coin_scale, coin))
        writing.append_batch(partial, number, rows)
        if name == "train" and number in (0, num_batches - 1):
            run.console.samples(
                f"samples of the base, batch {number + 1}", _shown(rows), run.config.logging.num_samples
            )
        run.console.note(f"preferences ({name}): batch {number + 1} of {num_batches}, {len(rows)} pairs")
    writing.finish(partial, final)


def label(prompt: str, pair: list[str], gold, coin_scale: float, coin_seed: tuple) -> dict:
    """One row: `choice` is 0 or 1 by a Bradley-Terry coin on the gold rewards."""
    first, second = gold([prompt, prompt], pair)
    p_first = sigmoid(coin_scale * (first - second))
    choice = 0 if random.Random(repr(coin_seed)).random() < p_first else 1
    return {
        "input_text": prompt,
        "candidate_0": pair[0],
        "candidate_1": pair[1],
        "choice": choice,
        "gold_0": first,
        "gold_1": second,
    }


def ceiling(rows: list[dict], coin_scale: float) -> float:
    """The best accuracy anyone can have on such labels: mean of max(p, 1 - p)."""
    chances = [sigmoid(coin_scale * (row["gold_0"] - row["gold_1"])) for row in rows]
    return sum(max(p, 1 - p) for p in chances) / len(chances)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _shown(rows):
    return [
        {
            "prompt": readable(row["input_text"]),
            "completion": row[f"candidate_{i}"],
            "gold_reward": row[f"gold_{i}"],
        }
        for row in rows[:4]
        for i in (0, 1)
    ][:6]
