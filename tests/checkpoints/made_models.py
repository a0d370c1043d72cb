"""Small models whose sizes differ wherever they may, so that no two axes can be confused, and edits of their files."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from rlhf_jax.models.llama import Llama, LlamaConfig

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"


def config_of(**fields):
    sizes = dict(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=56,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=10,
    )
    return LlamaConfig(**(sizes | fields))


def random_params(config, seed=0, dtype=np.float32):
    """Every leaf as the decoder itself declares it, with distinct random values."""
    rng = np.random.default_rng(seed)
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(Llama(config).init, jax.random.key(0), ids, ids)["params"]
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(dtype), shapes_of(shapes))


def shapes_of(boxed):
    from flax import linen as nn

    return nn.meta.unbox(boxed)


def rewrite(directory, change):
    """Apply `change` to the dict of stored tensors of a single-file checkpoint."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def edit_json(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
