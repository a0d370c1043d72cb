"""What the selecting rows hand to the update: the right completions, their quantile's tokens, a pool that forgets."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.training.algorithms import selection
from rlhf_jax.training.markers import Markers
from rlhf_jax.types import GroupedBatch

B, G, P, R, K = 2, 3, 4, 5, 3
MARKERS = (np.array([[50, 0], [51, 0], [52, 53]]), np.array([[1, 0], [1, 0], [1, 1]]))


def make_batch(scores, weights=None, start=0):
    """Each completion is filled with a number of its own."""
    scores = jnp.asarray(scores, jnp.float32)
    ids = start + jnp.arange(B * G, dtype=jnp.int32).reshape(B, G, 1) + jnp.zeros((B, G, R), jnp.int32)
    return GroupedBatch(
        prompt_ids=jnp.full((B, P), 7, jnp.int32),
        prompt_mask=jnp.array([[0, 1, 1, 1], [1, 1, 1, 1]], jnp.int32),
        completion_ids=ids,
        completion_mask=jnp.ones((B, G, R), jnp.int32),
        weights=jnp.ones((B, G)) if weights is None else jnp.asarray(weights, jnp.float32),
        scores=scores,
        old_logprobs=ids * 1.0,
        advantages=jnp.broadcast_to(scores[..., None], (B, G, R)),
    )


def test_raft_keeps_the_best_with_all_that_belongs_to_them():
    settings = selection.RAFTSettings(keep=2)
    batch = make_batch([[0.0, 2.0, 1.0], [5.0, 9.0, 7.0]], [[1, 1, 1], [1, 0, 1]])
    _, taught = selection.raft_select(settings, None, batch, jax.random.key(0))
    np.testing.assert_array_equal(taught.completion_ids[..., 0], [[1, 2], [5, 3]])
    np.testing.assert_array_equal(taught.old_logprobs[..., 0], [[1, 2], [5, 3]])
    np.testing.assert_array_equal(taught.scores, [[2, 1], [7, 5]])
    np.testing.assert_array_equal(taught.weights, 1)
    assert taught.prompt_ids is batch.prompt_ids and batch.completion_ids.shape == (B, G, R)


def test_online_dpo_leaves_ties_out():
    batch = make_batch([[0.0, 2.0, 1.0], [4.0, 4.0, 4.0]])
    _, taught = selection.online_dpo_select(selection.OnlineDPOSettings(), None, batch, jax.random.key(0))
    np.testing.assert_array_equal(taught.completion_ids[0, :, 0], [1, 0])
    np.testing.assert_array_equal(taught.weights, [[1, 1], [0, 0]])


def test_quark_marks_each_completion_with_its_quantile_of_the_whole_pool():
    settings = selection.QuarkSettings(num_quantiles=K, pool_size=12, batch_size=B, num_completions=G)
    memory = selection.quark_memory(settings, MARKERS, P, R)
    select = jax.jit(functools.partial(selection.quark_select, settings))
    first = np.array([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
    memory, taught = select(memory, make_batch(first), jax.random.key(0))
    own = np.asarray(taught.completion_ids[:, 0, 0])
    assert sorted(own) == list(range(6)) and (taught.weights == 1).all()  # all there is, each once
    check_markers(taught, own * K // 6)
    # The second rollout is better: what was best is now in the middle at most.
    memory, taught = select(memory, make_batch(first + 6, start=6), jax.random.key(1))
    own = np.asarray(taught.completion_ids[:, 0, 0])
    assert len(set(own)) == 6 and own.min() < 6
    check_markers(taught, own * K // 12)
    # The third takes the place of the first.
    memory, taught = select(memory, make_batch(first + 12, start=12), jax.random.key(2))
    assert sorted(np.asarray(memory["completion_ids"][:, 0])) == list(range(6, 18))
    check_markers(taught, (np.asarray(taught.completion_ids[:, 0, 0]) - 6) * K // 12)


def check_markers(taught, quantile):
    np.testing.assert_array_equal(taught.prompt_ids[:, P:], MARKERS[0][quantile])
    np.testing.assert_array_equal(taught.prompt_mask[:, P:], MARKERS[1][quantile])
    np.testing.assert_array_equal(taught.prompt_ids[:, :P], 7)
    np.testing.assert_array_equal(taught.ref_prompt_mask[:, :P], taught.prompt_mask[:, :P])
    assert not taught.ref_prompt_mask[:, P:].any()  # the reference reads the prompt alone


def test_a_completion_without_a_reward_is_never_drawn_for_its_own_sake():
    settings = selection.QuarkSettings(num_quantiles=K, pool_size=12, batch_size=B, num_completions=G)
    memory = selection.quark_memory(settings, MARKERS, P, R)
    batch = make_batch(np.full((B, G), 3.0), [[1, 0, 1], [0, 1, 1]])
    memory, taught = selection.quark_select(settings, memory, batch, jax.random.key(0))
    counted = np.asarray(taught.completion_ids[:, 0, 0])[np.asarray(taught.weights[:, 0]) > 0]
    assert sorted(counted) == [0, 2, 4, 5]
    memory, taught = selection.quark_select(settings, memory, make_batch(np.zeros((B, G))), jax.random.key(1))
    assert (taught.weights == 1).all()  # ten that count, six wanted


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (selection.RAFTSettings(keep=5, num_completions=4), "keep is 5"),
        (selection.OnlineDPOSettings(num_completions=1), "num_completions is 1"),
        (selection.OnlineDPOSettings(loss_type="nonsense"), "nonsense"),
        (selection.QuarkSettings(num_quantiles=1), "num_quantiles is 1"),
        (selection.QuarkSettings(pool_size=8, batch_size=4, num_completions=3), "pool_size is 8"),
    ],
)
def test_settings_that_cannot_be(settings, said):
    assert said in settings.check()


def test_markers():
    # A token for each character, but one for all digits above 4.
    encode = lambda text, add_eos: [3 if c.isdigit() and int(c) > 4 else ord(c) for c in text]
    tokenizer = types.SimpleNamespace(encode_completion=encode)
    made = Markers.of(tokenizer, "<{}>", 4, room=3)
    assert made.texts == ("<1>", "<2>", "<3>", "<4>") and made.best == tuple(map(ord, "<4>"))
    ids, mask = made.padded(0)
    assert ids.shape == (4, 3) and mask.all()
    with pytest.raises(InputError, match=r"reward_token is '<\{\}>'.*6 quantiles apart"):
        Markers.of(tokenizer, "<{}>", 6, room=3)  # 5 and 6 are one token
    with pytest.raises(InputError, match="quantiles apart"):
        Markers.of(tokenizer, "good", 2, room=9)
    with pytest.raises(InputError, match="takes 3 tokens.*leave 2 of"):
        Markers.of(tokenizer, "<{}>", 4, room=2)
