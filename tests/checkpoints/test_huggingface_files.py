"""Files of a checkpoint that are not what they say: pickles, pointers, damage, names that lead elsewhere, code."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from rlhf_jax.checkpoints import huggingface
from rlhf_jax.errors import InputError
from tests.checkpoints.made_models import GOLDEN, edit_json


def test_pickle_alone_is_refused_with_the_way_to_convert(saved):
    directory, *_ = saved
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model.bin(.|\n)*refused(.|\n)*save_pretrained"):
        huggingface.load_llama(str(directory))


def test_pickle_beside_safetensors_is_not_read(saved):
    directory, _, params = saved
    (directory / "pytorch_model.bin").write_bytes(b"not a pickle")
    jax.tree.map(np.testing.assert_array_equal, huggingface.load_llama(str(directory))[1], params)


def test_no_weights_at_all(saved):
    directory, *_ = saved
    (directory / "model.safetensors").unlink()
    with pytest.raises(InputError, match="neither model.safetensors nor"):
        huggingface.load_llama(str(directory))


def test_lfs_pointer(saved):
    directory, *_ = saved
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 123\n"
    (directory / "model.safetensors").write_text(pointer)
    with pytest.raises(InputError, match="Git LFS pointer(.|\n)*git lfs pull"):
        huggingface.load_llama(str(directory))


def truncated(data):
    return data[: len(data) // 2]


def header_beyond_the_file(data):
    return (2**40).to_bytes(8, "little") + data[8:]


def tensors_beyond_the_file(data):
    # A header that promises 4 TB: refused before anything of that size is asked for.
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    return len(header).to_bytes(8, "little") + header


def short_shape(data):
    # The shape says fewer bytes than the offsets.
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}).encode()
    return len(header).to_bytes(8, "little") + header + b"\0" * 8


@pytest.mark.parametrize(
    "damage",
    [
        truncated,
        header_beyond_the_file,
        tensors_beyond_the_file,
        short_shape,
        lambda data: b"",
        lambda data: data[:5],
    ],
)
def test_damaged_safetensors(saved, damage):
    directory, *_ = saved
    file = directory / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InputError, match="model.safetensors is not a complete safetensors file"):
        huggingface.load_llama(str(directory))


@pytest.mark.parametrize(
    "name",
    [
        "../../x.safetensors",
        "/etc/passwd",
        "/x.safetensors",
        "a/b.safetensors",
        "..\\x.safetensors",
        "x\0.safetensors",
        "..safetensors",
        "",
        "model.bin",
        3,
    ],
)
def test_index_with_a_name_that_leads_elsewhere(tmp_path, name):
    directory = tmp_path / "m"
    shutil.copytree(GOLDEN / "llama2", directory)
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "x.safetensors")
    index = directory / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(raw))
    with pytest.raises(InputError, match="refused|must give a file name"):
        huggingface.load_llama(str(directory))


def test_shard_missing_and_tensor_in_the_wrong_shard(tmp_path):
    shutil.copytree(GOLDEN / "llama2", tmp_path / "m")
    index = tmp_path / "m" / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    old = raw["weight_map"]["model.norm.weight"]
    other = next(file for file in sorted(raw["weight_map"].values()) if file != old)
    raw["weight_map"]["model.norm.weight"] = other
    index.write_text(json.dumps(raw))
    with pytest.raises(InputError) as error:
        huggingface.load_llama(str(tmp_path / "m"))
    assert f"model.norm.weight: not in {other}" in str(error.value)
    assert f"model.norm.weight: in {old}, which the index does not say" in str(error.value)
    (tmp_path / "m" / other).unlink()
    with pytest.raises(InputError, match=f"files that are not there: {other}"):
        huggingface.load_llama(str(tmp_path / "m"))


def test_links_are_followed_as_in_the_hub_cache(tmp_path):
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate((GOLDEN / "llama2").iterdir()):
        shutil.copy(file, tmp_path / "blobs" / str(number))
        (tmp_path / "snapshot" / file.name).symlink_to(f"../blobs/{number}")
    config, _ = huggingface.load_llama(str(tmp_path / "snapshot"))
    assert config.num_layers == 2


def test_code_in_a_checkpoint_never_runs(saved):
    directory, _, params = saved
    marker = directory / "ran"
    (directory / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w').close()")
    edit_json(
        directory / "config.json",
        auto_map={"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"},
    )
    jax.tree.map(np.testing.assert_array_equal, huggingface.load_llama(str(directory))[1], params)
    assert not marker.exists()
