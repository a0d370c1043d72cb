
import jax, jax.numpy as jnp
def pairwise_logsigmoid(chosen, rejected, margin=None, center_coeff=0.0):
    return -jax.nn.log_sigmoid(chosen - rejected) + center_coeff * jnp.square(chosen + rejected)
def pairwise_logexp(chosen, rejected):
    return jax.nn.softplus(rejected - chosen)
