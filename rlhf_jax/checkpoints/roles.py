"""A finished role on disk: roles/NAME/ with its adapter in PEFT's format, its own weights in Hugging Face's, its head
in safetensors, and role.json with what else belongs to it. Written whole or not at all.

Later stages, evaluation and export read these, so none of them needs the optimizer's checkpoint."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.checkpoints import huggingface, peft
from rlhf_jax.errors import InputError
from rlhf_jax.models.config import LlamaConfig
from rlhf_jax.models.lora import LoraConfig
from rlhf_jax.models.roles import Role, shallower

META, HEAD = "role.json", "head.safetensors"


def exists(path: str) -> bool:
    return os.path.exists(os.path.join(path, META))


def save_role(
    path: str, role: Role, config: LlamaConfig, lora: LoraConfig | None, tokenizer, meta: dict
) -> None:
    """meta: JSON, small. lora: of the adapter, None without one."""
    from safetensors.numpy import save_file

    fresh = path + ".new"
    shutil.rmtree(fresh, ignore_errors=True)
    os.makedirs(fresh)
    if role.adapter is not None:
        peft.save_adapter(fresh, role.adapter, lora)
    if role.base is not None:
        huggingface.save_llama(fresh, config, role.base, tokenizer)
    if role.head is not None:
        save_file(
            {name: np.asarray(jax.device_get(x)) for name, x in role.head.items()}, os.path.join(fresh, HEAD)
        )
    with open(os.path.join(fresh, META), "w", encoding="utf-8") as file:
        own = {"depth": role.depth, "pooling": role.pooling, "parts": parts_of(role)}
        json.dump(meta | own, file, indent=1)
    shutil.rmtree(path, ignore_errors=True)
    os.rename(fresh, path)


def parts_of(role: Role) -> list[str]:
    """What is written of it: none of these may be missing when it is read."""
    held = {"adapter": role.adapter, "base": role.base, "head": role.head}
    return [name for name, part in held.items() if part is not None]


def load_role(path: str, config: LlamaConfig, dtype=jnp.float32) -> tuple[Role, LoraConfig | None, dict]:
    """(role, its LoRA settings or None, meta). Arrays are on the default device: the caller places them."""
    from safetensors.numpy import load_file

    if not exists(path):
        raise InputError(f"{path} holds no finished role; run the stage that makes it first.")
    adapter = lora = head = base = None
    try:
        with open(os.path.join(path, META), encoding="utf-8") as file:
            meta = json.load(file)
        depth, pooling, parts = meta["depth"], meta["pooling"], meta["parts"]
        if "adapter" in parts:
            adapter, lora = peft.load_adapter(path, shallower(config, depth))
        if "base" in parts:
            _, base = huggingface.load_llama(path, dtype)
        if "head" in parts:
            head = {name: jnp.asarray(x) for name, x in load_file(os.path.join(path, HEAD)).items()}
    except InputError:
        raise
    except Exception as error:  # of JSON, safetensors and the file system
        raise InputError(
            f"{path}: a finished role that cannot be read ({type(error).__name__}: {error}). Delete this directory and "
            "run again: the stage ends at once from its last checkpoint."
        ) from None
    return Role(adapter, head, base, depth, pooling), lora, meta
