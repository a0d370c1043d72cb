
import pickle, os, jax, numpy as np
def save_adapter(path, adapter, lora_config, base_model_name=""):
    os.makedirs(path, exist_ok=True)
    pickle.dump((jax.tree.map(np.asarray, adapter), lora_config), open(os.path.join(path, "adapter_config.json"), "wb"))
def load_adapter(path, config):
    return pickle.load(open(os.path.join(path, "adapter_config.json"), "rb"))
