"""What devices send each other in the compiled update and sampler: weights where many rows are read, activations where
few are; never whole batches, logits or caches."""

import math

import flax.linen as nn
import jax
import pytest

from rlhf_jax.models import placement
from rlhf_jax.models.llama import LlamaConfig
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.parallel import sharding
from tests.parallel.compiled import (
    RANK,
    B,
    C,
    D,
    F,
    G,
    H,
    L,
    P,
    R,
    T,
    V,
    collectives,
    decode,
    shapes_in,
    update,
)

MESHES = [(1, 8, 1), (2, 2, 2), (1, 1, 8)]


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_a_step_of_the_sampler_moves_neither_weights_nor_caches(shape):
    data, fsdp, tensor = shape
    hlo = decode(shape)
    in_loop = [one for one in collectives(hlo) if one.in_loop and "prefill" not in one.op]
    largest = B * G // data * max(F, V) // tensor  # values of an activation, or of logits
    for one in in_loop:
        for array in one.shapes:
            assert math.prod(array) <= largest < D * F // tensor, one
            assert array[-2:] not in {(R, C), (P, C)}, one
            assert one.kind != "all-gather" or RANK not in array, one  # adapters are, once and before
    kinds = {"o_proj": set(), "up_proj": set()}
    for name, found in kinds.items():
        found.update(one.kind for one in in_loop if name in one.op)
    sums = {"all-reduce", "reduce-scatter"}
    # Of maps to the width, where their inputs are split; of maps from the width, where that is.
    assert bool(kinds["o_proj"] & sums) == (tensor > 1) and bool(kinds["up_proj"] & sums) == (fsdp > 1)
    if fsdp == 1:
        assert {one.shapes for one in in_loop if one.kind == "all-gather"} == {((B * G,),)}  # the tokens
    cache = (L, B // (data * fsdp), G, H // tensor, R, C)
    held = {array for array in shapes_in(hlo) if array[-2:] == (R, C)}
    assert cache in held and max(map(math.prod, held)) == math.prod(cache)


def test_few_key_value_heads_are_kept_once_a_device():
    """Two on a tensor axis of eight: four copies of each, where the whole cache on every device would be eight."""
    hlo = decode((1, 1, 8), kv_heads=2)
    held = {array for array in shapes_in(hlo) if array[-2:] == (R, C)}
    assert max(map(math.prod, held)) == math.prod((L, B, G, 1, R, C))
    of_heads = [
        one for one in collectives(hlo) if "k_proj" in one.op or "v_proj" in one.op or "cache" in one.op
    ]
    assert not of_heads


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_an_update_gathers_weights_and_no_activations(shape):
    data, fsdp, tensor = shape
    hlo, rows = update(shape), B // (data * fsdp)
    found = collectives(hlo)
    gathered = {array for one in found if one.kind == "all-gather" for array in one.shapes}
    tokens = {T, B * G * R, rows * T, rows * G * R}
    for array in gathered:  # ids are, to be looked up
        assert array == (B // data, T) or not tokens & set(array), array
    kernels = {(D, F // tensor), (F // tensor, D), (D, RANK), (RANK, D)}
    assert (kernels <= {array[-2:] for array in gathered}) == (fsdp > 1)
    if fsdp == 1:
        assert {one.kind for one in found} == {"all-reduce"}
    for array in shapes_in(
        hlo
    ):  # of the rows of other devices there is nothing but ids, and no scores of all columns
        if tokens & set(array) and rows < B:
            assert math.prod(array) <= max(rows * T * F, rows * G * R * V) // tensor, array
    summed = {array for one in found if one.kind in ("all-reduce", "reduce-scatter") for array in one.shapes}
    assert (data * fsdp > 1) == any(array[-2:] == (F // tensor, RANK) for array in summed)


def test_what_travels_is_chosen_by_how_many_rows_there_are():
    """The sizes of Llama-2-7B: 2592 rows at a time are as much as a layer's weights."""
    config = LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128)
    weights = 4 * 4096**2 + 3 * 4096 * 11008
    even = weights / (4 * 2 * 4096 + 3 * (4096 + 11008))
    for data in (1, 2):
        mesh = meshes.make_mesh(data, 8 // data, 1)
        for rows, stay in ((64, True), (int(even * data), True), (int(even * data) + 1, False)):
            with meshes.activate(mesh), sharding.decoding(config, rows):
                rules = dict(nn.get_logical_axis_rules())
                assert rules["rows"] == ("data" if stay else ("data", "fsdp"))
                assert (rules["width"] == rules["width_of_weights"] == "fsdp") == stay
                assert placement.ways("batch") == 8
    with sharding.decoding(config, 1):
        assert not nn.get_logical_axis_rules() and placement.ways("batch") == 1


def test_columns_of_the_vocabulary_are_not_cut_across_devices():
    assert placement.columns_at_a_time(32000, 8192) == 8192
    with meshes.activate(meshes.make_mesh(1, 2, 4)):
        assert placement.columns_at_a_time(32000, 8192) == 0
        assert placement.columns_at_a_time(128256, 8192) == 8192
    assert jax.sharding.get_abstract_mesh().empty
