"""Side-by-side generation, figures and report for a finished run.

python -m experiments.evaluate --workdir=runs/demo [--config.evaluation.num_completions=8]"""

import os
import sys

from experiments import cli

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
    if not os.path.exists(path):
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
    parser.add_argument("--workdir", required=True, help="of a run that has trained a policy")
    flags, overrides = cli.parse(parser, argv)
    config = cli.load_saved(flags.workdir, overrides)

    from experiments import judging, pipeline
    from rlhf_jax.checkpoints.lock import WorkdirLock
    from rlhf_jax.training.checks import check_config
    from rlhf_jax.training.console import Console
    from rlhf_jax.training.loop import StopRequest
    from rlhf_jax.training.run import Run
    from rlhf_jax.training.workdir import phase, settle_config

    check_config(config, tuple(pipeline.STAGES))
    with WorkdirLock(flags.workdir), StopRequest() as stop:
        settle_config(config.to_dict(), flags.workdir)
        run = Run(config, flags.workdir, Console(), stop)
        with phase(flags.workdir, "evaluation"):
            judging.side_by_side_and_report(run)
        tell(run)


if __name__ == "__main__":
    cli.main(command, sys.argv[1:])
