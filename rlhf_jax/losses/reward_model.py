"""What a reward model can be trained on: pairs, rankings, labels and ratings. One loss a record.

Knows scores and labels; nothing of the network they come from. Callers average. Sources: Bradley & Terry 1952; margin,
Touvron et al. 2023, arXiv:2307.09288, eq. 2; log(1 + exp), Bai et al. 2022, arXiv:2204.05862; centring, Eisenstein et
al. 2023, arXiv:2312.09244; every token, DeepSpeed-Chat, arXiv:2308.01320; rankings, Plackett 1975."""

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.losses.masking import masked_mean


def pairwise_logsigmoid(chosen, rejected, margin=None, center_coeff=0.0):
    """-log sigmoid(chosen - rejected - margin) + center_coeff * (chosen + rejected)^2.

    Args:
      chosen, rejected: [B] scores, reward units. margin: [B], how much better chosen is, or None.
      center_coeff: pulls scores towards mean 0, which a pair alone leaves free.
    Returns: [B] float32.
    """
    chosen, rejected = _pair(chosen, rejected)
    difference = chosen - rejected
    if margin is not None:
        chex.assert_equal_shape([chosen, margin])
        difference = difference - margin
    return -jax.nn.log_sigmoid(difference) + center_coeff * jnp.square(chosen + rejected)


def pairwise_logexp(chosen, rejected):
    """log(1 + exp(rejected - chosen)), [B] float32: the same number as the logsigmoid form without extras."""
    chosen, rejected = _pair(chosen, rejected)
    return jax.nn.softplus(rejected - chosen)


def token_level_pairwise(chosen_values, rejected_values, chosen_ids, rejected_ids, pad_id):
    """-log sigmoid of the difference at every token, from the first that differs to the end of the longer one.

    A pair that does not differ is read at its last column, so that it costs log 2 and pulls nowhere.

    Args:
      chosen_values, rejected_values: [B, T], a value at each token. Past its own end, the shorter one is read at pads.
      chosen_ids, rejected_ids: [B, T] int, padded on the right with pad_id.
    Returns: [B] float32, the mean over those tokens.
    """
    chex.assert_rank(chosen_values, 2)
    chex.assert_equal_shape([chosen_values, rejected_values, chosen_ids, rejected_ids])
    T = chosen_ids.shape[1]
    column = jnp.broadcast_to(jnp.arange(T)[None], chosen_ids.shape)
    first = lambda found: jnp.where(found.any(1), jnp.argmax(found, axis=1), T)
    end = jnp.maximum(first(chosen_ids == pad_id), first(rejected_ids == pad_id))
    start = first(chosen_ids != rejected_ids)
    start, end = jnp.where(start == T, T - 1, start), jnp.where(start == T, T, end)
    inside = (column >= start[:, None]) & (column < end[:, None])
    chosen, rejected = (
        jnp.where(inside, x.astype(jnp.float32), 0.0) for x in (chosen_values, rejected_values)
    )
    return masked_mean(-jax.nn.log_sigmoid(chosen - rejected), inside, axis=1)


def classification(logits, labels):
    """Cross-entropy of two classes.

    Args:
      logits: [B, 2]. labels: [B], 1 for accepted.
    Returns: [B] float32, nats.
    """
    chex.assert_shape(logits, (*labels.shape, 2))
    logp = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(logp, labels.astype(jnp.int32)[:, None], axis=1)[:, 0]


def regression(scores, targets, delta=None):
    """Squared error to human scores, or Huber's loss: half the square within delta, a line beyond.

    Args:
      scores, targets: [B], one unit. delta: in that unit, or None for the squared error.
    Returns: [B] float32.
    """
    chex.assert_equal_shape([scores, targets])
    error = scores.astype(jnp.float32) - targets.astype(jnp.float32)
    if delta is None:
        return jnp.square(error)
    size = jnp.abs(error)
    near = jnp.minimum(size, delta)
    return near * (size - 0.5 * near)


def multi_objective_regression(scores, targets, mask):
    """Mean squared error over the aspects that have a label.

    Args:
      scores, targets, mask: [B, K]; a target outside the mask is never read.
    Returns: [B] float32, 0 for a record without labels.
    """
    chex.assert_rank(mask, 2)
    chex.assert_equal_shape([scores, targets, mask])
    targets = jnp.where(mask > 0, targets.astype(jnp.float32), 0.0)
    error = jnp.where(mask > 0, scores.astype(jnp.float32), 0.0) - targets
    return masked_mean(jnp.square(error), mask, axis=1)


def plackett_luce(scores, mask):
    """-log probability of a ranking: each in turn is drawn from those that are left, by softmax.

    Args:
      scores: [B, K], columns ordered best first. mask: [B, K], 1 where there is a candidate.
    Returns: [B] float32, nats; of two candidates the pairwise loss, of fewer 0.
    """
    chex.assert_rank(mask, 2)
    chex.assert_equal_shape([scores, mask])
    real = mask > 0
    scores = jnp.where(real, scores.astype(jnp.float32), 0.0)
    K = scores.shape[1]
    order = jnp.arange(K)
    # left[b, i, j]: j is still there when i is drawn. i itself always, so that no row of the softmax is empty.
    left = (real[:, None, :] & (order[:, None] <= order[None])[None]) | jnp.eye(K, dtype=bool)[None]
    others = jnp.where(left, jnp.broadcast_to(scores[:, None], left.shape), -jnp.inf)
    return jnp.where(real, jax.nn.logsumexp(others, axis=-1) - scores, 0.0).sum(1)


def _pair(chosen, rejected):
    chex.assert_equal_shape([chosen, rejected])
    return chosen.astype(jnp.float32), rejected.astype(jnp.float32)
