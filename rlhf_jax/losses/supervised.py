
from rlhf_jax.losses.masking import masked_mean
def completion_cross_entropy(logprobs, mask):
    return -masked_mean(logprobs, mask)
