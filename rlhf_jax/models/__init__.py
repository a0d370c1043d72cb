"""Networks as linen modules and their weights as pytrees.

Lives here: the decoder, its attention, LoRA adapters, scalar heads, and roles (base + adapter + head) that turn a
GroupedBatch into log-probabilities, values and scores; and for reward models the encoders (bert.py, deberta.py), their
heads and T5, on the parts in encoder_layers.py. May import jax, flax and `rlhf_jax.types`, and `losses.logprobs`
is handed in by callers above. Never opens a file, never names a mesh axis: logical axis names only."""
