"""The page on a reward model: can it be trusted? For somebody who has never trained one.

Takes the content of gate.json, each part of it optional, and gives HTML: a section of a run's report, or a page of its
own. Knows nothing of models, and nothing of thresholds: what is good or bad, gate.py has said."""

import os

import numpy as np

from rlhf_jax.evaluation import as_list, drawing, is_number, page
from rlhf_jax.evaluation.drawing import has_numbers

TITLE = "Can this reward model be trusted?"
LEAD = (
    "A reward model stands in for people: of two answers it should score the one higher that people prefer. RL then "
    "believes it blindly and follows its mistakes as eagerly as its insights, so it is examined first, on pairs that "
    "it was not trained on."
)
HEADLINES = {
    "pass": ("ok", "Yes: it passes"),
    "warn": ("warn", "With care: something needs a look"),
    "refuse": ("bad", "No: the gate refuses it"),
}
BADGES = {"pass": ("ok", "fine"), "warn": ("warn", "look"), "refuse": ("bad", "bad")}


def section(found: dict) -> str:
    """Banner, cards, figures and findings as HTML; empty where there is no verdict."""
    verdict = found.get("verdict")
    if not isinstance(verdict, str) or verdict not in HEADLINES:
        return ""
    css, headline = HEADLINES[verdict]
    measures = found.get("measures") if isinstance(found.get("measures"), dict) else {}
    banner = (
        f'<div class="verdict {css}"><p class="headline">{page.escape(headline)}</p>'
        f'<p class="summary">{page.escape(found.get("reason", ""))}</p>{_cards(measures)}</div>'
    )
    made = "".join(page.figure(*one) for one in figures(measures))
    shown = f'<div class="figures">{made}</div>' if made else ""
    return f'<p class="lead">{page.escape(LEAD)}</p>\n{banner}\n{_findings(found)}\n{shown}\n{_sources(measures)}'


def write(path: str, found: dict, name: str) -> str:
    """A page of its own, whole or not at all; returns `path`. name: of the workdir."""
    about = found.get("about") if isinstance(found.get("about"), dict) else {}
    said = " · ".join(f"{key.replace('_', ' ')}: {value}" for key, value in about.items())
    body = (
        f"<h1>Reward model · {page.escape(name)}</h1>\n<section><h2>{page.escape(TITLE)}</h2>\n"
        f'<p class="muted">{page.escape(said)}</p>{section(found)}</section>'
    )
    with open(path + ".new", "w", encoding="utf-8") as file:
        file.write(page.document(f"Reward model: {name}", body))
    os.replace(path + ".new", path)
    return path


def _number(measures, *keys):
    """measures[key][key] ...; None where it is not there or not a number."""
    value = measures
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if is_number(value) else None


def _percent(value):
    return f"{100 * value:.0f}%"


def _interval(measures, name):
    low, high = _number(measures, name, "low"), _number(measures, name, "high")
    return "" if low is None or high is None else f"{100 * low:.0f}-{_percent(high)} with 95% certainty"


def _cards(m):
    cards = []

    def card(name, value, form, note):
        if value is not None:
            cards.append(
                f'<div class="card"><div class="name">{page.escape(name)}</div><div class="value">{form(value)}</div>'
                f'<div class="note">{page.escape(note)}</div></div>'
            )

    card(
        "New pairs put in the right order",
        _number(m, "accuracy", "value"),
        _percent,
        _interval(m, "accuracy"),
    )
    card("The best possible", _number(m, "ceiling"), _percent, "the labels themselves are noisy")
    card("Training pairs in the right order", _number(m, "train_accuracy", "value"), _percent,
         "if far above: memorised")  # fmt: skip
    card(
        "Loss on new pairs", _number(m, "loss", "value"), page.number, "nats; a coin has 0.69, less is better"
    )
    card("Its certainty is off by", _number(m, "ece"), _percent, _by_chance(m))
    card(
        "Agrees with the true reward", _number(m, "gold", "accuracy", "value"), _percent, "which it never saw"
    )
    card("Goes with length", _number(m, "length_correlation", "within_pairs"),
         lambda x: page.number(float(x), signed=True), "rank correlation; 0: not at all, 1: it is a ruler")  # fmt: skip
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _by_chance(m):
    chance = _number(m, "ece_by_chance")
    return "" if chance is None else f"on average; {_percent(chance)} by chance alone"


def _findings(found):
    rows = []
    for one in as_list(found.get("findings")):
        if isinstance(one, dict) and str(one.get("verdict")) in BADGES:
            css, badge = BADGES[str(one["verdict"])]
            rows.append(
                f'<div class="sign"><span class="badge {css}">{badge}</span><b>{page.escape(one.get("name", ""))}</b>'
                f"<span>{page.escape(one.get('sentence', ''))}</span></div>"
            )
    return "\n".join(rows)


def _sources(m):
    rows = []
    for one in as_list(m.get("by_source")):
        if isinstance(one, dict) and _number(one, "accuracy", "value") is not None:
            low, high = _number(one, "accuracy", "low"), _number(one, "accuracy", "high")
            between = "" if None in (low, high) else f"{100 * low:.0f}-{_percent(high)}"
            cells = [page.cell(one.get("source", "")), page.number_cell(_number(one, "pairs"))]
            cells += [page.number_cell(_number(one, "accuracy", "value")), page.cell(between, "number")]
            rows.append(cells)
    if not rows:
        return ""
    head = [("source", ""), ("pairs", "number"), ("right", "number"), ("95% interval", "number")]
    return f"<h3>Source by source</h3>{page.table(head, rows)}"


# Figures


def figures(m: dict) -> list[tuple[str, str, str]]:
    """(title, caption, SVG) of each that the measures allow."""
    made = [_calibration(m), _by_length(m), _against_length(m), _train_and_held_out(m), _best_of_n(m)]
    return [one for one in made if one is not None]


def _calibration(m):
    rows = [row for row in as_list(m.get("calibration")) if has_numbers(row, 2)]
    if len(rows) < 2:
        return None
    caption = (
        "Does it know how sure it may be? Across: how likely it says one answer is to be preferred. Up: how often "
        "that answer was. Look for dots on the dotted diagonal. A curve flatter than that is too sure of itself; RL "
        "then chases differences that mean nothing. Larger dots stand for more pairs."
    )
    draw = lambda ax, colours: drawing.calibration(ax, colours, rows)
    return "Is it as often right as it says?", caption, drawing.svg(draw, "gate-calibration")


def _by_length(m):
    rows = []
    for one in as_list(m.get("by_length")):
        if isinstance(one, dict):
            numbers = [_number(one, "accuracy", key) for key in ("value", "low", "high")]
            if None not in numbers:
                rows.append((str(one.get("group", "")), _number(one, "pairs") or 0, *numbers))
    if not rows:
        return None
    longer = _number(m, "longer_wins", "value")

    def draw(ax, colours):
        for i, (_, _, value, low, high) in enumerate(rows):
            ax.plot([i, i], [low, high], color=colours["reward"], linewidth=6, alpha=0.25)
            ax.plot(i, value, color=colours["reward"], marker="o", markersize=6, linestyle="none")
        ax.axhline(0.5, color=colours["muted"], linestyle=":", linewidth=1.0, label="a coin")
        if longer is not None:
            label = f'rule "the longer wins" {longer:.2f}'
            ax.axhline(longer, color=colours["limit"], linestyle="--", linewidth=1.2, label=label)
        names = [f"{name.replace(' is ', chr(10) + 'is ').replace(' in ', chr(10) + 'in ')}\n{count:g} pairs"
                 for name, count, *_ in rows]  # fmt: skip
        ax.set_xticks(range(len(rows)), labels=[drawing.plain(name) for name in names])
        ax.set(ylabel="share in the right order", xlim=(-0.5, len(rows) - 0.5), ylim=(0, 1.02))
        drawing.legend(ax, colours)

    caption = (
        "Does it judge content, or count words? All three dots should be well above the dotted line of a coin; pale "
        "bars are 95% intervals. High on the right and low on the left means that it takes length for quality. The "
        'dashed line is what the plain rule "the longer one wins" gets on all pairs: a model has to beat it.'
    )
    return "Right also when the better answer is shorter?", caption, drawing.svg(draw, "gate-by-length")


def _against_length(m):
    sides = {}
    for side in ("rejected", "chosen"):
        points = as_list((m.get("points") or {}).get(side)) if isinstance(m.get("points"), dict) else []
        sides[side] = np.array([row[:2] for row in points if has_numbers(row, 2)], float).reshape(-1, 2)
    if min(map(len, sides.values())) < 2:
        return None

    def draw(ax, colours):
        for side, role in (("rejected", "before"), ("chosen", "after")):
            points = sides[side][:: -(-len(sides[side]) // (drawing.MAX_POINTS // 2))]
            shift = 0.1 if side == "chosen" else -0.1  # lengths are whole numbers: side by side, not on top
            ax.scatter(
                points[:, 1] + shift,
                points[:, 0],
                s=9,
                alpha=0.5,
                color=colours[role],
                linewidths=0,
                label=side,
            )
        ax.set(xlabel="length (tokens)", ylabel="score (reward units)")
        drawing.legend(ax, colours)

    caption = (
        "Each dot is an answer of the held-out pairs. Look for green above grey at every length. A cloud that climbs "
        "to the right as a whole says that long answers get more whatever they say, and a policy will find that out."
    )
    return "Score against length", caption, drawing.svg(draw, "gate-against-length")


def _train_and_held_out(m):
    points = m.get("points") if isinstance(m.get("points"), dict) else {}
    scale = _number(m, "scale") or 1.0
    rows = [
        [row[0] for row in as_list(points.get(side)) if has_numbers(row, 1)]
        for side in ("chosen", "rejected")
    ]
    train = np.array([x for x in as_list(points.get("train_margin")) if is_number(x)], float)
    if len(rows[0]) != len(rows[1]) or len(rows[0]) < 2 or len(train) < 2:
        return None
    held_out = scale * (np.array(rows[0], float) - np.array(rows[1], float))

    def draw(ax, colours):
        edges = np.linspace(0, 1, 21)
        for margin, label, role in ((held_out, "new pairs", "after"), (train, "training pairs", "before")):
            p = 1 / (1 + np.exp(-np.clip(margin, -500, 500)))
            share = np.histogram(p, edges)[0] / len(p)
            ax.stairs(share, edges, fill=True, color=colours[role], alpha=0.28)
            ax.stairs(share, edges, color=colours[role], linewidth=1.4, label=label)
        ax.axvline(0.5, color=colours["muted"], linestyle=":", linewidth=1.0)
        ax.set(
            xlabel="probability that it gives to the preferred answer", ylabel="share of pairs", xlim=(0, 1)
        )
        ax.margins(y=0.2)
        drawing.legend(ax, colours)

    caption = (
        "Left of the dotted line it has the order wrong. The two hills should look alike. Training pairs piled up at 1 "
        "while new ones spread out, or pile up at both ends, is learning by heart: sure, and no wiser."
    )
    return "Pairs it was trained on, and new ones", caption, drawing.svg(draw, "gate-train-held-out")


def _best_of_n(m):
    found = m.get("preview") if isinstance(m.get("preview"), dict) else {}
    ns = [n for n in as_list(found.get("n")) if is_number(n) and n > 0]
    curves = {}
    for name in ("proxy", "gold", "length"):
        values = [x for x in as_list(found.get(name)) if is_number(x)]
        errors = [x for x in as_list(found.get(f"{name}_error")) if is_number(x)]
        if len(values) == len(ns) >= 2:
            curves[name] = values, errors if len(errors) == len(ns) else [0.0] * len(ns)
    second = "gold" if "gold" in curves else "length"
    if "proxy" not in curves or second not in curves:
        return None
    labels = {"proxy": ("its reward\n(deviations)", "reward"), "gold": ("true reward", "gold"),
              "length": ("length\n(tokens)", "other")}  # fmt: skip

    def draw(axes, colours):
        for ax, name in zip(axes, ("proxy", second), strict=True):
            values, errors = map(np.array, curves[name])
            label, role = labels[name]
            ax.plot(ns, values, color=colours[role], linewidth=1.6, marker="o", markersize=3)
            band = 1.96 * errors
            ax.fill_between(ns, values - band, values + band, color=colours[role], alpha=0.15, linewidth=0)
            ax.set_xscale("log", base=2)
            ax.set_xticks(ns, labels=[f"{n:g}" for n in ns])
            ax.minorticks_off()
            ax.set_ylabel(label, color=colours[role])
        axes[-1].set_xlabel("n: how many samples the best is chosen from")

    caption = (
        "A glimpse of RL before RL: of n samples of the untrained policy take the one that the reward model likes "
        "best. The upper curve always rises. "
    )
    caption += (
        "The lower one, the true reward, should rise with it: where it turns down, the policy is being paid for the "
        "reward model's mistakes."
        if second == "gold"
        else "No true reward is known here, so watch the length: if it runs away as n grows, length is what pays."
    )
    caption += " Bands: 95% of the change from n = 1."
    return "What choosing by it would buy", caption, drawing.svg(draw, "gate-best-of-n", rows=2, height=1.35)
