"""Llama weights in a Hugging Face directory: safetensors, single or sharded, to params and back.

Never pickle, never code from a checkpoint. The config decides every shape; a file that disagrees is one error that
lists the tensors. Knows nothing of adapters (peft.py) or of how a safetensors file is read (tensors.py)."""

import contextlib
import dataclasses
import os
import re

import jax.numpy as jnp
import numpy as np

from rlhf_jax.checkpoints import tensors
from rlhf_jax.checkpoints.tensors import Leaf
from rlhf_jax.errors import InputError
from rlhf_jax.models.architectures import ARCHITECTURES
from rlhf_jax.models.config import LlamaConfig
from rlhf_jax.models.lora import ATTENTION, MLP, shapes
from rlhf_jax.parallel import hosts
from rlhf_jax.parallel.sharding import llama_shardings, replicated

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHORT_NAMES = {  # what Vertex AI calls them
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "llama-2-7b-chat": "meta-llama/Llama-2-7b-chat-hf",
    "llama-2-13b-chat": "meta-llama/Llama-2-13b-chat-hf",
}
_FETCHED = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",  # sentencepiece: spm.model, spiece.model
    "chat_template.jinja",
)
_IGNORED = re.compile(
    r"\.rotary_emb\.inv_freq$"
)  # buffers that old conversions saved; the config has the same facts
_HEAD, _EMBEDDING, _SCORE = "lm_head.weight", "model.embed_tokens.weight", "score.weight"


def resolve(path: str) -> str:
    """The local directory of a checkpoint: a directory, a hub id `org/name`, or one of SHORT_NAMES.

    A hub id is downloaded (or found in the hub's cache): weights in safetensors, config and tokenizer, nothing else.
    Raises: InputError if there is no such directory and the hub cannot give it.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        return path
    name = _hub_name(path)
    from huggingface_hub import snapshot_download

    with _told(path, name):
        return snapshot_download(name, allow_patterns=list(_FETCHED), ignore_patterns=["*/*"])


def shape_of(path: str) -> LlamaConfig:
    """The config of a checkpoint without its weights: of a directory, a published model (models/architectures.py,
    nothing is fetched), or a hub id, of which config.json alone is downloaded.

    Raises: InputError as `resolve` does.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        return LlamaConfig.from_huggingface(path)
    name = SHORT_NAMES.get(path, path)
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    name = _hub_name(path)
    from huggingface_hub import hf_hub_download

    with _told(path, name):
        return LlamaConfig.from_huggingface(hf_hub_download(name, "config.json"))


def _hub_name(path: str) -> str:
    name = SHORT_NAMES.get(path, path)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        raise InputError(
            f"{path} is not a directory. Expected a directory with config.json and safetensors, a Hugging Face id "
            f"`organisation/name`, or one of {', '.join(SHORT_NAMES)}."
        )
    return name


@contextlib.contextmanager
def _told(path: str, name: str):
    """The hub's errors, as one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the hub's errors are of many classes, of its own and of its transport
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"{path}: no such directory here, and the model {name} could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {reason}). Check the name and the network; for a gated model accept its "
            "licence on the hub and run `hf auth login`; or give the path of a downloaded copy."
        ) from None


def load_llama(
    path: str, dtype=jnp.float32, mesh=None, *, shardings: dict | None = None, finish=None
) -> tuple[LlamaConfig, dict]:
    """(config, params in `dtype`) of a Llama-family checkpoint.

    Args:
      path: directory, hub id or short name, as `resolve` takes it.
      mesh: place the arrays on it by the rules of parallel/sharding.py; each process reads what its devices hold.
      shardings: the tree of shardings itself, instead of a mesh.
      finish: what becomes of each array as soon as it is there; see tensors.gather.
    Returns: params as models/llama.py lays them out. Host memory peaks at the result plus one small array.
    Raises: InputError naming the file; wrong tensors are listed all together.
    """
    directory = resolve(path)
    config = LlamaConfig.from_huggingface(directory)
    found = {name: held for name, held in stored_tensors(directory).items() if not _IGNORED.search(name)}
    leaves = leaves_of(config)
    if config.tie_embeddings and _HEAD in found:
        if not same_values(found[_HEAD], found.get(_EMBEDDING)):
            raise InputError(
                f"{directory}: config.json says tie_word_embeddings, but {_HEAD} {list(found[_HEAD].shape)} differs "
                f"from {_EMBEDDING} {list(found[_EMBEDDING].shape)}. Set tie_word_embeddings to false if the head is "
                "the model's own."
            )
        del found[_HEAD]
    hint = f"Check that {os.path.join(directory, 'config.json')} belongs to these files."
    tensors.check(found, leaves, directory, hint)
    if shardings is None and mesh is not None:
        shardings = llama_shardings(config, mesh)
    read = lambda name, slices: found[name].read(slices)
    return config, tensors.gather(leaves, read, dtype, shardings, finish)


def save_llama(
    path: str, config: LlamaConfig, params: dict, tokenizer=None, *, shard_bytes: int = 5 * 10**9
) -> None:
    """A directory that transformers (and load_llama) reads: weights in the dtype they have, configs, tokenizer.

    Args:
      tokenizer: of transformers; None writes none.
      shard_bytes: a longer checkpoint becomes several files with an index.
    `path` may exist: its other files stay, an earlier model in it is replaced.
    """
    items = tensors.stored_arrays(leaves_of(config), params)
    raw = config.to_huggingface()
    generation = {"bos_token_id": raw["bos_token_id"], "eos_token_id": raw["eos_token_id"]}
    if tokenizer is not None:
        generation["pad_token_id"] = tokenizer.pad_token_id
    install_model(path, items, raw, tokenizer, generation, shard_bytes)


def install_model(
    path: str, items: list, config: dict, tokenizer, generation: dict | None, shard_bytes: int
) -> None:
    """The files of a checkpoint: weights (`items`, as tensors.stored_arrays gives them), config.json, tokenizer and
    generation_config.json where there are any."""

    def make(directory):
        shards = _shards(items, shard_bytes)
        for file, part in shards.items():
            tensors.write(os.path.join(directory, file), part)
        if len(shards) > 1:
            total = sum(_bytes(item) for item in items)
            weight_map = {name: file for file, part in shards.items() for name, *_ in part}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            tensors.write_json(directory, INDEX, index)
        raw = config | {"torch_dtype": items[0][2].name}  # of the backbone, which comes first
        tensors.write_json(directory, "config.json", raw)
        if tokenizer is not None and hosts.is_first():
            tokenizer.save_pretrained(directory)
        if generation is not None:
            present = {key: value for key, value in generation.items() if value is not None}
            tensors.write_json(directory, "generation_config.json", present)

    tensors.install(path, make, stale=r"model.*\.safetensors(\.index\.json)?", last="config.json")


def load_scorer(path: str, dtype=jnp.float32, mesh=None):
    """(config, params, head, pooling) of a LlamaForSequenceClassification: a decoder with a linear head, no bias.

    Args: as `load_llama`.
    Returns: params without a vocabulary head; head [D, K] float32; pooling "last" (Hugging Face's), or "mean" of one
      of ours (the key `rlhf_jax_pooling` of its config.json).
    Raises: InputError, also for a checkpoint without `score.weight`.
    """
    directory = resolve(path)
    config = dataclasses.replace(LlamaConfig.from_huggingface(directory), tie_embeddings=True)
    raw = tensors.read_json(os.path.join(directory, "config.json"), "the config of a model")
    found = {name: held for name, held in stored_tensors(directory).items() if not _IGNORED.search(name)}
    if _SCORE not in found or len(found[_SCORE].shape) != 2:
        raise InputError(
            f"{directory} has no reward head ({_SCORE}, [outputs, {config.hidden_size}]). Give a checkpoint of the "
            "architecture LlamaForSequenceClassification, or what `experiments.export --role=reward_model` writes."
        )
    found.pop(_HEAD, None)
    leaves = [*leaves_of(config), _head_leaf(config, found[_SCORE].shape[0])]
    hint = f"Check that {os.path.join(directory, 'config.json')} belongs to these files."
    tensors.check(found, leaves, directory, hint)
    shardings = (
        None if mesh is None else llama_shardings(config, mesh) | {"score": {"kernel": replicated(mesh)}}
    )
    params = tensors.gather(leaves, lambda name, slices: found[name].read(slices), dtype, shardings)
    head = params.pop("score")["kernel"].astype(jnp.float32)
    return config, params, head, raw.get("rlhf_jax_pooling", "last")


def save_scorer(path: str, config: LlamaConfig, params: dict, head, tokenizer, pooling: str = "last") -> None:
    """A directory that transformers reads as LlamaForSequenceClassification, and load_scorer.

    head: [D, K]. pooling: as in models/roles.py; transformers knows only "last", which finds the last token that is
      not the tokenizer's pad. A bias of the head is not written: it moves every reward alike.
    """
    K = head.shape[1]
    config = dataclasses.replace(config, tie_embeddings=True)  # a vocabulary head is never read
    leaves = [*leaves_of(config), _head_leaf(config, K)]
    own = {"architectures": ["LlamaForSequenceClassification"], "pad_token_id": tokenizer.pad_token_id}
    own |= {
        "num_labels": K,
        "id2label": {str(i): f"LABEL_{i}" for i in range(K)},
        "rlhf_jax_pooling": pooling,
    }
    own |= {"label2id": {f"LABEL_{i}": i for i in range(K)}}
    params = {name: part for name, part in params.items() if name != "lm_head"} | {"score": {"kernel": head}}
    items = tensors.stored_arrays(leaves, params)
    install_model(path, items, config.to_huggingface() | own, tokenizer, None, 5 * 10**9)


def _head_leaf(config, outputs):
    return Leaf(("score", "kernel"), (_SCORE,), ((outputs,), (config.hidden_size,)), True)


def leaves_of(config: LlamaConfig) -> list[Leaf]:
    """Every array of the decoder and the tensors of Hugging Face's LlamaForCausalLM that it is made of."""
    V, D = (config.vocab_size,), (config.hidden_size,)

    def layer(path, name, groups, transposed=False):
        names = tuple(f"model.layers.{i}.{name}" for i in range(config.num_layers))
        return Leaf(("layers", *path), names, groups, transposed, stacked=True)

    leaves = [Leaf(("embed", "embedding"), (_EMBEDDING,), (V, D))]
    leaves.append(Leaf(("final_norm", "scale"), ("model.norm.weight",), (D,)))
    leaves.append(layer(("attention_norm", "scale"), "input_layernorm.weight", (D,)))
    leaves.append(layer(("mlp_norm", "scale"), "post_attention_layernorm.weight", (D,)))
    for room, targets, bias, stored in (
        ("attention", ATTENTION, config.attention_bias, "self_attn"),
        ("mlp", MLP, config.mlp_bias, "mlp"),
    ):
        for target in targets:
            inputs, outputs = shapes(config)[target]
            leaves.append(
                layer((room, target, "kernel"), f"{stored}.{target}.weight", (outputs, inputs), True)
            )
            if bias:
                leaves.append(layer((room, target, "bias"), f"{stored}.{target}.bias", (outputs,)))
    if not config.tie_embeddings:
        leaves.append(Leaf(("lm_head", "kernel"), (_HEAD,), (V, D), True))
    return leaves


def stored_tensors(directory: str, auto_class: str = "AutoModelForCausalLM") -> dict[str, tensors.Stored]:
    """{name: where it is stored} from the single file or the index.

    Raises: InputError if there are none, or only pickles; then it says how to convert them with `auto_class`.
    """
    single, index = os.path.join(directory, WEIGHTS), os.path.join(directory, INDEX)
    if os.path.lexists(single):
        return tensors.inspect(single)
    if os.path.lexists(index):
        return _sharded(directory, index)
    refuse_pickle(directory, WEIGHTS, auto_class)
    raise InputError(f"{directory} holds neither {WEIGHTS} nor {INDEX}: there are no weights to load.")


def _sharded(directory, index):
    raw = tensors.read_json(index, "the index of a sharded checkpoint")
    weight_map = raw.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InputError(f"{index}: 'weight_map' must give a file name for each tensor.")
    files = sorted(set(weight_map.values()))
    for file in files:
        # The name is checked, not where it leads: the hub's cache is made of links.
        if not re.fullmatch(r"[^/\\\0]+\.safetensors", file) or ".." in file:
            raise InputError(
                f"{index}: the file name {file!r} is not a plain name of a .safetensors file; refused."
            )
    missing = [file for file in files if not os.path.exists(os.path.join(directory, file))]
    if missing:
        raise InputError(
            f"{directory}: {INDEX} names files that are not there: {', '.join(missing)}. Copy them too."
        )
    held = {file: tensors.inspect(os.path.join(directory, file)) for file in files}
    wrong = [f"{name}: not in {file}" for name, file in weight_map.items() if name not in held[file]]
    wrong += [
        f"{name}: in {file}, which the index does not say"
        for file, names in held.items()
        for name in names
        if weight_map.get(name) != file
    ]
    if wrong:
        listed = "\n  ".join(wrong[:30] + [f"... and {len(wrong) - 30} more"] * (len(wrong) > 30))
        raise InputError(f"{index} does not match its files; copy all of them from one source.\n  {listed}")
    return {name: held[file][name] for name, file in weight_map.items()}


def refuse_pickle(directory: str, wanted: str, auto_class: str = "AutoModelForCausalLM") -> None:
    """Raises: InputError if the only weights in `directory` are in a format that runs code when it is read."""
    pickles = sorted(name for name in os.listdir(directory) if name.endswith(tensors.PICKLES))
    if pickles:
        raise InputError(
            f"{directory} has no {wanted}, only {', '.join(pickles[:3])}: pickle files can run code when they are "
            "read and are refused. Convert them where you trust them, with torch and transformers: "
            f"{auto_class}.from_pretrained(DIR).save_pretrained(NEW_DIR), which writes safetensors."
        )


def same_values(one: tensors.Stored, other: tensors.Stored | None) -> bool:
    """Whether two stored matrices are equal, read in blocks. True if `other` is missing: the check of names says so."""
    if other is None:
        return True
    if one.shape != other.shape:
        return False
    blocks = [(slice(i, min(i + 4096, one.shape[0])),) for i in range(0, one.shape[0], 4096)]
    return all(np.array_equal(one.read(block), other.read(block)) for block in blocks)


def _shards(items, limit):
    """{file name: its items}, in order, each file at most `limit` bytes (a longer tensor alone)."""
    parts, size = [[]], 0
    for item in items:
        if parts[-1] and size + _bytes(item) > limit:
            parts.append([])
            size = 0
        parts[-1].append(item)
        size += _bytes(item)
    if len(parts) == 1:
        return {WEIGHTS: parts[0]}
    return {f"model-{i:05}-of-{len(parts):05}.safetensors": part for i, part in enumerate(parts, start=1)}


def _bytes(item):
    return int(np.prod(item[1])) * item[2].itemsize
