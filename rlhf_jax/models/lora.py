"""LoRA adapters: a pytree of low-rank factors beside the base, never inside it.

y = x W + scale (x A) B, with B zero at the start, so a new adapter changes nothing. Hu et al. 2021, arXiv:2106.09685;
rank-stabilised scale of Kalajdzievski 2023, arXiv:2312.03732. Knows the decoder's shapes; no files, no optimizer."""

import dataclasses
import math

import flax.struct
import jax
import jax.numpy as jnp

from rlhf_jax.errors import InputError
from rlhf_jax.models import placement
from rlhf_jax.models.config import LlamaConfig

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which projections get an adapter and of what rank. Names are Hugging Face's, patterns are by projection."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ATTENTION + MLP
    rslora: bool = False  # scale alpha / sqrt(rank) instead of alpha / rank
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()

    def __post_init__(self):
        unknown = [name for name in self.targets if name not in ATTENTION + MLP]
        if unknown or not self.targets:
            raise InputError(
                f"LoRA targets {unknown or 'are empty'}; expected all, attention, or some of "
                f"{', '.join(ATTENTION + MLP)}."
            )
        if min([self.rank, *dict(self.rank_pattern).values()]) < 1:
            raise InputError(
                f"LoRA rank must be at least 1, got {self.rank} with pattern {dict(self.rank_pattern)}."
            )

    @classmethod
    def from_names(cls, rank: int, alpha: float, targets: str, rslora: bool) -> "LoraConfig":
        """targets: all, attention, or projection names with commas between them."""
        named = {"all": ATTENTION + MLP, "attention": ATTENTION}
        return cls(rank, alpha, named.get(targets, tuple(n.strip() for n in targets.split(","))), rslora)

    def rank_of(self, target: str) -> int:
        return dict(self.rank_pattern).get(target, self.rank)

    def scale_of(self, target: str) -> float:
        rank, alpha = self.rank_of(target), dict(self.alpha_pattern).get(target, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


@flax.struct.dataclass
class Adapter:
    """weights: {projection: {"a": [L, *in, r], "b": [L, r, *out]}} float32; scales: one number a projection."""

    weights: dict
    scales: tuple[tuple[str, float], ...] = flax.struct.field(pytree_node=False)

    def scaled(self) -> dict:
        """The factors with the scale folded into B, as the decoder reads them."""
        scales = dict(self.scales)
        return {name: {"a": w["a"], "b": w["b"] * scales[name]} for name, w in self.weights.items()}


def shapes(config: LlamaConfig) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """{projection: (input dimensions, output dimensions)} of one layer."""
    D, F, H, K, C = (
        config.hidden_size,
        config.intermediate_size,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
    )
    return {
        "q_proj": ((D,), (H, C)),
        "k_proj": ((D,), (K, C)),
        "v_proj": ((D,), (K, C)),
        "o_proj": ((H, C), (D,)),
        "gate_proj": ((D,), (F,)),
        "up_proj": ((D,), (F,)),
        "down_proj": ((F,), (D,)),
    }


AXES = {  # logical names of the input and output dimensions, as in the base kernels
    "q_proj": (("embed",), ("heads", "head_size")),
    "k_proj": (("embed",), ("kv_heads", "head_size")),
    "v_proj": (("embed",), ("kv_heads", "head_size")),
    "o_proj": (("heads", "head_size"), ("embed",)),
    "gate_proj": (("embed",), ("mlp",)),
    "up_proj": (("embed",), ("mlp",)),
    "down_proj": (("mlp",), ("embed",)),
}


def init(rng, config: LlamaConfig, lora: LoraConfig) -> Adapter:
    """A uniform in +-1/sqrt(fan in), as PEFT draws it; B zero."""
    weights = {}
    for index, name in enumerate(sorted(lora.targets)):
        inputs, outputs = shapes(config)[name]
        bound, rank = 1.0 / math.sqrt(math.prod(inputs)), lora.rank_of(name)
        key = jax.random.fold_in(rng, index)
        weights[name] = {
            "a": jax.random.uniform(key, (config.num_layers, *inputs, rank), jnp.float32, -bound, bound),
            "b": jnp.zeros((config.num_layers, rank, *outputs), jnp.float32),
        }
    return Adapter(weights, scales_of(lora))


def scales_of(lora: LoraConfig) -> tuple[tuple[str, float], ...]:
    return tuple((name, lora.scale_of(name)) for name in sorted(lora.targets))


def logical_axes(adapter: Adapter) -> Adapter:
    """The same tree with a tuple of logical axis names for each array, as it is stored."""
    stored = {"mlp": "mlp_of_adapter", "head_size": "head_size_of_adapter"}
    return _named(adapter, lambda name: stored.get(name, name))


def gathered(adapter: Adapter) -> Adapter:
    """The adapter as the layers read it, all of them at once: before a loop that would gather it again and again."""
    names = _named(adapter, lambda name: name)
    lay = lambda names, x: placement.used(x, *names)
    weights = jax.tree.map(lay, names.weights, adapter.weights, is_leaf=lambda x: isinstance(x, tuple))
    return adapter.replace(weights=weights)


def _named(adapter, of):
    names = {
        name: {
            "a": ("layers", *map(of, AXES[name][0]), "rank"),
            "b": ("layers", "rank", *map(of, AXES[name][1])),
        }
        for name in adapter.weights
    }
    return Adapter(names, adapter.scales)


def delta(factors: dict, scale: float):
    """scale * A B [L, *in, *out] in float32."""
    a, b = factors["a"].astype(jnp.float32), factors["b"].astype(jnp.float32)
    flat = jnp.einsum(
        "lir,lro->lio",
        a.reshape(a.shape[0], -1, a.shape[-1]),
        b.reshape(*b.shape[:2], -1),
        precision=jax.lax.Precision.HIGHEST,  # a TPU would round the factors to bfloat16
    )
    return scale * flat.reshape(*a.shape[:-1], *b.shape[2:])


def added(kernel, factors: dict, scale: float):
    """The kernels [L, *in, *out] with scale * A B added in float32, in the dtype they have."""
    return (kernel.astype(jnp.float32) + delta(factors, scale)).astype(kernel.dtype)


def merge(params: dict, adapter: Adapter, lora_config: LoraConfig) -> dict:
    """The base with the adapter added into its kernels; each kernel keeps its dtype. `params` is left as it is."""
    layers = params["layers"]
    merged = {"attention": dict(layers["attention"]), "mlp": dict(layers["mlp"])}
    for name, factors in adapter.weights.items():
        room = merged["attention" if name in ATTENTION else "mlp"]
        if "kernel" not in room[name]:
            raise InputError(
                "An adapter cannot be merged into a quantised base; merge it into the weights it was quantised from."
            )
        room[name] = {
            **room[name],
            "kernel": added(room[name]["kernel"], factors, lora_config.scale_of(name)),
        }
    return {**params, "layers": {**layers, **merged}}
