"""What a config needs on a TPU slice, before it is paid for: every phase compiled, on any machine, without a TPU.

python -m experiments.plan --config=configs/ppo.py:llama2_7b --topology=v5e:4x4
Exit status 0 whether it fits or not ("fits" in --json says); 2 for bad usage, or without the compiler."""

import json
import os
import sys

from experiments import cli

# Before jax: the compiler asks no cloud for the machine's type, and several plans may run at once.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def command(argv):
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--config", required=True, metavar="FILE.py[:SIZE]", help="e.g. configs/ppo.py:llama2_7b"
    )
    parser.add_argument(
        "--topology", required=True, metavar="CHIP:SHAPE", help="e.g. v5e:4x4, v4:2x2x4, v5p:4x4x4"
    )
    parser.add_argument("--stages", default="", help="only these of the config's, with commas between them")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument(
        "--search", action="store_true", help="tries meshes and batch sizes too, and ranks them"
    )
    parser.add_argument(
        "--compilations", type=int, default=24, help="at most so many for --search, or to find a fix"
    )
    parser.add_argument(
        "--efficiency", type=float, default=0.5, help="of the bound's speed that a run reaches"
    )
    flags, overrides = cli.parse(parser, argv)
    config = cli.load_config(flags.config, overrides)
    os.environ.update(ENVIRONMENT)

    from experiments import plan_report, planner  # imports jax

    tell = plan_report.progress()
    with plan_report.quiet():
        found = planner.plan(
            config,
            flags.topology,
            stages=tuple(filter(None, flags.stages.split(","))),
            search=flags.search,
            limit=flags.compilations,
            efficiency=flags.efficiency,
            tell=tell,
        )
    tell("")
    found = {"config": flags.config, "overrides": overrides, **found}
    if flags.json:
        print(json.dumps(found, indent=1))
    else:
        plan_report.show(found)


if __name__ == "__main__":
    cli.main(command, sys.argv[1:])
