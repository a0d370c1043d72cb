"""The stage `gate` and experiments.evaluate --reward_model: a saved reward model, read as RL will read it, is judged.

Here a run's files become the arrays that evaluation/gate_measures.py measures; what they are worth is for
evaluation/gate.py to say."""

import dataclasses
import hashlib
import math
import os

import jax
import numpy as np

from rlhf_jax.checkpoints import roles as role_files
from rlhf_jax.data import batching, formats
from rlhf_jax.data.formats import readable
from rlhf_jax.errors import InputError, NumericsError, Refused
from rlhf_jax.evaluation import gate, gate_measures, gate_page
from rlhf_jax.models.roles import Role
from rlhf_jax.parallel import hosts, sharding
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.rewards import learned, rules
from rlhf_jax.training import reward_stage, rollout, stages
from rlhf_jax.training.algorithms import ALGORITHMS
from rlhf_jax.training.algorithms.reward_models import KINDS
from rlhf_jax.training.algorithms.reward_records import Scale
from rlhf_jax.training.run import all_dropped, settings_of, tell_cut
from rlhf_jax.training.scoring import LEARNED
from rlhf_jax.training.workdir import read_json, write_json

FILE = "gate.json"
MEASURED_BY = ("batch_size", "max_pairs", "preview_prompts", "preview_completions", "bootstrap_samples")
SMALL_FILE = 2**20  # bytes; of larger ones, frozen weights say, the size stands for the content
# Kinds of reward models whose difference of scores is trained to be the log-odds of a label.
LOG_ODDS_KINDS = ("pairwise", "token_level", "ranking")
IN_OTHER_UNITS = ("pairrm", "steamshp")  # trained so too, and then averaged over orders and groups
ONE_RECORD_A_PAIR = ("pairwise", "token_level")


@dataclasses.dataclass(frozen=True)
class Judged(formats.Pair):
    """A pair with the gold rewards of its two sides, where they are known."""

    gold: tuple[float, float] | None = None


def judge_before_rl(run) -> None:
    """The stage `gate`: writes gate.json. Raises: Refused, unless config.gate.on_refusal is "warn"."""
    if LEARNED not in run.config.rewards.components:
        return
    section, path = run.config.gate, run.path(FILE)
    stops = section.on_refusal == "stop"
    made_of = {"reward_model": _digest(run.role_path("reward_model"))}
    made_of |= {name: section[name] for name in MEASURED_BY}
    kept = hosts.from_first(read_json(path) if hosts.is_first() and os.path.exists(path) else {})
    if kept.get("made_of") == made_of:
        measures = kept["measures"]
    else:
        train, held_out = pairs_of(run)
        prompts = run.encoded_prompts["held_out"] or prompts_of(run, held_out)
        by_coin = not run.config.data.preferences and not run.config.preferences.labeller
        coin_scale = run.config.preferences.coin_scale if by_coin else None
        measures = measured(run, train, held_out, prompts, coin_scale)
    found = _judged(run, measures) | {"made_of": made_of}
    write_json(path, found)
    tell(run.console, found)
    if stops and found["verdict"] == "refuse":
        page = _page(run, run.path("gate.html"), found)
        raise Refused(
            f"the gate refuses this reward model. {found['reason']}\nNothing is lost: {page} shows why. Train another "
            "one in another --workdir, or go on with this one: the same command with --config.gate.on_refusal=warn."
        )


def is_done(run) -> bool:
    """Whether nothing is left to judge: it is not asked for, it has let this model pass, or RL is over."""
    if LEARNED not in run.config.rewards.components:
        return True
    later = run.config.stages[run.config.stages.index("gate") :] if "gate" in run.config.stages else ()
    online = [stage for stage in later if stage in ALGORITHMS and ALGORITHMS[stage].online]
    if online and all(run.has_role(stage) for stage in online):
        return True
    path = run.path(FILE)
    if not os.path.exists(path) or not run.has_role("reward_model"):
        return False
    found = read_json(path)
    if found["made_of"]["reward_model"] != _digest(run.role_path("reward_model")):
        return False
    return found["verdict"] != "refuse" or run.config.gate.on_refusal == "warn"


def judge_on(run, pairs, output: str, about: dict) -> dict:
    """gate.json and gate.html in `output`: the workdir's reward model on any pairs. about: JSON, told on the page."""
    try:
        train = pairs_of(run)[0]
    except (InputError, OSError):
        train = []
        run.console.note(
            "the pairs that it was trained on are not there: nothing tells whether it memorised them"
        )
    pairs = as_pairs(pairs, KINDS["pairwise"].pairs(pairs))
    measures = measured(run, train, pairs, prompts_of(run, pairs), None, elsewhere=True)
    found = _judged(run, measures) | {"about": about}
    os.makedirs(output, exist_ok=True)
    write_json(os.path.join(output, FILE), found)
    page = _page(run, os.path.join(output, "gate.html"), found)
    tell(run.console, found)
    run.console.note(f"page: {page}")
    return found


def _page(run, path: str, found: dict) -> str:
    hosts.once(lambda: gate_page.write(path, found, os.path.basename(run.workdir)))
    return path


def pairs_of(run) -> tuple[list[Judged], list[Judged]]:
    """(training pairs, held-out pairs) that the records of the model's kind amount to; of a gated one, its gate's."""
    settings = settings_of("reward_model", run.config.reward_model)
    kind, sets = KINDS[settings.feedback], stages.reward_records(run)
    scale = Scale.of(settings, sets[0]) if kind.rated else None
    if kind.gated:
        kind, sets = KINDS["pairwise"], reward_stage.gate_pairs(run, *sets, scale)
    return tuple(as_pairs(records, kind.pairs(records, scale)) for records in sets)


def as_pairs(records, found) -> list[Judged]:
    """found: [((record, completion) of the better, of the worse)]."""
    gold = reward_stage.golds(records)

    def texts(record):
        if isinstance(record, formats.Pair):
            return record.chosen, record.rejected
        return record.completions if isinstance(record, formats.Ranking) else (record.completion,)

    def judged(better, worse):
        (i, g), (j, h) = better, worse
        known = None if gold is None or h >= len(gold[j]) else (gold[i][g], gold[j][h])
        record = records[i]
        pair = Judged(record.prompt, texts(record)[g], texts(records[j])[h], row=record.row, gold=known)
        label = getattr(record, "soft_label", None)
        return pair if label is None else doubted(pair, label)

    return [judged(*two) for two in found]


def doubted(pair: Judged, label: float) -> Judged:
    """With the probability `label` that `chosen` is the better one; turned round where the other one is likelier."""
    if label >= 0.5:
        return dataclasses.replace(pair, soft_label=label)
    gold = pair.gold and pair.gold[::-1]
    return dataclasses.replace(
        pair, chosen=pair.rejected, rejected=pair.chosen, soft_label=1.0 - label, gold=gold
    )


def prompts_of(run, pairs) -> list[tuple]:
    """(record, ids) of each prompt once."""
    once = {str(pair.prompt): pair for pair in pairs}.values()
    encoded = [(pair, run.encode_prompt(pair.prompt, pair.row)) for pair in once]
    return [(pair, ids) for pair, ids in encoded if ids is not None]


def _judged(run, measures):
    section = run.config.gate
    limits = gate.Thresholds(
        **{field.name: section[field.name] for field in dataclasses.fields(gate.Thresholds)}
    )
    judged = gate.judge(measures, limits)
    return judged | {"thresholds": dataclasses.asdict(limits), "measures": measures}


def measured(run, train, held_out, prompts, coin_scale: float | None, elsewhere=False) -> dict:
    """gate_measures.measure of the workdir's reward model.
    Args:
      train, held_out: Judged each. prompts: (record, ids) each, of the preview.
      coin_scale: of the coin that labelled them, where one did. elsewhere: the held-out ones are other data.
    """
    section = run.config.gate
    reward, meta = run.load_reward(), role_files.read_meta(run.role_path("reward_model"))
    seen = {(str(pair.prompt), pair.chosen, pair.rejected) for pair in train}
    twice = sum((str(pair.prompt), pair.chosen, pair.rejected) in seen for pair in held_out)
    some = [_some(held_out, section.max_pairs), None]
    some[1] = _some(train, len(some[0]) or section.max_pairs)
    run.console.note(
        f"gate: {len(some[0])} held-out and {len(some[1])} training pairs, "
        f"{min(section.preview_prompts, len(prompts))} prompts x {section.preview_completions} samples"
    )
    with meshes.activate(run.mesh):
        score = scorer(run, reward)
        pairs = scored(run, score, some)
        samples = preview(run, score, prompts) if section.preview_prompts and prompts else None
    tell_cut(run, "gate")
    how = run.config.reward_model
    feedback = settings_of("reward_model", how).feedback
    return gate_measures.measure(
        *pairs,
        samples,
        train_pairs=len(train),
        passes=meta["step"] * how.batch_size / len(train)
        if train and feedback in ONE_RECORD_A_PAIR
        else None,
        seen=twice,
        elsewhere=elsewhere,
        coin_scale=coin_scale,
        # Members are in deviations each.
        probabilities=feedback in LOG_ODDS_KINDS and how.kind not in IN_OTHER_UNITS and how.members == 1,
        bootstrap_samples=section.bootstrap_samples,
        seed=run.config.seed,
    )


def scorer(run, reward):
    """(batch, prompts, () -> their completions as text) -> raw scores [B, G] float64, as RL asks for them.

    reward: a Role, which reads the batch, or a TextReward, which reads the texts.
    """
    if not isinstance(reward, Role):
        return lambda batch, prompts, texts: np.float64(reward.score(prompts, texts()))
    forward = make_forward(run)
    return lambda batch, prompts, texts: np.asarray(
        hosts.gather(forward(run.base, reward, run.put(batch))), np.float64
    )


def make_forward(run):
    """Jitted (base, reward role, batch) -> raw scores [B, G]."""
    return jax.jit(lambda base, role, batch: learned.score(run.model, base, role, batch, run.eos_ids))


def _some(records: list, count: int) -> list:
    """At most `count` records, evenly from all."""
    if len(records) <= count:
        return list(records)
    return [records[i] for i in np.linspace(0, len(records) - 1, count).round().astype(int)]


def scored(run, score, sets: list[list[Judged]]) -> list[gate_measures.Pairs]:
    """The pairs of each set that config.data keeps, with their scores; all in batches of one shape."""
    longest, size = run.config.data.completion_tokens + 1, rows_of(run, run.config.gate.batch_size)
    encode = lambda text: run.tokenizer.encode_completion(text, longest, allow_truncation=True)
    encoded = []
    for pairs in sets:
        ids = [(pair, run.encode_prompt(pair.prompt, pair.row)) for pair in pairs]
        encoded.append([(p, i, (encode(p.chosen), encode(p.rejected))) for p, i in ids if i is not None])
        if pairs and not encoded[-1]:
            raise InputError(all_dropped(len(pairs), run.config.data.prompt_tokens))
    everything = [one for part in encoded for one in part]
    lengths = {
        "prompt_length": max((len(ids) for _, ids, _ in everything), default=1),
        "completion_length": max((len(c) for _, _, two in everything for c in two), default=1),
    }
    found = []
    for part in encoded:
        scores = []
        for start in range(0, len(part), size):
            run.stop.check("gate")
            asked, prompts, completions = zip(*part[start : start + size], strict=True)
            batch = batching.group(
                prompts, completions, **lengths, pad_id=run.tokenizer.pad_id, batch_size=size
            )
            texts = lambda asked=asked: [(pair.chosen, pair.rejected) for pair in asked]
            scores.append(score(batch, [pair.prompt for pair in asked], texts)[: len(prompts)])
        found.append(_pairs([pair for pair, _, _ in part], scores, [two for _, _, two in part]))
    return found


def rows_of(run, wanted: int) -> int:
    """At least `wanted` rows, as many on each device."""
    ways = math.prod(run.mesh.shape[axis] for axis in dict(sharding.RULES)["batch"])
    return -(-wanted // ways) * ways


def _pairs(pairs, scores, completions) -> gate_measures.Pairs:
    scores = np.concatenate(scores) if scores else np.zeros((0, 2))
    _check_finite(scores, "completions of pairs")
    gold = [pair.gold for pair in pairs]
    gold = None if not gold or None in gold else gold
    return gate_measures.Pairs(
        scores,
        [[len(ids) for ids in two] for two in completions],
        [str(pair.prompt) for pair in pairs],
        [_source(pair) for pair in pairs],
        gold,
        [1.0 if pair.soft_label is None else pair.soft_label for pair in pairs],
    )


def _source(pair) -> str:
    """Where a pair is from: what its record says, else its file."""
    if pair.row is None:
        return ""
    named = [pair.row.fields.get(name) for name in ("source", "dataset")]
    return next((x for x in named if isinstance(x, str) and x), os.path.basename(pair.row.source))


def preview(run, score, prompts) -> gate_measures.Samples:
    """Samples of the starting policy for the first prompts, as RL draws them, by a random stream of the gate's own."""
    section, pad_id = run.config.gate, run.tokenizer.pad_id
    chosen = prompts[: section.preview_prompts]
    size = rows_of(run, min(section.batch_size, len(chosen)))
    length = max(len(ids) for _, ids in chosen)
    network, sampling = run.network(), run.sampling(section.preview_completions)
    rule = rules.RULES[run.gold] if run.gold else None
    scores, tokens, gold = [], [], []
    for start in range(0, len(chosen), size):
        run.stop.check("gate")
        part = chosen[start : start + size]
        filled = [ids for _, ids in part] + [part[-1][1]] * (size - len(part))
        asked = run.put(batching.pad_prompts(filled, length, pad_id))
        key = jax.random.fold_in(run.rng("gate"), start)
        batch = rollout.sample(network, run.base, Role(), asked, key, sampling)
        texts = lambda batch=batch, part=part: rollout.texts(run.tokenizer, batch)[: len(part)]
        prompt = [getattr(record, "text", None) or record.prompt for record, _ in part]
        scores.append(score(batch, prompt, texts)[: len(part)])
        tokens.append(hosts.gather(batch.completion_mask.sum(-1))[: len(part)])
        if rule is not None:
            for asked_of, completions in zip(prompt, texts(), strict=True):
                gold.append(rule([readable(asked_of)] * len(completions), completions))
    _check_finite(np.concatenate(scores), "samples")
    gold = np.array(gold, np.float64) if rule is not None else None
    return gate_measures.Samples(np.concatenate(scores), np.concatenate(tokens), gold)


def _check_finite(scores, what):
    wrong = np.size(scores) - np.isfinite(scores).sum()
    if wrong:
        raise NumericsError(
            f"the reward model gives {wrong} of {np.size(scores)} {what} a score that is not finite. Lower "
            "config.reward_model.optimizer.learning_rate, or look at the base model."
        )


def tell(console, found: dict) -> None:
    """A short table and the verdict."""
    rows = [[one["verdict"], one["name"], one["figures"]] for one in found["findings"]]
    console.table("gate: can this reward model be trusted?", ["", "looked at", "found"], rows)
    for one in found["findings"]:
        if one["verdict"] != "pass" and one["sentence"] != found["reason"]:
            console.note(f"gate: {one['verdict']}: {one['sentence']}")
    line = f"gate: {found['verdict']}. {found['reason']}"
    console.note(line) if found["verdict"] == "pass" else console.warn(line)


def _digest(role: str) -> str:
    """Of the files of a saved role, its large ones by their size."""
    made = hashlib.sha256()
    for folder, _, names in sorted(os.walk(role)):
        for name in sorted(names):
            path = os.path.join(folder, name)
            size = os.path.getsize(path)
            made.update(f"{os.path.relpath(path, role)} {size} ".encode())
            if size <= SMALL_FILE:
                with open(path, "rb") as file:
                    made.update(file.read())
    return made.hexdigest()
