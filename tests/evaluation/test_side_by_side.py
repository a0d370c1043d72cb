"""The evaluation by beams: the best ones, and a log-ratio that is not called a KL."""

import jax
import numpy as np
import pytest

from configs import ppo
from experiments import pipeline
from rlhf_jax.errors import InputError
from rlhf_jax.evaluation import side_by_side
from rlhf_jax.models import lora
from rlhf_jax.models.roles import Role
from rlhf_jax.sampling.beam import BeamConfig, beam_search
from rlhf_jax.training.checks import check_config


class Numbers:
    def decode_completion(self, ids):
        return " ".join(map(str, ids))


def test_beams_are_decoded_and_their_log_ratio_is_no_kl(tiny_llama):
    model, params = tiny_llama
    adapter = lora.init(jax.random.key(1), model.config, lora.LoraConfig(rank=2))
    noise = lambda x: x + 0.2 * jax.random.normal(jax.random.key(2), x.shape)
    policy = Role(adapter=adapter.replace(weights=jax.tree.map(noise, adapter.weights)))
    prompts = [[5, 6, 7], [8, 9], [10]]
    call = dict(prompt_length=3, batch_size=2, tokenizer=Numbers(), put=lambda x: x, rng=jax.random.key(0))
    beams = BeamConfig(5, num_beams=3, num_return=2, eos_ids=(2,))
    found = side_by_side.completions_of(
        model, params, policy, prompts, sampling=beams, against=Role(), **call
    )
    assert "kl" not in found
    assert [len(group) for group in found["texts"]] == [2, 2, 2]
    ids, mask = np.array([[0, 8, 9], [0, 0, 10]]), np.array([[0, 1, 1], [0, 0, 1]])
    made = beam_search(model, params, ids, mask, beams, policy.adapter)
    assert found["texts"][1][0] == " ".join(map(str, np.array(made.ids[0, 0])[np.array(made.mask[0, 0]) > 0]))
    same = side_by_side.completions_of(model, params, policy, prompts, sampling=beams, against=policy, **call)
    np.testing.assert_allclose(same["log_ratio"], 0.0, atol=1e-4)
    assert np.abs(found["log_ratio"]).min() > 1e-2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_beams": 3}, "evaluation.num_completions is 4, more than config.evaluation.num_beams 3"),
        ({"num_beams": 0}, "evaluation.num_beams is 0; expected a number above 0"),
    ],
)
def test_more_completions_than_beams_are_refused(change, said):
    config = ppo.get_config("tiny")
    config.evaluation.update(change)
    with pytest.raises(InputError, match=said):
        check_config(config, tuple(pipeline.STAGES))
