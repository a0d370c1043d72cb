"""Run the stages of a config, each where it was left.

python -m experiments.run --config=configs/pipeline.py:smollm2 --workdir=runs/demo"""

import sys

from experiments import cli


def command(argv):
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--config", required=True, metavar="FILE.py[:SIZE]", help="e.g. configs/ppo.py:smollm2"
    )
    parser.add_argument("--workdir", required=True, help="where everything of this run is kept")
    cli.add_processes(parser)
    flags, overrides = cli.parse(parser, argv)
    cli.join_processes(flags)
    config = cli.load_config(flags.config, overrides)

    from experiments import pipeline  # imports jax

    pipeline.run(config, flags.workdir, f"python -m experiments.run {' '.join(argv)}")


if __name__ == "__main__":
    cli.main(command, sys.argv[1:])
