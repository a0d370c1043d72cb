"""The stages of one workdir in order: training's, then evaluation's, which training must not know."""

import os

from experiments import evaluate, gate, judging
from rlhf_jax.checkpoints.lock import WorkdirLock
from rlhf_jax.data import batching
from rlhf_jax.errors import InputError
from rlhf_jax.parallel import hosts
from rlhf_jax.training import constitution, scoring, stages
from rlhf_jax.training.algorithms import ALGORITHMS, preference
from rlhf_jax.training.checks import check_config
from rlhf_jax.training.console import Console
from rlhf_jax.training.loop import StopRequest
from rlhf_jax.training.offline import examples
from rlhf_jax.training.run import Run, tell_cut
from rlhf_jax.training.workdir import agree_on_run, phase, settle_config, write_environment

STAGES = stages.STAGES | {
    "reward_model": lambda run: stages.reward_model(run, evaluator=judging.judge_reward_model),
    "gate": gate.judge_before_rl,
    "evaluation": judging.side_by_side_and_report,
}


def run(config, workdir: str, command: str) -> None:
    """All stages of the config that are not done yet. command: what was typed, for environment.json."""
    check_config(config, tuple(STAGES))
    console = Console(log_every_steps=config.logging.log_every_steps, quiet=not hosts.is_first())
    try:
        os.makedirs(workdir, exist_ok=True)
    except OSError as error:
        raise InputError(f"--workdir: {workdir} cannot be made a directory ({error.strerror}).") from None
    with WorkdirLock(workdir), StopRequest() as stop:
        made = Run(config, workdir, console, stop)
        agree_on_run(config.to_dict(), workdir)
        hosts.once(lambda: settle(made))
        # What is done the first process says: another may see its files a moment later.
        todo = hosts.from_first([stage for stage in config.stages if not is_done(made, stage)])
        check_stages(made, todo)
        if todo:
            keep_compiled_programs()
            write_environment(workdir, config.to_dict(), command)
        else:
            console.note(f"all stages of {workdir} are done: {', '.join(config.stages)}")
        for stage in todo:
            with phase(workdir, stage):
                if stage == todo[0]:
                    read_data(made, todo)
                STAGES[stage](made)
                hosts.sync(stage)  # its files are there
        evaluate.tell(made)


def settle(run: Run) -> None:
    """config.json of the run, or what it may not differ in from the one that is there."""
    keep = ("evaluation",) if is_done(run, "evaluation") else ()
    kept = settle_config(run.config.to_dict(), run.workdir, keep)
    if kept:
        run.console.note(
            "the evaluation is done, with other settings:\n" + "\n".join(kept) + "\n"
            f"python -m experiments.evaluate --workdir={run.workdir} makes it again, with overrides if you give any"
        )


def online_stages(names) -> list[str]:
    """Those that learn from rewards of the policy's own samples."""
    return [name for name in names if name in ALGORITHMS and ALGORITHMS[name].online]


def check_stages(run: Run, todo: list[str]) -> None:
    """Raises: InputError if a stage needs the result of one that is neither done nor to be run."""
    online = [stage for stage in todo if stage == "gate" or stage in online_stages(todo)]
    before = run.config.stages[: run.config.stages.index(online[0])] if online else ()
    learned = scoring.LEARNED in run.config.rewards.components
    if online and learned and "reward_model" not in before and not run.has_role("reward_model"):
        raise InputError(
            f"config.stages has {online[0]!r}, which needs a reward model, and {run.workdir} has none; put "
            "'reward_model' before it, or name other rewards in config.rewards.components."
        )
    made = (
        run.config.data.preferences
        or "preferences" in run.config.stages
        or stages.is_done(run, "preferences")
    )
    if "gate" in todo and not made:
        raise InputError(
            f"config.stages has 'gate', which judges on pairs, and {run.workdir} has none; give "
            "config.data.preferences, or leave the stage out."
        )


def read_data(run: Run, todo: list[str]) -> None:
    """Reads what the stages will read, so that a wrong line or prompt shows now and not after hours of training."""
    data = run.config.data
    if "constitution" in todo:
        constitution.read_principles(run.config.constitution.principles)
    if "reward_model" in todo:
        stages.check_backbone(run)
    for stage, key in (("sft", "sft"), ("ppo_ptx", "ptx")):
        if stage in todo and not ("constitution" in todo and constitution.comes_before(run.config, stage)):
            examples(run, key)
    if data.preferences:
        if {"reward_model", "gate"} & set(todo):
            stages.reward_records(run)
        for stage in set(preference.ROWS) & set(todo):
            stages.judgements(run, stage)
    online = online_stages(todo)
    if online or {"preferences", "gate", "evaluation"} & set(todo):
        _ = run.prompt_sets, run.encoded_prompts  # kept by the run; files first, then the tokenizer
        if hosts.several():
            sets = run.prompt_sets.items()
            hosts.agree_on({f"{name} prompts": batching.record_hashes(prompts) for name, prompts in sets})
        tell_cut(run, "prompts")
    if "evaluation" in todo and not run.prompt_sets["held_out"]:
        raise InputError(
            "config.stages has 'evaluation' and no prompt is held out; give config.data.eval_prompts, or raise "
            "config.data.held_out_prompts (at most a fifth of the prompts)."
        )
    if online:
        with scoring.Rewards(run.config.rewards, run.console.warn) as rewards:  # starts the user's functions
            rewards.check_fields(run.prompt_sets["train"])
            for stage in online:
                greedy = ALGORITHMS[stage].greedy_baseline  # one completion, judged alone
                rewards.check_group(1 if greedy else run.config[stage].num_completions, f"config.{stage}")
            if "evaluation" in todo:
                rewards.check_group(run.config.evaluation.num_completions, "config.evaluation")


def is_done(run: Run, stage: str) -> bool:
    if stage == "gate":
        return gate.is_done(run)
    return os.path.exists(run.path("report.html")) if stage == "evaluation" else stages.is_done(run, stage)


def keep_compiled_programs() -> None:
    """JAX's persistent cache, unless the user has set one: a second run then starts in seconds."""
    import jax

    if not jax.config.jax_compilation_cache_dir:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(home, "rlhf_jax", "compiled"))
