"""Encoders, T5 and their heads: what padding may do (nothing), gradients, remat, and errors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.checkpoints import encoders, tiny_encoder
from rlhf_jax.errors import InputError
from rlhf_jax.models import encoder_heads
from rlhf_jax.models.encoder_config import BertConfig, DebertaConfig, T5Config
from rlhf_jax.models.t5 import T5, shift_right

VOCAB, WIDTH = 30, 16
# A full row, one padded on the right, one on the left, one with nothing in it.
MASK = np.array([[1] * 7, [1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1], [0] * 7])


def config_of(kind):
    if kind == "deberta with a convolution":
        plain = tiny_encoder.config_of("deberta", VOCAB, WIDTH, max_position=16)
        own = dict(conv_kernel_size=3, share_att_key=False, type_vocab_size=2, position_biased_input=True)
        return dataclasses.replace(plain, **own, position_buckets=4)
    return tiny_encoder.config_of(kind, VOCAB, WIDTH, max_position=16)


@functools.cache
def made(kind):
    config = config_of(kind)
    module = T5(config) if kind == "t5" else encoders.model_of(config)
    return config, module, tiny_encoder.init_params(module)


@functools.cache
def score_and_gradient(kind, remat):
    """(params, ids, types) -> ((loss, scores of the real rows), gradient): a mean-pooled head and one on [CLS]; of T5
    the first step."""
    config, module, _ = made(kind)
    module = type(module)(dataclasses.replace(config, remat=remat))
    mean = encoder_heads.init(jax.random.key(1), "mean", WIDTH, 2)
    first = encoder_heads.init(jax.random.key(2), "cls_gelu", WIDTH, 2)

    def loss(params, ids, types):
        if kind == "t5":
            scores = module.apply({"params": params}, ids, MASK, method=T5.first_step_logits)
        else:
            hidden = module.apply({"params": params}, ids, MASK, types)
            scores = encoder_heads.sequence_score(mean, "mean", hidden, MASK)
            scores = scores + encoder_heads.sequence_score(first, "cls_gelu", hidden, MASK)
        return jnp.sum(scores[:3] ** 2), scores[:3]

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def inputs(seed):
    rng = np.random.default_rng(seed)
    return rng.integers(7, VOCAB, MASK.shape), rng.integers(0, 2, MASK.shape)


CASES = [("bert", "none"), ("deberta with a convolution", "full"), ("t5", "dots")]


@pytest.mark.parametrize("kind, remat", CASES)
def test_padding_has_no_influence(kind, remat):
    params, run = made(kind)[2], score_and_gradient(kind, remat)
    ids, types = inputs(0)
    (_, scores), gradient = run(params, ids, types)
    for seed in (1, 2):
        others = [np.where(MASK > 0, own, new) for own, new in zip((ids, types), inputs(seed), strict=True)]
        (_, same), same_gradient = run(params, *others)
        np.testing.assert_array_equal(same, scores)
        # The table's rows of padding take no gradient either.
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), same_gradient, gradient
        )
    ids[1, 1] = 3 if ids[1, 1] != 3 else 4  # a real token, on the other hand, is read
    (_, moved), _ = run(params, ids, types)
    assert np.abs(moved[1] - scores[1]).max() > 1e-4 and np.array_equal(moved[0], scores[0])


@pytest.mark.parametrize("kind, remat", CASES)
def test_the_gradient_is_finite_and_that_of_differences(kind, remat):
    params, run = made(kind)[2], score_and_gradient(kind, remat)
    _, gradient = run(params, *inputs(0))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
    # Along the gradient itself the loss rises by the square of its length.
    size = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(gradient)))
    step = lambda by: jax.tree.map(lambda p, g: p + by * g / size, params, gradient)
    (up, _), _ = run(step(1e-3), *inputs(0))
    (down, _), _ = run(step(-1e-3), *inputs(0))
    np.testing.assert_allclose((up - down) / 2e-3, size, rtol=0.02)


def test_the_same_text_padded_on_either_side_scores_the_same():
    _, module, params = made("roberta")
    head = encoder_heads.init(jax.random.key(0), "cls_tanh", WIDTH, 3)
    text = np.random.default_rng(3).integers(7, VOCAB, 4)
    ids = np.full((2, 7), 9)
    ids[0, :4], ids[1, 3:] = text, text
    mask = np.array([[1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1]])

    @jax.jit
    def run(params):
        hidden = module.apply({"params": params}, jnp.asarray(ids), jnp.asarray(mask))
        return encoder_heads.sequence_score(head, "cls_tanh", hidden, mask)

    right, left = run(params)
    np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)


def test_mean_and_first_token_by_hand_and_nan_outside_the_mask():
    hidden = jnp.asarray(
        [[[1.0, 2.0], [3.0, 6.0], [jnp.nan, jnp.nan]], [[jnp.nan] * 2, [1.0, -1.0], [5.0, 1.0]]]
    )
    mask = jnp.asarray([[1, 1, 0], [0, 1, 1]])
    kernel = jnp.asarray([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]])
    out = {"kernel": kernel, "bias": jnp.asarray([0.0, 10.0, 0.0])}
    score = lambda h: encoder_heads.sequence_score({"out": out}, "mean", h, mask)
    np.testing.assert_allclose(score(hidden), [[2.0, 14.0, 0.0], [3.0, 10.0, 6.0]])  # means (2, 4) and (3, 0)
    gradient = jax.grad(lambda h: score(h).sum())(hidden)
    # The kernel's rows sum to 3 and 0, each of two tokens has half; a token outside the mask has none.
    np.testing.assert_allclose(gradient, [[[1.5, 0], [1.5, 0], [0, 0]], [[0, 0], [1.5, 0], [1.5, 0]]])
    dense = {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}
    first = encoder_heads.sequence_score({"dense": dense, "out": out}, "cls_tanh", hidden, mask)
    a, b = np.tanh([[1.0, 2.0], [1.0, -1.0]]).T
    np.testing.assert_allclose(first, np.stack([a, b + 10, 2 * a - b], axis=1), rtol=1e-6)


def test_pair_scores_read_the_first_marker_and_say_when_one_is_missing():
    head = encoder_heads.init(jax.random.key(0), "pairrm", 2)
    hidden = jax.random.normal(jax.random.key(1), (3, 5, 2))
    ids = jnp.asarray([[4, 9, 5, 9, 6], [4, 5, 6, 6, 5], [4, 9, 5, 9, 6]])
    mask = jnp.asarray([[1] * 5, [1] * 5, [1, 1, 1, 1, 0]])
    scores = jax.jit(lambda h: encoder_heads.pair_scores(head, h, ids, mask, (4, 5, 6)))(hidden)
    states, first, second = (np.asarray(x) for x in (hidden, head["dense"]["kernel"], head["out"]["kernel"]))
    by_hand = lambda row, at: np.tanh(np.concatenate([states[row, 0], states[row, at]]) @ first) @ second
    expected = [[by_hand(0, 2), by_hand(0, 4)], [by_hand(1, 1), by_hand(1, 2)]]
    np.testing.assert_allclose(scores[:2], expected, rtol=1e-5, atol=1e-6)
    assert np.isnan(scores[2]).all()
    with pytest.raises(ValueError, match="pair_scores"):
        encoder_heads.sequence_score(head, "pairrm", hidden, mask)


def test_t5_reads_its_targets_one_step_late_and_never_ahead():
    config, module, params = made("t5")
    targets = np.random.default_rng(0).integers(2, VOCAB, (4, 5))
    read = shift_right(jnp.asarray(targets), config)
    np.testing.assert_array_equal(read, np.concatenate([np.zeros((4, 1)), targets[:, :-1]], axis=1))
    run = jax.jit(lambda ids, decoder_ids: module.apply({"params": params}, ids, MASK, decoder_ids))
    ids, _ = inputs(0)
    logits = run(ids, read)
    later = run(ids, read.at[:, 3:].set(2))
    np.testing.assert_array_equal(logits[:, :3], later[:, :3])
    assert np.abs(logits[:, 3:] - later[:, 3:]).max() > 1e-3


def test_more_tokens_than_positions_is_an_error():
    config, module, params = made("roberta")
    ids = jnp.zeros((1, config.max_position), jnp.int32)
    with pytest.raises(ValueError, match="17 tokens in a row, .* positions for 16"):
        module.apply({"params": params}, ids, jnp.ones_like(ids))


BERT = dict(model_type="bert", vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=2)  # fmt: skip
DEBERTA = BERT | dict(model_type="deberta-v2")
T5_FIELDS = dict(model_type="t5", vocab_size=9, d_model=8, d_ff=8, num_layers=1, num_heads=2, d_kv=4)


@pytest.mark.parametrize(
    "cls, raw, message",
    [
        (
            BertConfig,
            BERT | dict(position_embedding_type="relative_key"),
            "position_embedding_type is 'relative_key'",
        ),
        (BertConfig, BERT | dict(hidden_act="mish"), "hidden_act is 'mish'; expected one of gelu"),
        (BertConfig, BERT | dict(num_attention_heads=3), "not a multiple of num_attention_heads 3"),
        (BertConfig, BERT | dict(hidden_size=None), "hidden_size is None"),
        (DebertaConfig, DEBERTA | dict(pos_att_type="p2c|p2p"), "pos_att_type is 'p2c|p2p'"),
        (DebertaConfig, DEBERTA | dict(conv_kernel_size=4), "conv_kernel_size is 4"),
        (DebertaConfig, DEBERTA | dict(conv_groups=2), "conv_groups is 2; only 1"),
        (DebertaConfig, DEBERTA | dict(norm_rel_ebd="batch"), "norm_rel_ebd is 'batch'"),
        (DebertaConfig, DEBERTA | dict(architectures=["DebertaV2PairRM"]), "source_prefix_id is None"),
        (T5Config, T5_FIELDS | dict(feed_forward_proj="glu-relu"), "feed_forward_proj is 'glu-relu'"),
        (T5Config, T5_FIELDS | dict(model_type="bart"), "model_type is 'bart'; only 't5'"),
        (T5Config, T5_FIELDS | dict(relative_attention_num_buckets=6), "relative_attention_num_buckets 6"),
    ],
)
def test_a_setting_that_is_not_supported_is_named(cls, raw, message):
    with pytest.raises(InputError) as error:
        cls.from_huggingface(raw)
    assert message in str(error.value)
