"""What evaluation is handed: the stage `evaluation` of a run, and the judgement on its reward model."""

import numpy as np

from rlhf_jax.data.formats import readable
from rlhf_jax.errors import InputError, NumericsError
from rlhf_jax.evaluation import best_of_n, curves, report, reward_quality, side_by_side
from rlhf_jax.models.roles import Role
from rlhf_jax.parallel import hosts
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.rewards import rules
from rlhf_jax.training import feedback
from rlhf_jax.training.algorithms import ALGORITHMS
from rlhf_jax.training.reward_stage import HeldOut
from rlhf_jax.training.scoring import Rewards
from rlhf_jax.training.workdir import write_json


def side_by_side_and_report(run) -> None:
    """The stage `evaluation`: tuned and untuned on the held-out prompts, then report.html and summary.png."""
    config, section = run.config, run.config.evaluation
    name = judged_stage(run)
    policy, _, meta = run.load_role(name) if name else (Role(), None, {})
    base = run.raw_base if name == "sft" else run.base
    rewards = Rewards(config.rewards, run.console.warn, run.mesh)
    reward, units = None, (meta.get("reward_mean", 0.0), meta.get("reward_std", 1.0))
    if run.has_role("reward_model") and rewards.learned:
        reward = run.load_reward()
    by_text = reward is not None and not isinstance(reward, Role)
    if section.best_of > 1 and rewards.learned and reward is None:
        raise InputError(
            f"config.evaluation.best_of is {section.best_of}, and there is no reward model to choose by: put "
            "'reward_model' into config.stages, or name other rewards in config.rewards.components."
        )
    prompts = run.encoded_prompts["held_out"]
    texts = [readable(prompt.text) for prompt, _ in prompts]
    gold = rules.RULES[run.gold] if run.gold else None
    found, best_of = {}, None
    rewarded = section.best_of > 1 or ALGORITHMS[name].online
    sampling = run.decoding()
    how = ("slots", "halvings")  # change no token
    said = {key: value for key, value in config.sampling.items() if key not in how}
    said["temperature"] = section.temperature
    if section.num_beams > 1:
        said = {
            "num_beams": sampling.num_beams,
            "length_penalty": sampling.length_penalty,
            "min_new_tokens": sampling.min_new_tokens,
        }
    with rewards:
        for side, role, against, n in (
            ("untuned", Role(), None, 1),
            ("tuned", policy, Role(), section.best_of),
        ):
            run.console.note(
                f"evaluation: {side}, {len(texts)} prompts x {section.num_completions} completions"
                + (f", the best of {section.num_beams} beams" if section.num_beams > 1 else "")
                + (f", each the best of {n}" if n > 1 else "")
            )
            with meshes.activate(run.mesh):
                sampled = side_by_side.completions_of(
                    run.model,
                    base,
                    role,
                    [ids for _, ids in prompts],
                    prompt_length=run.prompt_length,
                    batch_size=section.batch_size,
                    sampling=sampling,
                    tokenizer=run.tokenizer,
                    put=run.put,
                    rng=run.rng("evaluation"),
                    reward=None if reward is None or by_text else (reward, *units),
                    against=against,
                    vocab_chunk=config.model.vocab_chunk,
                    check=lambda: run.stop.check("evaluation"),
                    suffix=tuple(meta.get("prompt_suffix_ids", ())) if side == "tuned" else (),
                    rounds=n,
                )
            found[side] = side_by_side.with_gold(sampled, texts, gold)
        asked = [prompt for prompt, _ in prompts]
        if by_text:
            score_by_text(reward, units, asked, found)
        for side, n in (("untuned", 1), ("tuned", section.best_of)):
            sampled = found[side]
            if rewarded and not rewards.plain:
                total, _ = rewards.total(sampled.get("reward"), asked, sampled["texts"], normalise=False)
                sampled["reward"] = np.asarray(total)
            if n > 1:
                best_of = {"n": n, "curve": best_of_n.means_by_n(found[side], n)}
                found[side] = best_of_n.choose(found[side], n)
    if not hosts.is_first():
        return
    side_by_side.write(
        run.workdir,
        texts,
        **found,
        gold_name=rules.DESCRIPTIONS[run.gold] if run.gold else "",
        sampling=said,
        best_of=best_of,
    )
    report.write_report(run.workdir, kl_limit=section.max_kl)
    curves.save_summary_png(run.workdir)


def score_by_text(reward, units, prompts, found: dict) -> None:
    """`reward` [N, G] of both sides, asked together: rewards that compare then say which side is better.

    units: (mean, deviation) of raw rewards on samples of the reference.
    """
    mean, std = units
    together = [
        [*one, *other] for one, other in zip(*(side["texts"] for side in found.values()), strict=True)
    ]
    scores = np.float32((reward.score([prompt.text for prompt in prompts], together) - mean) / std)
    first = len(found["untuned"]["texts"][0])
    found["untuned"]["reward"], found["tuned"]["reward"] = scores[:, :first], scores[:, first:]


def judge_reward_model(run, found: HeldOut) -> None:
    """reward_model.json from what the model says of held-out records."""
    finite = np.isfinite(found.pairs)
    if not finite.all():
        raise NumericsError(
            f"the reward model gives {finite.size - finite.sum()} of {finite.size} held-out completions a score that "
            "is not finite. Lower config.reward_model.optimizer.learning_rate, or look at the base model."
        )
    gold, ceiling = found.gold, None
    if not len(found.pairs):
        write_json(run.path("reward_model.json"), {"kind": found.kind, "own": found.figures})
        run.console.note(
            f"reward_model: no prompt has two held-out completions to compare; its own figures: {_told(found.figures)}"
        )
        return
    if gold is not None:
        by_coin = not run.config.preferences.labeller
        ceiling = feedback.ceiling(gold, run.config.preferences.coin_scale) if by_coin else None
    quality = reward_quality.quality(found.pairs, gold, ceiling, train_pairs=found.train_records)
    write_json(run.path("reward_model.json"), quality | {"kind": found.kind, "own": found.figures})
    told = f"held-out accuracy {quality['accuracy']:.3f} on {len(found.pairs)} pairs"
    if gold is not None:
        told += "" if ceiling is None else f" (label noise allows {ceiling:.3f})"
        told += "; agrees with the gold reward on "
        told += "none" if quality["gold_accuracy"] is None else f"{quality['gold_accuracy']:.3f}"
    if found.figures:
        told += f"; {_told(found.figures)}"
    run.console.note(f"reward_model: {told}")


def _told(figures: dict) -> str:
    """Nested figures on one line."""
    parts = []
    for name, value in figures.items():
        if isinstance(value, dict):
            parts.append(f"{name} ({_told(value)})")
        else:
            values = value if isinstance(value, list) else [value]
            shown = (f"{x:.3f}" if isinstance(x, float) else str(x) for x in values)
            parts.append(f"{name} {', '.join(shown)}")
    return "; ".join(parts)


def judged_stage(run) -> str | None:
    """The last stage that tuned a policy; None where the best of n of the base itself is to be judged."""
    own = ("sft", "preferences", "reward_model", "gate", "evaluation")
    if run.config.evaluation.best_of > 1 and all(stage in own for stage in run.config.stages):
        return None
    return tuned_stage(run)


def tuned_stage(run) -> str:
    """The last stage of the config that trained a policy and is done."""
    policies = [
        s for s in run.config.stages if s not in ("preferences", "reward_model", "gate", "evaluation")
    ]
    if not policies:
        raise InputError(f"config.stages {tuple(run.config.stages)} has no stage that tunes a policy.")
    done = [stage for stage in policies if run.has_role(stage)]
    if not done:
        raise InputError(f"{run.workdir} holds no tuned policy yet; run one of {', '.join(policies)} first.")
    return done[-1]
