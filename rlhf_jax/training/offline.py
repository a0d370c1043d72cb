"""Training on fixed groups (SFT, reward models): records to batches, one update a step, a held-out pass.

Knows no algorithm: it reads the table. What comes out of the loop is left in roles/STAGE."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np

from rlhf_jax.data import batching, formats, packing
from rlhf_jax.errors import InputError
from rlhf_jax.parallel import hosts, sharding
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.training import constitution, utilisation
from rlhf_jax.training import reference as references
from rlhf_jax.training import state as states
from rlhf_jax.training.algorithms import ALGORITHMS, Algorithm
from rlhf_jax.training.clock import Clock
from rlhf_jax.training.loop import StepOutput, train
from rlhf_jax.training.run import Run, all_dropped, announce, optimizer_of, resumable, settings_of
from rlhf_jax.training.update import make_update
from rlhf_jax.types import GroupedBatch


def offline(
    run: Run, name: str, records, held_out, trained: dict, frozen: dict, packed_tokens: int = 0
) -> None:
    """A whole stage on (prompt ids, completions' ids) groups; leaves roles/NAME.

    packed_tokens: 0, or the length of the rows into which groups of one completion are packed; a batch then holds
      `batch_size` rows.
    """
    role, step, _ = fit(run, name, records, held_out, trained, frozen, packed_tokens=packed_tokens)
    run.save_role(name, role, {"step": step})


@dataclasses.dataclass(frozen=True)
class Apart:
    """What `fit` trains where that is no role of the run's decoder: its network, its batches, where its weights lie."""

    network: object  # what the objective is handed
    make_batch: Callable  # (records, batch_size or None) -> batch
    lengths: tuple[int, ...]  # of every batch, in tokens
    tokenizer: str  # its fingerprint
    shardings: dict  # of the trained
    what: str  # the network, for the reader


def fit(
    run: Run,
    name: str,
    records,
    held_out,
    trained: dict,
    frozen: dict,
    *,
    packed_tokens: int = 0,
    section=None,
    algorithm: Algorithm | None = None,
    log_as: str = "",
    member: int = 0,
    read: Callable | None = None,
    judge: Callable = lambda readings: {},
    apart: Apart | None = None,
):
    """Train on groups, as `encode_groups` makes them.

    Args:
      section, algorithm: of the stage; None: those of its name.
      log_as: what checkpoints and metrics are called; empty: the stage's name.
      member: of an ensemble; each sees the records in an order of its own.
      read: (trained, frozen, batch) -> arrays [B, ...] to keep of the held-out records; None: nothing.
      apart: None: roles of the run's decoder, on groups.
      judge: what `read` gave of all held-out records -> metrics of these.
    Returns: (the trained role, its steps, what `read` gave [N, ...] on the host; None without records or `read`).
    """
    section = run.config[name] if section is None else section
    algorithm, log_as = algorithm or ALGORITHMS[name], log_as or name
    network, settings = run.network() if apart is None else apart.network, settings_of(name, section)
    objective = functools.partial(algorithm.objective, settings, network)
    what, sorting = f"{len(records)} records", {}
    if packed_tokens:
        lengths = (0, packed_tokens)
        records, held_out = (packing.pack(groups, packed_tokens) for groups in (records, held_out))
        full = packing.fill_fraction(records, packed_tokens)
        what += f" in {len(records)} rows of {packed_tokens} tokens, {full:.1%} full"
    elif apart is not None:
        lengths = apart.lengths
    else:
        lengths = longest([*records, *held_out])
        sorting = sorted_by_length(run, lengths)
        candidates = most_completions([*records, *held_out])
    data = resumable(run, records, section.batch_size, lengths, member, apart and apart.tokenizer, **sorting)

    def make_batch(chosen, batch_size=None, lengths=lengths):
        if apart is not None:
            return apart.make_batch(chosen, batch_size)
        if packed_tokens:
            return packing.batch(
                chosen, row_tokens=packed_tokens, pad_id=run.tokenizer.pad_id, batch_size=batch_size
            )
        return grouped(
            chosen, batch_size, lengths=lengths, pad_id=run.tokenizer.pad_id, candidates=candidates
        )

    fingerprint, ref_logprobs = data.fingerprint(), {}
    if settings.reference == "cached":
        sets = {"train": records, "held_out": held_out}
        identity = fingerprint | {"held_out": batching.record_hashes(held_out)}
        ref_logprobs = references.kept_logprobs(run, name, sets, make_batch, section.batch_size, identity)
    update, optimizer, schedule = updater(run, section, settings, objective)
    follower = None
    if settings.reference_sync_steps:
        follower = references.follower(trained["policy"], frozen["base"], settings.reference_sync_mix)
    measure = make_measure(objective, read)

    count = None
    if apart is None:
        count = utilisation.offline_counter(run.model.config, algorithm, settings, trained)
    peak_flops, clock = utilisation.peak_of(run, count), Clock()

    def step(state, position):
        parts = clock.begin()
        indices = data.indices(position)
        chosen, shape = [records[i] for i in indices], lengths
        if sorting:
            shape = batching.bucket(longest(chosen), lengths, run.config.data.length_buckets)
        batch = make_batch(chosen, lengths=shape)
        if ref_logprobs:
            batch = batch.replace(ref_logprobs=ref_logprobs["train"][indices][..., : shape[1]])
        state, metrics = update(state, frozen, run.put(batch))
        parts.mark("update", metrics)
        metrics = metrics | {"learning_rate": schedule(position)}
        if packed_tokens:
            metrics["tokens"] = float((batch.segments > 0).sum())
            metrics["fill_fraction"] = metrics["tokens"] / batch.segments.size
        elif apart is not None:
            metrics["tokens"] = float(batch.mask.sum())
        else:
            metrics["tokens"] = float(batch.prompt_mask.sum() + batch.completion_mask.sum())

        def finish():
            flops = None if count is None else count(batch)
            return utilisation.told(parts, flops, peak_flops), []

        return state, StepOutput(metrics, finish)

    def held_out_pass(state):
        parts, size = [], section.batch_size
        given = frozen if follower is None else frozen | {"reference": state.reference}
        for i in range(0, len(held_out), size):
            batch = make_batch(held_out[i : i + size], size)
            if ref_logprobs:
                found = ref_logprobs["held_out"][i : i + size]
                missing = ((0, size - len(found)), (0, 0), (0, 0))
                batch = batch.replace(ref_logprobs=np.pad(found, missing))
            parts.append(hosts.gather(measure(state.trained, given, run.put(batch))))
        return parts

    def readings(parts):
        if read is None or not parts:
            return None
        return jax.tree.map(lambda *x: np.concatenate(x)[: len(held_out)], *(part[2] for part in parts))

    def evaluate(state):
        parts = held_out_pass(state)
        total = sum(float(weight) for weight, _, _ in parts)
        names = parts[0][1] if parts else ()
        means = {
            n: sum(float(weight * metrics[n]) for weight, metrics, _ in parts) / max(total, 1) for n in names
        }
        if parts:
            means |= judge(readings(parts))
            clock.current.mark("evaluate")
        return means

    with meshes.activate(run.mesh), clock:
        state = states.create(
            trained,
            optimizer,
            run.rng(name, member),
            {},
            run.model.config if apart is None else None,
            run.mesh,
            reference=follower,
            shardings=apart and apart.shardings,
        )
        announce(run, log_as, trained, f"{what}, {section.batch_size} a step", apart and apart.what)
        state = train(
            log_as,
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
        found = readings(held_out_pass(state)) if read is not None else None
    (role,) = (state.trained[n] for n in algorithm.trains)
    return role, int(state.step), found


def updater(run: Run, section, settings, objective):
    """(jitted update of a step's batch, optimizer, its learning rate by update)."""
    optimizer, schedule = optimizer_of(section, section.steps)
    update = make_update(objective, optimizer, num_microbatches=section.num_microbatches)
    if settings.reference_sync_steps:
        mix = settings.reference_sync_mix
        update = references.synced(update, settings.reference_sync_steps, mix, run.lora)
    return sharding.in_place(update), optimizer, schedule


def make_measure(objective, read: Callable | None):
    """Jitted (trained, frozen, batch) -> (weight, metrics, what `read` gives) of held-out records."""

    @jax.jit
    def measure(trained, frozen, batch):
        loss, (weight, metrics) = objective(trained, frozen, {}, batch, jax.random.key(0))
        return weight, {"loss": loss} | metrics, None if read is None else read(trained, frozen, batch)

    return measure


def read_all(run: Run, records, batch_size: int, read: Callable):
    """What read(batch) -> arrays [B, ...], jitted, gives of each record, on the host: [N, ...]."""
    lengths, candidates = longest(records), most_completions(records)
    parts = []
    with meshes.activate(run.mesh):
        for i in range(0, len(records), batch_size):
            batch = grouped(
                records[i : i + batch_size],
                batch_size,
                lengths=lengths,
                pad_id=run.tokenizer.pad_id,
                candidates=candidates,
            )
            parts.append(hosts.gather(read(run.put(batch))))
    return jax.tree.map(lambda *x: np.concatenate(x)[: len(records)], *parts)


def examples(run: Run, key: str) -> list[tuple]:
    """What config.data.KEY names, as encode_groups takes it; for tiny without one, its own corpus."""
    spec = run.config.data[key]
    own = key == "sft" and not spec and constitution.comes_before(run.config, "sft")
    if spec or own:
        form = formats.examples
        found = constitution.records(run, "sft", form) if own else run.records(spec, form)
        return [(one.prompt, (one.completion,), one.row) for one in found]
    if run.config.model.path == "tiny":
        return [(prompt, (completion,)) for prompt, completion in run.tiny_corpus]
    raise InputError(
        f"config.data.{key} is empty; give rows with input_text and output_text, or text (JSONL, hub id, ...)."
    )


def encode_groups(run: Run, groups, packed_tokens: int = 0) -> list[tuple]:
    """(prompt, completions as text, row or nothing, arrays beside them or nothing) -> (prompt ids, ids of each
    completion, ended by an end token, the same arrays). A group whose prompt config.data drops gives none.

    A single completion of an empty prompt is plain text: it is cut into pieces that fill a row of `packed_tokens`, or
    (0) a prompt of one token and the longest completion.
    """
    encoded = [one for group in groups for one in encode_group(run, *group, packed_tokens=packed_tokens)]
    if groups and not encoded:
        raise InputError(all_dropped(len(groups), run.config.data.prompt_tokens))
    return encoded


def encode_group(run: Run, prompt, completions, *more, packed_tokens: int = 0) -> list[tuple]:
    """See encode_groups."""
    longest = run.config.data.completion_tokens + 1
    if prompt == "":
        return packing.pieces(run.tokenizer.encode_text(*completions), packed_tokens or longest + 1)
    ids = run.encode_prompt(prompt, *more[:1])
    if ids is None:
        return []
    encode = lambda text: run.tokenizer.encode_completion(text, longest, allow_truncation=True)
    return [(ids, [encode(text) for text in completions], *(x for x in more[1:] if x))]


def longest(records) -> tuple[int, int]:
    """(longest prompt, longest completion) in tokens: the shape of every batch of these records."""
    return max(len(record[0]) for record in records), max(len(c) for record in records for c in record[1])


def sorted_by_length(run: Run, lengths: tuple[int, int]) -> dict:
    """What `resumable` is asked for, so that records of a batch fit the same bucket."""
    share = lambda record: max(n / most for n, most in zip(longest([record]), lengths, strict=True) if most)
    return {"sort_batches": run.config.data.sort_batches, "length": share}


def most_completions(records) -> int:
    return max(len(record[1]) for record in records)


# What rows of weight 0 have in the arrays beside the tokens.
FILL = {"soft_labels": 1.0}


def grouped(
    records,
    batch_size: int | None = None,
    *,
    lengths: tuple[int, int],
    pad_id: int,
    candidates: int | None = None,
) -> GroupedBatch:
    """Records, all with or all without arrays beside them, as one batch; filled up to `batch_size` with rows of weight
    0, and each record to `candidates` completions with empty ones of weight 0."""
    prompts, completions, *more = zip(*records, strict=True)
    counts = [len(one) for one in completions]
    candidates = candidates or max(counts)
    batch = batching.group(
        prompts,
        [[*one, *[[]] * (candidates - len(one))] for one in completions],
        prompt_length=lengths[0],
        completion_length=lengths[1],
        pad_id=pad_id,
        batch_size=batch_size,
    )
    for row, count in enumerate(counts):
        batch.weights[row, count:] = 0.0
    return batch.replace(**beside(more[0] if more else [{}], len(batch.prompt_ids), candidates))


def beside(fields: list[dict], rows: int, candidates: int) -> dict[str, np.ndarray]:
    """The arrays beside the tokens of a batch of `rows`, from those of each record."""
    arrays = {}
    for name in fields[0]:
        parts = [np.asarray(one[name], np.float32) for one in fields]
        shape = (candidates, *parts[0].shape[1:]) if parts[0].ndim else ()
        arrays[name] = np.full((rows, *shape), FILL.get(name, 0.0), np.float32)
        for row, part in enumerate(parts):
            arrays[name][(row, slice(len(part))) if part.ndim else row] = part
    return arrays
