"""One self-contained HTML page that tells a newcomer what a run did and whether to believe it.

The verdict comes first, then the figures and samples it rests on. Reads files only, each optional: what is
absent is left out of the page. Knows nothing of how the run was made, of HTML or of drawing."""

import json
import os

import numpy as np

from rlhf_jax.evaluation import as_list, curves, gate_page, is_number, load_run, page
from rlhf_jax.evaluation.monitors import warning_signs
from rlhf_jax.evaluation.verdict import GOLD, PROXY, change_of, mean, verdict

SIDE_BY_SIDE = 20  # prompts shown, the first ones of the file
MOMENTS, SAMPLES_A_MOMENT = 6, 3  # samples through training

# The parts of a step, time/... of metrics.jsonl, as the page calls them.
PARTS = {
    "rollout": "sampling",
    "score": "scoring",
    "update": "update",
    "evaluate": "evaluation",
    "other": "idle",
}

# What a kind of reward model is trained on, where that is not pairs.
RECORDS = {"classification": "labels", "regression": "ratings", "ranking": "rankings"}


def write_report(workdir, kl_limit=10.0):
    """Writes workdir/report.html from the files in workdir.
    Args: kl_limit: nats a completion; the page warns where the tuned model is further from its start.
    Returns: its path."""
    run = load_run(workdir)
    findings = warning_signs(run, kl_limit=kl_limit)
    sections = [
        ("changes", "What changed", _changes(run)),
        ("signs", "Warning signs", _signs(findings)),
        ("gate", gate_page.TITLE, gate_page.section(run.gate)),
        *(_policy_section(run, stage) for stage in run.rl_stages()),
        ("spread", "Before and after, completion by completion", _figures(curves.distributions(run))),
        ("samples", "Samples side by side", _side_by_side(run)),
        *_through_training(run),
        ("reward-model", "The reward model", _reward_model(run)),
        *_other_stages(run),
        ("time", "Time and memory", _time(run)),
        ("details", "Details", _details(run)),
    ]
    sections = [section for section in sections if section[2]]
    body = [verdict(run, findings), _contents(sections)]
    body += [
        f'<section id="{name}"><h2>{page.escape(title)}</h2>\n{text}\n</section>'
        for name, title, text in sections
    ]
    name = os.path.basename(os.path.abspath(run.workdir))
    path = os.path.join(run.workdir, "report.html")
    text = page.document(f"Run report: {name}", "\n".join(part for part in body if part))
    with open(path + ".new", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(path + ".new", path)  # a reader never sees half a page
    return path


def _contents(sections):
    links = "".join(f'<a href="#{name}">{page.escape(title)}</a>' for name, title, _ in sections)
    return f"<nav>{links}</nav>" if len(sections) > 2 else ""


def _changes(run):
    rows = []
    gold_name = run.evaluation.get("gold_name")
    for name, metric, unit in (
        (PROXY, "reward", "reward units"),
        (GOLD, "gold_reward", gold_name or "gold units"),
        ("Completion length", "completion_length", "tokens"),
        ("Ended by themselves", "finished", "share of completions"),
    ):
        change = change_of(run, metric)
        if change is not None:
            interval = f"{page.number(change[2], signed=True)}" + (
                f" ± {page.number(change[3])}" if change[3] is not None else ""
            )
            cells = [page.cell(name), page.number_cell(change[0]), page.number_cell(change[1])]
            rows.append([*cells, f'<td class="number">{interval}</td>', page.cell(unit, "muted")])
    kl = mean(run.evaluated("tuned", "kl"))
    if kl is not None:
        cells = [
            page.cell("Distance from the starting model (KL)"),
            page.number_cell(0.0),
            page.number_cell(kl),
        ]
        rows.append(
            [
                *cells,
                f'<td class="number">{page.number(kl, signed=True)}</td>',
                page.cell("nats a completion", "muted"),
            ]
        )
    if not rows:
        return ""
    lead = (
        "Means over the same held-out prompts, before and after tuning; ± is a 95% interval of the change, "
        "prompt by prompt. The reward was trained on, so its rise alone proves little."
    )
    if gold_name:
        lead += " The true reward was only measured: it tells whether the rise is real."
    head = [("", ""), ("before", "number"), ("after", "number"), ("change", "number"), ("unit", "")]
    return f'<p class="lead">{page.escape(lead)}</p>{page.table(head, rows)}{_sampling_note(run)}'


def _sampling_note(run):
    sampling = run.evaluation.get("sampling")
    if not isinstance(sampling, dict) or not sampling:
        return ""
    said = ", ".join(f"{key} {value}" for key, value in sampling.items())
    how = "Decoded by beam search" if "num_beams" in sampling else "Sampled"
    return f'<p class="muted">{how} with {page.escape(said)}.</p>'


def _signs(findings):
    if not findings:
        return ""
    badge = {"ok": "fine", "warn": "look", "bad": "bad"}
    lead = "Ways in which such runs go wrong, looked for in the numbers of this one; the worst first."
    rows = "\n".join(
        f'<div class="sign"><span class="badge {one.verdict}">{badge[one.verdict]}</span>'
        f"<b>{page.escape(one.name)}</b><span>{page.escape(one.sentence)}</span></div>"
        for one in findings
    )
    return f'<p class="lead">{lead}</p>\n{rows}'


def _figures(figures):
    if not figures:
        return ""
    made = "".join(page.figure(one.title, one.caption, one.svg) for one in figures)
    return f'<div class="figures">{made}</div>'


def _policy_section(run, stage):
    lead = "Pale: single steps. Bold: running mean. Each picture says below what to look for."
    figures = _figures(curves.stage_curves(run, stage))
    against = curves.reward_against_kl(run, stage)
    if against:
        figures += page.figure(against.title, against.caption, against.svg, wide=True)
    return (
        _anchor(stage),
        f"Training the policy ({stage})",
        f'<p class="lead">{lead}</p>{figures}' if figures else "",
    )


def _anchor(stage):
    return "stage-" + "".join(c if c.isascii() and c.isalnum() else "-" for c in stage)


def _other_stages(run):
    for stage in run.stages():
        if stage not in run.rl_stages() and stage != "reward_model":
            title = "Supervised fine-tuning" if stage == "sft" else f"Stage {stage}"
            yield _anchor(stage), title, _figures(curves.stage_curves(run, stage))


def _reward_model(run):
    data = run.reward_model
    said = []
    if is_number(data.get("accuracy")):
        pairs = f" {data['held_out_pairs']}" if is_number(data.get("held_out_pairs")) else ""
        said.append(f"On{pairs} held-out pairs it agrees with {100 * data['accuracy']:.1f}% of the labels")
        if is_number(data.get("ceiling")):
            said[-1] += (
                f", where {100 * data['ceiling']:.1f}% is the best possible because the labels are noisy"
            )
        said[-1] += "."
    if is_number(data.get("gold_accuracy")):
        said.append(
            f"It ranks {100 * data['gold_accuracy']:.1f}% of pairs as the true reward does, ties left out."
        )
    if is_number(data.get("train_pairs")):
        said.append(f"Trained on {data['train_pairs']:,} {RECORDS.get(data.get('kind'), 'pairs')}.")
    figures = _figures(curves.stage_curves(run, "reward_model") + curves.reward_model_quality(run))
    if not said and not figures:
        return ""
    lead = "It stands in for people: everything after it is only as good as this model."
    return f'<p class="lead">{lead}</p><p>{page.escape(" ".join(said))}</p>{figures}'


def _side_by_side(run):
    sides = (run.untuned, run.tuned)
    if not run.tuned:
        return ""
    scores = {
        (side, name): run.evaluated(side, name)
        for side in ("untuned", "tuned")
        for name in ("reward", "gold_reward", "kl")
    }
    value = lambda side, name, i: float(scores[side, name][i]) if i < len(scores[side, name]) else None
    chosen = range(min(SIDE_BY_SIDE, len(run.tuned)))
    has_gold, has_kl = len(scores["tuned", "gold_reward"]) > 0, len(scores["tuned", "kl"]) > 0
    has_reward = len(scores["tuned", "reward"]) > 0
    head = [("prompt", "prompt"), *([("before", "")] if sides[0] else []), ("after", "")]
    head += [("Δ reward", "number")] * has_reward + [("Δ true reward", "number")] * has_gold
    head += [("KL, nats", "number")] * has_kl
    rows = []
    for i in chosen:
        cells = [f'<td class="text">{page.words(run.tuned[i][0])}</td>']
        for side, css, answers in (("untuned", "before", sides[0]), ("tuned", "after", sides[1])):
            if answers:
                text = answers[i][1] if i < len(answers) else ""
                cells.append(f'<td class="text {css}">{page.words(text)}{_chips(value, side, i)}</td>')
        for shown, name in ((has_reward, "reward"), (has_gold, "gold_reward")):
            if shown:
                both = value("tuned", name, i), value("untuned", name, i)
                cells.append(page.number_cell(None if None in both else both[0] - both[1], signed=True))
        if has_kl:
            cells.append(page.number_cell(value("tuned", "kl", i)))
        rows.append(cells)
    lead = (
        f"The first {len(rows)} of {len(run.tuned)} held-out prompts, not picked. Click a column of numbers "
        "to sort by it. Read for sense, not only for score: repeated phrases and forced cheer are what "
        "reward hacking looks like."
    )
    return f'<p class="lead">{page.escape(lead)}</p>{page.table(head, rows, "samples sortable")}'


def _chips(value, side, i):
    named = (("learned", value(side, "reward", i)), ("true", value(side, "gold_reward", i)))
    said = " · ".join(f"{name} {page.number(v, signed=True)}" for name, v in named if v is not None)
    return f'<div class="chips">{said}</div>' if said else ""


def _through_training(run):
    for stage, rows in run.completions.items():
        rows = [row for row in rows if is_number(row.get("step")) and "completion" in row]
        steps = sorted({row["step"] for row in rows})
        if not steps:
            continue
        shown = [steps[i] for i in sorted(set(np.linspace(0, len(steps) - 1, MOMENTS).round().astype(int)))]
        names = [
            name for name in ("reward", "gold_reward", "kl") if any(is_number(row.get(name)) for row in rows)
        ]
        titles = {"reward": "reward", "gold_reward": "true reward", "kl": "KL, nats"}
        head = [("step", "number"), ("prompt", "prompt"), ("completion", "")]
        head += [(titles[name], "number") for name in names]
        body = []
        for step in shown:
            for row in [row for row in rows if row["step"] == step][:SAMPLES_A_MOMENT]:
                numbers = [
                    page.number_cell(row[name] if is_number(row.get(name)) else None) for name in names
                ]
                texts = [
                    f'<td class="text">{page.words(row.get(name, ""))}</td>'
                    for name in ("prompt", "completion")
                ]
                body.append([page.number_cell(step), *texts, *numbers])
        lead = "What the policy wrote along the way, early to late: the same story as the curves, in words."
        text = f'<p class="lead">{lead}</p>{page.table(head, body, "samples")}'
        yield f"through-{_anchor(stage)}", f"Samples through training ({stage})", text


def _time(run):
    phases = [row for row in as_list(run.timing.get("phases")) if isinstance(row, list) and len(row) >= 2]
    phases = [(str(row[0]), float(row[1])) for row in phases if is_number(row[1])]
    memory, steps = run.timing.get("peak_memory_bytes"), _steps(run)
    if not phases and not is_number(memory):
        return steps
    total = sum(seconds for _, seconds in phases)
    said = f"{_duration(total)} in all." if phases else ""
    said += f" Peak memory {memory / 2**30:.2f} GiB." if is_number(memory) else ""
    longest = max((seconds for _, seconds in phases), default=1.0) or 1.0
    bars = "".join(
        f"<span>{page.escape(name)}</span>"
        f'<span class="bar"><i style="width:{100 * seconds / longest:.1f}%"></i></span>'
        f'<span class="seconds">{_duration(seconds)}</span>'
        for name, seconds in phases
    )
    return f'<p class="lead">{said}</p><div class="time">{bars}</div>{steps}'


def _steps(run):
    """What a step of each stage takes and where the time goes. Of all but the first step, which compiles."""
    rows = [row for stage in run.stages() if (row := _stage_times(run, stage)) is not None]
    if not rows:
        return ""
    lead = (
        "A step in seconds and where they go, the first step, which compiles, left out. Idle: the devices had nothing "
        "to do until the next step began."
    )
    if any(mfu is not None for *_, mfu in rows):
        source = run.timing.get("peak_flops_source")
        of = f" ({source})" if isinstance(source, str) else ""
        lead += (
            " MFU, model FLOPs utilisation: the arithmetic that no program could leave out, as a share of what the "
            f"devices{of} reach when they only multiply matrices; evaluation is not in it."
        )
    share = lambda x: page.cell("–" if x is None else f"{100 * x:.{0 if x >= 0.0995 else 1}f}%", "number")
    body = [
        [
            page.cell(stage),
            page.number_cell(seconds),
            *map(share, shares),
            page.number_cell(speed),
            share(mfu),
        ]
        for stage, seconds, shares, speed, mfu in rows
    ]
    names = ("seconds a step", *PARTS.values(), "tokens/s", "MFU")
    table = page.table([("stage", ""), *((name, "number") for name in names)], body)
    return f'<h3>A step of each stage</h3><p class="lead">{page.escape(lead)}</p>{table}'


def _stage_times(run, stage):
    """(stage, seconds a step, share of each of PARTS or None, tokens a second, MFU or None); None: nothing is known."""
    of = lambda name: dict(zip(*run.series(stage, name), strict=True))
    seconds, speed, mfu = of("step_seconds"), of("tokens_per_second"), of("mfu")
    after = sorted(seconds)[1:]
    parts = {part: [of(f"time/{part}").get(step, 0.0) for step in after] for part in PARTS}
    total = sum(map(sum, parts.values()))
    if not total > 0:
        return None
    shares = [sum(times) / total if any(times) else None for times in parts.values()]
    whole = sum(seconds[step] for step in after)
    made = sum(seconds[step] * speed.get(step, 0.0) for step in after)
    # Of all the time together, so that a long step counts as long as it was.
    own = [sum(times) for times in zip(*(parts[part] for part in PARTS if part != "evaluate"), strict=True)]
    known = [(mfu[step], spent) for step, spent in zip(after, own, strict=True) if step in mfu]
    weight = sum(spent for _, spent in known)
    used = sum(share * spent for share, spent in known) / weight if weight > 0 else None
    return stage, whole / len(after), shares, made / whole if speed and whole > 0 else None, used


def _duration(seconds):
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def _details(run):
    parts = []
    if run.problems:
        items = "".join(f"<li>{page.escape(problem)}</li>" for problem in run.problems)
        parts.append(f"<p>Files of this run that could not be read in full:</p><ul>{items}</ul>")
    for title, value in (("Config", run.config), ("Environment: versions, devices, seed", run.environment)):
        if value:
            text = json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True)
            parts.append(page.details(title, f"<pre>{page.escape(text)}</pre>"))
    summary = run.evaluation.get("summary")
    if isinstance(summary, dict) and summary:
        rows = [
            [page.cell(name), page.cell(page.number(v) if is_number(v) else v, "number")]
            for name, v in summary.items()
        ]
        parts.append(page.details("All evaluation numbers", page.table([("", ""), ("", "number")], rows)))
    for stage in run.stages():
        rows = []
        for name in run.names(stage):
            _, values = run.series(stage, name) if name not in ("step", "time") else ((), ())
            if len(values):
                ends = (values[0], values[-1], values.min(), values.max())
                rows.append([page.cell(name), *map(page.number_cell, ends)])
        head = [("metric", ""), *((name, "number") for name in ("first", "last", "min", "max"))]
        if rows:
            parts.append(page.details(f"All metrics of {stage}", page.table(head, rows)))
    return "".join(parts)
