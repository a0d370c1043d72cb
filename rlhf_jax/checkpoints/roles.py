"""A finished role on disk: roles/NAME/ with its adapter in PEFT's format, its own weights in Hugging Face's, its head
and gate in safetensors, and role.json with what else belongs to it, how a score is read among it; the members of an
ensemble each in a directory of its own. A reward model that is no decoder is a Hugging Face directory with its own
tokenizer. Written whole or not at all.

Later stages, evaluation and export read these, so none of them needs the optimizer's checkpoint."""

import contextlib
import dataclasses
import json
import os
import shutil

import jax.numpy as jnp
import numpy as np

from rlhf_jax.checkpoints import encoders, huggingface, peft, tensors
from rlhf_jax.errors import InputError
from rlhf_jax.models.config import LlamaConfig
from rlhf_jax.models.encoder_config import BertConfig, DebertaConfig, T5Config
from rlhf_jax.models.lora import LoraConfig
from rlhf_jax.models.readout import Readout
from rlhf_jax.models.roles import Role, shallower
from rlhf_jax.parallel import hosts

META, HEAD, GATE = "role.json", "head.safetensors", "gate.safetensors"
MEMBER = "member_{}"


def exists(path: str) -> bool:
    return os.path.exists(os.path.join(path, META))


def save_role(
    path: str, role: Role, config: LlamaConfig, lora: LoraConfig | None, tokenizer, meta: dict
) -> None:
    """meta: JSON, small. lora: of the adapter, None without one."""
    from safetensors.numpy import save_file

    with _whole(path) as fresh:
        if role.adapter is not None:
            peft.save_adapter(fresh, role.adapter, lora)
        if role.base is not None:
            huggingface.save_llama(fresh, config, role.base, tokenizer)
        for part, file in ((role.head, HEAD), (role.gate, GATE)):
            if part is not None:
                arrays = {name: np.asarray(x) for name, x in hosts.gather(part).items()}
                if hosts.is_first():
                    save_file(arrays, os.path.join(fresh, file))
        for number, member in enumerate(role.members):
            save_role(os.path.join(fresh, MEMBER.format(number)), member, config, lora, tokenizer, {})
        own = {"depth": role.depth, "pooling": role.pooling, "parts": parts_of(role)}
        own |= {"readout": dataclasses.asdict(role.readout), "members": len(role.members)}
        _write_meta(fresh, meta | own)


def save_text_role(
    path: str, config: BertConfig | DebertaConfig | T5Config, params: dict, head: dict | None, tokenizer, meta
) -> None:
    """A role that is no decoder's: a Hugging Face directory with its own tokenizer, and role.json in it.

    meta: JSON, small; `kind` says how rewards/models read the rest.
    """
    with _whole(path) as fresh:
        if isinstance(config, T5Config):
            encoders.save_t5(fresh, config, params, tokenizer)
        else:
            encoders.save_encoder(fresh, config, params, head, tokenizer)
        _write_meta(fresh, meta)


@contextlib.contextmanager
def _whole(path: str):
    """A directory that takes the place of `path` once it is filled, by the first process."""
    fresh = path + ".new"

    def begin():
        shutil.rmtree(fresh, ignore_errors=True)
        os.makedirs(fresh)

    def end():
        shutil.rmtree(path, ignore_errors=True)
        os.rename(fresh, path)

    hosts.once(begin)
    yield fresh
    hosts.once(end)


def _write_meta(path: str, meta: dict) -> None:
    if not hosts.is_first():
        return
    with open(os.path.join(path, META), "w", encoding="utf-8") as file:
        json.dump(meta, file, indent=1)


def read_meta(path: str) -> dict:
    """What was saved beside the arrays.  Raises: InputError if there is no role, or it cannot be read."""
    if not exists(path):
        raise InputError(f"{path} holds no finished role; run the stage that makes it first.")
    return tensors.read_json(os.path.join(path, META), "what belongs to a role")


def parts_of(role: Role) -> list[str]:
    """What is written of it: none of these may be missing when it is read."""
    held = {"adapter": role.adapter, "base": role.base, "head": role.head, "gate": role.gate}
    return [name for name, part in held.items() if part is not None]


def load_role(
    path: str, config: LlamaConfig, dtype=jnp.float32, mesh=None
) -> tuple[Role, LoraConfig | None, dict]:
    """(role, its LoRA settings or None, meta).

    mesh: adapters and weights go straight into their shards, as load_llama's; heads and gates, which are small, are on
      the default device, and so is all without a mesh: the caller places them.
    """
    from safetensors.numpy import load_file

    if not exists(path):
        raise InputError(f"{path} holds no finished role; run the stage that makes it first.")
    adapter = lora = head = base = gate = None
    try:
        with open(os.path.join(path, META), encoding="utf-8") as file:
            meta = json.load(file)
        depth, pooling, parts = meta["depth"], meta["pooling"], meta["parts"]
        if "adapter" in parts:
            adapter, lora = peft.load_adapter(path, shallower(config, depth), mesh)
        if "base" in parts:
            _, base = huggingface.load_llama(path, dtype, mesh)
        arrays = lambda file: {n: jnp.asarray(x) for n, x in load_file(os.path.join(path, file)).items()}
        if "head" in parts:
            head = arrays(HEAD)
        if "gate" in parts:
            gate = arrays(GATE)
        # Roles written before there were others are read as plain scores.
        readout = Readout(**meta.get("readout", {}))
        members = [
            load_role(os.path.join(path, MEMBER.format(n)), config, dtype, mesh)
            for n in range(meta.get("members", 0))
        ]
        lora = members[0][1] if members else lora
    except InputError:
        raise
    except Exception as error:  # of JSON, safetensors and the file system
        raise InputError(
            f"{path}: a finished role that cannot be read ({type(error).__name__}: {error}). Delete this directory and "
            "run again: the stage ends at once from its last checkpoint."
        ) from None
    return (
        Role(adapter, head, base, depth, pooling, gate, tuple(m for m, _, _ in members), readout),
        lora,
        meta,
    )
