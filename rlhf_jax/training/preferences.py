"""Preferences with a known truth: samples of the base, judged by a gold reward through noise (feedback.py).

As in Gao et al. 2022, "Scaling laws for reward model overoptimization", arXiv:2210.10760. What is said of them, pairs
or labels or ratings or rankings, is what the run's kind of reward model reads. Written batch by batch, so that a killed
run goes on."""

import os

import jax

from rlhf_jax.data import writing
from rlhf_jax.data.batching import pad_prompts
from rlhf_jax.data.formats import readable
from rlhf_jax.errors import InputError
from rlhf_jax.models.roles import Role
from rlhf_jax.parallel import hosts
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.rewards import rules
from rlhf_jax.training import feedback, rollout
from rlhf_jax.training.algorithms.reward_models import feedback_of
from rlhf_jax.training.labelling import Labeller
from rlhf_jax.training.run import Run

FILES = {"train": "preferences.jsonl", "held_out": "preferences_held_out.jsonl"}
# Pairs of the same samples, for the gate of a multi-objective reward model.
GATE_FILES = {"train": "gate_preferences.jsonl", "held_out": "gate_preferences_held_out.jsonl"}


def kind_of(run: Run) -> str:
    """Of the records that the reward model in the config reads; pairs where there is none."""
    if "reward_model" not in run.config:
        return "pairwise"
    return feedback_of(run.config.reward_model.kind, run.config.reward_model.objective)


def files_of(run: Run) -> list[str]:
    gated = kind_of(run) == "multi_objective"
    return [*FILES.values(), *(GATE_FILES.values() if gated else ())]


def make(run: Run) -> None:
    """Writes both files (and those of the gate) with the gold rewards beside the feedback."""
    section, data = run.config.preferences, run.config.data
    if run.config.gold not in rules.RULES and not section.labeller:
        raise InputError(
            f"config.gold is {run.config.gold!r}; making preferences needs one of {', '.join(rules.RULES)}. "
            "Or name a judge in config.preferences.labeller; or give your own with config.data.preferences and leave "
            "the stage out."
        )
    wanted = {"train": section.num_pairs, "held_out": data.held_out_pairs}
    for name, count in wanted.items():
        if count and not run.encoded_prompts[name]:
            raise InputError(
                f"there are no {name} prompts to make {count} pairs of; raise config.data.held_out_prompts (at most a "
                "fifth of the prompts is held out) or set config.data.held_out_pairs=0."
            )
    kind = kind_of(run)
    samples = {"ranking": section.ranking_size}.get(kind, 2)
    if section.labeller:
        labeller = Labeller(section.labeller, kind, rules.RULES.get(run.config.gold), run.mesh)
        for name, count in wanted.items():
            _make_file(run, name, FILES[name], count, 2, labeller.rows)
        return
    taste = feedback.Taste(
        run.config.gold,
        rules.RULES[run.config.gold],
        section.coin_scale,
        section.accept_above,
        tuple(section.aspects),
        section.missing_ratings,
    )
    if kind == "multi_objective":  # the same samples; these first, as the others say that the stage is done
        for name, count in wanted.items():
            _make_file(run, name, GATE_FILES[name], count, 2, said_by(feedback.pair, taste, run, name))
    for name, count in wanted.items():
        # As many samples whatever is said of them.
        judge = said_by(feedback.FEEDBACK[kind], taste, run, name)
        _make_file(run, name, FILES[name], 2 * count // samples, samples, judge)


def said_by(judge, taste: feedback.Taste, run: Run, name: str):
    """(prompt, completions) of a batch -> rows. judge: of feedback.FEEDBACK."""

    def rows(asked: list[tuple], number: int) -> list[dict]:
        found = []
        for prompt, texts in asked:
            found += judge(taste, prompt, texts, (run.config.seed, name, number, len(found)))
        return found

    return rows


def _make_file(run: Run, name: str, file: str, count: int, samples: int, rows_of) -> None:
    """count: of prompts, each with `samples` samples. rows_of(asked, number of the batch) -> rows."""
    final = run.path(file)
    if hosts.from_first(os.path.exists(final)):
        return
    partial, size = final + ".partial", run.config.preferences.batch_size
    num_batches = -(-count // size)
    done = hosts.from_first(writing.keep_whole_batches(partial) if hosts.is_first() else None)
    network, sampling = run.network(), run.sampling(samples)
    rng = jax.random.fold_in(run.rng("preferences"), list(FILES).index(name))
    prompts = run.encoded_prompts[name]
    for number in range(done, num_batches):
        run.stop.check(f"preferences ({name}), batch {number} of {num_batches}")
        # Every prompt once before any twice; a later visit draws other samples.
        chosen = [prompts[(number * size + i) % len(prompts)] for i in range(size)]
        with meshes.activate(run.mesh):
            ids = run.put(pad_prompts([ids for _, ids in chosen], run.prompt_length, run.tokenizer.pad_id))
            batch = rollout.sample(network, run.base, Role(), ids, jax.random.fold_in(rng, number), sampling)
        made = zip(chosen, rollout.texts(run.tokenizer, batch), strict=True)
        asked = [(prompt.text, texts) for (prompt, _), texts in made if all(text.strip() for text in texts)]
        rows = rows_of(asked, number)
        if hosts.is_first():
            writing.append_batch(partial, number, rows)
        if name == "train" and number in (0, num_batches - 1):
            run.console.samples(
                f"samples of the base, batch {number + 1}", _shown(rows), run.config.logging.num_samples
            )
        run.console.note(f"preferences ({name}): batch {number + 1} of {num_batches}, {len(rows)} rows")
    hosts.once(lambda: writing.finish(partial, final))


def _shown(rows):
    """(prompt, completion, gold reward) of the first few."""
    told = []
    for row in rows[:4]:
        prompt = row["input_text"] if "input_text" in row else row["prompt"]
        if "chosen" in row:
            texts = [(row["chosen"], row.get("gold_0")), (row["rejected"], row.get("gold_1"))]
        elif "choice" in row:
            texts = [(row[f"candidate_{i}"], row[f"gold_{i}"]) for i in (0, 1)]
        elif "completions" in row:
            texts = zip(row["completions"], row["gold"], strict=True)
        else:
            texts = [(row["completion"], row["gold"])]
        told += [
            {"prompt": readable(prompt), "completion": text, "gold_reward": gold} for text, gold in texts
        ]
    return told[:6]
