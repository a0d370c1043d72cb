"""The top of the page: one headline, what happened in a few sentences, and the four or five numbers that matter.

Knows a run's held-out results and the warning signs found; nothing of the sections below."""

import os

import numpy as np

from rlhf_jax.evaluation import is_number, page

PROXY, GOLD = "Reward", "True reward"


def mean(values):
    """Of those that are finite; None if there are none."""
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else None


def change_of(run, name):
    """(before, after, change, half width of its 95% interval or None) over the held-out prompts, or None."""
    change = run.change(name)
    if change is None:
        return None
    before, after, difference, error = change
    return before, after, difference, None if error is None else 1.96 * error


def verdict(run, findings):
    """HTML: headline, summary, what kind of run it was, cards."""
    reward, gold = change_of(run, "reward"), change_of(run, "gold_reward")
    bad = [finding for finding in findings if finding.verdict == "bad"]
    warned = [finding for finding in findings if finding.verdict == "warn"]
    clear = lambda change: change is not None and change[2] > (change[3] or 0.0)
    if bad and clear(reward) and gold is not None and gold[2] < 0:
        css, headline = "bad", "Reward hacking: the learned reward rose, the true reward fell"
    elif bad:
        css, headline = "bad", "Do not trust this result before reading the warning signs"
    elif gold is not None:
        css, headline = (
            ("ok", "Tuning worked") if clear(gold) else ("warn", "No clear gain in the true reward")
        )
    elif reward is not None:
        css, headline = ("ok", "The reward rose") if clear(reward) else ("warn", "No clear gain in reward")
    else:
        css, headline = ("warn" if warned else "muted"), "Not evaluated on held-out prompts yet"
    if warned and css == "ok":
        headline += f", with {_count(len(warned), 'thing')} to look at"
    name = os.path.basename(os.path.abspath(run.workdir))
    return (
        f"<h1>Run report · {page.escape(name)}</h1>\n"
        f'<div class="verdict {css}"><p class="headline">{page.escape(headline)}</p>'
        f'<p class="summary">{page.escape(_summary(run, reward, gold, bad, warned))}</p>'
        f'<p class="muted">{page.escape(_story(run))}</p>{_cards(run, reward, gold)}</div>'
    )


def _summary(run, reward, gold, bad, warned):
    """The result in one or two sentences of plain text."""
    parts = []
    if reward is not None:
        moved = "raised" if reward[2] > 0 else "lowered"
        said = f"Tuning {moved} the reward it was trained on from {_short(reward[0])} to {_short(reward[1])}"
        if gold is not None:
            gold_name = run.evaluation.get("gold_name") or "the gold reward"
            verb = "rose" if gold[2] > 0 else "fell"
            said += f", and the true reward, {gold_name}, which training never saw, {verb} from "
            said += f"{_short(gold[0])} to {_short(gold[1])}"
            said += f" (change {_short(gold[2])} ± {_short(gold[3], False)})" if gold[3] is not None else ""
        count = run.evaluation.get("num_prompts") or len(run.tuned)
        said += f", on {count} held-out prompts" if count else ""
        kl = mean(run.evaluated("tuned", "kl"))
        most = "at most " if run.evaluation.get("best_of") else ""
        said += (
            f", at a distance of {most}{page.number(kl)} nats from the starting model"
            if kl is not None
            else ""
        )
        parts.append(f"{said}.")
    elif run.stages():
        last = run.stages()[-1]
        steps = [
            row["step"] for row in run.metrics if row.get("stage") == last and is_number(row.get("step"))
        ]
        parts.append(f"The last stage in the logs is {last}, at step {max(steps, default=0):g}.")
    else:
        parts.append("There are no metrics in this folder yet.")
    if bad or warned:
        names = ", ".join(finding.name for finding in bad + warned)
        parts.append(f"{_count(len(bad) + len(warned), 'warning sign')}: {names}.")
    elif reward is not None:
        parts.append("None of the warning signs looked for was found.")
    return " ".join(parts)


def _short(value, signed=True):
    """For a sentence: two decimals, unless that would leave nothing."""
    return page.number(value if abs(value) < 0.005 else round(float(value), 2), signed)


def _story(run):
    """What kind of run this is, for somebody who has not seen one."""
    told = {
        "sft": "imitated example answers",
        "reward_model": "trained a reward model to predict which of two completions is preferred",
    }
    steps = [told[stage] if stage in told else _rl_story(run, stage) for stage in run.stages()]
    return f"This run {', then '.join(steps)}." if steps else ""


def _rl_story(run, stage):
    if stage not in run.rl_stages():
        return f"trained the stage {stage}"
    return f"tuned a language model ({stage}) to score high on a reward while staying near its start"


def _count(number, noun):
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _cards(run, reward, gold):
    length, finished = change_of(run, "completion_length"), change_of(run, "finished")
    cards = []
    for name, change, note in (
        (PROXY, reward, "what was trained on"),
        (GOLD, gold, run.evaluation.get("gold_name") or "never trained on"),
        ("Completion length", length, "tokens"),
        ("Ended by themselves", finished, "share of completions"),
    ):
        if change is not None:
            values = f'<span class="old">{_short(change[0], False)} →</span> {_short(change[1], False)}'
            cards.append((name, values, note))
    kl = mean(run.evaluated("tuned", "kl"))
    if kl is not None:
        cards.insert(2 if gold else 1, ("Distance (KL)", page.number(kl), "nats a completion"))
    made = "".join(
        f'<div class="card"><div class="name">{page.escape(name)}</div><div class="value">{values}</div>'
        f'<div class="note">{page.escape(note)}</div></div>'
        for name, values, note in cards
    )
    return f'<div class="cards">{made}</div>' if cards else ""
