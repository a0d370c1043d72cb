"""Networks as linen modules and their weights as pytrees.

Lives here: the decoder, its attention, LoRA adapters, scalar heads, and roles (base + adapter + head) that turn a
GroupedBatch into log-probabilities, values and scores. May import jax, flax and `rlhf_jax.types`, and `losses.logprobs`
is handed in by callers above. Never opens a file, never names a mesh axis: logical axis names only."""
