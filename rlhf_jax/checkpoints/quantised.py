"""A quantised base from a checkpoint: each array is quantised as soon as it is read, so that no more is there in full.

Knows nothing of how weights are coded (models/quantise.py) or stored (huggingface.py)."""

import functools

import jax
import jax.numpy as jnp

from rlhf_jax.checkpoints import huggingface
from rlhf_jax.models import lora, quantise
from rlhf_jax.models.config import LlamaConfig
from rlhf_jax.parallel import sharding


def load_llama(
    path: str,
    kind: str,
    dtype=jnp.float32,
    mesh=None,
    adapter: lora.Adapter | None = None,
    lora_config: lora.LoraConfig | None = None,
) -> tuple[LlamaConfig, dict]:
    """As huggingface.load_llama, with codes and scales in the place of the projections' kernels.

    Args:
      kind: int8 or nf4. "none" loads as it is.
      adapter: merged into the weights before they are quantised, as lora.merge would.
    Memory peaks at the result, one stacked kernel in `dtype`, and one layer of it in float32.
    """
    config = LlamaConfig.from_huggingface(huggingface.resolve(path))
    shardings = None if mesh is None else sharding.llama_shardings(config, mesh, kind)
    inputs = {name: len(sizes) for name, (sizes, _) in lora.shapes(config).items()}

    def finish(where, array):
        if where[-1] != "kernel" or where[0] != "layers":
            return {where[-1]: array}
        *_, room, name, _ = where
        places = (
            None
            if shardings is None
            else {n: shardings["layers"][room][name][n] for n in ("codes", "scales")}
        )
        factors, scale = None, 0.0
        if adapter is not None and name in adapter.weights:
            factors, scale = adapter.weights[name], lora_config.scale_of(name)
        made = jax.jit(functools.partial(_quantise, inputs[name], kind, scale), out_shardings=places)(
            array, factors
        )
        made = jax.block_until_ready(made)
        array.delete()
        return made

    return huggingface.load_llama(path, dtype, mesh, finish=None if kind == "none" else finish)


def _quantise(num_inputs, kind, scale, kernels, factors):
    def one(part):
        kernel, factors = part
        if factors is not None:
            (kernel,) = lora.added(kernel[None], jax.tree.map(lambda x: x[None], factors), scale)
        return quantise.quantise_kernel(kernel, num_inputs, kind)

    return jax.lax.map(one, (kernels, factors))
