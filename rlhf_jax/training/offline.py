"""Training on fixed groups (SFT, reward models): records to batches, one update a step, a held-out pass.

Knows no algorithm: it reads the table. What comes out of the loop is left in roles/STAGE."""

import functools

import jax
import numpy as np

from rlhf_jax.data import batching, formats, packing
from rlhf_jax.errors import InputError
from rlhf_jax.models import roles
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.training import state as states
from rlhf_jax.training.algorithms import ALGORITHMS
from rlhf_jax.training.loop import StepOutput, train
from rlhf_jax.training.run import Run, all_dropped, announce, optimizer_of, resumable, settings_of
from rlhf_jax.training.update import make_update


def offline(run: Run, name: str, records, held_out, trained: dict, frozen: dict, packed_tokens: int = 0):
    """Train on (prompt ids, completions' ids) groups. Returns held-out scores [N, G], if a reward is trained.

    packed_tokens: 0, or the length of the rows into which groups of one completion are packed; a batch then holds
      `batch_size` rows.
    """
    section, algorithm = run.config[name], ALGORITHMS[name]
    network, settings = run.network(), settings_of(name, section)
    objective = functools.partial(algorithm.objective, settings, network)
    what = f"{len(records)} records"
    if packed_tokens:
        lengths = (0, packed_tokens)
        records, held_out = (packing.pack(groups, packed_tokens) for groups in (records, held_out))
        full = packing.fill_fraction(records, packed_tokens)
        what += f" in {len(records)} rows of {packed_tokens} tokens, {full:.1%} full"
    else:
        lengths = longest([*records, *held_out])
    data = resumable(run, records, section.batch_size, lengths)

    def make_batch(chosen, batch_size=None):
        if packed_tokens:
            return packing.batch(
                chosen, row_tokens=packed_tokens, pad_id=run.tokenizer.pad_id, batch_size=batch_size
            )
        return batching.group(
            [prompt for prompt, _ in chosen],
            [completions for _, completions in chosen],
            prompt_length=lengths[0],
            completion_length=lengths[1],
            pad_id=run.tokenizer.pad_id,
            batch_size=batch_size,
        )

    optimizer, schedule = optimizer_of(section, section.steps)
    update = jax.jit(
        make_update(objective, optimizer, num_microbatches=section.num_microbatches), donate_argnums=0
    )

    def step(state, position):
        batch = make_batch(data.batch(position))
        state, metrics = update(state, frozen, run.put(batch))
        metrics = metrics | {"learning_rate": schedule(position)}
        if packed_tokens:
            metrics["tokens"] = float((batch.segments > 0).sum())
            metrics["fill_fraction"] = metrics["tokens"] / batch.segments.size
        else:
            metrics["tokens"] = float(batch.prompt_mask.sum() + batch.completion_mask.sum())
        return state, StepOutput(metrics)

    @jax.jit
    def measure(trained, frozen, batch):
        loss, (weight, metrics) = objective(trained, frozen, {}, batch, jax.random.key(0))
        scores = None
        if "reward" in trained:
            scores = roles.scores(network.model, frozen["base"], trained["reward"], batch)
        return weight, {"loss": loss} | metrics, scores

    def held_out_pass(state):
        parts = []
        for i in range(0, len(held_out), section.batch_size):
            batch = make_batch(held_out[i : i + section.batch_size], section.batch_size)
            parts.append(jax.device_get(measure(state.trained, frozen, run.put(batch))))
        return parts

    def evaluate(state):
        parts = held_out_pass(state)
        total = sum(float(weight) for weight, _, _ in parts)
        names = parts[0][1] if parts else ()
        return {
            n: sum(float(weight * metrics[n]) for weight, metrics, _ in parts) / max(total, 1) for n in names
        }

    with meshes.activate(run.mesh):
        state = states.create(trained, optimizer, run.rng(name), {}, run.model.config, run.mesh)
        announce(run, name, trained, f"{what}, {section.batch_size} a step")
        state = train(
            name,
            state,
            step,
            total_steps=section.steps,
            workdir=run.workdir,
            fingerprint=data.fingerprint(),
            logging=run.logging(name),
            console=run.console,
            stop=run.stop,
            evaluate=evaluate,
            eval_every_steps=section.eval_every_steps,
            best_metric="eval/accuracy" if name == "reward_model" else None,
        )
        scores = [part[2] for part in held_out_pass(state)] if "reward" in trained else []
    (role,) = (state.trained[n] for n in algorithm.trains)
    run.save_role(name, role, {"step": int(state.step)})
    return np.concatenate(scores)[: len(held_out)] if scores else None


def examples(run: Run, key: str) -> list[tuple]:
    """What config.data.KEY names, as encode_groups takes it; for tiny without one, its own corpus."""
    spec = run.config.data[key]
    if spec:
        return [(one.prompt, (one.completion,), one.row) for one in run.records(spec, formats.examples)]
    if run.config.model.path == "tiny":
        return [(prompt, (completion,)) for prompt, completion in run.tiny_corpus]
    raise InputError(
        f"config.data.{key} is empty; give rows with input_text and output_text, or text (JSONL, hub id, ...)."
    )


def encode_groups(run: Run, groups, packed_tokens: int = 0) -> list[tuple[list[int], list[list[int]]]]:
    """(prompt, completions as text, row or nothing) -> (prompt ids, ids of each completion, ended by an end token).

    A single completion of an empty prompt is plain text: it is cut into pieces that fill a row of `packed_tokens`, or
    (0) a prompt of one token and the longest completion.
    """
    data, encoded = run.config.data, []
    for prompt, completions, *row in groups:
        if prompt == "":
            ids = run.tokenizer.encode_text(*completions)
            encoded += packing.pieces(ids, packed_tokens or data.completion_tokens + 2)
            continue
        ids = run.encode_prompt(prompt, *row)
        if ids is not None:
            encoded.append(
                (
                    ids,
                    [
                        run.tokenizer.encode_completion(c, data.completion_tokens + 1, allow_truncation=True)
                        for c in completions
                    ],
                )
            )
    if groups and not encoded:
        raise InputError(all_dropped(len(groups), data.prompt_tokens))
    return encoded


def longest(records) -> tuple[int, int]:
    """(longest prompt, longest completion) in tokens: the shape of every batch of these records."""
    return max(len(prompt) for prompt, _ in records), max(len(c) for _, group in records for c in group)
