"""An ablation: every point with every seed, each a run of its own, then one table and one figure.

python -m experiments.sweep --config=configs/sweeps/kl_coeff.py --workdir=runs/kl_coeff [--config.ppo.steps=12]
The runs are DIR/points/NAME/seedN. Run again, it goes on: what is done is skipped, what failed is tried again."""

import os
import shutil
import sys

from experiments import cli, points
from experiments.processes import Processes
from rlhf_jax.errors import InputError, Interrupted, RunError

# Of a shared workdir, what a point makes itself or what belongs to one run only.
NOT_COPIED = ("config.json", "environment.json", "timing.json", ".lock", "checkpoints")


def run_all(plan: points.Plan, workdir: str, run, stopped, note) -> list:
    """A Result for every point and seed. run(arguments, log) -> (status, last error); stopped() -> bool."""
    from rlhf_jax.evaluation.sweep import Result

    results, shared = [], {}
    todo = [(seed, point) for seed in plan.seeds for point in plan.points]
    for number, (seed, point) in enumerate(todo, 1):
        directory = os.path.join(workdir, "points", point.name, f"seed{seed}")
        told, (status, problem) = f"{point.name}, seed {seed} ({number} of {len(todo)})", (None, "")
        if is_done(point.config(seed), directory):
            status = 0
            note(f"{told}: already done")
        elif not stopped():
            os.makedirs(os.path.dirname(directory), exist_ok=True)
            if plan.shared and not os.path.exists(directory):
                if seed not in shared:
                    note(f"shared stages, seed {seed}: log in {shared_directory(workdir, seed)}.log")
                    shared[seed] = make_shared(plan.shared, seed, workdir, run)
                status, problem = shared[seed]
                if status == 0:
                    copy(shared_directory(workdir, seed), directory)
                    status = None
                else:
                    problem = f"the stages it shares: {problem}"
            if status is None and not stopped():
                note(f"{told}: log in {directory}.log")
                status, problem = run(point.arguments(seed, directory), directory)
                if status == 0 and not is_done(point.config(seed), directory):
                    status, problem = 1, "it ended without evaluation.json"
            if stopped() and status != 0:
                status, problem = None, ""
            elif status:
                note(f"{told}: failed with status {status}. {problem}")
        results.append(Result(point.name, seed, directory, status, problem))
    by_point = {point.name: i for i, point in enumerate(plan.points)}
    return sorted(results, key=lambda result: by_point[result.point])


def is_done(config, directory: str) -> bool:
    """All stages are, under this very config. Another config is for the run itself to refuse."""
    from experiments import pipeline
    from rlhf_jax.training.run import Run
    from rlhf_jax.training.workdir import differences

    evaluated = os.path.exists(os.path.join(directory, "evaluation.json"))
    if not evaluated or differences(config.to_dict(), directory):
        return False
    run = Run(config, directory, None, None)
    return all(pipeline.is_done(run, stage) for stage in config.stages)


def shared_directory(workdir: str, seed: int) -> str:
    return os.path.join(workdir, "shared", f"seed{seed}")


def make_shared(point: points.Point, seed: int, workdir: str, run) -> tuple[int, str]:
    directory = shared_directory(workdir, seed)
    os.makedirs(os.path.dirname(directory), exist_ok=True)
    return run(point.arguments(seed, directory), directory)


def copy(source: str, target: str) -> None:
    """Whole or not at all."""
    shutil.rmtree(target + ".new", ignore_errors=True)
    at_top = lambda directory, names: NOT_COPIED if directory == source else ()
    shutil.copytree(source, target + ".new", ignore=at_top)
    os.rename(target + ".new", target)


def command(argv):
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--config", required=True, metavar="FILE.py[:SIZE]", help="e.g. configs/sweeps/losses.py"
    )
    parser.add_argument("--workdir", required=True, help="where all runs, the table and the figure are kept")
    flags, overrides = cli.parse(parser, argv)
    plan = points.load(flags.config, overrides)

    from rlhf_jax.checkpoints.lock import WorkdirLock
    from rlhf_jax.evaluation import sweep
    from rlhf_jax.training.console import Console

    try:
        os.makedirs(flags.workdir, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--workdir: {flags.workdir} cannot be made a directory ({error.strerror})."
        ) from None
    console = Console()
    with WorkdirLock(flags.workdir), Processes() as processes:
        results = run_all(plan, flags.workdir, processes.run, lambda: processes.stopped, console.note)
        judged = sweep.judge(results)
        typed = f"python -m experiments.sweep {' '.join(argv)}"
        about = {"command": typed, "overrides": {p.name: [p.spec, *p.overrides] for p in plan.points}}
        sweep.write(flags.workdir, judged, f"Sweep {os.path.basename(flags.config)}", about)
    heads, rows = sweep.table(judged)
    narrow = [[cell.replace(" ± ", "±") for cell in row] for row in rows]
    console.table("held-out prompts, mean over seeds", heads, narrow)
    for note in judged["notes"]:
        console.note(note)
    console.note(f"figure and table: {os.path.join(flags.workdir, 'sweep.html')}")
    if processes.stopped:
        raise Interrupted("interrupted; what is done is saved. Run the same command to go on.")
    failed = [result for result in results if result.status]
    if failed:
        error = RunError(
            f"{len(failed)} of {len(results)} runs failed; run the same command to try them again."
        )
        error.status = failed[0].status
        raise error


if __name__ == "__main__":
    cli.main(command, sys.argv[1:])
