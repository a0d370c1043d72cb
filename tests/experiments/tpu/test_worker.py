"""worker.sh as it is, on this machine: a home of its own, and stand-ins for what would touch the system."""

import os
import pathlib
import shutil
import subprocess
import tarfile
import time

import pytest

SCRIPT = pathlib.Path(__file__).parents[3] / "experiments" / "tpu" / "worker.sh"
pytestmark = pytest.mark.skipif(
    not (shutil.which("bash") and shutil.which("flock") and shutil.which("setsid")),
    reason="needs bash and util-linux",
)
RUN = """#!/bin/bash
# In the place of Python: notes how it was called, then does what `behaviour` says.
echo "$PWD $*" >>"$HOME/starts"
echo "step 1"; echo "step 2"
trap 'exit 75' TERM
[ "$(cat "$HOME/behaviour")" = stubborn ] && trap '' TERM
while [ ! -e "$HOME/end" ]; do sleep 0.02; done
exit "$(cat "$HOME/end")"
"""


class Home:
    def __init__(self, path):
        self.path = path
        self.write("behaviour", "good")
        # Everything that would reach out of this directory; each says how it was called.
        for name in ("sudo", "gcsfuse", "uv", "python3"):
            self.tool(name, f'echo "{name} $*" >>"$HOME/tools"')
        self.tool("curl", "echo 3")  # the number of this worker
        self.tool("mountpoint", "exit 1")

    def write(self, name, text="", mode=0o644):
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)

    def read(self, name):
        return (self.path / name).read_text()

    def tool(self, name, body):
        self.write(f".local/bin/{name}", f"#!/bin/bash\n{body}\n", 0o755)

    def __call__(self, *words, **environment):
        """(exit status, output). That it returns shows that nothing detached holds on to the connection."""
        env = {"HOME": str(self.path), "PATH": os.defpath + ":/usr/local/bin", **environment}
        done = subprocess.run(
            ["bash", str(SCRIPT), *words], env=env, cwd=self.path, capture_output=True, text=True, timeout=30
        )
        return done.returncode, done.stdout + done.stderr

    def poll(self, wanted):
        """Polls until it says what is wanted."""
        for _ in range(200):
            told = self("poll")[1]
            if told == f"@rlhf_jax 3 {wanted}\n":
                return
            time.sleep(0.02)
        pytest.fail(f"{told!r}, not {wanted}")


@pytest.fixture
def home(tmp_path):
    """A worker that is set up."""
    made = Home(tmp_path)
    made.write("rlhf_jax_venv/bin/python", RUN, 0o755)
    made.write("rlhf_jax/code.py")
    made.write("rlhf_jax_job/ready")
    yield made
    made.write("end", "0")
    assert made("stop", STOP_SECONDS="1")[0] == 0


def test_a_run_from_launch_to_end(home):
    workdir = home.path / "out" / "run"
    assert home("poll") == (0, "@rlhf_jax 3 idle\n")
    assert home("launch", str(workdir), "--distributed", "--config.x=a 'b'") == (0, "@rlhf_jax 3 launched\n")
    home.poll("running")
    status, told = home("launch", str(workdir), "--distributed")
    assert (status, told) == (0, "@rlhf_jax 3 running\n"), "a second launch changes nothing"
    home.write("out/run/checkpoints/ppo/8/meta/metadata")
    home.write("out/run/checkpoints/ppo/16.orbax-checkpoint-tmp/x")
    home.write("out/run/roles/sft/adapter")
    assert home("log", str(workdir), "2")[1].splitlines() == [
        "@rlhf_jax saved checkpoints/ppo/8", "@rlhf_jax saved roles/sft", "step 2",
    ]  # fmt: skip
    home.write("end", "76")
    home.poll("exited 76")
    assert (
        home.read("starts") == f"{home.path}/rlhf_jax -u -m experiments.run --distributed --config.x=a 'b'\n"
    )
    for _ in range(100):  # the copy comes after the status
        logs = list(home.path.glob("out/run.logs/worker-3-*.log"))
        if logs and logs[0].read_text():
            break
        time.sleep(0.02)
    assert logs[0].read_text() == "step 1\nstep 2\n"
    (home.path / "end").unlink()
    assert home("launch", str(workdir))[1] == "@rlhf_jax 3 launched\n", (
        "one that has ended may be launched again"
    )
    home.poll("running")


@pytest.mark.parametrize("behaviour, status", [("good", 75), ("stubborn", 137)])
def test_stop_lets_the_run_save_and_then_insists(home, behaviour, status):
    home.write("behaviour", behaviour)
    home("launch", str(home.path / "out"))
    home.poll("running")
    for _ in range(100):
        if (home.path / "rlhf_jax_job" / "log").exists() and "step 2" in home.read("rlhf_jax_job/log"):
            break
        time.sleep(0.02)
    time.sleep(0.1)  # until it has set its trap
    assert home("stop", STOP_SECONDS="1") == (0, "")
    home.poll(f"exited {status}")
    assert home("stop") == (0, ""), "with nothing to stop"


def test_stop_ends_what_a_run_has_left_behind(home):
    home.write("rlhf_jax_venv/bin/python", "#!/bin/bash\nsleep 60 &\nexit 76\n", 0o755)
    home("launch", str(home.path / "out"))
    home.poll("exited 76")
    home.tool("seq", "echo 1")  # does not wait as long as it should
    assert home("stop") == (0, "")
    assert home("launch", str(home.path / "out"))[1] == "@rlhf_jax 3 launched\n"
    home.poll("exited 76")


def test_after_a_reboot_the_run_counts_as_lost(home):
    home.write("rlhf_jax_job/started")
    home.write("rlhf_jax_job/lock")
    assert home("poll")[1] == "@rlhf_jax 3 lost\n"


def bundle(home):
    with tarfile.open(home.path / "rlhf_jax.tar.gz", "w:gz") as archive:
        archive.add(SCRIPT, "experiments/tpu/worker.sh")


def test_set_up(tmp_path):
    home = Home(tmp_path)
    bundle(home)
    assert home("poll")[1] == "@rlhf_jax 3 bare\n"
    assert home("launch", "/nowhere")[0] == 2
    home.write(".rlhf_jax_token", "hf_canary", 0o644)
    home.write("rlhf_jax/of_before.py")
    status, told = home("setup", "my-bucket")
    assert (status, told) == (0, "@rlhf_jax 3 set up\n")
    assert home("poll")[1] == "@rlhf_jax 3 idle\n"
    token = tmp_path / ".cache" / "huggingface" / "token"
    assert token.read_text() == "hf_canary" and token.stat().st_mode & 0o777 == 0o600
    assert not (tmp_path / ".rlhf_jax_token").exists()
    assert (tmp_path / "rlhf_jax/experiments/tpu/worker.sh").exists()
    assert not (tmp_path / "rlhf_jax/of_before.py").exists(), "old code is gone"
    calls = home.read("tools").splitlines()
    assert calls[:2] == [
        f"uv venv -q --python 3.11 {tmp_path}/rlhf_jax_venv",
        f"uv pip install -q --python {tmp_path}/rlhf_jax_venv/bin/python -e {tmp_path}/rlhf_jax[tpu]",
    ]
    assert calls[-1].startswith("gcsfuse ") and calls[-1].endswith(" my-bucket /mnt/rlhf_jax")
    assert not any("canary" in call for call in calls)


@pytest.mark.parametrize(
    "tool, status, message",
    [("gcsfuse", 74, "my-bucket could not be mounted on worker 3"), ("uv", 70, "Python 3.11")],
)
def test_a_set_up_that_fails_says_where(tmp_path, tool, status, message):
    home = Home(tmp_path)
    bundle(home)
    home.tool(tool, "exit 1")
    got, told = home("setup", "my-bucket")
    assert got == status and message in told
    assert home("poll")[1] == "@rlhf_jax 3 bare\n"


def test_no_set_up_under_a_run(home):
    bundle(home)
    home("launch", str(home.path / "out"))
    home.poll("running")
    status, told = home("setup", "my-bucket")
    assert status == 2 and "stop it first" in told
    assert (home.path / "rlhf_jax/code.py").exists()
