"""The judgement on a reward model before RL trusts it: pass, warn or refuse, and the reason in one sentence.

Reads the numbers of gate_measures.measure and thresholds. Refuses only what the numbers show beyond their own error: a
whole 95% interval, not its middle. Knows no model, no figure and no HTML."""

import dataclasses
import math

from rlhf_jax.evaluation.gate_measures import GROUPS, SURE

VERDICTS = ("pass", "warn", "refuse")
COIN = 0.5
COIN_LOSS = math.log(2)


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """config.gate has each with its unit."""

    min_pairs: int
    min_accuracy: float
    warn_accuracy_gap: float
    refuse_accuracy_gap: float
    warn_loss_gap: float
    refuse_loss_gap: float
    memorised_loss: float
    warn_ece: float
    refuse_ece: float
    warn_saturation: float
    warn_spread: float
    refuse_spread: float
    warn_length_correlation: float
    refuse_length_correlation: float
    warn_length_growth: float
    warn_seen: float
    significance: float


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing looked at. `name` and `figures` are short; `sentence` has the numbers and, where it is not a pass, what
    to do."""

    name: str
    verdict: str
    figures: str
    sentence: str


def judge(measures: dict, thresholds: Thresholds) -> dict:
    """{"verdict", "reason", "findings": the worst first}. measures: of gate_measures.measure."""
    found = [one for check in CHECKS for one in check(measures, thresholds)]
    found.sort(
        key=lambda one: -VERDICTS.index(one.verdict)
    )  # stable: of the same verdict in the order of CHECKS
    verdict = found[0].verdict if found else "warn"
    reason = found[0].sentence if verdict != "pass" else _all_well(measures)
    return {"verdict": verdict, "reason": reason, "findings": [dataclasses.asdict(one) for one in found]}


def _grade(refused, warned):
    return "refuse" if refused else "warn" if warned else "pass"


def percent(value) -> str:
    return f"{100 * value:.0f}%"


def ranged(one) -> str:
    """66% (62-70%)"""
    return f"{percent(one['value'])} ({100 * one['low']:.0f}-{percent(one['high'])})"


def nats(value) -> str:
    """Two decimals, or two digits of less."""
    return f"{value:.2f}" if value >= 0.095 else f"{value:.2g}"


def _all_well(m):
    said = f"It agrees with {ranged(m['accuracy'])} of the labels of {m['held_out_pairs']} pairs that it has not seen"
    if m["ceiling"] is not None:
        said += f", where {percent(m['ceiling'])} is the best possible"
    if m["train_accuracy"] is not None:
        said += f", with {percent(m['train_accuracy']['value'])} of those that it was trained on"
    return f"{said}, and is as often right as it says."


def _times(m):
    passes = m.get("passes")
    if not m["train_pairs"]:
        return ""
    often = (
        f" after {passes:.3g} pass{'' if passes == 1 else 'es'} over {m['train_pairs']:,} pairs"
        if passes
        else ""
    )
    return often or f" of {m['train_pairs']:,} pairs"


FEWER = "train for fewer steps (config.reward_model.steps) or on more pairs"


def _without_evidence(m, t):
    """No held-out pairs: the training loss is all there is."""
    if m["held_out_pairs"]:
        return
    train, why, end = m["train_loss"], "no pair was held out", "set config.data.held_out_pairs"
    if m.get("undecided_pairs"):
        why = f"the labels of all {m['undecided_pairs']} held-out pairs are undecided (soft_label 0.5)"
        end = "hold out pairs whose label is decided: config.data.held_out_pairs"
    if train is not None and m["probabilities"] and train["value"] < t.memorised_loss:
        yield Finding(
            "Memorised",
            "refuse",
            f"training loss {train['value']:.2g}",
            f"It knows its training pairs by heart (loss {train['value']:.2g} nats{_times(m)}) and {why}, so nothing "
            f"shows that it understands a new one: {end} or eval_preferences.",
        )
    yield Finding(
        "Held-out pairs",
        "warn",
        "none",
        f"{why[0].upper()}{why[1:]}, so nothing shows whether it is right: {end} or config.data.eval_preferences.",
    )


def _few(m, t):
    if 0 < m["held_out_pairs"] < t.min_pairs:
        yield Finding(
            "Held-out pairs",
            "warn",
            str(m["held_out_pairs"]),
            f"Only {m['held_out_pairs']} pairs were held out, too few to refuse or to trust anything: hold out "
            f"{t.min_pairs} or more (config.data.held_out_pairs, at most a fifth of the pairs).",
        )


def _memorised(m, t):
    gap, loss_gap = m["accuracy_gap"], m["loss_gap"]
    if gap is None or loss_gap is None:
        return
    enough = m["held_out_pairs"] >= t.min_pairs
    train, held_out = m["train_loss"]["value"], m["loss"]["value"]
    far = gap["low"] > t.refuse_accuracy_gap or loss_gap["low"] > t.refuse_loss_gap
    # A gap alone is no harm; with a loss above a coin's its probabilities mislead on new pairs.
    refused = far and m["loss"]["low"] > COIN_LOSS
    warned = gap["value"] > t.warn_accuracy_gap and gap["low"] > 0
    warned |= loss_gap["value"] > t.warn_loss_gap and loss_gap["low"] > 0
    verdict = _grade(refused and enough, refused or warned)
    sentence = (
        f"{percent(m['train_accuracy']['value'])} right on its training pairs and {ranged(m['accuracy'])} on held-out "
        f"ones, loss {nats(train)} against {nats(held_out)} nats (a coin: 0.69)"
    )
    figures = f"training {percent(m['train_accuracy']['value'])}, held out {ranged(m['accuracy'])}; "
    figures += f"loss {nats(train)}, {nats(held_out)}"
    if verdict == "pass":
        yield Finding("Memorised", verdict, figures, f"{sentence}: what it learned holds for new pairs.")
        return
    told = "It knows its training pairs better than new ones"
    if train < t.memorised_loss:
        told = "It knows its training pairs by heart"
    elif refused:
        told = "It learned its training pairs, not the taste behind them"
    end = FEWER
    if m["elsewhere"] and train >= t.memorised_loss:
        told, end = "What it learned does not carry over to these pairs", "train it on such pairs"
    yield Finding("Memorised", verdict, figures, f"{told}{_times(m)}: {sentence}; {end}.")


def _accuracy(m, t):
    accuracy = m["accuracy"]
    if accuracy is None:
        return
    said = f"Agrees with {ranged(accuracy)} of {m['held_out_pairs']} held-out labels"
    if m.get("undecided_pairs"):
        said += f", {m['undecided_pairs']} undecided ones left out"
    if m["ceiling"] is not None:
        said += f"; the best possible on labels this noisy is {percent(m['ceiling'])}"
    refused = accuracy["high"] < t.min_accuracy and m["held_out_pairs"] >= t.min_pairs
    if refused:
        end = f": the policy would be trained on noise (the least is {percent(t.min_accuracy)}); look at the labels, "
        end += "or train longer or at another learning rate."
    elif accuracy["low"] <= COIN:
        end = ": that cannot be told from a coin; hold out more pairs, or train on more."
    else:
        end = "."
    figures = f"{ranged(accuracy)} of {m['held_out_pairs']}"
    figures += f"; best possible {percent(m['ceiling'])}" if m["ceiling"] is not None else ""
    yield Finding("Held-out accuracy", _grade(refused, accuracy["low"] <= COIN), figures, said + end)


def _calibrated(m, t):
    if m["ece"] is None:
        return
    excess = max(m["ece"] - m["ece_by_chance"], 0.0)
    refused = excess > t.refuse_ece and m["held_out_pairs"] >= t.min_pairs
    verdict = _grade(refused, excess > t.warn_ece)
    said = (
        f"What it says and how often it is right differ by {percent(m['ece'])} on average (calibration error; "
        f"{percent(m['ece_by_chance'])} would come by chance)"
    )
    end = ": when it says 80%, 80% is about right."
    if verdict != "pass":
        wrong = m["saturation"]["wrong_when_sure"]
        if wrong is not None and wrong > 1 - SURE:
            said += f", and where it is {percent(SURE)} sure it is wrong in {percent(wrong)}"
        end = f"; {FEWER}, or soften the labels (label smoothing)."
    figures = f"off by {percent(m['ece'])}; by chance {percent(m['ece_by_chance'])}"
    yield Finding("Calibration", verdict, figures, said + end)


def _saturated(m, t):
    share = m["saturation"]["held_out"]
    if share is None or not m["probabilities"]:
        return
    of_train = m["saturation"]["train"]
    said = f"It is {percent(SURE)} sure or more of {percent(share)} of the held-out pairs"
    said += f" and of {percent(of_train)} of the training pairs" if of_train is not None else ""
    end = "."
    if share > t.warn_saturation:
        end = ": so sure that how much better an answer is no longer shows in its score; "
        end += f"{FEWER}, or smooth the labels."
    verdict = _grade(False, share > t.warn_saturation)
    yield Finding("Saturation", verdict, f"{percent(SURE)} sure of {percent(share)} of the pairs", said + end)


def _flat(m, t):
    spread = m["spread"]
    if spread is None:
        return
    verdict = _grade(
        spread["share"] < t.refuse_spread
        and (m["preview"] is not None or m["held_out_pairs"] >= t.min_pairs),
        spread["share"] < t.warn_spread,
    )
    said = (
        f"{spread['share']:.0%} of the variance of its scores lies between answers to one prompt (deviation "
        f"{spread['within']:.2g}; {spread['between']:.2g} between prompts)"
    )
    end = "."
    if verdict != "pass":
        end = ": it rates the question, not the answer, and RL would see a flat reward; look at what differs between "
        end += "chosen and rejected in the data, and at the learning rate."
    figures = f"{spread['share']:.0%} of the variance is between answers"
    yield Finding("Answers told apart", verdict, figures, said + end)


def _length(m, t):
    how = m["length_correlation"]
    if how is None or how["within_pairs"] is None:
        return
    rho, beyond, longer = how["within_pairs"], m["beyond_length"], m["longer_wins"]
    rule, share = ("longer", longer["value"]) if longer["value"] >= 0.5 else ("shorter", 1 - longer["value"])
    no_better = beyond["low"] <= 0
    refused = abs(rho) > t.refuse_length_correlation and no_better and m["held_out_pairs"] >= t.min_pairs
    warned = abs(rho) > t.warn_length_correlation or (no_better and share > 0.5 and longer_is_sure(longer))
    verdict = _grade(refused, warned)
    said = (
        f'Within pairs its preference goes with length at a rank correlation of {rho:+.2f}; the rule "the {rule} one '
        f'wins" alone is right in {percent(share)}, the model in {percent(m["accuracy"]["value"])}'
    )
    end = "."
    if refused:
        end = ": it is a ruler, and RL would only learn to write "
        end += f"{'more' if rho > 0 else 'less'}; balance the lengths of the pairs, or penalise length."
    elif abs(rho) > t.warn_length_correlation:
        end = ": expect length to drift in RL; watch completion_length, or balance the lengths of the pairs."
    elif warned:
        end = ": length alone tells more of the labels than it does; look at what the labels reward."
    figures = f"rank correlation {rho:+.2f}; rule {percent(share)}, model {percent(m['accuracy']['value'])}"
    yield Finding("Length", verdict, figures, said + end)
    for row in m["by_length"]:
        one = row["accuracy"]
        if row["group"] != GROUPS[1] and one and row["pairs"] >= t.min_pairs and one["high"] < COIN:
            yield Finding(
                "Length",
                "warn",
                f"{row['group']}: {ranged(one)}",
                f"Where {row['group']}, it is right in only {ranged(one)} of {row['pairs']} pairs: it takes length for "
                "quality; balance the lengths of the pairs.",
            )


def longer_is_sure(longer) -> bool:
    """Whether length says anything of the labels at all."""
    return longer["low"] > COIN or longer["high"] < COIN


def _sources(m, t):
    for row in m["by_source"]:
        one = row["accuracy"]
        if one and row["pairs"] >= t.min_pairs and one["high"] < t.min_accuracy:
            yield Finding(
                "Sources",
                "warn",
                f"{row['source']}: {ranged(one)}",
                f"On {row['source']} it is right in only {ranged(one)} of {row['pairs']} pairs, while it is in "
                f"{percent(m['accuracy']['value'])} of all: look at the labels of that source.",
            )


def _seen(m, t):
    held_out = m["held_out_pairs"] + m.get("undecided_pairs", 0)
    share = m["seen_pairs"] / max(held_out, 1)
    if share > t.warn_seen:
        yield Finding(
            "Held-out pairs",
            "warn",
            f"{m['seen_pairs']} seen in training",
            f"{m['seen_pairs']} of the {held_out} held-out pairs are word for word among the training "
            "pairs, so held-out figures flatter it: remove the duplicates.",
        )


def _previewed(m, t):
    """Over-optimisation ahead: what the best of n by this reward buys in gold, or in length."""
    p = m["preview"]
    if p is None or p["proxy_error"] is None:
        return
    n, proxy = p["n"][-1], p["proxy"][-1] - p["proxy"][0]
    rise = f"Of {n} samples of the starting policy the one it likes best is {proxy:.2g} deviations above the mean"
    if p["gold"] is not None:
        gold, error = p["gold"][-1] - p["gold"][0], max(p["gold_error"][-1], 1e-9)
        peak = max(range(len(p["n"])), key=lambda i: p["gold"][i])
        fell = gold < -t.significance * error
        said = f"{rise}, and its true reward goes from {p['gold'][0]:+.2f} to {p['gold'][-1]:+.2f} "
        said += f"(± {1.96 * error:.2g})"
        end = ": what it likes is better."
        if fell:
            end = ": more of its reward is worse text, so RL would make the text worse; get better labels or more."
        elif gold < t.significance * error:
            end = ": nothing shows that what it likes is better; stop RL early, at a small KL."
        elif p["n"][peak] < n and p["gold"][peak] - p["gold"][-1] > t.significance * error:
            fell_from = p["n"][peak]
            end = f", after a peak at the best of {fell_from}: stop RL early, near {p['kl'][peak]:.2g} nats."
        good = gold >= t.significance * error and not end.startswith(", after")
        figures = f"best of {n}: {proxy:+.2g} deviations, true reward {gold:+.2f}"
        yield Finding("Best of n", _grade(fell, not good), figures, said + end)
    before, after = p["length"][0], p["length"][-1]
    figures = f"best of {n}: {proxy:+.2g} deviations, {before:.3g} to {after:.3g} tokens"
    growth = after / max(before, 1e-9)
    if max(growth, 1 / max(growth, 1e-9)) > t.warn_length_growth:
        yield Finding(
            "Best of n",
            "warn",
            figures,
            f"{rise} and {after:.3g} tokens long where the mean is {before:.3g}: length is what it pays for; watch "
            "completion_length in RL.",
        )
    elif p["gold"] is None:
        yield Finding(
            "Best of n",
            "pass",
            figures,
            f"{rise} and as long as others ({before:.3g} to {after:.3g} tokens).",
        )


def _noise(m, t):
    noise = m["label_noise"]
    if noise is None:
        return
    if not noise["told"]:
        said = f"Cannot be told from {m['held_out_pairs']} pairs: between {percent(noise['low'])} and "
        said += f"{percent(noise['high'])} of the labels, or of its surest judgements, may be wrong."
    else:
        said = f"About {percent(noise['value'])} ({100 * noise['low']:.0f}-{percent(noise['high'])}) of the labels "
        said += "go against it however sure it is: wrong labels, or its own sure mistakes."
        if noise["low"] > 0:
            said += f" Label smoothing of about {noise['value']:.2f}, or soft labels, would fit them."
    figures = f"{percent(noise['value'])} ({100 * noise['low']:.0f}-{percent(noise['high'])})"
    yield Finding("Label noise", "pass", figures if noise["told"] else "cannot be told", said)


# The order is that of the reason, where several are as bad.
CHECKS = (_without_evidence, _memorised, _flat, _length, _accuracy, _calibrated, _previewed, _seen, _sources,
          _saturated, _few, _noise)  # fmt: skip
