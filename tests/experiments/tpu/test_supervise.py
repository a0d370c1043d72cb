"""What watch and resume do about exit statuses, preemptions and silence, against a played gcloud."""

import pytest

from experiments.tpu.supervise import MAX_SILENT_POLLS, MAX_WAIT_SECONDS
from rlhf_jax.errors import InputError, PeerLost, RunError, StorageError

ALL = "{0},{0},{0},{0}".format
RUNNING = ALL("running")


def test_a_run_that_ends_well_is_only_watched(fake, capsys):
    fake.run("watch", f"{RUNNING} {RUNNING} {ALL(0)}")
    assert fake.calls() == []
    said = capsys.readouterr().out
    assert said.count("step 1\n") == said.count("step 3\n") == 1, "each line of the log once"
    assert "`delete`" in said


def test_resume_alone_does_everything(fake):
    fake.run("resume", f"MISSING CREATING {ALL('bare')} {RUNNING} {ALL(0)}", "--delete_after")
    assert fake.calls() == ["create", "scp", "setup", "launch", "delete"]


def test_a_preempted_slice_is_made_anew_and_the_run_resumed(fake):
    events = f"{RUNNING} {RUNNING} {RUNNING}+8 PREEMPTED {ALL('bare')} {RUNNING} {ALL(0)}"
    fake.run("watch", events)
    assert fake.calls() == ["delete", "create", "scp", "setup", "launch"]


def test_a_slice_that_vanishes_is_made_anew(fake):
    fake.run("watch", f"{RUNNING} MISSING {ALL('bare')} {RUNNING} {ALL(0)}")
    assert fake.calls() == ["create", "scp", "setup", "launch"]


@pytest.mark.parametrize(
    "action, events", [("watch", "MISSING"), ("watch", "PREEMPTED"), ("watch", ALL("idle"))]
)
def test_watch_creates_nothing_that_it_has_not_seen(fake, action, events):
    with pytest.raises(InputError, match="`?resume`?"):
        fake.run(action, events)
    assert fake.calls() == []


def test_interrupted_runs_go_on_with_growing_waits(fake):
    fake.run("watch", f"{ALL(75)} {RUNNING} {ALL(75)} {RUNNING} {ALL(0)}")
    assert fake.calls() == ["stop", "launch"] * 2
    assert fake.waited == [30, 30, 60, 30]  # back-off, a look, back-off, a look


def test_each_status_of_the_contract_is_run_again(fake):
    statuses = [75, 76, 134, 137, 143]
    fake.run("watch", " ".join(map(ALL, [*statuses, 0])))
    assert fake.calls() == ["stop", "launch"] * len(statuses)


@pytest.mark.parametrize("status", [1, 2, 3, 74])
def test_a_status_that_would_come_again_ends_the_watch(fake, status):
    with pytest.raises(RunError, match=f"status {status}; .*/mnt/rlhf_jax/runs/1.logs") as error:
        fake.run("watch", f"{RUNNING} 76,{status},134,0")
    assert error.value.status == status and fake.calls() == []


def test_one_processs_own_reason_counts_more_than_a_bug_that_it_caused(fake):
    with pytest.raises(RunError) as error:
        fake.run("watch", "1,1,3,1")
    assert error.value.status == 3


def test_it_gives_up_without_newer_checkpoints(fake):
    with pytest.raises(RunError, match="3 restarts without a newer checkpoint") as error:
        fake.run("watch", f"{RUNNING}+8 " + f"{ALL(76)} " * 4, "--max_restarts=3")
    assert error.value.status == 76 and fake.calls() == ["stop", "launch"] * 3


def test_with_newer_checkpoints_it_goes_on(fake):
    again = " ".join(f"{RUNNING}+{step} {ALL(76)}" for step in range(8, 40, 8))
    fake.run("watch", f"{again} {ALL(0)}", "--max_restarts=1")
    assert fake.calls() == ["stop", "launch"] * 4


def test_an_old_checkpoint_is_no_progress(fake):
    with pytest.raises(RunError, match="1 restarts without"):
        fake.run("watch", f"{RUNNING}+8 {ALL(76)} {RUNNING}+8 {ALL(76)} {RUNNING}", "--max_restarts=1")


def test_when_one_process_fails_all_are_ended_and_launched_again(fake):
    fake.run("watch", f"{RUNNING} running,137,running,running 143,137,75,143 {RUNNING} {ALL(0)}")
    assert fake.calls() == ["stop", "stop", "launch"]
    assert fake.waited[1] == 60, "time to notice by themselves"


def test_a_machine_that_was_started_anew_is_a_killed_process(fake):
    fake.run("watch", f"{RUNNING} running,lost,running,running 137,lost,143,143 {ALL(0)}")
    assert fake.calls() == ["stop", "stop", "launch"]


def test_processes_that_are_done_wait_for_the_one_that_writes_the_report(fake):
    fake.run("watch", f"{RUNNING} " + "running,0,0,0 " * 5 + ALL(0))
    assert fake.calls() == []


def test_silence_is_borne_for_a_while(fake):
    fake.run("watch", f"{RUNNING} unreachable unreachable {RUNNING} {ALL(0)}")
    assert fake.calls() == []
    with pytest.raises(PeerLost, match="Connection timed out"):
        fake.run("watch", "unreachable")
    assert len(fake.waited) == 2 + 2 + MAX_SILENT_POLLS
    assert fake.calls() == [], "a slice that may be at work is never deleted for silence"


def test_a_worker_that_does_not_answer_is_silence(fake):
    fake.run("watch", f"running,running {RUNNING} {ALL(0)}")
    assert fake.calls() == []


def test_without_capacity_it_asks_again(fake):
    fake.write("refuse_create", "There is no more capacity in the zone")
    fake.run("resume", f"MISSING MISSING {ALL('bare')} {ALL(0)}")
    assert fake.calls() == ["create", "create", "scp", "setup", "launch"]
    assert fake.waited[0] == MAX_WAIT_SECONDS


def test_without_quota_it_stops(fake):
    fake.write("refuse_create", "Quota limit 'TPUV5sLitepodPerProjectPerZone' has been exceeded")
    with pytest.raises(RunError, match="(?s)tpu-vm create run1 .*Quota limit") as error:
        fake.run("resume", "MISSING")
    assert error.value.status == 1


def test_a_bucket_that_cannot_be_mounted_is_a_storage_failure(fake):
    fake.write("refuse_setup")
    with pytest.raises(StorageError, match="could not be mounted"):
        fake.run("resume", ALL("bare"))


def test_output_of_the_run_cannot_speak_to_the_terminal(fake, capsys):
    fake.write("saved", "sample \x1b[2J\x07 end\n")
    fake.run("watch", ALL(0))
    assert "sample [2J end\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "events, deleted", [(ALL(3), True), (ALL(76), True), (ALL("idle"), False), ("unreachable", False)]
)
def test_delete_after_spares_what_may_be_at_work(fake, events, deleted):
    with pytest.raises(RunError):
        fake.run("watch", events, "--delete_after", "--max_restarts=0")
    assert fake.calls() == ["delete"] * deleted
