"""Shapes of published checkpoints by name, for plans: nothing has to be fetched to know what a model needs.

From the config.json of each on the Hugging Face hub. Knows numbers alone."""

from rlhf_jax.models.config import LlamaConfig

_LLAMA2 = dict(vocab_size=32000, max_position=4096, bos_id=1, eos_ids=(2,))
_SHAPES = {
    "Llama-2-7b": dict(hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32, num_kv_heads=32),
    "Llama-2-13b": dict(hidden_size=5120, intermediate_size=13824, num_layers=40, num_heads=40, num_kv_heads=40),
    "Llama-2-70b": dict(hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64, num_kv_heads=8),
}  # fmt: skip

ARCHITECTURES: dict[str, LlamaConfig] = {
    f"meta-llama/{name}{kind}-hf": LlamaConfig(**_LLAMA2, **shape, head_dim=128)
    for name, shape in _SHAPES.items()
    for kind in ("", "-chat")
}


def tiny(vocab_size: int = 1024, width: int = 64, bos_id: int = 1, eos_id: int = 2) -> LlamaConfig:
    """What checkpoints/tiny.py makes."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=width // 4,
        max_position=256,
        tie_embeddings=True,
        initializer_range=0.05,
        bos_id=bos_id,
        eos_ids=(eos_id,),
    )


ARCHITECTURES["tiny"] = tiny()
# The embedded model, as its file says too (checkpoints/gguf.py).
ARCHITECTURES["smollm2"] = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    max_position=8192,
    rope_theta=100000.0,
    tie_embeddings=True,
    bos_id=1,
    eos_ids=(2,),
)
