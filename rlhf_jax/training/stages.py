"""The stages: sft, preferences, reward_model, ppo. Each leaves what later ones need and is skipped when that is there.

Here a stage picks its data and its roles; offline.py and online.py turn those into steps for the one loop."""

import functools
import os

from rlhf_jax.checkpoints import huggingface
from rlhf_jax.data import formats
from rlhf_jax.errors import InputError
from rlhf_jax.training import constitution, preferences, reward_stage, text_reward_stage
from rlhf_jax.training.algorithms import ALGORITHMS, preference
from rlhf_jax.training.algorithms.reward_models import TEXT_KINDS
from rlhf_jax.training.offline import encode_groups, examples, offline
from rlhf_jax.training.online import online
from rlhf_jax.training.reward_stage import preference_pairs, reward_records
from rlhf_jax.training.run import Run, settings_of


def sft(run: Run) -> None:
    """Completion-only cross-entropy; later stages take the result as their base."""
    section = run.config.sft
    records = encode_groups(run, examples(run, "sft"), section.packed_tokens)
    trained = {"policy": run.new_role(run.rng("sft"), section.train, run.raw_base)}
    frozen = {"base": None if section.train == "full" else run.raw_base}
    offline(run, "sft", records, [], trained, frozen, section.packed_tokens)


def judgements(run: Run, name: str):
    """(training records, held-out ones) of a policy from preferences: pairs, or labelled completions where the data
    have labels and the algorithm reads them."""
    reads_labels = ALGORITHMS[name].settings.reads_labels
    return preference_pairs(run, formats.pairs_or_labelled if reads_labels else formats.pairs)


def on_preferences(run: Run, name: str) -> None:
    """The policy from preferences alone (DPO and relatives)."""
    sets, smoothing = judgements(run, name), None
    if any(isinstance(one, formats.Labelled) for one in sets[0][:1]):
        tell_imbalance(run, name, sets[0])
        group = lambda one: (one.prompt, (one.completion,), one.row, {"soft_labels": float(one.accepted)})
        return tune(run, name, [[group(one) for one in part] for part in sets])
    if any(pair.soft_label is not None for pairs in sets for pair in pairs):
        settings = settings_of(name, run.config[name])
        if settings.reads_soft_labels:
            smoothing = settings.label_smoothing
        else:
            run.console.note(f"{name}: soft_label of the pairs is not read; dpo with loss_type sigmoid does")

    def group(pair):
        whole = (pair.prompt, (pair.chosen, pair.rejected), pair.row)
        if smoothing is None:
            return whole
        return (*whole, {"soft_labels": 1.0 - smoothing if pair.soft_label is None else pair.soft_label})

    return tune(run, name, [[group(pair) for pair in pairs] for pairs in sets])


def tune(run: Run, name: str, sets) -> None:
    """sets: training groups and held-out ones, for encode_groups."""
    train, test = (encode_groups(run, groups) for groups in sets)
    trained = {"policy": run.new_role(run.rng(name), run.config[name].train, run.base)}
    offline(run, name, train, test, trained, {"base": run.base})


def tell_imbalance(run: Run, name: str, records) -> None:
    """What KTO's paper says of its weights: accepted ones should weigh 1 to 4/3 times as much as all others (4.2)."""
    section, accepted = run.config[name], sum(one.accepted for one in records)
    others = len(records) - accepted
    run.console.note(f"{name}: {accepted} completions accepted, {others} not")
    if not accepted or not others:
        run.console.warn(f"{name}: all labels are the same; the policy is only pushed in one direction")
        return
    ratio = section.desirable_weight * accepted / max(section.undesirable_weight * others, 1e-9)
    if not 1 <= ratio <= 4 / 3:
        low = section.undesirable_weight * others / accepted
        run.console.warn(
            f"{name}: the accepted completions weigh {ratio:.2f} times as much as the others; expected 1 to 1.33: "
            f"config.{name}.desirable_weight between {low:.2f} and {low * 4 / 3:.2f}, now {section.desirable_weight:g}"
        )


def reward_model(run: Run, evaluator=None) -> None:
    """A reward model of config.reward_model.kind. evaluator: (run, HeldOut) -> None, called at the end."""
    stage = text_reward_stage if run.config.reward_model.kind in TEXT_KINDS else reward_stage
    stage.reward_model(run, evaluator)


def check_backbone(run: Run) -> None:
    """Fetches what a reward model that is no decoder starts from.  Raises: InputError if it is not there."""
    section = run.config.reward_model
    if section.kind in TEXT_KINDS and section.backbone != text_reward_stage.TINY:
        try:
            huggingface.resolve(section.backbone)
        except InputError as error:
            raise InputError(f"config.reward_model.backbone: {error}") from None


__all__ = ["STAGES", "check_backbone", "is_done", "judgements", "reward_model", "reward_records"]

STAGES = {
    "constitution": constitution.make,
    "sft": sft,
    "preferences": preferences.make,
    "reward_model": reward_model,
}
STAGES |= {name: functools.partial(on_preferences, name=name) for name in preference.ROWS}
STAGES |= {name: functools.partial(online, name=name) for name, row in ALGORITHMS.items() if row.online}


def is_done(run: Run, stage: str) -> bool:
    if stage == "preferences":
        return all(os.path.exists(run.path(file)) for file in preferences.files_of(run))
    if stage == "constitution":
        return all(os.path.exists(run.path(file)) for file in constitution.FILES.values())
    return run.has_role(stage)
