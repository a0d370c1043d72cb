"""A TPU slice for experiments.run, from creation to deletion.

python -m experiments.tpu ACTION --name=NAME --zone=ZONE --type=TYPE [flags] -- --config=configs/ppo.py:llama2_7b

create   the TPU VM, or with --queued a queued resource
setup    code, Python and packages on every worker, the bucket mounted
launch   experiments.run on every worker, detached; nothing if it is running
watch    follow it: its log here, restarts after interruptions, a new slice after a preemption
resume   watch, and before it whatever of the above is missing: alone, it does everything
stop     end the run, which saves; the slice stays
delete   the slice; the bucket stays

Every action may be given the same flags. --dry_run prints the gcloud calls and makes none. $HF_TOKEN goes to the
workers as a file. docs/tpu.md walks through a run."""

import shlex
import sys
from time import sleep

from experiments import cli
from experiments.tpu import flags as flags_
from experiments.tpu.cloud import Cloud, Result, execute
from experiments.tpu.scenario import Scenario
from experiments.tpu.source import Bundle
from experiments.tpu.supervise import Watch
from rlhf_jax.errors import InputError, Interrupted, PeerLost, RunError


def say(text: str) -> None:
    print(text, flush=True)


def comment(text: str) -> None:
    say("\n".join(f"# {line}" for line in text.splitlines()))


def shown(call: list[str], timeout_seconds: int = 0) -> Result:
    """In the place of execute."""
    say(shlex.join(call))
    return Result(0)


def command(argv):
    own, arguments = flags_.split(argv)
    flags = flags_.parser(__doc__).parse_args(own)
    job = flags_.read_job(flags, arguments)
    bundle, watches = Bundle(job, dry=flags.dry_run), flags.action in ("watch", "resume")
    run, tell = execute, say
    if flags.dry_run:
        run, tell = Scenario(flags.scenario, job.slice.hosts or 1, say) if watches else shown, comment
    cloud = Cloud(job, bundle, run, tell)
    if flags.action == "setup" or (watches and not bundle.kept()):
        tell(f"code: commit {bundle.pack(flags.allow_dirty)}")
    elif watches:
        tell(f"code: commit {bundle.kept()}, as it was packed before; `setup` packs it anew")
    if watches:
        watch(flags, cloud, tell)
    else:
        getattr(cloud, {"setup": "set_up"}.get(flags.action, flags.action))()
    if flags.action == "delete":
        bundle.forget()


def watch(flags, cloud: Cloud, tell) -> None:
    """Raises: RunError with the status of the run, if it is not 0."""
    clock = (lambda seconds: comment(f"wait {seconds} s")) if flags.dry_run else sleep
    follower = Watch(cloud, clock, tell, flags.max_restarts, may_create=flags.action == "resume")
    try:
        status = follower.follow()
    except KeyboardInterrupt:
        raise Interrupted(
            "no longer watching; the run goes on, and so do its costs (`watch` follows it again)"
        ) from None
    except RunError as error:
        # Not a slice that may be at work, or that was never asked to.
        finish(flags.delete_after and not isinstance(error, InputError | PeerLost), cloud, tell)
        raise
    finish(flags.delete_after, cloud, tell)
    if status:
        ended = RunError(
            f"the run ended with status {status}; its log is above and in {cloud.job.shared_workdir}.logs"
        )
        ended.status = status
        raise ended


def finish(delete: bool, cloud: Cloud, tell) -> None:
    if delete:
        tell("deleting the slice")
        cloud.delete()
    else:
        tell("the slice may still be there, and then costs on; `delete` ends that")


if __name__ == "__main__":
    cli.main(command, sys.argv[1:])
