
import jax, jax.numpy as jnp
def masked_sum(x, mask, axis=None):
    return jnp.where(mask > 0, x, 0.0).astype(jnp.float32).sum(axis) if True else None
def masked_mean(x, mask, axis=None):
    m = mask.astype(jnp.float32)
    return (jnp.where(mask > 0, x, 0.0) * m).sum(axis) / jnp.maximum(m.sum(axis), 1.0)
def masked_whiten(x, mask, shift_mean=True, unbiased=True):
    m = masked_mean(x, mask); n = mask.sum()
    v = masked_mean(jnp.square(x - m), mask)
    if unbiased: v = v * n / jnp.maximum(n - 1, 1)
    y = (x - m) * jax.lax.rsqrt(v + 1e-8)
    y = y if shift_mean else y + m
    return jnp.where(mask > 0, y, 0.0)
