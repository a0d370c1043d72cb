"""What is copied to the workers: the code, worker.sh, and the token of Hugging Face if $HF_TOKEN is set.

The code is packed once for a name and kept, so that a run that is resumed after a preemption goes on with it."""

import contextlib
import os
import pathlib
import shutil
import subprocess
import tarfile

from experiments.tpu.commands import SCRIPT, Job
from rlhf_jax.errors import InputError

ROOT = pathlib.Path(__file__).parent.parent.parent
WORKER = pathlib.Path(__file__).with_name("worker.sh")


class Bundle:
    """dry: nothing is written."""

    def __init__(self, job: Job, root: pathlib.Path = ROOT, dry: bool = False):
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        self.directory, self._root = pathlib.Path(cache, "rlhf_jax", "tpu", f"{job.name}.{job.zone}"), root
        self._dry = dry
        self.code, self._commit = self.directory / "rlhf_jax.tar.gz", self.directory / "commit"
        self._script, self._token = self.directory / SCRIPT, self.directory / ".rlhf_jax_token"

    @property
    def files(self) -> list[str]:
        tokens = [self._token] if os.environ.get("HF_TOKEN") else []
        return [str(path) for path in (self.code, self._script, *tokens)]

    def check(self, allow_dirty: bool) -> str:
        """The commit that would be packed.  Raises: InputError if it is not what lies in the tree."""
        commit = self._git("rev-parse", "HEAD").strip()
        changes = self._git("status", "--porcelain").splitlines()
        if changes and not allow_dirty:
            raise InputError(
                f"{self._root} has changes that are not committed ({changes[0].strip()}"
                f"{f' and {len(changes) - 1} more' if len(changes) > 1 else ''}), so the run could not be made again. "
                "Commit them, or give --allow_dirty to send the tree as it is."
            )
        return commit + (" with changes" if changes else "")

    def pack(self, allow_dirty: bool) -> str:
        """Packs the tree as git sees it: ignored files stay here. Returns the commit."""
        commit = self.check(allow_dirty)
        if self._dry:
            return commit
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        names = self._git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
        with tarfile.open(f"{self.code}.new", "w:gz") as archive:
            for name in filter(None, names):
                if os.path.lexists(self._root / name):  # deleted ones are still listed
                    archive.add(self._root / name, name)
        os.replace(f"{self.code}.new", self.code)
        shutil.copy(WORKER, self._script)
        self._commit.write_text(commit)
        return commit

    def kept(self) -> str | None:
        """The commit that was packed before."""
        return self._commit.read_text() if self._commit.exists() and self.code.exists() else None

    @contextlib.contextmanager
    def with_token(self):
        """The token is a file for as long as it is copied: neither calls nor process lists show it."""
        token = os.environ.get("HF_TOKEN")
        try:
            if token and not self._dry:
                self._token.unlink(missing_ok=True)
                with open(os.open(self._token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                    file.write(token)
            yield
        finally:
            if not self._dry:
                self._token.unlink(missing_ok=True)

    def forget(self) -> None:
        if not self._dry:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _git(self, *arguments: str) -> str:
        command = ["git", "-C", str(self._root), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except FileNotFoundError:
            raise InputError("git is not installed; the code is sent as git knows it.") from None
        except subprocess.CalledProcessError as error:
            raise InputError(
                f"{self._root} is not a git repository ({error.stderr.strip()}); clone it anew."
            ) from None
