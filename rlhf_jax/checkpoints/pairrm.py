"""The config of PairRM as llm-blender publishes it: its ranker's settings instead of a model's.

Two layouts of the same weights are on the hub. `llm-blender/PairRM-hf` has DeBERTa's own config.json with the ids of
the marker tokens (class DebertaV2PairRM), which DebertaConfig reads. `llm-blender/PairRM` has the settings of
LLM-Blender's ranker (`ranker_type`, `model_name`), so the shape is that of the named DeBERTa-v3, the vocabulary is as
long as the embedding (the markers were added to it), and the ids are in the tokenizer's files. In both the names of the
tensors are `pretrained_model.*` for the backbone and `head_layer.1`, `head_layer.4` for the two maps of the head (a
torch Sequential of dropout, linear, tanh, dropout, linear). Read in github.com/yuchenlin/LLM-Blender:
llm_blender/pair_ranker/{pairrm,ranker,model_util}.py and llm_blender/blender/blender_utils.py."""

import dataclasses
import os

import jax
import jax.numpy as jnp

from rlhf_jax.checkpoints import tensors
from rlhf_jax.errors import InputError
from rlhf_jax.models.encoder_config import MARKERS, DebertaConfig

MARKER_TOKENS = ("<|source|>", "<|candidate1|>", "<|candidate2|>")
_SHAPES = {  # layers, heads, width, MLP width
    "microsoft/deberta-v3-xsmall": (12, 6, 384, 1536),
    "microsoft/deberta-v3-small": (6, 12, 768, 3072),
    "microsoft/deberta-v3-base": (12, 12, 768, 3072),
    "microsoft/deberta-v3-large": (24, 16, 1024, 4096),
}
_V3 = {
    "model_type": "deberta-v2",
    "relative_attention": True,
    "position_buckets": 256,
    "max_position_embeddings": 512,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "position_biased_input": False,
    "type_vocab_size": 0,
    "layer_norm_eps": 1e-7,
    "architectures": ["DebertaV2PairRM"],
}


def with_markers(config: DebertaConfig, params: dict, tokenizer, rng) -> tuple[DebertaConfig, dict]:
    """(config with the ids of the markers, params with a row for each): a backbone becomes PairRM's.

    tokenizer: of transformers; the markers that it lacks are added to it. New rows are drawn as the others were;
    microsoft/deberta-v3 has rows to spare, which are used as they are.
    """
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKER_TOKENS)})
    ids = tuple(tokenizer.convert_tokens_to_ids(list(MARKER_TOKENS)))
    table, rows = params["words"]["embedding"], max(config.vocab_size, 1 + max(ids))
    if rows > config.vocab_size:
        shape = (rows - config.vocab_size, table.shape[1])
        new = config.initializer_range * jax.random.normal(rng, shape, table.dtype)
        params = params | {"words": {"embedding": jnp.concatenate([table, new])}}
    return dataclasses.replace(config, vocab_size=rows, marker_ids=ids), params


def ranker_config(directory: str, raw: dict, found: dict) -> DebertaConfig:
    """The config of a directory whose config.json has the settings of LLM-Blender's ranker.

    Args:
      raw: that config.json. found: the tensors, without their prefix.
    Raises: InputError naming the file if the ranker is of another kind or a file lacks what is needed.
    """
    source = os.path.join(directory, "config.json")
    if raw["ranker_type"] != "pairranker":
        raise InputError(
            f"{source}: ranker_type is {raw['ranker_type']!r}; only 'pairranker' (PairRM) is supported."
        )
    name = raw.get("model_name")
    if name not in _SHAPES:
        raise InputError(
            f"{source}: model_name is {name!r}; the shapes that are known are those of {', '.join(_SHAPES)}. Use a "
            "copy with DeBERTa's own config.json, as llm-blender/PairRM-hf has it."
        )
    embedding = found.get("embeddings.word_embeddings.weight")
    if embedding is None:
        raise InputError(f"{directory}: pretrained_model.embeddings.word_embeddings.weight is missing.")
    keys = ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size")
    shape = dict(zip(keys, _SHAPES[name], strict=True)) | {"vocab_size": embedding.shape[0]}
    markers = dict(zip(MARKERS, _marker_ids(directory), strict=True))
    return DebertaConfig.from_huggingface(_V3 | shape | markers | {"n_tasks": raw.get("n_tasks") or 1})


def _marker_ids(directory):
    known, files = {}, [os.path.join(directory, name) for name in ("added_tokens.json", "tokenizer.json")]
    if os.path.exists(files[0]):
        known = tensors.read_json(files[0], "the tokens added to a vocabulary")
    if os.path.exists(files[1]):
        added = tensors.read_json(files[1], "a tokenizer").get("added_tokens") or []
        known = {token.get("content"): token.get("id") for token in added} | known
    missing = [token for token in MARKER_TOKENS if type(known.get(token)) is not int]
    if missing:
        raise InputError(
            f"{directory}: neither added_tokens.json nor tokenizer.json has the id of {', '.join(missing)}. Copy the "
            "tokenizer's files from where PairRM was published."
        )
    return [known[token] for token in MARKER_TOKENS]
