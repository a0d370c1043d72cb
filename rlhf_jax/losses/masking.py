"""Means over real tokens: the one place that divides by a mask's sum.

Knows arrays and masks; nothing of what is in them."""

import chex
import jax
import jax.numpy as jnp


def masked_mean(x, mask, axis=None):
    """Mean of x where mask is 1; 0 where nothing is.

    Args:
      x: any shape and dtype; entries outside the mask are never read.
      mask: of the same shape. axis: as in jnp.mean.
    Returns: float32. The count is at least 1, so an empty mask gives 0 and no gradient.
    """
    chex.assert_equal_shape([x, mask])
    weights = mask.astype(jnp.float32)
    total = jnp.where(mask > 0, x.astype(jnp.float32), 0.0) * weights
    return total.sum(axis) / jnp.maximum(weights.sum(axis), 1.0)


def masked_whiten(x, mask, shift_mean=True, unbiased=True):
    """(x - mean) / sqrt(variance + 1e-8) over the whole batch; 0 outside the mask.

    Args:
      x, mask: of one shape.
      shift_mean: False adds the mean back, which scales rewards without moving them (Ziegler et al. 2019).
      unbiased: variance over n - 1, as TRL, Tunix and verl have it; False over n, as OpenAI's code.
    Returns: float32, the shape of x.
    """
    x = jnp.where(mask > 0, x.astype(jnp.float32), 0.0)
    mean = masked_mean(x, mask)
    # Twice, because the first mean is rounded at the size of x and not at that of its spread.
    centred = x - mean
    centred = centred - masked_mean(centred, mask)
    variance = masked_mean(jnp.square(centred), mask)
    if unbiased:
        count = mask.astype(jnp.float32).sum()
        variance = variance * count / jnp.maximum(count - 1.0, 1.0)
    whitened = centred * jax.lax.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return jnp.where(mask > 0, whitened, 0.0)


def is_last(mask):
    """[B, T] bool, True at the last real token of each row; nowhere in a row without one."""
    real = mask > 0
    later = jnp.cumsum(real[:, ::-1], axis=1)[:, ::-1] - real
    return real & (later == 0)
