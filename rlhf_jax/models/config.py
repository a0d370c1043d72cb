"""LlamaConfig: every number that shapes the decoder, read from a Hugging Face config.json of either layout.

Knows nothing of weights. An unsupported setting is an error that names it, never a silent difference."""

import dataclasses
import json
import math
import os
from typing import Any

import jax.numpy as jnp

from rlhf_jax.errors import InputError

REMAT_POLICIES = ("none", "dots", "full")
ATTENTION_FORMS = ("plain", "splash", "interpreted")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Stretching of the rotary frequencies. kind: "linear" or "llama3" (Llama 3.1, section "long context")."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape and numerics of a Llama-family decoder. Widths in units, lengths in tokens."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    dtype: Any = jnp.float32  # of the computation; reductions (norms, softmax) stay float32
    # What the backward pass computes again: none (no product; norms and gates are), dots (products of attention too,
    # but no projection), full (all of a layer).
    remat: str = "none"
    # Of groups: plain (attention.py), splash (the TPU's kernels, splash.py), interpreted (these on a CPU, for tests).
    attention: str = "plain"

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"num_attention_heads {self.num_heads} is not a multiple of num_key_value_heads {self.num_kv_heads}."
            )
        if self.head_dim % 2:
            raise InputError(f"head_dim is {self.head_dim}; rotary positions need an even number.")
        if self.remat not in REMAT_POLICIES:
            raise InputError(f"remat is {self.remat!r}; expected one of {', '.join(REMAT_POLICIES)}.")
        if self.attention not in ATTENTION_FORMS:
            raise InputError(
                f"attention is {self.attention!r}; expected one of {', '.join(ATTENTION_FORMS)}."
            )

    @classmethod
    def from_huggingface(cls, path_or_dict, **overrides) -> "LlamaConfig":
        """From a checkpoint directory, a config.json, or its parsed dict; `overrides` replace fields (dtype, remat).

        Reads the layout of the hub (`rope_theta`, `rope_scaling`) and that of transformers 5 (`rope_parameters`).
        Raises: InputError naming the file and the setting that is missing or not supported.
        """
        source, raw = read_config(path_or_dict, "a Llama-family checkpoint")
        fields = _shape(raw, source) | {
            "rope_theta": _rope(raw, source)[0],
            "rope_scaling": _scaling(raw, source),
        }
        return cls(**(fields | overrides))

    def to_huggingface(self) -> dict:
        """The config.json of this shape, in the hub's layout, which transformers 4 and 5 both read."""
        scaling = None
        if self.rope_scaling is not None:
            s = self.rope_scaling
            scaling = {"rope_type": s.kind, "factor": s.factor}
            if s.kind == "llama3":
                scaling |= {
                    "low_freq_factor": s.low_freq_factor,
                    "high_freq_factor": s.high_freq_factor,
                    "original_max_position_embeddings": s.original_max_position,
                }
        eos = list(self.eos_ids) if len(self.eos_ids) != 1 else self.eos_ids[0]
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "tie_word_embeddings": self.tie_embeddings,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "initializer_range": self.initializer_range,
            "bos_token_id": self.bos_id,
            "eos_token_id": eos or None,
        }


def read_config(path_or_dict, what: str) -> tuple[str, dict]:
    """(where it came from, for messages; its parsed content) of a checkpoint's directory, a config.json, or a dict.

    Raises: InputError naming the file if there is no such JSON object; `what` says whose config is expected.
    """
    if isinstance(path_or_dict, dict):
        return "config", path_or_dict
    path = os.fspath(path_or_dict)
    path = os.path.join(path, "config.json") if os.path.isdir(path) else path
    try:
        with open(path, encoding="utf-8") as file:
            raw = json.load(file)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; expected the config.json of {what}.") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not JSON ({error.msg}).") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}).") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: expected a JSON object.")
    return path, raw


# Settings that would change the computation and that this decoder does not have. Absent or equal is fine.
_FIXED = {"model_type": "llama", "hidden_act": "silu", "pretraining_tp": 1, "quantization_config": None,
          "partial_rotary_factor": 1.0, "embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0,
          "attention_multiplier": None, "sliding_window": None, "no_rope_layers": None}  # fmt: skip


def _shape(raw, source):
    for key, expected in _FIXED.items():
        value = expected if raw.get(key) is None else raw[key]
        if value != expected:
            raise InputError(
                f"{source}: {key} is {value!r}; only {expected!r} is supported. "
                "This loader reads Llama-family checkpoints (Llama 2 and 3, TinyLlama, SmolLM2)."
            )

    def integer(key, default=None):
        value = raw.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise InputError(f"{source}: {key} is {value!r}; expected a positive whole number.")
        return value

    def flag(key):
        value = raw.get(key)
        if value not in (True, False, None):
            raise InputError(f"{source}: {key} is {value!r}; expected true or false.")
        return bool(value)

    heads, width = integer("num_attention_heads"), integer("hidden_size")
    eos = raw.get("eos_token_id")
    eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(i) is int and i >= 0 for i in eos):
        raise InputError(
            f"{source}: eos_token_id is {raw['eos_token_id']!r}; expected a token id, or a list of them."
        )
    return {
        "vocab_size": integer("vocab_size"),
        "hidden_size": width,
        "intermediate_size": integer("intermediate_size"),
        "num_layers": integer("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": integer("num_key_value_heads", heads),
        "head_dim": integer("head_dim", width // heads),
        "max_position": integer("max_position_embeddings", 2048),
        "rms_norm_eps": _number(raw, "rms_norm_eps", 1e-6, source),
        "tie_embeddings": flag("tie_word_embeddings"),
        "attention_bias": flag("attention_bias"),
        "mlp_bias": flag("mlp_bias"),
        "initializer_range": _number(raw, "initializer_range", 0.02, source),
        "bos_id": raw.get("bos_token_id"),
        "eos_ids": tuple(eos),
    }


def _number(raw, key, default, source):
    value = default if raw.get(key) is None else raw[key]
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise InputError(f"{source}: {key} is {value!r}; expected a number above 0.")
    return float(value)


def _rope(raw, source):
    """(theta, the dict of scaling settings) from either layout."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise InputError(f"{source}: the rope settings are {rope!r}; expected a JSON object.")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(
            f"{source}: partial_rotary_factor is {rope['partial_rotary_factor']!r}; only 1.0 is supported."
        )
    return _number(raw | rope, "rope_theta", 10000.0, source), rope


def _scaling(raw, source):
    _, rope = _rope(raw, source)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise InputError(
            f"{source}: rope scaling {kind!r} is not supported; supported: default, linear, llama3."
        )
    needed = ("factor",) if kind == "linear" else ("factor", "low_freq_factor", "high_freq_factor")
    for key in needed:
        if type(rope.get(key)) not in (int, float) or not 0 < rope[key] < math.inf:
            raise InputError(
                f"{source}: rope scaling {kind!r} needs a number above 0 for {key!r}, found {rope.get(key)!r}."
            )
    if kind == "linear":
        return RopeScaling("linear", float(rope["factor"]))
    original = _number(raw | rope, "original_max_position_embeddings", 8192, source)
    return RopeScaling(
        "llama3",
        float(rope["factor"]),
        float(rope["low_freq_factor"]),
        float(rope["high_freq_factor"]),
        int(original),
    )
