"""Random weights of a shape, as the Hugging Face directory that every side loads.

python -m benchmarks.sides.models S DIRECTORY"""

import os
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.workloads import BOS_ID, EOS_ID, FIRST_WORD, PAD_ID, SHAPES, word
from rlhf_jax.checkpoints import huggingface, tiny
from rlhf_jax.models.llama import Llama, LlamaConfig


def tokenizer_of(vocab_size: int):
    """One token a word, each the number of its id."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = {"<pad>": PAD_ID, "<s>": BOS_ID, "</s>": EOS_ID}
    names |= {word(i): i for i in range(FIRST_WORD, vocab_size)}
    made = Tokenizer(models.WordLevel(names, unk_token=word(FIRST_WORD)))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tiny.wrap(made, pad="<pad>", bos="<s>", eos="</s>")


def make(shape: str, directory: str) -> None:
    """Writes it unless it is there."""
    if os.path.exists(os.path.join(directory, "config.json")):
        return
    s = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=s.vocab_size,
        hidden_size=s.hidden_size,
        intermediate_size=s.intermediate_size,
        num_layers=s.num_layers,
        num_heads=s.num_heads,
        num_kv_heads=s.num_kv_heads,
        head_dim=s.head_dim,
        max_position=1024,
        rope_theta=1_000_000.0,  # Tunix 0.1.7 turns by this, whatever its config says
        tie_embeddings=s.tied,
        initializer_range=0.02,
        bos_id=BOS_ID,
        eos_ids=(EOS_ID,),
    )
    ids = jnp.zeros((1, 1), jnp.int32)
    params = nn.meta.unbox(jax.jit(Llama(config).init)(jax.random.key(0), ids, ids)["params"])
    huggingface.save_llama(directory, config, params, tokenizer_of(s.vocab_size))


if __name__ == "__main__":
    make(*sys.argv[1:])
