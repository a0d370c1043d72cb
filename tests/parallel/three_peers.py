"""What test_peers.py runs: a process that joins two others without jax, and then does what it is told."""

import json
import os
import socket
import sys
import time

from rlhf_jax.parallel import peers

index, folder, what = int(sys.argv[1]), sys.argv[2], sys.argv[3]
LEAVE = {
    "raise": (1, "RuntimeError: no reward"),
    "input": (2, "no such file"),
    "interrupted": (75, "stopped"),
}


def appears(name):
    while not os.path.exists(os.path.join(folder, name)):
        time.sleep(0.01)
    return os.path.join(folder, name)


def put(name, content=""):
    with open(os.path.join(folder, name + ".new"), "w") as file:
        file.write(content)
    os.rename(os.path.join(folder, name + ".new"), os.path.join(folder, name))


def from_first(value):
    if index == 0:
        put("first", json.dumps(value))
    with open(appears("first")) as file:
        return json.load(file)


peers.join(index, 3, from_first, "127.0.0.1")
while index == 0 and len(peers._link._who) < 2:
    time.sleep(0.01)
put(f"joined{index}")
for n in range(3):
    appears(f"joined{n}")
if what in LEAVE and (index == 1 or what == "interrupted"):
    peers.leave(*LEAVE[what])
if what == "stuck" and index == 1:
    peers.beat("ppo, step 3", "step", 0.05)
if what in ("part", "strangers"):
    if what == "strangers" and index == 0:  # they neither end the run nor are they heard
        with open(appears("first")) as file:
            port = json.load(file)[1]
        for said in (
            b"\xff\n",
            b"[]\n",
            b'{"hello": 2, "token": "x"}\n{"ended": 1, "status": 3, "why": "?"}\n',
            b"x" * 99999,
        ):
            with socket.create_connection(("127.0.0.1", port)) as it:
                it.sendall(said)
        time.sleep(1.0)
    put(f"through{index}")
    for n in range(3):
        appears(f"through{n}")
    peers.part()
    sys.exit(0)
time.sleep(60)
