
import jax.numpy as jnp
from rlhf_jax.losses.masking import masked_mean
def clipped_policy_loss(logprobs, old_logprobs, advantages, mask, clip_epsilon=0.2, dual_clip=None):
    lr = jnp.where(mask > 0, logprobs - old_logprobs, 0.0); r = jnp.exp(lr)
    g = jnp.minimum(r * advantages, jnp.clip(r, 1 - clip_epsilon, 1 + clip_epsilon) * advantages)
    return -masked_mean(g, mask), {"ratio_mean": masked_mean(r, mask), "clip_fraction": masked_mean((g < r * advantages) * 1.0, mask), "approx_kl": masked_mean(jnp.expm1(lr) - lr, mask), "ratio_max_gap": jnp.abs(r - 1).max()}
def clipped_value_loss(values, old_values, returns, mask, clip_range=0.2):
    c = old_values + jnp.clip(values - old_values, -clip_range, clip_range)
    l = 0.5 * masked_mean(jnp.maximum(jnp.square(values - returns), jnp.square(c - returns)), mask)
    m = masked_mean(returns, mask); var = masked_mean(jnp.square(returns - m), mask)
    ev = 1 - masked_mean(jnp.square(returns - old_values), mask) / jnp.maximum(var, 1e-8)
    return l, {"explained_variance": ev}
