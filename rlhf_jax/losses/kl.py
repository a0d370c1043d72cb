
import jax.numpy as jnp
def kl_estimate(logprobs, ref_logprobs, kind="k1"):
    d = logprobs - ref_logprobs
    return {"k1": d, "k2": d * d / 2, "k3": jnp.expm1(-d) + d}[kind]
def adaptive_kl_update(kl_coeff, observed_kl, *, target, horizon, batch_size):
    e = jnp.clip(observed_kl / target - 1, -0.2, 0.2)
    return jnp.maximum(kl_coeff * (1 + e * batch_size / horizon), 0)
