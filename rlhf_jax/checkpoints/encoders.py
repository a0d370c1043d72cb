"""BERT, RoBERTa, DeBERTa-v2/v3, PairRM and T5 in Hugging Face directories: safetensors to params and head, and back.

Reads the layouts that published files have: a prefix of the model before every name or none, norms named gamma and
beta, saved buffers, heads of pre-training. Never pickle. The config decides every shape; a file that disagrees is one
error that lists the tensors. What a tensor becomes is in encoder_layouts.py."""

import dataclasses
import os
import re

import jax.numpy as jnp

from rlhf_jax.checkpoints import encoder_layouts as layouts
from rlhf_jax.checkpoints import huggingface, tensors
from rlhf_jax.checkpoints.pairrm import ranker_config
from rlhf_jax.checkpoints.tensors import Leaf, Stored
from rlhf_jax.errors import InputError
from rlhf_jax.models import encoder_heads
from rlhf_jax.models.bert import Bert
from rlhf_jax.models.config import read_config
from rlhf_jax.models.deberta import Deberta
from rlhf_jax.models.encoder_config import BERT_KINDS, BertConfig, DebertaConfig, T5Config
from rlhf_jax.models.t5 import T5
from rlhf_jax.parallel.sharding import module_shardings, named

SHARD_BYTES = 5 * 10**9
MODEL_TYPES = (*BERT_KINDS, "deberta-v2")
_PREFIX = re.compile(r"^(bert|roberta|deberta|pretrained_model)\.")
# Buffers, and the heads of pre-training and generation, which no reward model reads.
_IGNORED = re.compile(
    r"^embeddings\.(position_ids|token_type_ids)$|^(cls|lm_head|lm_predictions|mask_predictions)\."
)
_T5_IGNORED = re.compile(
    r"^(encoder|decoder)\.embed_tokens\.weight$|EncDecAttention\.relative_attention_bias\.weight$"
)


def model_of(config: BertConfig | DebertaConfig) -> Bert | Deberta:
    """The linen module of an encoder's config: `.apply({"params": params}, ids, mask, type_ids=None)`."""
    return Bert(config) if isinstance(config, BertConfig) else Deberta(config)


def load_encoder(
    path: str, dtype=jnp.float32, mesh=None
) -> tuple[BertConfig | DebertaConfig, dict, dict | None]:
    """(config, params in `dtype`, head in float32 or None) of a BERT, RoBERTa or DeBERTa checkpoint, or of PairRM.

    Args:
      path: directory or hub id, as huggingface.resolve takes it.
      mesh: place the arrays on it by the rules of parallel/sharding.py.
    Returns: `config.head` is the kind of the head (models/encoder_heads.py), None for a bare backbone; its pooler,
      which pre-training used for another task, is then left out.
    Raises: InputError naming the file; wrong tensors are listed all together.
    """
    directory = huggingface.resolve(path)
    source, raw = read_config(directory, "an encoder's checkpoint")
    is_ranker = raw.get("ranker_type") is not None
    if not is_ranker and raw.get("model_type") not in MODEL_TYPES:
        raise InputError(
            f"{source}: model_type is {raw.get('model_type')!r}; the encoders that can be read are "
            f"{', '.join(MODEL_TYPES)} (v3 is deberta-v2 too). T5 is read by load_t5, Llama by load_llama."
        )
    found = _without_prefix(
        huggingface.stored_tensors(directory, "AutoModelForSequenceClassification"), directory
    )
    config = ranker_config(directory, raw, found) if is_ranker else _config(directory, raw, found)
    found = {name: stored for name, stored in found.items() if not _unread(name, config)}
    backbone, head_leaves = _leaves(config), layouts.head(config)
    hint = f"Check that {os.path.join(directory, 'config.json')} belongs to these files."
    tensors.check(found, backbone + head_leaves, directory, hint)
    read = lambda name, slices: found[name].read(slices)
    params = tensors.gather(
        backbone, read, dtype, None if mesh is None else module_shardings(model_of(config), mesh)
    )
    if not head_leaves:
        return config, params, None
    shardings = None if mesh is None else head_shardings(config, mesh)
    return config, params, tensors.gather(head_leaves, read, jnp.float32, shardings)


def save_encoder(
    path: str,
    config: BertConfig | DebertaConfig,
    params: dict,
    head: dict | None = None,
    tokenizer=None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """A directory that transformers (and load_encoder) reads: weights in the dtype they have, config, tokenizer.

    A classifier's head becomes transformers' own; of a mean-pooled one transformers reads the backbone alone.
    Raises: InputError if `config.head` does not name the kind of the head that is given.
    """
    if (head is None) != (config.head is None):
        raise InputError(
            f"config.head is {config.head!r}, but {'no head is' if head is None else 'a head is'} given. Set "
            "config.head and config.num_labels (dataclasses.replace) to what is saved."
        )
    backbone = [_renamed(leaf, lambda name: _prefix(config) + name) for leaf in _leaves(config)]
    items = tensors.stored_arrays(backbone, params)
    if head is not None:
        leaves = [
            _renamed(leaf, lambda name: _head_prefix(config, name) + name) for leaf in layouts.head(config)
        ]
        items += tensors.stored_arrays(leaves, head)
    huggingface.install_model(path, items, config.to_huggingface(), tokenizer, None, shard_bytes)


def head_shardings(config: BertConfig | DebertaConfig, mesh) -> dict:
    """NamedShardings of the config's head."""
    shapes = {}
    for leaf in layouts.head(config):
        shapes.setdefault(leaf.path[0], {})[leaf.path[1]] = jnp.empty(leaf.shape)
    return named(encoder_heads.logical_axes(shapes), shapes, mesh)


def load_t5(path: str, dtype=jnp.float32, mesh=None) -> tuple[T5Config, dict]:
    """(config, params in `dtype`) of a T5, T5 v1.1 or Flan-T5 checkpoint; arguments and errors as load_encoder's.

    Whether the head is the embedding is decided by the weights: transformers 5 says so in every config it writes.
    """
    directory = huggingface.resolve(path)
    config = T5Config.from_huggingface(directory)
    found = huggingface.stored_tensors(directory, "AutoModelForSeq2SeqLM")
    for name in (
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
    ):  # one matrix, saved once by any name
        if name in found:
            found.setdefault("shared.weight", found[name])
    found = {name: stored for name, stored in found.items() if not _T5_IGNORED.search(name)}
    own = found.get("lm_head.weight")
    if config.tie_embeddings and own is not None:
        if huggingface.same_values(own, found.get("shared.weight")):
            del found["lm_head.weight"]
        else:
            config = dataclasses.replace(config, tie_embeddings=False)
    leaves = layouts.t5(config)
    hint = f"Check that {os.path.join(directory, 'config.json')} belongs to these files."
    tensors.check(found, leaves, directory, hint)
    shardings = None if mesh is None else module_shardings(T5(config), mesh, num_inputs=3)
    return config, tensors.gather(leaves, lambda name, slices: found[name].read(slices), dtype, shardings)


def save_t5(
    path: str, config: T5Config, params: dict, tokenizer=None, *, shard_bytes: int = SHARD_BYTES
) -> None:
    """A directory that transformers (and load_t5) reads."""
    raw = config.to_huggingface()
    generation = {key: raw[key] for key in ("decoder_start_token_id", "eos_token_id", "pad_token_id")}
    items = tensors.stored_arrays(layouts.t5(config), params)
    huggingface.install_model(path, items, raw, tokenizer, generation, shard_bytes)


def _without_prefix(stored: dict[str, Stored], directory: str) -> dict[str, Stored]:
    found, names = {}, {}
    for name, tensor in stored.items():
        plain = _PREFIX.sub("", name)
        plain = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", plain)
        plain = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", plain)
        if plain in found:
            raise InputError(
                f"{directory}: {names[plain]} and {name} are the same tensor by two names. Keep one of them."
            )
        found[plain], names[plain] = tensor, name
    return found


def _config(directory, raw, found):
    cls = BertConfig if raw["model_type"] in BERT_KINDS else DebertaConfig
    config = cls.from_huggingface(directory)
    classifies = {"classifier.weight", "classifier.out_proj.weight"} & set(found)
    if config.head is None and classifies and not raw.get("architectures") and raw.get("pooling") is None:
        # A config that does not say its class: the weights do.
        head = "cls_tanh" if cls is BertConfig or raw.get("pooler_hidden_act") == "tanh" else "cls_gelu"
        config = dataclasses.replace(config, head=head)
    return config


def _unread(name, config):
    if name.startswith("pooler."):
        return config.head not in ("cls_tanh", "cls_gelu") or getattr(config, "kind", "bert") != "bert"
    if name == "embeddings.position_embeddings.weight":  # saved by early DeBERTas that never add it
        return isinstance(config, DebertaConfig) and not config.position_biased_input
    return _IGNORED.search(name) is not None


def _leaves(config):
    return layouts.bert(config) if isinstance(config, BertConfig) else layouts.deberta(config)


def _prefix(config):
    """What transformers puts before the backbone's names: nothing where the backbone is the whole model."""
    if config.head in (None, "mean"):
        return ""
    if config.head == "pairrm":
        return "pretrained_model."
    return "deberta." if isinstance(config, DebertaConfig) else BERT_KINDS[config.kind] + "."


def _head_prefix(config, name):
    """BERT alone has its pooler inside the backbone."""
    return "bert." if name.startswith("pooler.") and isinstance(config, BertConfig) else ""


def _renamed(leaf: Leaf, rename) -> Leaf:
    return dataclasses.replace(leaf, names=tuple(rename(name) for name in leaf.names))
