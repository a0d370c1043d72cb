"""The flags of python -m experiments.tpu, and the job they describe, checked before anything costs money."""

import argparse
import math
import re

from experiments import cli
from experiments.tpu import scenario, types
from experiments.tpu.commands import Job
from rlhf_jax.errors import InputError

ACTIONS = ("create", "setup", "launch", "watch", "resume", "stop", "delete")
STARTING = ("launch", "watch", "resume")  # those that need the arguments of experiments.run


def parser(description: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m experiments.tpu",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("action", choices=ACTIONS)
    made.add_argument("--name", default="", help="of the slice")
    made.add_argument("--zone", default="", help="e.g. us-west4-a")
    made.add_argument("--type", default="", help="e.g. v5litepod-16, v4-32, v5p-128, v6e-16")
    made.add_argument("--project", default="", help="if it is not gcloud's own setting")
    made.add_argument("--runtime_version", default="", help="if it is not the usual one of the type")
    made.add_argument("--spot", action="store_true", help="cheaper, and may be preempted")
    made.add_argument("--queued", action="store_true", help="a queued resource: waits for capacity")
    made.add_argument(
        "--create_flag", action="append", default=[], help="one more of gcloud's: --network=NAME"
    )
    made.add_argument("--bucket", default="", help="its name, without gs://; mounted at /mnt/rlhf_jax")
    made.add_argument("--workdir", default="", help="of the run, within the bucket")
    made.add_argument("--allow_dirty", action="store_true", help="send the tree with uncommitted changes")
    made.add_argument("--max_restarts", type=int, default=5, help="without a newer checkpoint (%(default)s)")
    made.add_argument(
        "--delete_after", action="store_true", help="of watch, resume: delete the slice at the end"
    )
    made.add_argument("--dry_run", action="store_true", help="print the gcloud calls, make none")
    made.add_argument(
        "--scenario", default=scenario.EXAMPLE, help="of watch, resume with --dry_run (%(default)s)"
    )
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return made


def split(argv: list[str]) -> tuple[list[str], list[str]]:
    """(our own, those of experiments.run, which follow --)."""
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


def read_job(flags: argparse.Namespace, arguments: list[str]) -> Job:
    """Raises: InputError naming the flag that is wrong or missing."""
    for name in ("name", "zone"):
        value = getattr(flags, name)
        if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", value):
            raise InputError(
                f"--{name}={value}: give the {name} of the slice (lower-case letters, digits and -)."
            )
    if flags.bucket and not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", flags.bucket):
        raise InputError(f"--bucket={flags.bucket}: give its name alone, without gs:// and directories.")
    if flags.max_restarts < 0:
        raise InputError(f"--max_restarts={flags.max_restarts}: expected 0 or more.")
    # stop and delete work on whatever is there.
    known = None if flags.action in ("stop", "delete") else types.find(flags.type, flags.runtime_version)
    job = Job(
        name=flags.name,
        zone=flags.zone,
        slice=known,
        project=flags.project,
        spot=flags.spot,
        queued=flags.queued,
        create_flags=tuple(flags.create_flag),
        bucket=flags.bucket,
        workdir=flags.workdir,
        arguments=tuple(arguments),
    )
    if flags.action in STARTING:
        check_arguments(arguments, known)
        _ = job.shared_workdir
    return job


def check_arguments(arguments: list[str], known: types.Slice) -> None:
    """Raises: InputError if experiments.run would refuse them, or the mesh is not the slice's."""
    for word in arguments:
        if word.split("=")[0] in ("--workdir", "--distributed"):
            raise InputError(f"'{word}' after --: --workdir goes before it, and --distributed is added.")
    run = cli.parser("")
    run.add_argument("--config", default="")
    parsed, overrides = cli.parse(run, arguments)
    if not parsed.config:
        raise InputError("give the arguments of experiments.run after --, at least --config=FILE.py[:SIZE].")
    mesh = cli.load_config(parsed.config, overrides).mesh
    sizes = [mesh.data, mesh.fsdp, mesh.tensor]
    product = math.prod(size for size in sizes if size != -1)
    if known.chips and (known.chips % product if -1 in sizes else known.chips != product):
        told = " x ".join(f"{name} {mesh[name]}" for name in ("data", "fsdp", "tensor"))
        raise InputError(
            f"config.mesh is {told}, and {known.name} has {known.chips} chips; give --config.mesh.data, .fsdp and "
            ".tensor whose product is that (-1: the rest)."
        )
