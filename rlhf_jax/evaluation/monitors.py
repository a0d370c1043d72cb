"""Looks for the signs that a run went wrong: reward hacking above all.

Every sign is a comparison of numbers from the run's own files, with a threshold that is an argument, and ends
as one sentence for somebody who was not there. Knows nothing of models, figures or HTML; a file that is
missing or damaged takes away the signs that need it and nothing else."""

import collections
import dataclasses
import itertools
import re

import numpy as np

from rlhf_jax.evaluation import Run, is_number, load_run


@dataclasses.dataclass(frozen=True)
class Finding:
    """One sign looked for. verdict: "ok", "warn" (worth a look) or "bad" (look before using the result)."""

    name: str
    verdict: str
    sentence: str


def warning_signs(
    run,
    *,
    kl_limit=10.0,
    significance=2.0,
    peak_significance=3.0,
    flat_effect=0.1,
    plateau_gain=0.1,
    plateau_kl_growth=0.3,
    length_ratio=1.5,
    diversity_ratio=0.7,
    duplicates=0.1,
    entropy_ratio=0.3,
    accuracy_gap=0.15,
    memorised_loss=0.05,
):
    """Looks for every sign that the files allow.
    Args:
      run: a workdir, or what load_run() gave.
      kl_limit: nats a completion against the reference; above: warn, twice: bad. Sentences stay fluent below
        about 10.
      significance: standard errors that make a change real.
      peak_significance: standard errors below its own best stretch that make the gold reward's fall real;
        higher, because the best of ten stretches is high by chance.
      flat_effect: a rise of the reward smaller than this share of its spread within a batch counts as flat.
      plateau_gain, plateau_kl_growth: warn if the last steps add less than this share of the reward's rise
        while KL grows by more than that share, to above kl_limit.
      length_ratio: tuned over untuned length, or its inverse; above: warn, above its square: bad.
      diversity_ratio: distinct word pairs, tuned over untuned; below: warn, below its square: bad.
      duplicates: rise in the share of completions that another prompt got as well; above: warn, thrice: bad.
      entropy_ratio: last over first entropy; below: warn, below its square: bad.
      accuracy_gap: reward model's training accuracy above the held-out one; above: warn, twice: bad.
      memorised_loss: nats; a pairwise loss below this means that the training pairs are known by heart.
    Returns: findings, the worst first; signs whose data is absent are not in the list.
    """
    if not isinstance(run, Run):
        run = load_run(run)
    findings = _nonfinite(run)
    for stage in run.rl_stages():
        findings += _gold_falls(run, stage, significance, peak_significance)
        findings += _reward_moves(run, stage, significance, flat_effect)
        findings += _plateau(run, stage, plateau_gain, plateau_kl_growth, kl_limit)
        findings += _entropy(run, stage, entropy_ratio)
    findings += _gold_evaluated(run, significance) + _kl(run, kl_limit) + _length(run, length_ratio)
    findings += _repetition(run, diversity_ratio, duplicates)
    findings += _gate(run) or _memorised(run, accuracy_gap, memorised_loss)
    return sorted(findings, key=lambda finding: ("bad", "warn", "ok").index(finding.verdict))


def _grade(is_bad, is_warn):
    return "bad" if is_bad else "warn" if is_warn else "ok"


def _stretches(values, count=10):
    """(mean, standard error) of up to `count` equal stretches of a series, at least two values each."""
    parts = np.array_split(values, max(1, min(count, len(values) // 2)))
    return np.array(
        [(part.mean(), part.std(ddof=1) / np.sqrt(len(part)) if len(part) > 1 else 0.0) for part in parts]
    )


def _ends(values, share=0.1):
    """Means of the first and last tenth of a series."""
    count = max(1, round(len(values) * share))
    return values[:count].mean(), values[-count:].mean()


def _standard_errors(late, early):
    """How many standard errors lie between two (mean, standard error); two equal constants are 0 apart."""
    return (late[0] - early[0]) / max(np.hypot(late[1], early[1]), 1e-9)


def _nonfinite(run):
    listed = [
        (row.get("stage"), row["nonfinite"]) for row in run.metrics if isinstance(row.get("nonfinite"), list)
    ]
    counts = collections.Counter(f"{stage}/{name}" for stage, names in listed for name in names)
    if not counts:
        return []
    names = ", ".join(f"{name} ({count} times)" for name, count in counts.most_common(4))
    return [Finding("Not a number", "warn", f"NaN or infinity was logged for {names}.")]


def _gold_falls(run, stage, significance, peak_significance):
    """Over-optimisation as Gao et al. 2022 (arXiv:2210.10760) have it: proxy rises, gold peaks and falls."""
    (gold_steps, gold), (_, reward) = run.series(stage, "gold_reward"), run.series(stage, "reward")
    if len(gold) < 8 or len(reward) < 8:
        return []
    golds, rewards = _stretches(gold), _stretches(reward)
    peak = int(golds[:, 0].argmax())
    fall = -_standard_errors(golds[-1], golds[peak])
    below_start = -_standard_errors(golds[-1], golds[0]) > significance
    rose = _standard_errors(rewards[-1], rewards[0]) > significance
    if rose and below_start:
        verdict, end = "bad", "ends below where it began: the policy exploits errors of the reward model."
    elif rose and fall > peak_significance:
        step = gold_steps[min(len(gold) - 1, (2 * peak + 1) * len(gold) // (2 * len(golds)))]
        verdict = "warn"
        end = f"has fallen from {golds[peak, 0]:+.3g} near step {step:.0f}: an earlier checkpoint is better."
    else:
        verdict, end = "ok", "does not fall while it rises." if rose else "does not fall against it."
    return [
        Finding(
            f"Learned against true reward ({stage})",
            verdict,
            f"The learned reward went from {rewards[0, 0]:+.3g} to {rewards[-1, 0]:+.3g}; the true reward "
            f"went from {golds[0, 0]:+.3g} to {golds[-1, 0]:+.3g} and {end}",
        )
    ]


def _gold_evaluated(run, significance):
    gold, reward = run.change("gold_reward"), run.change("reward")
    count = min(len(values) for values in run.paired("gold_reward"))
    if gold is None or reward is None or gold[3] is None or count < 8:
        return []
    proxy, change, error = reward[2], gold[2], max(gold[3], 1e-9)
    hacked = proxy > 0 and change < -significance * error
    unclear = proxy > 0 and not hacked and change < significance * error
    end = (
        "More learned reward is worse text by the true measure."
        if hacked
        else "The gain in learned reward bought no clear gain in the true one."
        if unclear
        else "Both agree."
        if proxy > 0
        else "The learned reward did not rise."
    )
    return [
        Finding(
            "Held-out prompts",
            _grade(hacked, unclear),
            f"Learned reward changed by {proxy:+.3g} and true reward by {change:+.3g} "
            f"(± {1.96 * error:.2g}) on {count} completions. {end}",
        )
    ]


def _reward_moves(run, stage, significance, flat_effect):
    """A reward that sits still from the first step: nothing is learned; the reward model may be saturated."""
    _, reward = run.series(stage, "reward")
    if len(reward) < 8:
        return []
    parts = _stretches(reward, count=4)
    rise = parts[-1, 0] - parts[0, 0]
    spread = run.series(stage, "reward_std")[1]
    effect = rise / max(np.median(spread), 1e-9) if len(spread) else None
    still = _standard_errors(parts[-1], parts[0]) < significance
    small = effect is not None and effect < flat_effect
    fell = rise < 0 and -_standard_errors(parts[-1], parts[0]) > significance
    numbers = f"mean {parts[0, 0]:.4g} in the first quarter and {parts[-1, 0]:.4g} in the last"
    if fell:
        end = "It fell: look at the learning rate and the sign of the reward."
    elif still or small:
        end = "It never moved, nothing was learned: look at the held-out accuracy of the reward model."
    else:
        end = "It rose."
    return [Finding(f"Reward moves ({stage})", _grade(still or fell, small), f"Reward: {numbers}. {end}")]


def _plateau(run, stage, gain, kl_growth, kl_limit):
    """The end of a run that spends distance and gets nothing for it. Within the limit that does no harm."""
    (steps, reward), (kl_steps, kl) = run.series(stage, "reward"), run.series(stage, "kl")
    if len(reward) < 20 or len(kl) < 20:
        return []
    parts = _stretches(reward)
    first, best = parts[0, 0], parts[:, 0].max()
    if best - first < 4 * parts[:, 1].mean():
        return []  # no rise to speak of: _reward_moves says so
    reached = int(np.argmax(parts[:, 0] >= best - gain * (best - first)))
    edges = np.array_split(steps, len(parts))
    then, end = kl[kl_steps <= edges[reached][-1]], kl[kl_steps >= edges[-1][0]]
    if not len(then) or not len(end) or reached >= 0.7 * len(parts):
        return []
    kl_then, kl_end = then[-len(end) :].mean(), end.mean()
    if kl_end < kl_limit or kl_end - kl_then < kl_growth * kl_then:
        return []
    sentence = (
        f"{100 * (1 - gain):.0f}% of the gain in reward was there by step {edges[reached][-1]:.0f} at a KL "
        f"of {kl_then:.3g} nats; the rest of the run went on to {kl_end:.3g} nats for little: stop earlier, "
        "or raise kl_coeff."
    )
    return [Finding(f"Plateau ({stage})", "warn", sentence)]


def _kl(run, limit):
    kl = run.evaluated("tuned", "kl")
    kl = kl[np.isfinite(kl)]
    where = "on the held-out prompts"
    if not len(kl):
        stages = run.rl_stages()
        if not stages:
            return []
        kl = run.series(stages[-1], "kl")[1]
        kl, where = kl[-max(1, len(kl) // 10) :], f"at the end of {stages[-1]}"
    mean = kl.mean()
    error = kl.std(ddof=1) / np.sqrt(len(kl)) if len(kl) > 1 else 0.0
    if mean < -max(0.1, 3 * error):
        sentence = (
            f"Mean KL is {mean:.3g} nats {where}. A KL cannot be negative: the samples do not come from the "
            "policy that is scored (temperature, a filter, padding)."
        )
        return [Finding("Distance from the start (KL)", "bad", sentence)]
    end = "within" if mean <= limit else "above"
    sentence = f"Mean KL to the start is {mean:.3g} nats a completion {where}, {end} the limit of {limit:g}."
    return [Finding("Distance from the start (KL)", _grade(mean > 2 * limit, mean > limit), sentence)]


def _length(run, limit):
    before, after = run.paired("completion_length")
    source = "on the held-out prompts"
    if len(before) and len(after):
        before, after = before.mean(), after.mean()
    else:
        stages = [s for s in run.rl_stages() if len(run.series(s, "completion_length")[0]) >= 4]
        if not stages:
            return []
        before, after = _ends(run.series(stages[-1], "completion_length")[1])
        source = f"during {stages[-1]}"
    ratio = max(after, 1e-9) / max(before, 1e-9)
    drift = max(ratio, 1 / ratio)
    end = "much the same." if drift <= limit else "rewards may be paying for length, not for content."
    return [
        Finding(
            "Length drift",
            _grade(drift > limit**2, drift > limit),
            f"Completions went from {before:.3g} to {after:.3g} tokens {source}: {end}",
        )
    ]


def words(text):
    """Lower-case words and single punctuation marks."""
    return re.findall(r"\w+|[^\w\s]", str(text).lower())


def distinct_2(texts, budget=None):
    """Share of different word pairs among all pairs (Li et al. 2016), over the first `budget` pairs: without
    an equal budget the longer of two sets looks more repetitive than it is."""
    pairs = []
    for text in texts:
        tokens = words(text)
        pairs += itertools.pairwise(tokens)
    pairs = pairs[:budget]
    return len(set(pairs)) / len(pairs) if pairs else None


def _pairs(texts):
    return sum(max(len(words(text)) - 1, 0) for text in texts)


def _shared(answers):
    """Share of completions that a different prompt got too, word for word (empty ones included)."""
    prompts = collections.defaultdict(set)
    for prompt, completion in answers:
        prompts[" ".join(words(completion))].add(prompt)
    return sum(len(prompts[" ".join(words(completion))]) > 1 for _, completion in answers) / len(answers)


def _repetition(run, diversity_ratio, duplicates):
    if len(run.untuned) < 8 or len(run.tuned) < 8:
        return []
    before, after = ([completion for _, completion in answers] for answers in (run.untuned, run.tuned))
    budget = min(_pairs(before), _pairs(after))
    first, last = distinct_2(before, budget), distinct_2(after, budget)
    findings = []
    if first and last is not None:
        ratio = last / first
        end = (
            "no more repetitive than before."
            if ratio >= diversity_ratio
            else "it has fallen into set phrases."
        )
        sentence = (
            f"{100 * last:.0f}% of word pairs are different ones ({100 * first:.0f}% before tuning): {end}"
        )
        findings.append(
            Finding("Repetition", _grade(ratio < diversity_ratio**2, ratio < diversity_ratio), sentence)
        )
    rise = _shared(run.tuned) - _shared(run.untuned)
    sentence = (
        f"{100 * _shared(run.tuned):.0f}% of completions are word for word what another prompt got as well "
        f"({100 * _shared(run.untuned):.0f}% before tuning)."
    )
    findings.append(
        Finding("Identical completions", _grade(rise > 3 * duplicates, rise > duplicates), sentence)
    )
    return findings


def _entropy(run, stage, limit):
    _, entropy = run.series(stage, "entropy")
    if len(entropy) < 4:
        return []
    first, last = _ends(entropy)
    ratio = last / first if first > 0 else 1.0
    end = (
        "still exploring."
        if ratio >= limit
        else "the policy has nearly stopped exploring; expect repeated phrases."
    )
    sentence = f"Entropy went from {first:.3g} to {last:.3g} nats a token: {end}"
    return [Finding(f"Entropy ({stage})", _grade(ratio < limit**2, ratio < limit), sentence)]


def _memorised(run, gap_limit, memorised_loss):
    """The reward model knows its training pairs by heart and generalises less than it seems."""
    held_out = run.reward_model.get("accuracy")
    stage = "reward_model"
    accuracy, loss = run.series(stage, "accuracy")[1], run.series(stage, "loss")[1]
    late = accuracy[-max(1, len(accuracy) // 10) :].mean() if len(accuracy) else None
    findings = []
    if is_number(held_out):
        pairs = run.reward_model.get("held_out_pairs")
        error = np.sqrt(0.25 / max(pairs if is_number(pairs) else 100, 1))
        chance = held_out < 0.5 + 2 * error
        ceiling = run.reward_model.get("ceiling")
        limit = f"; the best possible on such labels is {100 * ceiling:.0f}%" if is_number(ceiling) else ""
        end = " That is no better than a coin: the policy is trained on noise." if chance else ""
        sentence = f"Agrees with {100 * held_out:.0f}% of held-out labels{limit}.{end}"
        findings.append(Finding("Reward model accuracy", "bad" if chance else "ok", sentence))
        if late is not None:
            gap = late - held_out
            end = (
                "memorised its training pairs: fewer epochs, or more pairs."
                if gap > gap_limit
                else "generalises."
            )
            sentence = (
                f"{100 * late:.0f}% on its training pairs, {100 * held_out:.0f}% on held-out ones: it {end}"
            )
            findings.append(
                Finding("Reward model memorised", _grade(gap > 2 * gap_limit, gap > gap_limit), sentence)
            )
    elif len(loss) >= 4 and _ends(loss)[1] < memorised_loss:
        sentence = (
            f"Its training loss ended at {_ends(loss)[1]:.2g} nats: the pairs are known by heart. No "
            "held-out accuracy was measured, so nothing shows that its reward means anything on new text."
        )
        findings.append(Finding("Reward model memorised", "warn", sentence))
    return findings


def _gate(run):
    """The verdict of the gate, which measured more of the reward model than its log tells; nothing without one."""
    verdict = {"pass": "ok", "warn": "warn", "refuse": "bad"}.get(str(run.gate.get("verdict")))
    return [Finding("Gate before RL", verdict, str(run.gate.get("reason", "")))] if verdict else []
