
import pickle, os, jax, jax.numpy as jnp
from rlhf_jax.models.config import LlamaConfig
def load_llama(path, dtype=jnp.float32, mesh=None):
    c = LlamaConfig.from_huggingface(path)
    p = pickle.load(open(os.path.join(path, "p.pkl"), "rb"))
    return c, jax.tree.map(lambda x: jnp.asarray(x, dtype), p)
def save_llama(path, config, params, tokenizer=None):
    import json, numpy as np
    os.makedirs(path, exist_ok=True)
    pickle.dump(jax.tree.map(np.asarray, params), open(os.path.join(path, "p.pkl"), "wb"))
    json.dump(config.to_huggingface(), open(os.path.join(path, "config.json"), "w"))
    if tokenizer is not None: tokenizer.save_pretrained(path)
