"""Weights in and out of Hugging Face directories: layouts, precision, and what may be missing."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from rlhf_jax.checkpoints import huggingface
from rlhf_jax.errors import InputError
from rlhf_jax.parallel.mesh import make_mesh
from tests.checkpoints.made_models import GOLDEN, config_of, edit_json, random_params, rewrite

SHAPES = {  # sizes that differ wherever they may, so that no two axes can be confused
    "untied": dict(num_kv_heads=2),
    "tied with biases": dict(num_kv_heads=4, tie_embeddings=True, attention_bias=True, mlp_bias=True),
}


# Round trips and layouts


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shard_bytes", [10**9, 9000])
def test_round_trip(tmp_path, shape, shard_bytes):
    config = config_of(**SHAPES[shape])
    params = random_params(config)
    huggingface.save_llama(str(tmp_path / "m"), config, params, shard_bytes=shard_bytes)
    shards = sorted(file.name for file in (tmp_path / "m").glob("*.safetensors"))
    if shard_bytes == 9000:
        assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
        index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(4 * x.size for x in jax.tree.leaves(params))
        assert set(index["weight_map"].values()) == set(shards)
    else:
        assert shards == ["model.safetensors"]
    loaded_config, loaded = huggingface.load_llama(str(tmp_path / "m"))
    assert loaded_config == config
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_stored_tensors_are_the_transposed_flattened_kernels(saved):
    directory, config, params = saved
    with safe_open(directory / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    tensors = load_file(directory / "model.safetensors")
    layer, attention = tensors["model.layers.1.self_attn.q_proj.weight"], params["layers"]["attention"]
    for head in range(
        config.num_heads
    ):  # row head * size + i reads the hidden state, gives entry i of this head
        rows = layer[head * config.head_dim : (head + 1) * config.head_dim]
        np.testing.assert_array_equal(rows, attention["q_proj"]["kernel"][1, :, head].T)
    out = tensors["model.layers.2.self_attn.o_proj.weight"].reshape(config.hidden_size, config.num_heads, -1)
    np.testing.assert_array_equal(out, np.moveaxis(attention["o_proj"]["kernel"][2], -1, 0))
    np.testing.assert_array_equal(
        tensors["model.layers.0.mlp.down_proj.weight"], params["layers"]["mlp"]["down_proj"]["kernel"][0].T
    )
    np.testing.assert_array_equal(tensors["lm_head.weight"], params["lm_head"]["kernel"].T)


@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_export_has_the_names_shapes_and_config_that_transformers_wrote(tmp_path, name):
    from transformers import AutoConfig

    config, params = huggingface.load_llama(str(GOLDEN / name))
    huggingface.save_llama(str(tmp_path), config, params)
    theirs = {k: v for file in (GOLDEN / name).glob("*.safetensors") for k, v in load_file(file).items()}
    theirs = {key: value for key, value in theirs.items() if "inv_freq" not in key}
    ours = load_file(tmp_path / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value)
    read = AutoConfig.from_pretrained(tmp_path, trust_remote_code=False)
    expected = AutoConfig.from_pretrained(GOLDEN / name, trust_remote_code=False)
    for key in (
        "rope_parameters",
        "head_dim",
        "rms_norm_eps",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
    ):
        assert getattr(read, key) == getattr(expected, key), key
    assert (
        read.num_key_value_heads == expected.num_key_value_heads
        and read.eos_token_id == expected.eos_token_id
    )
    assert huggingface.load_llama(str(tmp_path))[0] == config


def test_an_earlier_model_in_the_directory_is_replaced_and_other_files_stay(tmp_path):
    config = config_of()
    (tmp_path / "role.json").write_text("{}")
    huggingface.save_llama(str(tmp_path), config, random_params(config), shard_bytes=9000)
    params = random_params(config, seed=1)
    huggingface.save_llama(str(tmp_path), config, params)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"role.json", "model.safetensors", "config.json", "generation_config.json"}
    jax.tree.map(np.testing.assert_array_equal, huggingface.load_llama(str(tmp_path))[1], params)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
def test_every_precision_to_every_other(tmp_path, stored, wanted):
    config = config_of(num_layers=1)
    params = jax.tree.map(lambda x: jnp.asarray(x, stored), random_params(config))
    huggingface.save_llama(str(tmp_path), config, params)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == stored
    _, loaded = huggingface.load_llama(str(tmp_path), jnp.dtype(wanted))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(wanted), strict=True), loaded, params)


@pytest.mark.parametrize("shape", SHAPES)
def test_placed_on_a_mesh(tmp_path, shape):
    config = config_of(**SHAPES[shape])
    params = random_params(config)
    huggingface.save_llama(str(tmp_path), config, params)
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    _, loaded = huggingface.load_llama(str(tmp_path), mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    kernel = loaded["layers"]["attention"]["q_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (3, 6, 2, 10)  # 24 / 4 of the width, 4 / 2 of the heads
    # Any other placement goes through `shardings`: here layers are split, and the entries of a head.
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, None, "tensor"))
    plain = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shardings = jax.tree.map(lambda x: split if x.shape[-1:] == (10,) and x.ndim == 4 else plain, params)
    _, loaded = huggingface.load_llama(str(tmp_path), shardings=shardings)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert loaded["layers"]["attention"]["q_proj"]["kernel"].addressable_shards[0].data.shape == (3, 24, 4, 5)


# What a checkpoint may have too much or too little of


def test_all_wrong_tensors_in_one_error(saved):
    directory, *_ = saved

    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.7.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
        key = "model.layers.1.mlp.up_proj.weight"
        tensors[key] = np.ascontiguousarray(tensors[key].T)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int8)

    rewrite(directory, change)
    with pytest.raises(InputError) as error:
        huggingface.load_llama(str(directory))
    message = str(error.value)
    assert message.startswith(f"{directory}: 4 tensors are not as the config says")
    assert "model.norm.weight: missing, expected [24]" in message
    assert "model.layers.7.mlp.up_proj.weight: found [2, 2], expected no such tensor" in message
    assert "model.layers.1.mlp.up_proj.weight: found [24, 56], expected [56, 24]" in message
    assert "lm_head.weight: found dtype I8, expected one of F32, BF16, F16" in message


def test_a_larger_vocabulary_than_the_config_says(saved):
    directory, *_ = saved
    edit_json(directory / "config.json", vocab_size=39)
    with pytest.raises(InputError, match=r"embed_tokens.weight: found \[40, 24\], expected \[39, 24\]"):
        huggingface.load_llama(str(directory))


def test_a_long_list_is_cut(saved):
    directory, *_ = saved
    edit_json(directory / "config.json", num_hidden_layers=30)
    with pytest.raises(InputError, match="243 tensors(.|\n)*and 213 more"):
        huggingface.load_llama(str(directory))


def test_tied_head_may_be_stored_if_it_is_the_embedding(tmp_path):
    config = config_of(tie_embeddings=True)
    huggingface.save_llama(str(tmp_path), config, random_params(config))
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    assert "lm_head" not in huggingface.load_llama(str(tmp_path))[1]
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(InputError, match="tie_word_embeddings, but lm_head.weight"):
        huggingface.load_llama(str(tmp_path))


def test_untied_head_must_be_there(saved):
    directory, *_ = saved
    rewrite(directory, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(InputError, match=r"lm_head.weight: missing, expected \[40, 24\]"):
        huggingface.load_llama(str(directory))


# Where checkpoints come from


def test_unknown_path_says_what_is_possible(tmp_path):
    with pytest.raises(InputError, match="is not a directory(.|\n)*organisation/name(.|\n)*llama-2-7b"):
        huggingface.load_llama(str(tmp_path / "nothing"))


def test_hub_id_offline():
    with pytest.raises(InputError, match="someone/no-such-model could not be fetched"):
        huggingface.load_llama("someone/no-such-model")


def test_short_names_and_what_is_fetched(monkeypatch):
    import huggingface_hub

    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(GOLDEN / "llama2")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    config, _ = huggingface.load_llama("llama-2-13b-chat")
    assert asked["name"] == "meta-llama/Llama-2-13b-chat-hf" and config.num_layers == 2
    kept = list(
        huggingface_hub.utils.filter_repo_objects(
            ["config.json", "a.safetensors", "x.bin", "evil.py", "original/m.safetensors", "tokenizer.model"],
            allow_patterns=asked["allow_patterns"],
            ignore_patterns=asked["ignore_patterns"],
        )
    )
    assert kept == ["config.json", "a.safetensors", "tokenizer.model"]


def test_another_architecture(saved):
    directory, *_ = saved
    edit_json(directory / "config.json", model_type="gpt2")
    with pytest.raises(InputError, match="model_type is 'gpt2'"):
        huggingface.load_llama(str(directory))


def test_save_refuses_params_of_another_shape(tmp_path):
    config = config_of()
    with pytest.raises(InputError, match="layers/attention/k_proj/kernel"):
        huggingface.save_llama(str(tmp_path / "m"), config, random_params(config_of(num_kv_heads=1)))
    assert not list(tmp_path.iterdir())
