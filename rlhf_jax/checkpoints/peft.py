"""LoRA adapters in PEFT's format, in and out.

A setting that this code does not have is an error that names it, never a silent difference. Knows the names and
shapes of adapters, not the base they stand beside."""

import os

import jax.numpy as jnp
import numpy as np

from rlhf_jax.checkpoints import huggingface, tensors
from rlhf_jax.checkpoints.tensors import Leaf
from rlhf_jax.errors import InputError
from rlhf_jax.models.config import LlamaConfig
from rlhf_jax.models.lora import ATTENTION, MLP, Adapter, LoraConfig, scales_of, shapes
from rlhf_jax.parallel.sharding import adapter_shardings

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PARENT = {**dict.fromkeys(ATTENTION, "self_attn"), **dict.fromkeys(MLP, "mlp")}
_READ = {"peft_type", "r", "lora_alpha", "target_modules", "use_rslora", "rank_pattern", "alpha_pattern"}
# Settings without effect on what a loaded adapter computes. Any other one that is set is refused.
_INERT = {
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "lora_dropout",  # of training
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
    "ensure_weight_tying",
}
_NEUTRAL = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva")}


def load_adapter(path: str, config: LlamaConfig, mesh=None) -> tuple[Adapter, LoraConfig]:
    """(adapter in float32, its settings) from a PEFT directory, for a decoder of this shape.

    mesh: place the arrays on it by the rules of parallel/sharding.py.
    Raises: InputError naming a setting that is not supported, or listing all tensors that do not fit.
    """
    source = os.path.join(path, CONFIG)
    lora = _settings(tensors.read_json(source, "a PEFT adapter"), source)
    file = os.path.join(path, WEIGHTS)
    if not os.path.lexists(file):
        huggingface.refuse_pickle(path, WEIGHTS)
    found = tensors.inspect(file)
    leaves = _leaves(config, lora)
    tensors.check(found, leaves, file, f"Check {source} and that the adapter was trained on this base model.")
    shardings = None if mesh is None else adapter_shardings(config, lora, mesh).weights
    weights = tensors.gather(leaves, lambda name, slices: found[name].read(slices), jnp.float32, shardings)
    return Adapter(weights, scales_of(lora)), lora


def save_adapter(path: str, adapter: Adapter, lora_config: LoraConfig, base_model_name: str = "") -> None:
    """A directory that peft's `PeftModel.from_pretrained` (and load_adapter) reads. `path` may exist."""
    layers = next(iter(adapter.weights.values()))["a"].shape[0]
    leaves = [
        leaf
        for name, factors in adapter.weights.items()
        for leaf in _pair(
            name, layers, factors["a"].shape[1:-1], factors["b"].shape[2:], lora_config.rank_of(name)
        )
    ]
    items = tensors.stored_arrays(leaves, adapter.weights)

    def make(directory):
        tensors.write(os.path.join(directory, WEIGHTS), items)
        tensors.write_json(directory, CONFIG, _raw(lora_config, base_model_name))

    tensors.install(path, make, stale=r"adapter_model\..*", last=CONFIG)


def _leaves(config, lora):
    pairs = (
        _pair(name, config.num_layers, *shapes(config)[name], lora.rank_of(name))
        for name in sorted(lora.targets)
    )
    return [leaf for pair in pairs for leaf in pair]


def _pair(name, layers, inputs, outputs, rank):
    """A is stored [r, in] and B [out, r]."""
    stem = "base_model.model.model.layers.{}." + f"{_PARENT[name]}.{name}."
    a, b = (tuple(f"{stem}lora_{x}.weight".format(i) for i in range(layers)) for x in "AB")
    return (
        Leaf((name, "a"), a, ((rank,), tuple(inputs)), transposed=True, stacked=True),
        Leaf((name, "b"), b, (tuple(outputs), (rank,)), transposed=True, stacked=True),
    )


def _settings(raw, source):
    if raw.get("peft_type") != "LORA":
        raise InputError(f"{source}: peft_type is {raw.get('peft_type')!r}; only 'LORA' is supported.")
    for key, value in raw.items():
        if key in _READ or key in _INERT or value in _NEUTRAL.get(key, (None, False, {}, [], "")):
            continue
        raise InputError(
            f"{source}: {key} is {value!r}, which is not supported. Train or convert the adapter without it, "
            "or merge it into its base with peft and load that as a whole checkpoint."
        )
    targets = raw.get("target_modules")
    if targets == "all-linear":
        targets = [*ATTENTION, *MLP]
    if not isinstance(targets, list) or not targets:
        raise InputError(
            f"{source}: target_modules is {targets!r}; expected a list of some of {', '.join(ATTENTION + MLP)}."
        )

    def projections(field, given):
        if not isinstance(given, dict):
            raise InputError(f"{source}: {field} is {given!r}; expected an object.")
        return tuple(sorted((_projection(key, field, source), value) for key, value in given.items()))

    def number(field, value, whole=False):
        kinds = (int,) if whole else (int, float)
        if not isinstance(value, kinds) or isinstance(value, bool) or not value > 0 or not np.isfinite(value):
            raise InputError(f"{source}: {field} is {value!r}; expected a positive {'whole ' * whole}number.")
        return value if whole else float(value)

    return LoraConfig(
        rank=number("r", raw.get("r", 8), whole=True),
        alpha=number("lora_alpha", raw.get("lora_alpha", 8)),
        targets=tuple(sorted({_projection(name, "target_modules", source) for name in targets})),
        rslora=bool(raw.get("use_rslora", False)),
        rank_pattern=tuple(
            (name, number("rank_pattern", value, whole=True))
            for name, value in projections("rank_pattern", raw.get("rank_pattern") or {})
        ),
        alpha_pattern=tuple(
            (name, number("alpha_pattern", value))
            for name, value in projections("alpha_pattern", raw.get("alpha_pattern") or {})
        ),
    )


def _projection(key, field, source):
    """q_proj from "q_proj" or "self_attn.q_proj": a name that means the same in every layer."""
    name = str(key).rpartition(".")[2]
    if name not in _PARENT or key not in (name, f"{_PARENT[name]}.{name}"):
        raise InputError(
            f"{source}: {field} names {key!r}, which is not supported: expected one of {', '.join(_PARENT)}, "
            "each in all layers alike."
        )
    return name


def _raw(lora, base_model_name):
    def plain(x):
        return int(x) if float(x).is_integer() else float(x)

    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name or None,
        "r": lora.rank,
        "lora_alpha": plain(lora.alpha),
        "target_modules": sorted(lora.targets),
        "use_rslora": lora.rslora,
        "rank_pattern": dict(lora.rank_pattern),
        "alpha_pattern": {name: plain(value) for name, value in lora.alpha_pattern},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "layers_to_transform": None,
        "modules_to_save": None,
        "use_dora": False,
    }
