"""Beam search against transformers, against a slow float64 reference, and against all sequences there are."""

import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from rlhf_jax.checkpoints import huggingface
from rlhf_jax.errors import InputError
from rlhf_jax.losses.logprobs import token_logprobs
from rlhf_jax.models import lora, roles
from rlhf_jax.models.llama import Llama, LlamaConfig
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.parallel import sharding
from rlhf_jax.sampling.beam import BeamConfig, beam_search
from rlhf_jax.sampling.generate import SamplingConfig, generate
from rlhf_jax.types import GroupedBatch
from tests.sampling import beam_reference

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
PROMPTS = jnp.array([[0, 0, 5, 6], [9, 8, 7, 6], [0, 1, 2, 3]])
MASK = jnp.array([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
V, R, END = 4, 4, 2  # of the toy: 4 + 3 * 4 + ... sequences


def golden(file):
    with np.load(GOLDEN / file) as arrays:
        names = sorted({key.split("/")[0] for key in arrays})
        return {n: {k.split("/")[1]: arrays[k] for k in arrays if k.startswith(n + "/")} for n in names}


CASES = golden("beam.npz") | golden("beam_groups.npz")
LOADED = {}


@pytest.mark.parametrize("name", CASES)
def test_sequences_and_scores_are_those_of_transformers(name):
    case = CASES[name]
    settings = json.loads(str(case["settings"]))
    checkpoint = settings.pop("model")
    if checkpoint not in LOADED:
        LOADED[checkpoint] = huggingface.load_llama(str(GOLDEN / checkpoint))
    config, params = LOADED[checkpoint]
    ids, mask = jnp.asarray(case["prompt_ids"]), jnp.asarray(case["prompt_mask"])
    made = jax.device_get(beam_search(Llama(config), params, ids, mask, BeamConfig(pad_id=1, **settings)))
    ids = made.ids
    if "num_groups" in settings:  # transformers' groups write the first end token for any
        ids = np.where(np.isin(ids, settings["eos_ids"]), settings["eos_ids"][:1] or 0, ids)
    np.testing.assert_array_equal(ids, case["ids"])
    np.testing.assert_allclose(made.scores, case["scores"], atol=1e-4)
    ends = np.isin(made.ids, settings["eos_ids"]) & (made.mask > 0)
    np.testing.assert_array_equal(ends.any(-1), made.finished)
    assert (ends.sum(-1) == made.finished).all()
    np.testing.assert_array_equal(made.ids == 1, made.mask == 0)  # nothing but what follows the end is pad
    if "num_groups" not in settings:  # there, scores have the penalty in them
        score = made.logprobs.sum(-1) / made.mask.sum(-1) ** settings["length_penalty"]
        np.testing.assert_allclose(made.scores, score, rtol=1e-5)
