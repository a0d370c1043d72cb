"""Judges a finished (or running) workdir from its files: warning signs, figures, one HTML page.

Lives here: Run and load_run() (what a workdir holds), side_by_side.py and reward_quality.py (measure),
monitors.py (signs of reward hacking), curves.py (what the figures show) and drawing.py (how), page.py (HTML and CSS),
verdict.py (the top of the page) and report.py (the rest of it). Of a reward model before RL: gate_measures.py and
label_noise.py (measure), gate.py (judges), gate_page.py (shows).
May import: every room below training. What reads files only could run on another machine.
Never: changes weights, imports training, trusts the text of a model, fails because a file is missing."""

import dataclasses
import glob
import json
import os
import warnings

import numpy as np


@dataclasses.dataclass(frozen=True)
class Run:
    """The files of a workdir, each empty if it is not there."""

    workdir: str
    config: dict
    metrics: list  # of dicts, as in metrics.jsonl
    completions: dict  # stage -> list of dicts
    untuned: list  # [(prompt, completion)]
    tuned: list
    evaluation: dict
    reward_model: dict
    environment: dict
    timing: dict
    problems: tuple  # sentences on files that could not be read
    gate: dict = dataclasses.field(default_factory=dict)

    def stages(self):
        """Stage names in the order in which they ran."""
        return list(dict.fromkeys(str(row["stage"]) for row in self.metrics if "stage" in row))

    def rl_stages(self):
        """Stages with a `kl` metric, whatever the algorithm is called."""
        return [stage for stage in self.stages() if len(self.series(stage, "kl")[0])]

    def names(self, stage):
        """The metrics that a stage logged at least once."""
        return list(dict.fromkeys(n for row in self.metrics if row.get("stage") == stage for n in row))

    def series(self, stage, name):
        """(steps, values) as float arrays, sorted; without nulls; of a repeated step the last counts."""
        found = {}
        for row in self.metrics:
            if row.get("stage") == stage and is_number(row.get(name)) and is_number(row.get("step")):
                found[row["step"]] = row[name]
        steps = sorted(found)
        return np.array(steps, float), np.array([found[step] for step in steps], float)

    def evaluated(self, side, name):
        """A flat float array from evaluation.json, NaN where a value is null; empty if it is not there."""
        return to_array((self.evaluation.get(side) or {}).get(name))

    def paired(self, name):
        """(untuned, tuned) values of the prompts where both are known; empty arrays if there are none."""
        before, after = self.evaluated("untuned", name), self.evaluated("tuned", name)
        if len(before) != len(after):
            return before[np.isfinite(before)], after[np.isfinite(after)]
        both = np.isfinite(before) & np.isfinite(after)
        return before[both], after[both]

    def change(self, name):
        """(mean before, mean after, change, its standard error), or None where a side is not known.

        Values come prompt by prompt, once for each completion, so a column is a prompt. Completions of one
        prompt are not independent: the error is over prompts. It is None where prompts cannot be paired."""
        before, after = self.paired(name)
        if not len(before) or not len(after):
            return None
        error = None
        untuned, tuned = self.evaluated("untuned", name), self.evaluated("tuned", name)
        if len(untuned) == len(tuned):
            change = tuned - untuned
            prompts = self.evaluation.get("num_prompts")
            if isinstance(prompts, int) and 0 < prompts < len(change) and len(change) % prompts == 0:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", RuntimeWarning)  # a prompt without any score stays NaN
                    change = np.nanmean(change.reshape(-1, prompts), axis=0)
            change = change[np.isfinite(change)]
            error = float(change.std(ddof=1) / np.sqrt(len(change))) if len(change) > 1 else None
        return float(before.mean()), float(after.mean()), float(after.mean() - before.mean()), error


def load_run(workdir):
    """Everything that the report and the monitors read. Never fails on a file's content: see Run.problems."""
    problems = []
    path = lambda name: os.path.join(workdir, name)
    read_object = lambda name: _read_object(path(name), problems)
    completions = {
        os.path.splitext(os.path.basename(file))[0]: _read_lines(file, problems)
        for file in sorted(glob.glob(os.path.join(glob.escape(str(workdir)), "completions", "*.jsonl")))
    }
    answers = lambda name: [_answer(row) for row in _read_lines(path(name), problems)]
    evaluation, gate = read_object("evaluation.json"), read_object("gate.json")
    for side in ("untuned", "tuned"):
        if not isinstance(evaluation.get(side, {}), dict):
            evaluation = {**evaluation, side: {}}
    return Run(
        workdir=str(workdir),
        config=read_object("config.json"),
        metrics=_read_lines(path("metrics.jsonl"), problems),
        completions=completions,
        untuned=answers("eval_results_untuned.jsonl"),
        tuned=answers("eval_results_tuned.jsonl"),
        evaluation=evaluation,
        reward_model=read_object("reward_model.json"),
        environment=read_object("environment.json"),
        timing=read_object("timing.json"),
        problems=tuple(problems),
        gate=gate,
    )


def _read_object(path, problems):
    if not os.path.exists(path):
        return {}
    try:
        with open(path, "rb") as file:
            value = json.load(file)
        if isinstance(value, dict):
            return value
        problems.append(f"{os.path.basename(path)} is not a JSON object and was left out.")
    except (ValueError, OSError, RecursionError) as error:
        problems.append(f"{os.path.basename(path)} could not be read and was left out: {error}")
    return {}


def _read_lines(path, problems):
    """JSON objects, one a line. A torn last line is normal (the run may be writing); others are counted."""
    if not os.path.exists(path):
        return []
    rows, bad = [], 0
    try:
        with open(path, "rb") as file:
            lines = file.readlines()
    except OSError as error:
        problems.append(f"{os.path.basename(path)} could not be read and was left out: {error}")
        return []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif line.strip() and (number < len(lines) or line.endswith(b"\n")):
            bad += 1
    if bad:
        problems.append(f"{os.path.basename(path)}: {bad} damaged lines were left out.")
    return rows


def _answer(row):
    inputs = row.get("inputs")
    prompt = inputs.get("inputs_pretokenized", "") if isinstance(inputs, dict) else ""
    return str(prompt), str(row.get("prediction", ""))


def is_number(value):
    """True for a finite JSON number that a float can hold."""
    return isinstance(value, (int, float)) and abs(value) < 1e300  # False for NaN too


def as_list(value):
    """A JSON list; anything else, nothing included, counts as an empty one."""
    return value if isinstance(value, list) else []


def to_array(values):
    """A flat float array from JSON lists, nested or not, with NaN for what is not a number."""
    if not isinstance(values, (list, tuple)):
        return np.zeros(0)
    flat = []
    for value in values:
        if isinstance(value, (list, tuple)):
            flat.extend(to_array(value))
        else:
            flat.append(float(value) if is_number(value) else np.nan)
    return np.array(flat, float)
