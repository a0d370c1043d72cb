"""Encoders and T5 against numbers that transformers computed in torch (tests/golden/make_encoder_golden.py)."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.checkpoints import encoders
from rlhf_jax.models import deberta, encoder_heads, t5
from rlhf_jax.models.t5 import T5

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
TOLERANCE = 2e-5  # of values of size 1 to 6; the issue asks for 1e-4
ENCODERS = ("bert", "roberta", "deberta_v3", "deberta_v2")


@functools.cache
def golden():
    with np.load(GOLDEN / "encoders.npz") as file:
        return {name: x.astype(np.int32) if x.dtype == np.int16 else x for name, x in file.items()}


@functools.cache
def checkpoint(name):
    load = encoders.load_t5 if name in ("t5", "flan") else encoders.load_encoder
    return load(str(GOLDEN / "encoders" / name))


@functools.cache
def hidden(name, side):
    config, params, _ = checkpoint(name)
    return _encode(config, params, name, side)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ENCODERS)
def test_hidden_states_with_padding_on_either_side(name, side):
    expected, mask = golden()[f"{name}_{side}_hidden"], golden()[f"{name}_{side}_mask"]
    assert np.abs(expected).max() > 1.0
    np.testing.assert_allclose(hidden(name, side) * mask[..., None], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ENCODERS)
def test_logits_of_the_classifiers(name):
    config, _, head = checkpoint(name)
    mask, expected = golden()[f"{name}_right_mask"], golden()[f"{name}_logits"]
    assert expected.std() > 0.1 and expected.shape == (4, config.num_labels)
    logits = encoder_heads.sequence_score(head, config.head, hidden(name, "right"), mask)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "field, value",
    [
        ("position_span", dict(position_buckets=0, max_relative_positions=8)),
        ("scale", dict(pos_att_type=("c2p",))),
        ("norm", dict(norm_rel_ebd=False)),
    ],
)
def test_the_golden_file_of_v3_sees_each_setting(field, value):
    # A golden file that another setting met as well would prove nothing.
    config, params, _ = checkpoint("deberta_v3")
    other = _encode(dataclasses.replace(config, **value), params, "deberta_v3", "right")
    mask = golden()["deberta_v3_right_mask"][..., None]
    assert np.abs((other - golden()["deberta_v3_right_hidden"]) * mask).max() > 0.05, field


def test_pairrm_scores_both_candidates():
    config, params, head = checkpoint("pairrm")
    ids, mask, expected = (golden()[f"pairrm_{part}"] for part in ("ids", "mask", "scores"))
    states = _encoder(config)(params, ids, mask, None)
    scores = encoder_heads.pair_scores(head, states, ids, mask, config.marker_ids)
    assert scores.shape == (3, 2, 1) and expected.std() > 0.03
    np.testing.assert_allclose(scores, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["t5", "flan"])
def test_t5_logits_with_padding_on_either_side(name, side):
    config, params = checkpoint(name)
    ids, mask = golden()[f"{name}_{side}_ids"], golden()[f"{name}_{side}_mask"]
    decoder_ids, decoder_mask = golden()[f"{name}_decoder_ids"], golden()[f"{name}_decoder_mask"]
    encoded, logits, first = _t5(config)(params, ids, mask, decoder_ids, decoder_mask)
    expected = golden()[f"{name}_{side}_logits"]
    assert np.abs(expected).max() > 1.0
    check = functools.partial(np.testing.assert_allclose, rtol=0, atol=TOLERANCE)
    check(encoded * mask[..., None], golden()[f"{name}_{side}_encoded"])
    check(logits * decoder_mask[..., None], expected)
    check(first, expected[:, 0])  # the decoder's first token is the start token in every row


def test_rows_of_the_position_tables_at_every_distance():
    away = golden()["away"]
    buckets = deberta.relative_buckets(away, 256, 512)
    np.testing.assert_array_equal(buckets, golden()["deberta_buckets"])
    for causal, name in ((False, "t5_buckets"), (True, "t5_causal_buckets")):
        rows = t5.relative_buckets(away, 32, 128, both_sides=not causal)
        np.testing.assert_array_equal(rows, golden()[name])


def test_bfloat16_computes_the_same_to_its_precision():
    config, params, _ = checkpoint("deberta_v2")
    half = _encode(dataclasses.replace(config, dtype=jnp.bfloat16), params, "deberta_v2", "right")
    assert half.dtype == jnp.bfloat16
    mask, expected = golden()["deberta_v2_right_mask"][..., None], golden()["deberta_v2_right_hidden"]
    difference = np.abs(half.astype(np.float32) * mask - expected)
    assert difference.mean() < 0.02 and difference.max() < 0.2


@functools.cache
def _t5(config):
    @jax.jit
    def run(params, ids, mask, decoder_ids, decoder_mask):
        model = T5(config)
        apply = functools.partial(model.apply, {"params": params})
        encoded = apply(ids, mask, method=T5.encode)
        logits = apply(ids, mask, decoder_ids, decoder_mask)
        return encoded, logits, apply(ids, mask, method=T5.first_step_logits)

    return run


def _encode(config, params, name, side):
    inputs = [golden().get(f"{name}_{side}_{part}") for part in ("ids", "mask", "types")]
    return np.asarray(_encoder(config)(params, *inputs))


@functools.cache
def _encoder(config):
    return jax.jit(lambda params, *inputs: encoders.model_of(config).apply({"params": params}, *inputs))
