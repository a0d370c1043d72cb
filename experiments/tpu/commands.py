"""The gcloud calls of a job, as argument lists: pure functions, so that --dry_run shows what would run.

Knows gcloud's syntax and worker.sh's; runs nothing."""

import dataclasses
import shlex

from experiments.tpu.types import Slice
from rlhf_jax.errors import InputError

MOUNT = "/mnt/rlhf_jax"  # of the bucket, on every worker; worker.sh has it too
SCRIPT = "rlhf_jax_worker.sh"  # in the home directory of a worker
MARK = "@rlhf_jax"  # begins the lines of worker.sh that are for us


@dataclasses.dataclass(frozen=True)
class Job:
    name: str  # of the TPU VM, and of the queued resource if there is one
    zone: str
    slice: Slice | None = None  # None: for calls that do not need it
    project: str = ""  # empty: gcloud's own setting
    spot: bool = False
    queued: bool = False
    create_flags: tuple[str, ...] = ()  # more of gcloud's, such as --network=NAME
    bucket: str = ""
    workdir: str = ""
    arguments: tuple[str, ...] = ()  # of experiments.run, but for --workdir and --distributed

    @property
    def shared_workdir(self) -> str:
        """The directory as every worker sees it.  Raises: InputError if they cannot all see it."""
        if self.workdir.startswith("/"):
            return self.workdir
        if not self.workdir or not self.bucket:
            raise InputError(
                f"--workdir={self.workdir}: all workers must see one directory, which outlives them. Give --bucket, "
                "and --workdir within it; or an absolute --workdir on a file system that all of them have mounted."
            )
        return f"{MOUNT}/{self.workdir}"


def create(job: Job) -> list[list[str]]:
    kind = ["--accelerator-type=" + job.slice.name]
    more = (["--spot"] if job.spot else []) + list(job.create_flags)
    if job.queued:
        version = "--runtime-version=" + job.slice.runtime_version
        return [_queue(job, "create", f"--node-id={job.name}", *kind, version, *more)]
    return [_node(job, "create", *kind, "--version=" + job.slice.runtime_version, *more)]


def delete(job: Job) -> list[list[str]]:
    if job.queued:
        return [_queue(job, "delete", "--force", "--quiet")]  # --force: with its node
    return [_node(job, "delete", "--quiet")]


def node_state(job: Job) -> list[str]:
    return _node(job, "describe", "--format=value(state)")


def queue_state(job: Job) -> list[str]:
    return _queue(job, "describe", "--format=value(state.state)")


def set_up(job: Job, files: list[str]) -> list[list[str]]:
    """files: the packed code and worker.sh, and the token if there is one, on this machine."""
    copy = ["gcloud", "compute", "tpus", "tpu-vm", "scp", *files, f"{job.name}:", *_where(job)]
    return [[*copy, "--worker=all", "--quiet"], _on_workers(job, "setup", job.bucket)]


def launch(job: Job) -> list[list[str]]:
    # One process needs no coordinator.
    several = job.slice.hosts is None or job.slice.hosts > 1
    command = ["--distributed"] * several + [f"--workdir={job.shared_workdir}", *job.arguments]
    return [_on_workers(job, "launch", job.shared_workdir, *command)]


def poll(job: Job) -> list[str]:
    command = f"{_if_there('poll')}; else echo '{MARK} ? bare'; fi"
    return _node(job, "ssh", "--worker=all", f"--command={command}", "--quiet")


def log(job: Job, first_line: int) -> list[str]:
    """Steps that are saved, and the log of process 0 from a line on."""
    command = shlex.join(["bash", SCRIPT, "log", job.shared_workdir, str(first_line)])
    return _node(job, "ssh", "--worker=0", f"--command={command}", "--quiet")


def stop(job: Job) -> list[list[str]]:
    return [_node(job, "ssh", "--worker=all", f"--command={_if_there('stop')}; fi", "--quiet")]


def _if_there(action: str) -> str:
    return f"if [ -e {SCRIPT} ]; then bash {SCRIPT} {action}"


def _on_workers(job: Job, *words: str) -> list[str]:
    command = shlex.join(["bash", SCRIPT, *words])
    return _node(job, "ssh", "--worker=all", f"--command={command}", "--quiet")


def _node(job: Job, action: str, *flags: str) -> list[str]:
    return ["gcloud", "compute", "tpus", "tpu-vm", action, job.name, *_where(job), *flags]


def _queue(job: Job, action: str, *flags: str) -> list[str]:
    return ["gcloud", "compute", "tpus", "queued-resources", action, job.name, *_where(job), *flags]


def _where(job: Job) -> list[str]:
    return [f"--zone={job.zone}"] + ([f"--project={job.project}"] if job.project else [])
