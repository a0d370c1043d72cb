"""A tiny Llama with random weights and a tokenizer trained on a handful of sentences, as a Hugging Face directory.

For tests and quick runs that must not need a download. The same seed and corpus give the same files."""

import os

import jax
import jax.numpy as jnp
from flax import linen as nn

from rlhf_jax.checkpoints import huggingface
from rlhf_jax.models import architectures
from rlhf_jax.models.llama import Llama


def train_tokenizer(corpus: list[str], vocab_size: int):
    """A byte-level BPE tokenizer: any text encodes, and decodes to itself."""
    specials = ["<|pad|>", "<|bos|>", "<|eos|>"]
    return wrap(byte_level(corpus, vocab_size, specials), pad=specials[0], bos=specials[1], eos=specials[2])


def byte_level(corpus: list[str], vocab_size: int, specials: list[str]):
    """A tokenizer of the tokenizers library whose first ids are those of `specials`, in order."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(
        pre_tokenizers.ByteLevel.alphabet()
    )  # sorted: the trainer numbers them in the order given
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def wrap(tokenizer, **named: str):
    """The same for transformers; named: the token of each role (pad, eos, cls, ...)."""
    from transformers import PreTrainedTokenizerFast

    tokens = {f"{role}_token": token for role, token in named.items()}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **tokens)


def make(directory: str, corpus: list[str], *, seed: int = 0, vocab_size: int = 1024, width: int = 64) -> str:
    """Write the model to `directory` unless it is there; returns the directory."""
    if os.path.exists(os.path.join(directory, "config.json")):
        return directory
    tokenizer = train_tokenizer(corpus, vocab_size)
    config = architectures.tiny(len(tokenizer), width, tokenizer.bos_token_id, tokenizer.eos_token_id)
    ids = jnp.zeros((1, 1), jnp.int32)
    params = nn.meta.unbox(jax.jit(Llama(config).init)(jax.random.key(seed), ids, ids)["params"])
    huggingface.save_llama(directory, config, params, tokenizer)
    return directory
