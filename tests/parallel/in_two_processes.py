"""What test_hosts.py runs in two processes: every way of telling each other something."""

import os
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import cli
from rlhf_jax.checkpoints import roles as role_files
from rlhf_jax.errors import InputError
from rlhf_jax.models.roles import Role
from rlhf_jax.parallel import hosts, sharding
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.training import workdir


def talk(me):
    assert hosts.several() and hosts.is_first() == (me == 0) and hosts.name() == f"process {me} of 2"
    said = [{"text": "\ud800 é" * (1 + 50 * n), "nan": [1e-45, n]} for n in (0, 1)]
    assert hosts.share(said[me]) == said
    assert hosts.from_first(me) == 0 and hosts.agree(me) == 1
    assert hosts.spread(5, lambda rows: [[me, n] for n in range(5)[rows]]) == [[n > 1, n] for n in range(5)]
    assert hosts.spread(1, lambda rows: [me] * len(range(1)[rows])) == [1]
    vote = hosts.Vote()  # known one step later
    assert [vote(me == 1 and n == 2) for n in range(5)] == [False, False, False, True, False]
    done = []
    hosts.once(lambda: done.append((hosts.several(), hosts.share("x"))))
    assert done == ([(False, ["x"])] if me == 0 else [])  # and inside it is alone


def disagree(me):
    hosts.agree_on({"kl_coeff": 0.1, "data": "same"})
    own = {"kl_coeff": 0.1 + me, "data": "same"} | ({"jax": "0.10.2"} if me else {})
    with pytest.raises(InputError) as refused:
        hosts.agree_on(own)
    lines = str(refused.value).splitlines()
    assert lines[1:-1] == [
        '  jax: "(absent)" on process 0; "0.10.2" on process 1',
        "  kl_coeff: 0.1 on process 0; 1.1 on process 1",
    ]


def arrays(me):
    """Each process puts the rows of its own devices; what it has in the place of others is not read."""
    mesh = meshes.make_mesh(1, 4, 2)  # rows are split over fsdp, four ways
    rows = np.arange(24.0, dtype=np.float32).reshape(8, 3)
    ours = np.where((np.arange(8) // 4 == me)[:, None], rows, np.nan)
    batch = sharding.put_batch(ours, mesh)
    assert hosts.is_split(batch) and len(batch.addressable_shards) == 4
    np.testing.assert_array_equal(hosts.gather(batch), rows)
    np.testing.assert_array_equal(hosts.gather({"b": batch.sum(), "c": 1.0})["b"], rows.sum())
    np.testing.assert_array_equal(hosts.gather(sharding.put_batch(batch, mesh)), rows)
    key = sharding.place(jax.random.key(3), sharding.replicated(mesh))
    drawn = jax.jit(lambda k: jax.random.uniform(k, (4,)))(key)
    np.testing.assert_array_equal(drawn, jax.random.uniform(jax.random.key(3), (4,)))
    with pytest.raises(InputError, match="a batch of 6 rows cannot be split over 4 devices"):
        sharding.put_batch(rows[:6], mesh)
    return batch


def files(me, folder, batch):
    """One writer, of arrays that no process has whole; a workdir that not all see is refused."""
    path = os.path.join(folder, "role")
    role_files.save_role(path, Role(head={"kernel": batch}), None, None, None, {"step": 3})
    assert role_files.read_meta(path)["step"] == 3 and sorted(os.listdir(path)) == [
        "head.safetensors",
        "role.json",
    ]
    np.testing.assert_array_equal(
        load_file(os.path.join(path, "head.safetensors"))["kernel"], hosts.gather(batch)
    )
    workdir.agree_on_run({"seed": 0}, folder)
    with pytest.raises(InputError, match="config.ppo.kl_coeff: 0.05 on process 0; 1.05 on process 1"):
        workdir.agree_on_run({"ppo": {"kl_coeff": 0.05 + me}}, folder)
    workdir.VISIBLE_SECONDS = 0.1
    own = os.path.join(folder, str(me))
    os.makedirs(own)
    with pytest.raises(InputError, match=r"writes to .* is not seen by process 1 \(host"):
        workdir.agree_on_run({"seed": 0}, own)


def command(argv):
    parser = cli.parser(__doc__)
    parser.add_argument("--folder")
    cli.add_processes(parser)
    flags, _ = cli.parse(parser, argv)
    cli.join_processes(flags)
    me = jax.process_index()
    talk(me)
    disagree(me)
    files(me, flags.folder, arrays(me))
    print("all is well", flush=True)


if __name__ == "__main__":
    cli.main(command, sys.argv[1:])
