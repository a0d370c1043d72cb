"""The arithmetic that a workload cannot do without, over the machine's best matmul rate: what no program goes below.

Each prompt once, however many completions it has; vocabulary logits at completion positions only; log-probabilities
and values of the behaviour policy from sampling; no gradient of frozen weights. Adapters and norms count nothing."""

import time

from benchmarks.workloads import Workload


def flops(workload: Workload) -> float:
    """Floating-point operations of one iteration."""
    w, m = workload, workload.model
    prompts, made = w.rows * w.prompt, w.sequences * w.completion
    if w.kind in ("sft", "dpo"):
        forward = forward_flops(w)
        total = forward.times(backward(w))
        return total if w.kind == "sft" else total + forward.times(1, 1, 1)
    sampling = 2 * (prompts + made) * m.layer_values + 2 * made * m.head_values + forward_flops(w).attention
    if w.kind == "sample":
        return sampling
    forward = forward_flops(w)
    reference = forward.times(1, 1, 1)
    reward = forward.times(1, 0, 1) if w.kind == "ppo" else 0.0
    return sampling + reference + reward + w.epochs * forward.times(backward(w))


class Forward:
    def __init__(self, layers, head, attention):
        self.layers, self.head, self.attention = layers, head, attention

    def times(self, layers, head=None, attention=None):
        """layers: how often they count; head and attention: the same, and 3 for a backward pass."""
        head = layers if head is None else head
        attention = 3 if attention is None else attention
        return layers * self.layers + head * self.head + attention * self.attention


def forward_flops(w: Workload) -> Forward:
    m = w.model
    prompts, made = w.rows * w.prompt, w.sequences * w.completion
    # A prompt token reads half of the prompt on average, a completion token all of it and half of its completion.
    read = prompts * w.prompt / 2 + made * (w.prompt + w.completion / 2)
    attention = 4 * m.num_layers * m.num_heads * m.head_dim * read
    return Forward(2 * (prompts + made) * m.layer_values, 2 * made * m.head_values, attention)


def backward(w: Workload) -> int:
    """Forward passes that a forward and backward pass is worth: without gradients of frozen weights it is 2, not 3."""
    return 2 if w.lora else 3


def matmul_rate(seconds: float = 1.0) -> float:
    """The best of several large float32 products here, in floating-point operations a second."""
    import jax
    import jax.numpy as jnp

    best, multiply = 0.0, jax.jit(jnp.matmul)
    for n in (1024, 2048, 4096):
        x = jnp.ones((n, n), jnp.float32)
        multiply(x, x).block_until_ready()
        stop = time.perf_counter() + seconds
        while time.perf_counter() < stop:
            began = time.perf_counter()
            multiply(x, x).block_until_ready()
            best = max(best, 2 * n**3 / (time.perf_counter() - began))
    return best
