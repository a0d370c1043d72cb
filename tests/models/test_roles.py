"""Roles: where a score is read, what an end token adds, how much of the base is used, how heads begin."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models import heads, roles
from rlhf_jax.models.llama import Llama
from rlhf_jax.models.roles import Role
from rlhf_jax.types import GroupedBatch

EOS = 2


def batch_of(lengths, ids=None):
    """Two prompts, two completions each, of the given lengths."""
    ids = jax.random.randint(jax.random.key(0), (2, 2, 5), 3, 60) if ids is None else ids
    mask = (jnp.arange(5)[None, None] < jnp.array(lengths)[..., None]).astype(jnp.int32)
    prompts = jnp.array([[0, 0, 5, 6], [9, 8, 7, 6]])
    return GroupedBatch(prompts, jnp.array([[0, 0, 1, 1], [1, 1, 1, 1]]), ids, mask)


def rows(model, params, batch, b, g):
    """Hidden states of prompt and completion as one plain row, real tokens only."""
    prompt = batch.prompt_ids[b][batch.prompt_mask[b] > 0]
    ids = jnp.concatenate([prompt, batch.completion_ids[b, g][batch.completion_mask[b, g] > 0]])[None]
    return model.apply({"params": params}, ids, jnp.ones_like(ids), method=Llama.hidden)[0], len(prompt)


def test_scores_are_read_at_the_completion(tiny_llama):
    """pooling "last": at its last token; "mean": on the mean of its tokens, the prompt's left out."""
    model, params = tiny_llama
    head = heads.init_reward(jax.random.key(3), model.config.hidden_size) | {"bias": jnp.float32(0.5)}
    batch = batch_of([[5, 2], [3, 2]])
    last, mean = (roles.scores(model, params, Role(head=head, pooling=p), batch) for p in ("last", "mean"))
    for b, g in ((0, 0), (0, 1), (1, 0)):
        states, start = rows(model, params, batch, b, g)
        np.testing.assert_allclose(last[b, g], states[-1] @ head["kernel"] + 0.5, atol=1e-5)
        np.testing.assert_allclose(mean[b, g], states[start:].mean(0) @ head["kernel"] + 0.5, atol=1e-5)


def test_padding_and_neighbours_do_not_matter(tiny_llama):
    model, params = tiny_llama
    role = Role(head=heads.init_reward(jax.random.key(3), model.config.hidden_size))
    batch = batch_of([[5, 2], [1, 3]])
    other = batch.replace(completion_ids=jnp.where(batch.completion_mask > 0, batch.completion_ids, 17))
    np.testing.assert_array_equal(
        roles.scores(model, params, role, batch), roles.scores(model, params, role, other)
    )


def test_an_empty_completion_is_read_at_its_prompt(tiny_llama):
    model, params = tiny_llama
    role = Role(head=heads.init_reward(jax.random.key(3), model.config.hidden_size))
    batch = batch_of([[0, 2], [1, 0]])
    found = roles.scores(model, params, role, batch)
    states, _ = rows(model, params, batch, 0, 0)
    np.testing.assert_allclose(found[0, 0], states[-1] @ role.head["kernel"], atol=1e-5)
    assert np.isfinite(roles.scores(model, params, role.replace(pooling="mean"), batch)).all()


def test_depth_is_the_model_cut_after_so_many_layers(tiny_llama):
    model, params = tiny_llama
    role = Role(head=heads.init_reward(jax.random.key(3), model.config.hidden_size), depth=1)
    batch = batch_of([[5, 2], [1, 3]])
    cut = Llama(dataclasses.replace(model.config, num_layers=1))
    first = params | {"layers": jax.tree.map(lambda x: x[:1], params["layers"])}
    expected = roles.scores(cut, first, role.replace(depth=None), batch)
    np.testing.assert_allclose(roles.scores(model, params, role, batch), expected, atol=1e-6)
    assert np.abs(expected - roles.scores(model, params, role.replace(depth=None), batch)).max() > 1e-3


def test_every_completion_is_ended_once():
    ids = jnp.array([[[7, 8, 9, 7, 8], [7, EOS, 0, 0, 0]], [[0, 0, 0, 0, 0], [7, 8, 9, 7, EOS]]])
    ended = roles.end_with(batch_of([[5, 2], [0, 5]], ids), EOS, (EOS, 3))
    expected = [[[7, 8, 9, 7, 8, EOS], [7, EOS, 0, 0, 0, 0]], [[EOS, 0, 0, 0, 0, 0], [7, 8, 9, 7, EOS, 0]]]
    np.testing.assert_array_equal(ended.completion_ids * ended.completion_mask, expected)
    np.testing.assert_array_equal(ended.completion_mask.sum(-1), [[6, 2], [1, 5]])


def test_b11_heads_begin_as_in_the_papers_code():
    reward, value = heads.init_reward(jax.random.key(0), 4096), heads.init_value(4096)
    np.testing.assert_allclose(reward["kernel"].std(), 4097**-0.5, rtol=0.05)  # not 1 / 4097
    assert reward["bias"] == 0 and not value["kernel"].any() and value["bias"] == 0


def test_a_normalised_head_gives_normalised_scores():
    head = {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.float32(0.3)}
    states = jnp.array([[1.0, 2.0], [3.0, 0.5], [-1.0, 1.0]])
    raw = heads.apply(head, states)
    np.testing.assert_allclose(
        heads.apply(heads.normalised(head, 1.5, 4.0), states), (raw - 1.5) / 4.0, rtol=1e-6
    )
