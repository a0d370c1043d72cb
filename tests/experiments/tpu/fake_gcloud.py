#!PYTHON -IS
"""Plays gcloud for the tests: each look at the slice takes the next event of the file `events` beside it.

An event: a state of the node (PREEMPTED, MISSING, CREATING), "unreachable", or a word for each worker with commas
between: running, idle, bare, lost, or an exit status. "+NAME" after it: that checkpoint is there from now on."""

import os
import pathlib
import sys

here = pathlib.Path(__file__).parent
words = sys.argv[1:]
with open(here / "calls", "a") as calls:
    calls.write(" ".join(words) + "\n")
events = (here / "events").read_text().split()
event, _, saved = events[0].partition("+")


def take():
    if len(events) > 1:
        (here / "events").write_text("\n".join(events[1:]))


def refuse(text, status=1):
    print(f"ERROR: (gcloud) {text}", file=sys.stderr)
    raise SystemExit(status)


command = next((word for word in words if word.startswith("--command=")), "")
if os.path.exists(here / "refuse_create") and "create" in words:
    text = (here / "refuse_create").read_text()
    os.remove(here / "refuse_create")
    refuse(text)
if "describe" in words:
    if "queued-resources" in words:
        print("ACTIVE")
    elif event == "MISSING":
        take()
        refuse("NOT_FOUND: Resource was not found")
    elif event.isupper():
        take()
        print(event)
    else:
        print("READY")
elif " poll" in command:
    take()
    if event == "unreachable":
        refuse("ssh: connect to host 10.0.0.2 port 22: Connection timed out", 255)
    if saved:
        with open(here / "saved", "a") as file:
            file.write(f"@rlhf_jax saved checkpoints/ppo/{saved}\n")
    for number, state in enumerate(event.split(",")):
        print("@rlhf_jax", number, f"exited {state}" if state.isdigit() else state)
elif " log " in command:
    if (here / "saved").exists():
        print((here / "saved").read_text(), end="")
    first = int(command.split()[-1])
    print("".join(f"step {n}\n" for n in range(first, 4)), end="")
elif " setup" in command and os.path.exists(here / "refuse_setup"):
    refuse("bucket b could not be mounted", 74)
