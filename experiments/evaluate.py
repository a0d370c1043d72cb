"""Side-by-side generation, figures and report for a finished run; or the judgement on a reward model.

python -m experiments.evaluate --workdir=runs/demo [--config.evaluation.num_completions=8]
python -m experiments.evaluate --reward_model=runs/demo --data=pairs.jsonl [--config.gate.preview_prompts=32]

The second tells whether the reward model of a workdir can be trusted on labelled pairs: gate.json and gate.html in
its folder gate/, exit status 3 if it cannot."""

import os
import sys

from experiments import cli
from rlhf_jax.errors import InputError, Refused

TOLD = {
    "reward": "reward (trained on)",
    "gold_reward": "true reward (never trained on)",
    "kl": "KL to the start, nats",
    "log_ratio": "log-probability over the start's, nats (beams: no KL)",
    "completion_length": "tokens",
    "finished": "ended by themselves",
}


def tell(run) -> None:
    """The table of what changed, and where the report is."""
    from rlhf_jax.training.workdir import read_json

    path = run.path("evaluation.json")
    if run.console.quiet or not os.path.exists(path):
        return
    evaluation = read_json(path)
    summary, best_of, rows = evaluation["summary"], evaluation.get("best_of"), []
    for name, told in TOLD.items():
        before, after = summary.get(f"untuned/{name}"), summary.get(f"tuned/{name}")
        if after is not None:
            told += " (upper bound)" if name == "kl" and best_of else ""
            rows.append([told, before, after, None if before is None else after - before])
    run.console.table("held-out prompts", ["", "before", "after", "change"], rows)
    if best_of:
        values = list(best_of["curve"].values())
        title = "by number of samples, an estimate from all of them"
        run.console.table(title, list(best_of["curve"]), [list(row) for row in zip(*values, strict=True)])
    run.console.note(f"report: {run.path('report.html')}")


def command(argv):
    parser = cli.parser(__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--workdir", help="of a run that has trained a policy")
    which.add_argument("--reward_model", metavar="WORKDIR", help="of a run that has trained a reward model")
    parser.add_argument("--data", help="pairs to judge a reward model on: a file, a glob, or a hub id")
    parser.add_argument("--output", help="where gate.json and gate.html go; WORKDIR/gate if not given")
    cli.add_processes(parser)
    flags, overrides = cli.parse(parser, argv)
    cli.join_processes(flags)
    (judge if flags.reward_model else again)(flags, overrides)


def again(flags, overrides) -> None:
    """Evaluation and report of a finished run."""
    if flags.data or flags.output:
        raise InputError("--data and --output go with --reward_model=WORKDIR, not with --workdir.")
    config = cli.load_saved(flags.workdir, overrides)

    from experiments import judging, pipeline
    from rlhf_jax.checkpoints.lock import WorkdirLock
    from rlhf_jax.parallel import hosts
    from rlhf_jax.training.checks import check_config
    from rlhf_jax.training.console import Console
    from rlhf_jax.training.loop import StopRequest
    from rlhf_jax.training.run import Run
    from rlhf_jax.training.workdir import agree_on_run, phase, settle_config

    check_config(config, tuple(pipeline.STAGES))
    with WorkdirLock(flags.workdir), StopRequest() as stop:
        agree_on_run(config.to_dict(), flags.workdir)
        hosts.once(lambda: settle_config(config.to_dict(), flags.workdir))
        run = Run(config, flags.workdir, Console(quiet=not hosts.is_first()), stop)
        with phase(flags.workdir, "evaluation"):
            judging.side_by_side_and_report(run)
        tell(run)


def judge(flags, overrides) -> None:
    """Raises: Refused."""
    if not flags.data:
        raise InputError("--reward_model needs --data: labelled pairs that it was not trained on.")
    config = cli.load_saved(flags.reward_model, [])
    from configs import common

    with config.unlocked():  # a run of before there was a gate, or kinds of reward models, lacks their keys
        for name, default in common.get_config().items():
            if name not in config:
                config[name] = default
            elif hasattr(default, "items"):
                config[name] = {**default, **config[name]}
    config = cli.override(config, overrides)

    from experiments import gate, pipeline
    from rlhf_jax.data import batching, formats
    from rlhf_jax.parallel import hosts
    from rlhf_jax.training.checks import check_config
    from rlhf_jax.training.console import Console
    from rlhf_jax.training.loop import StopRequest
    from rlhf_jax.training.run import Run
    from rlhf_jax.training.workdir import agree_on_run

    check_config(config, tuple(pipeline.STAGES))
    agree_on_run(config.to_dict(), flags.reward_model)
    output = flags.output or os.path.join(flags.reward_model, "gate")
    with StopRequest() as stop:
        run = Run(config, flags.reward_model, Console(quiet=not hosts.is_first()), stop)
        if not run.has_role("reward_model"):
            raise InputError(f"--reward_model: {flags.reward_model} holds no finished reward model.")
        pairs = run.records(flags.data, formats.pairs)
        hosts.agree_on({"--data": batching.record_hashes(pairs)})
        found = gate.judge_on(run, pairs, output, {"reward_model": flags.reward_model, "data": flags.data})
    if found["verdict"] == "refuse":
        raise Refused(f"the gate refuses this reward model. {found['reason']}")


if __name__ == "__main__":
    cli.main(command, sys.argv[1:])
