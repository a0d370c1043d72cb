"""The TPU's attention kernels against the plain form: run by the Pallas interpreter, compiled for a described TPU."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.models import attention, lora, roles, splash
from rlhf_jax.models.attention import GroupContext
from rlhf_jax.models.llama import Llama
from rlhf_jax.models.roles import Role
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.parallel import sharding
from rlhf_jax.types import GroupedBatch

B, H, K, C = 2, 4, 2, 16


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(
        splash, "LONGEST_BLOCK", 128
    )  # so that short rows have several, empty ones among them


def compare(contexts, atol=1e-5):
    """Values and gradients of both forms at all tokens that have something to read."""
    P = contexts[0].prompt_mask.shape[1]
    own = 0 if contexts[0].completion_mask is None else np.prod(contexts[0].completion_mask.shape[1:])
    keys = jax.random.split(jax.random.key(0), 4)
    shape = lambda heads: (B, P + own, heads, C)
    q, k, v = (jax.random.normal(key, shape(heads)) for key, heads in zip(keys, (H, K, K), strict=False))
    probe = jax.random.normal(keys[3], shape(H))

    def both(form):
        def probed(q, k, v, context, reads):
            out = jnp.where(reads[:, :, None, None], form(q, k, v, context), 0.0)
            return jnp.sum(out * probe), out

        return jax.jit(jax.value_and_grad(probed, (0, 1, 2), has_aux=True))

    plain = both(attention.group_attention)
    kernel = both(lambda *inputs: splash.group_attention(*inputs, interpret=True))
    for context in contexts:
        ((_, out), gradients), ((_, expected), wanted) = (
            form(q, k, v, context, jnp.asarray(reading(context))) for form in (kernel, plain)
        )
        np.testing.assert_allclose(out, expected, atol=atol)
        for found, right in zip(gradients, wanted, strict=True):
            np.testing.assert_allclose(found, right, rtol=2e-6, atol=atol)
            assert np.abs(right).max() > 0.1


def reading(context):
    """[B, S]: tokens with something to read."""
    if context.segments is not None:
        own = np.ones((B, context.segments[0].size), bool)
        return np.concatenate([np.zeros_like(context.prompt_mask, bool), own], 1)
    before = np.cumsum(context.prompt_mask, 1)
    if context.completion_mask is None:
        return before > 0
    own = before[:, -1:, None] + np.cumsum(context.completion_mask, 2)
    return np.concatenate([before, own.reshape(B, -1)], 1) > 0


def left(rows, size):
    return (np.arange(size)[None] >= size - np.array(rows)[:, None]).astype(np.int32)


def right(rows, size):
    return left(rows, size)[:, ::-1].copy()


def test_groups_with_padding_on_either_side():
    """Lengths that are no multiples of anything; empty completions, and a row of nothing at all, which is not NaN."""
    P, G, R = 70, 3, 45
    completions = right([45, 0, 3, 20, 1, 45], R).reshape(B, G, R)
    nothing = completions * np.array([1, 0])[:, None, None]
    compare(
        [
            GroupContext(left([70, 9], P), completions),
            GroupContext(right([1, 70], P), completions),
            GroupContext(left([70, 0], P), nothing),
        ]
    )


def test_plain_sequences():
    compare([GroupContext(left([130, 40], 130)), GroupContext(right([130, 40], 130))])


def test_packed_rows_read_their_own_segment():
    lengths = ((40, 60, 29), (1, 100))
    segments = np.zeros((B, 1, 150), np.int32)
    for row, parts in enumerate(lengths):
        held = np.repeat(np.arange(1, len(parts) + 1), parts)
        segments[row, 0, : len(held)] = held
    nothing = np.zeros((B, 1), np.int32)
    compare([GroupContext(nothing, (segments > 0).astype(np.int32), segments)])


def test_packed_rows_with_a_prompt_are_not_for_the_kernels():
    segments = jnp.ones((1, 1, 4), jnp.int32)
    shared = GroupContext(jnp.ones((1, 2), jnp.int32), segments, segments)
    assert not splash.can_carry(shared)
    single = GroupContext(jnp.ones((1, 1), jnp.int32), segments, segments)
    assert splash.can_carry(
        single
    )  # by shape; a prompt token that is real against the contract is not passed over
    q, k = jnp.ones((1, 5, H, C)), jnp.ones((1, 5, K, C))
    assert np.isnan(splash.group_attention(q, k, k, single, interpret=True)).all()


def test_the_mask_is_the_group():
    P, G, R, size = 5, 3, 4, 24
    mask = np.array(splash.GroupMask(size, P, G, R)[:, :])
    of = np.array([-1] * P + [0] * R + [1] * R + [2] * R + [3] * (size - P - G * R))
    for i in range(size):
        for j in range(size):
            readable = j <= i and (of[i] == of[j] or (of[j] == -1 and of[i] < G))
            assert mask[i, j] == readable
    np.testing.assert_array_equal(splash.GroupMask(size, P, G, R)[8:16, 4:12], mask[8:16, 4:12])


@pytest.mark.parametrize("tokens", [1, 128, 129, 513, 576, 1100, 4608])
def test_blocks_hold_the_tokens(tokens, monkeypatch):
    monkeypatch.setattr(splash, "LONGEST_BLOCK", 512)
    size, block = splash.blocks(tokens)
    assert size % block == 0 and block % 128 == 0 and block <= 512
    assert tokens <= size < tokens + 128 * -(-tokens // 512)


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 2, 4)])  # 4 devices for 2 key heads: each is held twice
def test_the_model_on_a_mesh(tiny_llama, shape):
    """States and adapter gradients of the whole model, rematerialised, on 8 devices, are those of the plain form."""
    model, params = tiny_llama
    rng = np.random.default_rng(0)
    ids = lambda *shape: rng.integers(3, 60, shape).astype(np.int32)
    batch = GroupedBatch(
        ids(4, 6), left([6, 3, 5, 1], 6), ids(4, 2, 7), right([7, 0, 3, 7, 1, 2, 7, 7], 7).reshape(4, 2, 7)
    )
    adapter = lora.init(jax.random.key(1), model.config, lora.LoraConfig(rank=2))
    adapter = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), adapter)
    kept = np.concatenate([np.ones((4, 2, 1)), batch.completion_mask], 2)[..., None]
    probe = rng.normal(size=(4, 2, 8, model.config.hidden_size)).astype(
        np.float32
    )  # squares would sum to the norm's

    def gradient(form):
        model_of = Llama(dataclasses.replace(model.config, attention=form, remat="full"))
        loss = lambda adapter, params, batch: jnp.sum(
            kept * probe * roles.states(model_of, params, Role(adapter), batch)
        )
        return jax.jit(jax.value_and_grad(loss))

    expected = gradient("plain")(adapter, params, batch)
    mesh = meshes.make_mesh(*shape)
    with meshes.activate(mesh):
        placed = jax.device_put(
            (Role(adapter), params),
            (
                sharding.role_shardings(Role(adapter), model.config, mesh),
                sharding.llama_shardings(model.config, mesh),
            ),
        )
        found = gradient("interpreted")(placed[0].adapter, placed[1], sharding.put_batch(batch, mesh))
    assert min(float(np.abs(x).max()) for x in jax.tree.leaves(expected)) > 0.1
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-3), found, expected)


def test_the_choice():
    assert splash.choose("auto", "tpu") == splash.choose("splash", "tpu") == "splash"
    assert splash.choose("auto", "cpu") == splash.choose("plain", "tpu") == "plain"
    with pytest.raises(InputError, match="config.model.attention is 'splash'.*cpu"):
        splash.choose("splash", "cpu")


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu compiles for TPUs; pip install libtpu"
)
def test_it_compiles_for_a_tpu_and_keeps_no_scores():
    """Forward and backward, heads of 128 and of 64, for a slice of 4 chips that need not be there. In a process of its
    own: libtpu reads XLA_FLAGS too, and does not know those of a CPU."""
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    script = pathlib.Path(__file__).parent / "compile_splash.py"
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kernels"] >= 3 and found["kernels_64"] >= 3  # forward, and the two of the backward pass
    assert not found["all_gathers"]  # each chip sees its own rows and heads only
    assert found["splash_bytes"] < found["plain_bytes"] / 10
