"""The stage `constitution`: the base answers, criticises its answer by a principle and rewrites it; the last rewriting
is an example for SFT, and the better of a pair with the first answer.

Bai et al. 2022, "Constitutional AI", arXiv:2212.08073, section 3.1. Written batch by batch, so that a killed run goes
on. The second half of the paper, a judge in the place of people, is `preferences.labeller` and rewards/models/judge."""

import dataclasses
import os
import random

import jax

from rlhf_jax.data import sources, writing
from rlhf_jax.data.batching import pad_prompts
from rlhf_jax.data.formats import readable
from rlhf_jax.errors import InputError
from rlhf_jax.models.roles import Role
from rlhf_jax.parallel import hosts
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.training import rollout
from rlhf_jax.training.run import Run

FILES = {"sft": "constitution_sft.jsonl", "pairs": "constitution_pairs.jsonl"}
ASK = """Request: {prompt}

Response: {response}

{critique}
"""
REVISE = """Request: {prompt}

Response: {response}

Criticism: {criticism}

{revision} Write the new response and nothing else.
"""
SHAPE = 64  # tokens to which the length of a question is rounded up, so that few programs are compiled


def make(run: Run) -> None:
    """Writes both files: rows of prompt and completion, and of prompt, chosen (the rewriting) and rejected (the first).

    Each row of the first file also has the principle and the criticism of its last round.
    """
    principles = read_principles(run.config.constitution.principles)
    if hosts.from_first(all(os.path.exists(run.path(file)) for file in FILES.values())):
        return
    section = run.config.constitution
    partial, size = run.path("constitution_partial.jsonl"), section.batch_size
    prompts = run.encoded_prompts["train"]
    count = -(-section.num_prompts // size)
    done = hosts.from_first(writing.keep_whole_batches(partial) if hosts.is_first() else None)
    for number in range(done, count):
        run.stop.check(f"constitution, batch {number} of {count}")
        chosen = [prompts[(number * size + i) % len(prompts)][0] for i in range(size)]
        rows = _batch(run, chosen, principles, number)
        if hosts.is_first():
            writing.append_batch(partial, number, rows)
        if number in (0, count - 1):
            run.console.samples(
                f"rewritings, batch {number + 1}", _shown(rows), run.config.logging.num_samples
            )
        run.console.note(f"constitution: batch {number + 1} of {count}, {len(rows)} of {size} rewritten")
    hosts.once(lambda: _finish(run, partial))


def _finish(run: Run, partial: str) -> None:
    rows = [row.fields for row in sources.read_rows(partial)]
    _write(
        run.path(FILES["sft"]),
        rows,
        lambda r: {"completion": r["revised"]} | {k: r[k] for k in ("principle", "criticism")},
    )
    _write(run.path(FILES["pairs"]), rows, lambda r: {"chosen": r["revised"], "rejected": r["first"]})
    os.remove(partial)


def records(run: Run, name: str, form) -> list:
    """What was written; the instruction stands in front of these prompts already."""
    return form(sources.read_rows(run.path(FILES[name])))


def comes_before(config, stage: str) -> bool:
    """Whether `stage` can learn from what is written here."""
    stages = config.stages
    return {"constitution", stage} <= set(stages) and stages.index("constitution") < stages.index(stage)


def read_principles(spec: str) -> list[dict]:
    """[{"critique", "revision"}] of a data spec; empty: the packaged ones. Raises: InputError naming the line."""
    rows = sources.read_rows(spec or "packaged:constitution")
    for row in rows:
        for field in ("critique", "revision"):
            if not isinstance(row.fields.get(field), str) or not row.fields[field].strip():
                raise InputError(
                    f"{row.source}, line {row.line}: {field!r} is {row.fields.get(field)!r:.60}; a principle has a "
                    "text 'critique', which asks for criticism, and a text 'revision', which asks for a new response."
                )
    return [{name: row.fields[name].strip() for name in ("critique", "revision")} for row in rows]


def _batch(run: Run, prompts, principles, number: int) -> list[dict]:
    """One row for each prompt whose answer, criticism and rewriting are not empty."""
    section, rng = run.config.constitution, jax.random.fold_in(run.rng("constitution"), number)
    answer_tokens = run.config.data.completion_tokens
    asked = [prompt.text for prompt in prompts]
    first = response = _continue(run, asked, answer_tokens, jax.random.fold_in(rng, 0), False)
    for turn in range(section.rounds):
        drawn = [
            random.Random(f"{run.config.seed} {number} {turn} {i}").choice(principles)
            for i in range(len(prompts))
        ]
        fields = [
            dict(prompt=readable(text), response=said.strip(), **principle)
            for text, said, principle in zip(asked, response, drawn, strict=True)
        ]
        questions = [_filled(ASK, one) for one in fields]
        key = jax.random.fold_in(rng, 2 * turn + 1)
        criticism = _continue(run, questions, section.critique_tokens, key, section.template, "Criticism:")
        for one, said in zip(fields, criticism, strict=True):
            one["criticism"] = said.strip()
        questions = [_filled(REVISE, one) for one in fields]
        key = jax.random.fold_in(rng, 2 * turn + 2)
        response = _continue(run, questions, answer_tokens, key, section.template, "New response:")
    return [
        {
            "prompt": text,
            "first": one,
            "revised": last,
            "principle": p["critique"],
            "criticism": f["criticism"],
        }
        for text, one, last, p, f in zip(asked, first, response, drawn, fields, strict=True)
        if one.strip() and last.strip()
    ]


def _continue(run: Run, texts, max_tokens: int, key, template: bool, cue: str = "") -> list[str]:
    """One sample of the base for each text; template: as a message of the user, else the text with a cue after it."""
    tokenizer, limit = run.tokenizer, run.model.config.max_position - max_tokens
    if template:
        texts = [[{"role": "user", "content": text}] for text in texts]
    elif cue:
        texts = [f"{text}\n{cue}" for text in texts]
    ids = [tokenizer.encode_prompt(text, limit) for text in texts]
    length = min(limit, -(-max(map(len, ids)) // SHAPE) * SHAPE)
    sampling = dataclasses.replace(run.sampling(1), max_new_tokens=max_tokens)
    with meshes.activate(run.mesh):
        arrays = run.put(pad_prompts(ids, length, tokenizer.pad_id))
        # run.base is kept by the run, so it is not asked for before an sft to come.
        base = run.base if run.has_role("sft") else run.raw_base
        batch = rollout.sample(run.network(), base, Role(), arrays, key, sampling)
    return [said for (said,) in rollout.texts(tokenizer, batch)]


def _filled(template: str, fields: dict) -> str:
    """Names in braces of the template alone: braces in what a model wrote are text."""
    for name in ("prompt", "response", "criticism", "critique", "revision"):
        template = template.replace("{" + name + "}", f"\0{name}\0")
    return "".join(fields[part] if i % 2 else part for i, part in enumerate(template.split("\0")))


def _write(path: str, rows, more) -> None:
    writing.append_batch(path + ".new", 0, [{"prompt": row["prompt"]} | more(row) for row in rows])
    writing.finish(path + ".new", path)


def _shown(rows):
    return [
        {"prompt": readable(row["prompt"]), "completion": row[name].strip()}
        for row in rows[:3]
        for name in ("first", "criticism", "revised")
    ]
