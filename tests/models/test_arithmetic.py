"""The formula of necessary FLOPs: by hand, and against what the decoder's own trace multiplies."""

import types

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax.models import arithmetic
from rlhf_jax.models.arithmetic import Tokens, forward
from rlhf_jax.models.roles import Role
from rlhf_jax.parallel import flops
from rlhf_jax.training.algorithms import Network
from rlhf_jax.types import GroupedBatch

TINY = types.SimpleNamespace(vocab_size=10, hidden_size=4, intermediate_size=6, num_layers=2, num_heads=2,
                             num_kv_heads=1, head_dim=2)  # fmt: skip


def test_by_hand():
    tokens = Tokens.of_groups([3], [[2, 1]])
    # Pairs: 3 * 3 / 2 in the prompt, 2 * (3 + 1) and 1 * (3 + 1/2) in the completions.
    assert tokens == Tokens(run=6, predicted=3, read=16.0)
    # Of a layer: queries and outputs 4 x 4 each, keys and values 4 x 2 each, three of 4 x 6.
    assert arithmetic.layer_values(TINY) == 120
    found = forward(TINY, tokens)
    assert (found.layers, found.head, found.attention) == (2 * 6 * 2 * 120, 2 * 3 * 40, 4 * 2 * 2 * 2 * 16)
    assert found.times(1, 1, 1) == 2880 + 240 + 512
    assert found.times(arithmetic.training_passes(full=True)) == 3 * (2880 + 240 + 512)
    # Without gradients of frozen weights a product has one product behind it, attention still two.
    assert found.times(arithmetic.training_passes(full=False), 0) == 2 * 2880 + 3 * 512
    half = forward(TINY, tokens, num_layers=1)
    assert (half.layers, half.head, half.attention) == (1440, 240, 256)


def test_texts_in_a_row_read_only_themselves():
    assert Tokens.of_texts([4, 2], predicted=3) == Tokens(6, 3, 10.0)
    assert Tokens.of_texts([], predicted=0) == Tokens(0, 0, 0)


@pytest.mark.parametrize("G", [1, 3])
def test_the_decoder_multiplies_what_the_formula_says(tiny_llama, G):
    """Traced without padding. The trace has every pair of tokens, allowed or not, and no last token of a completion."""
    model, base = tiny_llama
    B, P, R, config = 2, 5, 4, model.config
    ones = lambda *shape: jnp.ones(shape, jnp.int32)
    batch = GroupedBatch(ones(B, P), ones(B, P), ones(B, G, R), ones(B, G, R), weights=jnp.ones((B, G)))
    network = Network(model, vocab_chunk=0)
    traced = flops.count(jax.make_jaxpr(lambda x: network.logprobs(x, Role(), batch)[0])(base)).total
    run = Tokens(B * (P + G * (R - 1)), B * G * R, B * (P * P + G * (R - 1) * (P + R - 1)))
    assert traced == pytest.approx(forward(config, run).times(1, 1, 1), rel=1e-9)
    asked = Tokens.of_groups([P] * B, [[R] * G] * B)
    assert asked.run == run.run + B * G and asked.predicted == run.predicted
