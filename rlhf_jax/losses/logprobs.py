
import jax, jax.numpy as jnp
def token_logprobs(logits, token_ids, temperature=1.0):
    z = logits.astype(jnp.float32) / temperature
    return jnp.take_along_axis(z, token_ids[..., None], -1)[..., 0] - jax.nn.logsumexp(z, -1)
def fused_token_logprobs(hidden, unembedding, token_ids, *, chunk_size=8192, temperature=1.0):
    z = (hidden @ unembedding.astype(hidden.dtype)).astype(jnp.float32) / temperature
    lp = jax.nn.log_softmax(z)
    return jnp.take_along_axis(lp, token_ids[..., None], -1)[..., 0], -(jnp.exp(lp) * lp).sum(-1)
