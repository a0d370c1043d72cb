"""Loading streams tensor by tensor: measured on the resident memory of a process of its own."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from rlhf_jax.checkpoints import huggingface
from rlhf_jax.models.llama import Llama, LlamaConfig

ROOT = pathlib.Path(__file__).parent.parent.parent

MEMORY = """
import sys, threading
import jax, jax.numpy as jnp
from rlhf_jax.checkpoints import huggingface
from rlhf_jax.models.llama import LlamaConfig

def resident(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

jnp.zeros(1).block_until_ready()
path, dtype = sys.argv[1:]
config, params = huggingface.load_llama(path + "/small")  # imports and warms up
before, peak, done = resident("VmRSS"), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.0005):
        peak = max(peak, resident("VmRSS"))
watcher = threading.Thread(target=watch)
watcher.start()
config, params = huggingface.load_llama(path + "/large", jnp.dtype(dtype))
done.set()
watcher.join()
print((max(peak, resident("VmRSS")) - before) / sum(x.nbytes for x in jax.tree.leaves(params)))
"""


def save(path, vocab_size, hidden_size, intermediate_size, num_layers, num_heads, head_dim):
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads // 2,
        head_dim=head_dim,
    )
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = nn.meta.unbox(jax.eval_shape(Llama(config).init, jax.random.key(0), ids, ids)["params"])
    ones = jax.tree.map(lambda x: np.ones(x.shape, jnp.bfloat16), shapes)
    huggingface.save_llama(str(path), config, ones, shard_bytes=60 * 10**6)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_host_memory_peaks_below_1_2_times_the_result(tmp_path):
    # 196 MB in float32, stored as bfloat16; resident memory counts mapped pages of the files as well.
    save(tmp_path / "small", 40, 24, 56, 3, 4, 10)
    save(tmp_path / "large", 8192, 512, 1408, 12, 8, 64)
    command = [sys.executable, "-c", MEMORY, str(tmp_path), "float32"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert run.returncode == 0, run.stderr
    assert 0.9 < float(run.stdout) < 1.2
