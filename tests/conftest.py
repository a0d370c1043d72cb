"""Eight virtual CPU devices, explicit broadcasting, a compile cache shared by all workers, no network."""

import gc
import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true --xla_cpu_multi_thread_eigen=false "
    # Compiles in two thirds of the time, and a module as one, not split for more threads than there are.
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"  # programs are lowered sooner without who called whom
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), "rlhf_jax_test_cache")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from rlhf_jax.models.llama import Llama, LlamaConfig

jax.config.update("jax_numpy_rank_promotion", "raise")
gc.set_threshold(200_000, 20, 100)  # tracing makes many small objects, and few cycles


@pytest.fixture(scope="session")
def tiny_llama():
    """(Llama, params): 2 layers, grouped-query attention, width 32, 64 tokens."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        initializer_range=0.2,
        eos_ids=(2,),
    )
    model = Llama(config)
    ids = jnp.zeros((1, 1), jnp.int32)
    return model, nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), ids, ids)["params"])
