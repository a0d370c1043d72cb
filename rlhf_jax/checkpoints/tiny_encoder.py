"""A tiny encoder or T5 with random weights and a tokenizer of its own, as a Hugging Face directory.

For tests and quick runs that must not need a download. The same seed and corpus give the same files."""

import os

import jax
import jax.numpy as jnp
from flax import linen as nn

from rlhf_jax.checkpoints import encoders, tiny
from rlhf_jax.checkpoints.pairrm import MARKER_TOKENS
from rlhf_jax.errors import InputError
from rlhf_jax.models.encoder_config import BertConfig, DebertaConfig, T5Config
from rlhf_jax.models.t5 import T5

KINDS = ("bert", "roberta", "deberta", "t5")
ENCODER_TOKENS = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", *MARKER_TOKENS)  # ids 0 to 6
T5_TOKENS = ("<pad>", "</s>")  # ids 0 and 1, as every T5 has them


def train_tokenizer(corpus: list[str], vocab_size: int, kind: str):
    """Byte-level BPE that writes [CLS] x [SEP] (or x </s> for T5) around a text, and types 0 and 1 for a pair."""
    from tokenizers.processors import TemplateProcessing

    if kind == "t5":
        tokenizer = tiny.byte_level(corpus, vocab_size, list(T5_TOKENS))
        tokenizer.post_processor = TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
        )
        return tiny.wrap(tokenizer, pad="<pad>", eos="</s>")
    tokenizer = tiny.byte_level(corpus, vocab_size, list(ENCODER_TOKENS))
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return tiny.wrap(tokenizer, pad="[PAD]", cls="[CLS]", sep="[SEP]", mask="[MASK]")


def config_of(
    kind: str, vocab_size: int, width: int = 64, max_position: int = 512
) -> BertConfig | DebertaConfig | T5Config:
    """Two layers of four heads. PairRM's markers are ids 4 to 6, ready for a "pairrm" head on DeBERTa.

    Raises: InputError if `kind` is none of KINDS.
    """
    if kind not in KINDS:
        raise InputError(f"a tiny model of kind {kind!r} cannot be made; expected one of {', '.join(KINDS)}.")
    shape = dict(
        vocab_size=vocab_size, hidden_size=width, intermediate_size=2 * width, num_layers=2, num_heads=4
    )
    if kind == "t5":  # Flan's: gated, with a head of its own
        own = dict(gated=True, activation="gelu_new", tie_embeddings=False, scale_output=False)
        return T5Config(**shape, **own, num_decoder_layers=2, head_dim=width // 4)
    # Wide enough that attention begins uneven: what compares two texts has to tell their places apart.
    shape |= dict(initializer_range=width**-0.5, max_position=max_position, num_labels=1)
    if kind == "deberta":
        own = dict(head_dim=width // 4, embedding_size=width, position_buckets=32)
        return DebertaConfig(**shape, **own, max_relative_positions=max_position, marker_ids=(4, 5, 6))
    shape["max_position"] += kind == "roberta"  # one row is the padding's
    return BertConfig(**shape, kind=kind, layer_norm_eps=1e-5)


def make(
    directory: str,
    corpus: list[str],
    kind: str = "deberta",
    *,
    seed: int = 0,
    vocab_size: int = 1024,
    width: int = 64,
) -> str:
    """Write the model to `directory` unless it is there; returns the directory. An encoder has no head yet."""
    if os.path.exists(os.path.join(directory, "config.json")):
        return directory
    tokenizer = train_tokenizer(corpus, vocab_size, kind)
    config = config_of(kind, len(tokenizer), width)
    if kind == "t5":
        encoders.save_t5(directory, config, with_places(init_params(T5(config), seed)), tokenizer)
    else:
        encoders.save_encoder(
            directory, config, init_params(encoders.model_of(config), seed), tokenizer=tokenizer
        )
    return directory


def init_params(module: nn.Module, seed: int = 0) -> dict:
    """New float32 parameters of an encoder or of T5."""
    ids = jnp.zeros((1, 2), jnp.int32)
    inputs = (ids, ids, ids) if isinstance(module, T5) else (ids, ids)
    return nn.meta.unbox(jax.jit(module.init)(jax.random.key(seed), *inputs)["params"])


def with_places(params: dict) -> dict:
    """A new T5's params with position biases of deviation 1.

    Nothing else tells a T5 where a token stands, and they begin near 0, to grow over long pretraining: in a few hundred
    steps no head would come to read what is near, such as which of two texts a word is in.
    """
    wide = lambda stack: stack | {"relative_bias": stack["relative_bias"] / stack["relative_bias"].std()}
    return params | {name: wide(params[name]) for name in ("encoder", "decoder")}
