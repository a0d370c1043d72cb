"""The decoder against numbers that transformers and peft computed in torch (tests/golden/make_golden.py)."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.checkpoints import huggingface, peft
from rlhf_jax.models.llama import Llama
from rlhf_jax.models.lora import merge

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
TOLERANCE = 1e-4  # of logits of size 1 to 20


def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


@pytest.fixture(scope="module", params=["llama2", "llama3"])
def checkpoint(request):
    config, params = huggingface.load_llama(str(GOLDEN / request.param))
    return config, params, golden(request.param)


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_with_padding_on_either_side(checkpoint, side):
    config, params, expected = checkpoint
    ids, mask = expected[f"{side}_ids"], expected[f"{side}_mask"]
    logits = _logits(config, params, ids, mask)
    assert np.abs(expected[f"{side}_logits"]).max() > 1.0
    np.testing.assert_allclose(logits * mask[..., None], expected[f"{side}_logits"], rtol=0, atol=TOLERANCE)


def test_greedy_tokens_by_teacher_forcing(checkpoint):
    config, params, expected = checkpoint
    P, R = expected["prompt_ids"].shape[1], expected["greedy_ids"].shape[1]
    ids = np.concatenate([expected["prompt_ids"], expected["greedy_ids"]], axis=1)
    mask = np.concatenate([expected["prompt_mask"], np.ones_like(expected["greedy_ids"])], axis=1)
    chosen = _logits(config, params, ids, mask)[:, P - 1 : P + R - 1].argmax(-1)
    np.testing.assert_array_equal(chosen, expected["greedy_ids"])


def test_the_rope_scaling_of_the_golden_files_matters():
    # A golden file that an unscaled model met as well would prove nothing.
    config, params = huggingface.load_llama(str(GOLDEN / "llama3"))
    expected = golden("llama3")
    ids, mask = expected["right_ids"], expected["right_mask"]
    unscaled = _logits(dataclasses.replace(config, rope_scaling=None), params, ids, mask)
    assert np.abs((unscaled - expected["right_logits"]) * mask[..., None]).max() > 0.1


@pytest.mark.parametrize("merged", [False, True])
def test_adapter_made_by_peft(merged):
    config, params = huggingface.load_llama(str(GOLDEN / "llama2"))
    adapter, settings = peft.load_adapter(str(GOLDEN / "adapter"), config)
    expected = golden("adapter")
    if merged:
        params, adapter = merge(params, adapter, settings), None
    logits = _logits(config, params, expected["ids"], expected["mask"], adapter)
    np.testing.assert_allclose(
        logits * expected["mask"][..., None], expected["logits"], rtol=0, atol=TOLERANCE
    )


def _logits(config, params, ids, mask, adapter=None):
    apply = jax.jit(lambda p, i, m, a: Llama(config).apply({"params": p}, i, m, a))
    return np.asarray(apply(params, jnp.asarray(ids), jnp.asarray(mask), adapter))
