"""Judges a sweep from its runs' files: one table over seeds, at the end and at equal KL, and one figure.

Writes sweep.json, sweep.md, sweep.png and sweep.html. A run that failed or is not finished is named and takes no part
in the numbers. Knows nothing of how runs are started and of what their points change."""

import dataclasses
import json
import math
import os

import numpy as np

from rlhf_jax.evaluation import Run, drawing, is_number, load_run, page

MEASURES = ("kl", "reward", "gold_reward")
COLOURS = ("#2f7fd9", "#d9822b", "#2a9d6f", "#cf3f4a", "#8a5bd6", "#8c6d46", "#d65ba6", "#6f7d91")
NAMES = {
    "kl": "KL", "reward": "reward", "reward_change": "change", "gold_reward": "gold",
    "gold_reward_change": "change", "reward_at_kl": "reward at KL {}", "gold_reward_at_kl": "gold at KL {}",
}  # fmt: skip
# Student's t at 97.5 %, by degrees of freedom from 1.
T_QUANTILES = (12.7062, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.30600, 2.26216)


@dataclasses.dataclass(frozen=True)
class Result:
    """How one run of the sweep ended."""

    point: str
    seed: int
    workdir: str
    status: int | None  # 0: done; None: not finished; else the exit status it failed with
    problem: str = ""  # the last it said


def judge(results: list[Result]) -> dict:
    """The content of sweep.json: of each run and each point what was measured, and the KL of the comparison."""
    runs = [_measured(result) for result in results]
    done = [run for run in runs if run["status"] == 0]
    reaches = {id(run): max(run["curve"]["kl"]) for run in done if run["curve"]}
    comparable = {run["point"] for run in done if run["curve"]}
    equal_kl = min(reaches.values()) if len(comparable) > 1 and min(reaches.values()) > 0 else None
    for run in done:
        for name in MEASURES[1:]:
            if equal_kl is not None and run["curve"] and name in run["curve"]:
                run[f"{name}_at_kl"] = at_kl(run["curve"]["kl"], run["curve"][name], equal_kl)
    points = []
    for name in dict.fromkeys(run["point"] for run in runs):
        own = [run for run in runs if run["point"] == name]
        found = {m: interval([run[m] for run in own if run["status"] == 0 and m in run]) for m in NAMES}
        points.append(
            {"name": name, "done": sum(run["status"] == 0 for run in own), "of": len(own)}
            | {measure: value for measure, value in found.items() if value}
        )
    return {"equal_kl": equal_kl, "points": points, "runs": runs, "notes": _notes(runs, equal_kl)}


def _measured(result):
    found = dataclasses.asdict(result) | {"curve": {}}
    if result.status != 0:
        return found
    run = load_run(result.workdir)
    summary = run.evaluation.get("summary")
    summary = summary if isinstance(summary, dict) else {}
    for name in MEASURES:
        before, after = summary.get(f"untuned/{name}"), summary.get(f"tuned/{name}")
        if is_number(after):
            found[name] = after
            if is_number(before) and name != "kl":
                found[f"{name}_change"] = after - before
    found["curve"] = training_curve(run)
    return found


def training_curve(workdir: Run) -> dict:
    """{"kl", "reward", "gold_reward": lists over the steps of the last online stage}; empty without such a stage.

    `kl` is unbiased whatever kl_kind is charged (that is another metric), so points of any kind can be compared."""
    stages = [stage for stage in workdir.rl_stages() if "completion_length" in workdir.names(stage)]
    if not stages:
        return {}
    series = {name: workdir.series(stages[-1], name) for name in MEASURES}
    series = {name: pair for name, pair in series.items() if len(pair[0])}
    common = sorted(set.intersection(*(set(steps) for steps, _ in series.values())))
    if len(common) < 2 or len(series) < 2:
        return {}
    kept = {name: values[np.isin(steps, common)] for name, (steps, values) in series.items()}
    return {name: drawing.smooth(values).tolist() for name, values in kept.items()}


def at_kl(kl: list, values: list, target: float) -> float | None:
    """The value where the curve first reaches the KL, on the line between two steps; None if it never does."""
    for i, reached in enumerate(kl):
        if reached >= target:
            if i == 0:
                return values[0]
            share = (target - kl[i - 1]) / (reached - kl[i - 1])
            return values[i - 1] + share * (values[i] - values[i - 1])
    return None


def interval(values: list) -> dict | None:
    """{"mean", "half_width", "count"}: mean and half width of its 95 % t interval, None with one value."""
    values = [value for value in values if is_number(value)]
    if not values:
        return None
    count, half = len(values), None
    if count > 1:
        half = float(t_quantile(count - 1) * np.std(values, ddof=1) / math.sqrt(count))
    return {"mean": float(np.mean(values)), "half_width": half, "count": count}


def t_quantile(freedom: int) -> float:
    """Student's t at 97.5 %; from 10 degrees of freedom by Cornish and Fisher's expansion, right to 0.0005."""
    if freedom <= len(T_QUANTILES):
        return T_QUANTILES[freedom - 1]
    z = 1.959964
    terms = (z, (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96,
             (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)  # fmt: skip
    return sum(term / freedom**power for power, term in enumerate(terms))


def _notes(runs, equal_kl) -> list[str]:
    notes = [
        "Means over seeds of the held-out prompts, ± the half width of a 95 % t interval (none with one seed)."
    ]
    notes.append(
        "KL in nats a completion; change: from before tuning; gold: the true reward, never trained on."
    )
    if equal_kl is not None:
        notes.append(
            f"At KL {equal_kl:.3g} nats, the most that the run which moved least has reached: on each run's training "
            "batches, smoothed as in its report, where it first gets there."
        )
    without = [r["point"] for r in runs if r["status"] == 0 and not r["curve"]]
    if without:
        names = ", ".join(dict.fromkeys(without))
        notes.append(
            f"Without a curve over KL: {names}; nothing was sampled in training, or KL not measured."
        )
    for run in runs:
        if run["status"] != 0:
            how = "not finished" if run["status"] is None else f"failed with status {run['status']}"
            notes.append(f"{run['point']}, seed {run['seed']}: {how}. {run['problem']}".strip())
    return notes


def table(judged: dict) -> tuple[list[str], list[list[str]]]:
    """(heads, rows of strings), without the measures that no run has."""
    shown = [name for name in NAMES if any(name in point for point in judged["points"])]
    at = "" if judged["equal_kl"] is None else f"{judged['equal_kl']:.3g}"
    heads = ["point", "seeds", *(NAMES[name].format(at) for name in shown)]
    rows = []
    for point in judged["points"]:
        seeds = f"{point['done']}" if point["done"] == point["of"] else f"{point['done']} of {point['of']}"
        rows.append([point["name"], seeds, *(_told(point.get(n), n.endswith("_change")) for n in shown)])
    return heads, rows


def _told(value, signed=False):
    """Two decimals, or as many as show the second digit of the interval (without one, the third of the mean)."""
    if value is None:
        return "-"
    size = value["half_width"] or (abs(value["mean"]) / 10 if value["half_width"] is None else 0) or 1.0
    decimals = min(max(1 - math.floor(math.log10(size)), 2), 4)
    text = f"{value['mean']:{'+' if signed else ''}.{decimals}f}"
    return text if value["half_width"] is None else f"{text} ± {value['half_width']:.{decimals}f}"


def write(directory: str, judged: dict, title: str, about: dict) -> None:
    """sweep.json, sweep.md, sweep.html and, where a run has something to draw, sweep.png. about: goes into the json."""
    heads, rows = table(judged)
    _write(directory, "sweep.json", json.dumps(about | judged, indent=1))
    flat = lambda text: " ".join(str(text).split()).replace("|", "\\|")
    line = lambda cells: "| " + " | ".join(map(flat, cells)) + " |"
    text = [f"# {flat(title)}", "", line(heads), line(["---"] * len(heads)), *map(line, rows), ""]
    panels = _panels(judged["runs"])
    if panels:
        text += ["![reward against KL](sweep.png)", ""]
        _save_png(os.path.join(directory, "sweep.png"), judged, panels)
    _write(directory, "sweep.md", "\n".join([*text, *(f"- {flat(note)}" for note in judged["notes"]), ""]))
    cells = [[page.cell(row[0]), *(page.cell(text, "number") for text in row[1:])] for row in rows]
    parts = [page.table([(head, "number" if i else "") for i, head in enumerate(heads)], cells)]
    parts += [f"<p class='muted'>{page.escape(note)}</p>" for note in judged["notes"]]
    body = [f"<h1>{page.escape(title)}</h1>", f"<section><h2>By point</h2>{''.join(parts)}</section>"]
    if panels:
        draw = lambda axes, colours: _draw(np.atleast_1d(axes), colours, judged, panels)
        svg = drawing.svg(draw, "sweep", rows=len(panels), width=6.5, height=2.7)
        caption = (
            "Thin lines: the training batches of each seed. Diamonds: held-out prompts, mean over the seeds. Higher at "
            "the same KL is better. The axis is spaced by the square root of KL, as in Gao et al. 2022."
        )
        figure = page.figure("What distance buys, point by point", caption, svg, wide=True)
        body.append(f"<section>{figure}</section>")
    _write(directory, "sweep.html", page.document(title, "\n".join(body)))


def _panels(runs):
    """The rewards that some run has beside a KL."""
    drawn = lambda run, name: name in run["curve"] or ("kl" in run and name in run)
    return [name for name in MEASURES[1:] if any(drawn(run, name) for run in runs)]


def _draw(axes, colours, judged, panels):
    furthest = 0.02
    for ax, name in zip(axes, panels, strict=True):
        for number, point in enumerate(judged["points"]):
            colour = COLOURS[number % len(COLOURS)]
            style = ("-", "--", ":")[number // len(COLOURS) % 3]
            label = drawing.plain(point["name"])
            for run in judged["runs"]:
                if run["point"] == point["name"] and name in run["curve"]:
                    x = np.maximum(run["curve"]["kl"], 0.0)
                    ax.plot(
                        x, run["curve"][name], style, color=colour, linewidth=0.9, alpha=0.75, label=label
                    )
                    furthest, label = max(furthest, x.max()), None
            if "kl" in point and name in point:
                x, y = max(point["kl"]["mean"], 0.0), point[name]["mean"]
                marks = dict(s=38, marker="D", color=colour, edgecolors=colours["text"], linewidths=0.6)
                ax.scatter([x], [y], zorder=3, label=label, **marks)
                furthest = max(furthest, x)
        ax.set_ylabel("learned reward" if name == "reward" else "true reward")
        if judged["equal_kl"] is not None:
            ax.axvline(judged["equal_kl"], color=colours["muted"], linestyle=":", linewidth=1.0)
    drawing.legend(axes[0], colours)
    drawing.root_scale(axes, furthest)
    axes[-1].set_xlabel(drawing.KL_AXIS)


def _save_png(path, judged, panels):
    import matplotlib  # here, because it takes half a second
    from matplotlib.figure import Figure

    colours = {role: pair[1] for role, pair in drawing.ROLES.items()}
    with matplotlib.rc_context(drawing.style(colours, size=9.0)):
        figure = Figure(figsize=(7.0, 3.2 * len(panels)), layout="constrained", facecolor="white")
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        _draw(axes, colours, judged, panels)
        figure.savefig(path + ".new", format="png", dpi=130)
    os.replace(path + ".new", path)


def _write(directory, name, text):
    path = os.path.join(directory, name)
    with open(path + ".new", "w", encoding="utf-8", errors="replace") as file:
        file.write(text)
    os.replace(path + ".new", path)
