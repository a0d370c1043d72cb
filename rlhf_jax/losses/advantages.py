
import jax, jax.numpy as jnp
from rlhf_jax.losses.kl import kl_estimate
def shaped_rewards(scores, logprobs, ref_logprobs, mask, kl_coeff, kind="k1"):
    k = jnp.where(mask > 0, kl_estimate(logprobs, ref_logprobs, kind), 0.0)
    T = mask.shape[1]; last = mask.sum(-1).astype(int) - 1
    at = (jnp.arange(T)[None] == last[:, None])
    return -kl_coeff * k + at * scores[:, None]
def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    values = jnp.where(mask > 0, values, 0.0); rewards = jnp.where(mask > 0, rewards, 0.0)
    nxt = jnp.concatenate([values[:, 1:], jnp.zeros_like(values[:, :1])], 1)
    d = rewards + gamma * nxt - values
    def f(c, x):
        c = x + gamma * lam * c; return c, c
    _, a = jax.lax.scan(f, jnp.zeros(d.shape[0]), d.T[::-1])
    a = a[::-1].T
    return jnp.where(mask > 0, a, 0.0), jnp.where(mask > 0, a + values, 0.0)
