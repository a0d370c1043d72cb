"""Encoders and T5 on a mesh of 8 virtual devices: everything large is split, and the forward pass is that of one."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.checkpoints import encoders
from rlhf_jax.models import encoder_heads
from rlhf_jax.models.t5 import T5
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.parallel import sharding

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "encoders"
ROWS, TOKENS, LARGE = 8, 6, 300  # values; smaller arrays may be whole everywhere


def inputs():
    rng = np.random.default_rng(0)
    mask = (np.arange(TOKENS) < rng.integers(1, TOKENS + 1, (ROWS, 1))).astype(np.int32)
    return rng.integers(4, 57, (ROWS, TOKENS)).astype(np.int32), mask


def forward(name, mesh=None):
    """(scores, params and head) on a mesh, or on one device."""
    put = jnp.asarray if mesh is None else (lambda x: sharding.put_batch(x, mesh))
    ids, mask = (put(x) for x in inputs())
    if name == "flan":
        config, params = encoders.load_t5(str(GOLDEN / name), mesh=mesh)
        run = lambda p, i, m: T5(config).apply({"params": p}, i, m, i, m)
        return jax.jit(run)(params, ids, mask), params
    config, params, head = encoders.load_encoder(str(GOLDEN / name), mesh=mesh)

    @jax.jit
    def run(params, head, ids, mask):
        hidden = encoders.model_of(config).apply({"params": params}, ids, mask)
        return encoder_heads.sequence_score(head, config.head, hidden, mask)

    return run(params, head, ids, mask), (params, head)


@pytest.mark.parametrize("name", ["deberta_v2", "flan"])
def test_a_sharded_forward_is_that_of_one_device(name):
    expected, _ = forward(name)
    mesh = meshes.make_mesh(2, 2, 2)
    with meshes.activate(mesh):
        scores, weights = forward(name, mesh)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)
    for path, x in jax.tree_util.tree_leaves_with_path(weights):
        if x.size > LARGE:
            assert not x.sharding.is_fully_replicated, jax.tree_util.keystr(path)
