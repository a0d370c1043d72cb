"""Shapes of the models that are not decoders: BERT and RoBERTa, DeBERTa-v2 and v3, T5 and Flan-T5.

Each is read from a Hugging Face config.json and written back. Knows nothing of weights. A setting that would change
the computation and is not supported is an error that names it."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from rlhf_jax.errors import InputError
from rlhf_jax.models.config import REMAT_POLICIES, read_config

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish", "tanh")
# model_type of a config.json: the prefix of its tensors' names in transformers.
BERT_KINDS = {"bert": "bert", "roberta": "roberta", "xlm-roberta": "roberta"}
HEAD_KINDS = ("cls_tanh", "cls_gelu", "mean", "pairrm")  # models/encoder_heads.py
MARKERS = ("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id")
_MEAN_HEAD = "mean"  # value of config.json's `pooling`, which is ours: transformers has no such class


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Shape and numerics of BERT (Devlin et al. 2019) and RoBERTa (Liu et al. 2019). Lengths in tokens."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    kind: str = "bert"  # one of BERT_KINDS
    max_position: int = 512  # rows of the position table, the first `position_offset` of them unused
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    activation: str = "gelu"
    initializer_range: float = 0.02
    pad_id: int = 0
    num_labels: int = 2
    head: str | None = None  # one of HEAD_KINDS; what the checkpoint has, or is given when it is saved
    dtype: Any = jnp.float32
    remat: str = "none"

    def __post_init__(self):
        _check(self)
        if self.hidden_size % self.num_heads:
            raise InputError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_heads}."
            )
        if self.head in ("cls_gelu", "pairrm"):
            raise InputError(
                f"head {self.head!r} belongs to DeBERTa; BERT and RoBERTa have cls_tanh and mean."
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def position_offset(self) -> int:
        """The row of the first token's position: RoBERTa counts from the row after its padding's."""
        return 0 if self.kind == "bert" else self.pad_id + 1

    @classmethod
    def from_huggingface(cls, path_or_dict, **overrides) -> "BertConfig":
        """From a checkpoint directory, a config.json, or its parsed dict; `overrides` replace fields (dtype, remat).

        Raises: InputError naming the file and the setting that is missing or not supported.
        """
        read = _Reader(*read_config(path_or_dict, "a BERT or RoBERTa checkpoint"))
        read.fixed(
            position_embedding_type="absolute",
            is_decoder=False,
            add_cross_attention=False,
            quantization_config=None,
        )
        kind = read.choice("model_type", tuple(BERT_KINDS))
        fields = {
            "kind": kind,
            "max_position": read.integer("max_position_embeddings", 512),
            "type_vocab_size": read.integer("type_vocab_size", 2),
            "layer_norm_eps": read.number("layer_norm_eps", 1e-12),
            "pad_id": read.integer("pad_token_id", 0 if kind == "bert" else 1, at_least=0),
            "head": read.head({"ForSequenceClassification": "cls_tanh"}),
        }
        return cls(**(read.encoder_shape() | fields | overrides))

    def to_huggingface(self) -> dict:
        """The config.json that transformers 4 and 5 read."""
        name = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"}[self.kind]
        return _encoder_json(self, self.kind, name) | {
            "max_position_embeddings": self.max_position,
            "type_vocab_size": self.type_vocab_size,
            "position_embedding_type": "absolute",
            "pad_token_id": self.pad_id,
        }


@dataclasses.dataclass(frozen=True)
class DebertaConfig:
    """Shape and numerics of DeBERTa-v2 and v3 (He et al. 2021, arXiv:2006.03654, arXiv:2111.09543)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    embedding_size: int
    max_position: int = 512
    type_vocab_size: int = 0
    layer_norm_eps: float = 1e-7
    activation: str = "gelu"
    initializer_range: float = 0.02
    position_biased_input: bool = False  # adds absolute positions to the input
    relative_attention: bool = True
    pos_att_type: tuple[str, ...] = ("c2p", "p2c")
    share_att_key: bool = True  # positions are projected by the keys' and queries' own kernels
    position_buckets: int = 256  # 0: none, every distance has a row of its own
    max_relative_positions: int = 512
    norm_rel_ebd: bool = True
    conv_kernel_size: int = 0  # above 0: the convolution of v2-xlarge beside the first layer
    conv_activation: str = "tanh"
    pad_id: int = 0
    num_labels: int = 2
    head: str | None = None
    marker_ids: tuple[int, int, int] | None = None  # PairRM: source, first candidate, second candidate
    dtype: Any = jnp.float32
    remat: str = "none"

    def __post_init__(self):
        _check(self)
        if self.conv_kernel_size and self.conv_kernel_size % 2 == 0:
            raise InputError(f"conv_kernel_size is {self.conv_kernel_size}; expected 0 or an odd number.")
        if self.head == "pairrm" and self.marker_ids is None:
            raise InputError(f"a PairRM head needs the ids of its marker tokens: {', '.join(MARKERS)}.")

    @property
    def position_span(self) -> int:
        """Half the rows of the table of relative positions."""
        return self.position_buckets or self.max_relative_positions

    @classmethod
    def from_huggingface(cls, path_or_dict, **overrides) -> "DebertaConfig":
        """From a checkpoint directory, a config.json, or its parsed dict; `overrides` replace fields (dtype, remat).

        Raises: InputError naming the file and the setting that is missing or not supported.
        """
        read = _Reader(*read_config(path_or_dict, "a DeBERTa-v2 or v3 checkpoint"))
        read.fixed(model_type="deberta-v2", conv_groups=1, quantization_config=None)
        shape = read.encoder_shape()
        kinds = read.options("pos_att_type", (), ("c2p", "p2c"))
        norms = read.options("norm_rel_ebd", ("none",), ("none", "layer_norm"))
        width, longest = shape["hidden_size"], read.integer("max_position_embeddings", 512)
        pooled = {"gelu": "cls_gelu", "tanh": "cls_tanh"}[
            read.choice("pooler_hidden_act", ("gelu", "tanh"), "gelu")
        ]
        head = read.head({"ForSequenceClassification": pooled, "PairRM": "pairrm"})
        if head in ("cls_gelu", "cls_tanh"):
            read.fixed(pooler_hidden_size=width)
        fields = {
            "head_dim": read.integer("attention_head_size", width // shape["num_heads"]),
            "embedding_size": read.integer("embedding_size", width),
            "max_position": longest,
            "type_vocab_size": read.integer("type_vocab_size", 0, at_least=0),
            "layer_norm_eps": read.number("layer_norm_eps", 1e-7),
            "position_biased_input": read.flag("position_biased_input", True),
            "relative_attention": read.flag("relative_attention", False),
            "pos_att_type": kinds,
            "share_att_key": read.flag("share_att_key", False),
            "position_buckets": max(read.integer("position_buckets", 0, at_least=-1), 0),
            "norm_rel_ebd": "layer_norm" in norms,
            "conv_kernel_size": read.integer("conv_kernel_size", 0, at_least=0),
            "conv_activation": read.choice("conv_act", ACTIVATIONS, "tanh"),
            "pad_id": read.integer("pad_token_id", 0, at_least=0),
            "head": head,
        }
        reach = read.integer("max_relative_positions", -1, at_least=-1)
        fields["max_relative_positions"] = reach if reach > 0 else longest
        if head == "pairrm" or any(key in read.raw for key in MARKERS):
            fields["marker_ids"] = tuple(read.integer(key, at_least=0) for key in MARKERS)
        if head == "pairrm":
            fields["num_labels"] = read.integer("n_tasks", 1)
        return cls(**(shape | fields | overrides))

    def to_huggingface(self) -> dict:
        """The config.json that transformers 4 and 5 read."""
        raw = _encoder_json(self, "deberta-v2", "DebertaV2") | {
            "attention_head_size": self.head_dim,
            "embedding_size": self.embedding_size,
            "max_position_embeddings": self.max_position,
            "type_vocab_size": self.type_vocab_size,
            "position_biased_input": self.position_biased_input,
            "relative_attention": self.relative_attention,
            "pos_att_type": list(self.pos_att_type),
            "share_att_key": self.share_att_key,
            "position_buckets": self.position_buckets or -1,
            "max_relative_positions": self.max_relative_positions,
            "norm_rel_ebd": "layer_norm" if self.norm_rel_ebd else "none",
            "pooler_hidden_act": "tanh" if self.head == "cls_tanh" else "gelu",
            "pooler_hidden_size": self.hidden_size,
            "pooler_dropout": 0.0,
            "pad_token_id": self.pad_id,
        }
        if self.conv_kernel_size:
            raw |= {"conv_kernel_size": self.conv_kernel_size, "conv_act": self.conv_activation}
        if self.marker_ids is not None:
            raw |= dict(zip(MARKERS, self.marker_ids, strict=True))
        if self.head == "pairrm":
            raw |= {"n_tasks": self.num_labels, "drop_out": 0.05, "architectures": ["DebertaV2PairRM"]}
        return raw


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Shape and numerics of T5 (Raffel et al. 2020, arXiv:1910.10683), its v1.1 and Flan-T5."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_decoder_layers: int
    num_heads: int
    head_dim: int
    activation: str = "relu"
    gated: bool = False  # v1.1 and Flan: a gate beside the activated projection
    tie_embeddings: bool = True  # the head is the embedding
    scale_output: bool = True  # the decoder's output times hidden_size ** -0.5: v1
    num_buckets: int = 32
    max_distance: int = 128
    layer_norm_eps: float = 1e-6
    initializer_factor: float = 1.0
    pad_id: int = 0
    eos_id: int = 1
    start_id: int = 0  # the first token the decoder reads
    dtype: Any = jnp.float32
    remat: str = "none"

    def __post_init__(self):
        _check(self)
        if self.num_buckets % 4 or self.max_distance <= self.num_buckets // 2:
            raise InputError(
                f"relative_attention_num_buckets {self.num_buckets} must be a multiple of 4, and "
                f"relative_attention_max_distance {self.max_distance} above half of it."
            )

    @classmethod
    def from_huggingface(cls, path_or_dict, **overrides) -> "T5Config":
        """From a checkpoint directory, a config.json, or its parsed dict; `overrides` replace fields (dtype, remat).

        transformers 5 writes tie_word_embeddings true for every T5, so `tie_embeddings` is sure only once the weights
        are seen: load_t5 sets it.
        Raises: InputError naming the file and the setting that is missing or not supported.
        """
        read = _Reader(*read_config(path_or_dict, "a T5 checkpoint"))
        read.fixed(model_type="t5", is_encoder_decoder=True, quantization_config=None)
        gated, _, activation = read.raw.get("feed_forward_proj", "relu").rpartition("-")
        activation = "gelu_new" if (gated, activation) == ("gated", "gelu") else activation
        if gated not in ("", "gated") or activation not in ACTIVATIONS:
            raise InputError(
                f"{read.source}: feed_forward_proj is {read.raw['feed_forward_proj']!r}; expected relu, gated-gelu, or "
                f"another of {', '.join(ACTIVATIONS)}, with or without gated- before it."
            )
        tied = read.flag("tie_word_embeddings", True)
        layers = read.integer("num_layers")
        fields = {
            "vocab_size": read.integer("vocab_size"),
            "hidden_size": read.integer("d_model"),
            "intermediate_size": read.integer("d_ff"),
            "num_layers": layers,
            "num_decoder_layers": read.integer("num_decoder_layers", layers),
            "num_heads": read.integer("num_heads"),
            "head_dim": read.integer("d_kv"),
            "activation": activation,
            "gated": bool(gated),
            "tie_embeddings": tied,
            "scale_output": read.flag("scale_decoder_outputs", tied),
            "num_buckets": read.integer("relative_attention_num_buckets", 32),
            "max_distance": read.integer("relative_attention_max_distance", 128),
            "layer_norm_eps": read.number("layer_norm_epsilon", 1e-6),
            "initializer_factor": read.number("initializer_factor", 1.0),
            "pad_id": read.integer("pad_token_id", 0, at_least=0),
            "eos_id": read.integer("eos_token_id", 1, at_least=0),
        }
        fields["start_id"] = read.integer("decoder_start_token_id", fields["pad_id"], at_least=0)
        return cls(**(fields | overrides))

    def to_huggingface(self) -> dict:
        """The config.json that transformers 4 and 5 read."""
        activation = "gelu" if (self.gated, self.activation) == (True, "gelu_new") else self.activation
        return {
            "architectures": ["T5ForConditionalGeneration"],
            "model_type": "t5",
            "is_encoder_decoder": True,
            "vocab_size": self.vocab_size,
            "d_model": self.hidden_size,
            "d_ff": self.intermediate_size,
            "num_layers": self.num_layers,
            "num_decoder_layers": self.num_decoder_layers,
            "num_heads": self.num_heads,
            "d_kv": self.head_dim,
            "feed_forward_proj": f"gated-{activation}" if self.gated else activation,
            "tie_word_embeddings": self.tie_embeddings,
            "scale_decoder_outputs": self.scale_output,
            "relative_attention_num_buckets": self.num_buckets,
            "relative_attention_max_distance": self.max_distance,
            "layer_norm_epsilon": self.layer_norm_eps,
            "initializer_factor": self.initializer_factor,
            "pad_token_id": self.pad_id,
            "eos_token_id": self.eos_id,
            "decoder_start_token_id": self.start_id,
        }


class _Reader:
    """The settings of one config.json, each checked as it is read."""

    def __init__(self, source: str, raw: dict):
        self.source, self.raw = source, raw

    def integer(self, key, default=None, *, at_least=1):
        value = default if self.raw.get(key) is None else self.raw[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
            raise self._wrong(key, value, f"a whole number, {at_least} or more")
        return value

    def number(self, key, default):
        value = default if self.raw.get(key) is None else self.raw[key]
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self._wrong(key, value, "a number above 0")
        return float(value)

    def flag(self, key, default):
        value = default if self.raw.get(key) is None else self.raw[key]
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def choice(self, key, allowed, default=None):
        value = default if self.raw.get(key) is None else self.raw[key]
        if value not in allowed:
            raise self._wrong(key, value, f"one of {', '.join(allowed)}")
        return value

    def options(self, key, default, allowed) -> tuple[str, ...]:
        """Several names, as a list or joined with |; in the order of `allowed`."""
        value = self.raw.get(key)
        names = default if value is None else value.lower().split("|") if isinstance(value, str) else value
        if not isinstance(names, list | tuple) or not {str(n).strip() for n in names} <= {*allowed, ""}:
            raise self._wrong(key, value, f"some of {', '.join(allowed)}")
        given = {str(n).strip() for n in names}
        return tuple(n for n in allowed if n in given)

    def fixed(self, **expected):
        for key, only in expected.items():
            if (value := self.raw.get(key)) not in (None, only):
                raise InputError(f"{self.source}: {key} is {value!r}; only {only!r} is supported.")

    def head(self, by_class: dict) -> str | None:
        """The head that the class of the checkpoint has; None if it is a bare backbone, or another task's."""
        if self.raw.get("pooling") is not None:
            return self.choice("pooling", (_MEAN_HEAD,))
        names = self.raw.get("architectures") or []
        return next((kind for end, kind in by_class.items() if any(n.endswith(end) for n in names)), None)

    def encoder_shape(self) -> dict:
        labels = self.raw.get("id2label")
        default = len(labels) if isinstance(labels, dict) and labels else 2
        return {
            "vocab_size": self.integer("vocab_size"),
            "hidden_size": self.integer("hidden_size"),
            "intermediate_size": self.integer("intermediate_size"),
            "num_layers": self.integer("num_hidden_layers"),
            "num_heads": self.integer("num_attention_heads"),
            "activation": self.choice("hidden_act", ACTIVATIONS, "gelu"),
            "initializer_range": self.number("initializer_range", 0.02),
            "num_labels": self.integer("num_labels", default),
        }

    def _wrong(self, key, value, expected):
        return InputError(f"{self.source}: {key} is {value!r}; expected {expected}.")


def _check(config):
    if config.remat not in REMAT_POLICIES:
        raise InputError(f"remat is {config.remat!r}; expected one of {', '.join(REMAT_POLICIES)}.")
    if getattr(config, "head", None) not in (None, *HEAD_KINDS):
        raise InputError(f"head is {config.head!r}; expected one of {', '.join(HEAD_KINDS)}, or None.")


def _encoder_json(config, model_type, class_name):
    classifies = config.head in ("cls_tanh", "cls_gelu")
    raw = {
        "architectures": [class_name + ("ForSequenceClassification" if classifies else "Model")],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "hidden_act": config.activation,
        "initializer_range": config.initializer_range,
        "layer_norm_eps": config.layer_norm_eps,
        "id2label": {str(i): f"LABEL_{i}" for i in range(config.num_labels)},
        "label2id": {f"LABEL_{i}": i for i in range(config.num_labels)},
    }
    return raw | ({"pooling": _MEAN_HEAD} if config.head == _MEAN_HEAD else {})
