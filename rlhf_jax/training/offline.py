"""Training on fixed groups (SFT, reward models): records to batches, one update a step, a held-out pass.

Knows no algorithm: it reads the table. What comes out of the loop is left in roles/STAGE."""

import functools

import jax
import numpy as np

from rlhf_jax.data import batching, formats, packing
from rlhf_jax.errors import InputError
from rlhf_jax.models import roles
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.training import reference as references
from rlhf_jax.training import state as states
from rlhf_jax.training.algorithms import ALGORITHMS
from rlhf_jax.training.loop import StepOutput, train
from rlhf_jax.training.run import Run, all_dropped, announce, optimizer_of, resumable, settings_of
from rlhf_jax.training.update import make_update
from rlhf_jax.types import GroupedBatch


def offline(run: Run, name: str, records, held_out, trained: dict, frozen: dict, packed_tokens: int = 0):
    """Train on (prompt ids, completions' ids) groups, or such pairs with a soft label. Returns held-out scores [N, G],
    if a reward is trained.

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
        return grouped(chosen, batch_size, lengths=lengths, pad_id=run.tokenizer.pad_id)

    fingerprint, ref_logprobs = data.fingerprint(), {}
    if settings.reference == "cached":
        sets = {"train": records, "held_out": held_out}
        identity = fingerprint | {"held_out": batching.record_hashes(held_out)}
        ref_logprobs = references.kept_logprobs(run, name, sets, make_batch, section.batch_size, identity)
    optimizer, schedule = optimizer_of(section, section.steps)
    update, follower = make_update(objective, optimizer, num_microbatches=section.num_microbatches), None
    if settings.reference_sync_steps:
        mix = settings.reference_sync_mix
        follower = references.follower(trained["policy"], frozen["base"], mix)
        update = references.synced(update, settings.reference_sync_steps, mix, run.lora)
    update = jax.jit(update, donate_argnums=0)

    def step(state, position):
        indices = data.indices(position)
        batch = make_batch([records[i] for i in indices])
        if ref_logprobs:
            batch = batch.replace(ref_logprobs=ref_logprobs["train"][indices])
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
        parts, size = [], section.batch_size
        given = frozen if follower is None else frozen | {"reference": state.reference}
        for i in range(0, len(held_out), size):
            batch = make_batch(held_out[i : i + size], size)
            if ref_logprobs:
                found = ref_logprobs["held_out"][i : i + size]
                missing = ((0, size - len(found)), (0, 0), (0, 0))
                batch = batch.replace(ref_logprobs=np.pad(found, missing))
            parts.append(jax.device_get(measure(state.trained, given, run.put(batch))))
        return parts

    def evaluate(state):
        parts = held_out_pass(state)
        total = sum(float(weight) for weight, _, _ in parts)
        names = parts[0][1] if parts else ()
        return {
            n: sum(float(weight * metrics[n]) for weight, metrics, _ in parts) / max(total, 1) for n in names
        }

    with meshes.activate(run.mesh):
        state = states.create(
            trained, optimizer, run.rng(name), {}, run.model.config, run.mesh, reference=follower
        )
        announce(run, name, trained, f"{what}, {section.batch_size} a step")
        state = train(
            name,
            state,
            step,
            total_steps=section.steps,
            workdir=run.workdir,
            fingerprint=fingerprint,
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
    """(prompt, completions as text, row or nothing, more) -> (prompt ids, ids of each completion, ended by an end
    token, the same more).

    A single completion of an empty prompt is plain text: it is cut into pieces that fill a row of `packed_tokens`, or
    (0) a prompt of one token and the longest completion.
    """
    data, encoded = run.config.data, []
    for prompt, completions, *more in groups:
        if prompt == "":
            ids = run.tokenizer.encode_text(*completions)
            encoded += packing.pieces(ids, packed_tokens or data.completion_tokens + 2)
            continue
        ids = run.encode_prompt(prompt, *more[:1])
        if ids is not None:
            encoded.append(
                (
                    ids,
                    [
                        run.tokenizer.encode_completion(c, data.completion_tokens + 1, allow_truncation=True)
                        for c in completions
                    ],
                    *more[1:],
                )
            )
    if groups and not encoded:
        raise InputError(all_dropped(len(groups), data.prompt_tokens))
    return encoded


def longest(records) -> tuple[int, int]:
    """(longest prompt, longest completion) in tokens: the shape of every batch of these records."""
    return max(len(record[0]) for record in records), max(len(c) for record in records for c in record[1])


def grouped(records, batch_size: int | None = None, *, lengths: tuple[int, int], pad_id: int) -> GroupedBatch:
    """Records, all with or all without a soft label, as one batch; filled up to `batch_size` with rows of weight 0."""
    prompts, completions, *labels = zip(*records, strict=True)
    batch = batching.group(
        prompts,
        completions,
        prompt_length=lengths[0],
        completion_length=lengths[1],
        pad_id=pad_id,
        batch_size=batch_size,
    )
    if labels:
        missing = batch.prompt_ids.shape[0] - len(records)
        batch = batch.replace(soft_labels=np.pad(np.float32(labels[0]), (0, missing), constant_values=1.0))
    return batch
