"""Adapters in PEFT's format: what peft wrote is read, what is written is what was read, the rest is refused by name."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlhf_jax.checkpoints import peft
from rlhf_jax.errors import InputError
from rlhf_jax.models.config import LlamaConfig
from rlhf_jax.models.lora import ATTENTION, MLP, Adapter, LoraConfig, delta, scales_of, shapes

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
STEM = "base_model.model.model.layers"


@pytest.fixture(scope="module")
def config():
    return LlamaConfig.from_huggingface(str(GOLDEN / "llama2"))


@pytest.fixture
def directory(tmp_path):
    """A copy of the adapter that peft wrote."""
    shutil.copytree(GOLDEN / "adapter", tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(directory, **fields):
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def random_adapter(config, lora, seed=0):
    rng = np.random.default_rng(seed)
    weights = {}
    for name in lora.targets:
        inputs, outputs = shapes(config)[name]
        a, b = (
            (config.num_layers, *inputs, lora.rank_of(name)),
            (config.num_layers, lora.rank_of(name), *outputs),
        )
        weights[name] = {"a": rng.standard_normal(a).astype("f"), "b": rng.standard_normal(b).astype("f")}
    return Adapter(weights, scales_of(lora))


def test_what_peft_wrote(config):
    adapter, lora = peft.load_adapter(str(GOLDEN / "adapter"), config)
    assert lora == LoraConfig(
        rank=4,
        alpha=10.0,
        targets=("down_proj", "q_proj", "v_proj"),
        rslora=True,
        rank_pattern=(("v_proj", 2),),
        alpha_pattern=(("down_proj", 6.0),),
    )
    assert dict(adapter.scales) == pytest.approx(
        {"q_proj": 10 / 2, "v_proj": 10 / 2**0.5, "down_proj": 6 / 2}
    )
    stored = load_file(GOLDEN / "adapter" / "adapter_model.safetensors")
    for name, parent in (("q_proj", "self_attn"), ("v_proj", "self_attn"), ("down_proj", "mlp")):
        for layer in range(config.num_layers):
            a, b = (stored[f"{STEM}.{layer}.{parent}.{name}.lora_{x}.weight"].astype("d") for x in "AB")
            expected = dict(adapter.scales)[name] * (b @ a)  # [out, in]
            ours = np.asarray(delta(adapter.weights[name], dict(adapter.scales)[name])[layer])
            np.testing.assert_allclose(ours.reshape(expected.T.shape), expected.T, atol=1e-5)


def test_round_trip_of_peft_files_is_equal_bytes(config, tmp_path):
    adapter, lora = peft.load_adapter(str(GOLDEN / "adapter"), config)
    peft.save_adapter(str(tmp_path / "new"), adapter, lora, base_model_name="base/name")
    theirs = load_file(GOLDEN / "adapter" / "adapter_model.safetensors")
    ours = load_file(tmp_path / "new" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)
    written = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    read = json.loads((GOLDEN / "adapter" / "adapter_config.json").read_text())
    for key in ("peft_type", "task_type", "r", "lora_alpha", "use_rslora", "target_modules", "bias"):
        assert written[key] == read[key], key
    assert (written["rank_pattern"], written["alpha_pattern"]) == ({"v_proj": 2}, {"down_proj": 6})
    assert written["base_model_name_or_path"] == "base/name"


@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(rank=3, alpha=7.5),
        LoraConfig(
            rank=2, alpha=4.0, targets=("k_proj", "o_proj"), rslora=True, rank_pattern=(("o_proj", 5),)
        ),
    ],
    ids=["all targets", "two targets"],
)
def test_round_trip_of_ours(config, tmp_path, lora):
    adapter = random_adapter(config, lora)
    (tmp_path / "role.json").write_text("{}")  # saved beside what else belongs to a role
    peft.save_adapter(str(tmp_path), adapter, lora)
    loaded, settings = peft.load_adapter(str(tmp_path), config)
    assert set(settings.targets) == set(lora.targets) and settings.rank_pattern == lora.rank_pattern
    assert (settings.rank, settings.alpha, settings.rslora) == (lora.rank, lora.alpha, lora.rslora)
    assert loaded.scales == adapter.scales
    jax.tree.map(np.testing.assert_array_equal, loaded.weights, adapter.weights)
    assert {file.name for file in tmp_path.iterdir()} == {
        "role.json",
        "adapter_config.json",
        "adapter_model.safetensors",
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("use_dora", True),
        ("layers_to_transform", [0]),
        ("layers_pattern", "layers"),
        ("fan_in_fan_out", True),
        ("init_lora_weights", "pissa"),  # changes the base as well
        ("trainable_token_indices", [1]),
        ("exclude_modules", ["k_proj"]),
        ("lora_bias", True),
        ("layer_replication", [[0, 2]]),
        ("a_setting_of_the_future", 1),
        ("target_modules", ["q_proj", "lm_head"]),
        ("target_modules", ["model.layers.0.self_attn.q_proj"]),
        ("target_modules", ".*_proj"),
        ("rank_pattern", {"layers.0.self_attn.v_proj": 2}),
        ("alpha_pattern", {"^q_proj": 2}),
        ("rank_pattern", {"v_proj": 0}),
        ("alpha_pattern", {"v_proj": "much"}),
        ("r", True),
        ("lora_alpha", None),
        ("peft_type", "PREFIX_TUNING"),
    ],
)
def test_unsupported_settings_are_named(config, directory, field, value):
    edit(directory, **{field: value})
    with pytest.raises(InputError, match=f"adapter_config.json: {field}"):
        peft.load_adapter(str(directory), config)


def test_names_that_mean_every_layer_are_read(config, directory):
    edit(directory, target_modules=["self_attn.q_proj", "v_proj", "mlp.down_proj"])
    assert peft.load_adapter(str(directory), config)[1].targets == ("down_proj", "q_proj", "v_proj")


def test_all_linear(config, tmp_path):
    lora = LoraConfig(rank=2)
    peft.save_adapter(str(tmp_path), random_adapter(config, lora), lora)
    edit(tmp_path, target_modules="all-linear")
    assert set(peft.load_adapter(str(tmp_path), config)[1].targets) == {*ATTENTION, *MLP}


def test_all_wrong_tensors_in_one_error(config, directory):
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[f"{STEM}.0.mlp.down_proj.lora_A.weight"]
    tensors[f"{STEM}.5.mlp.down_proj.lora_A.weight"] = np.zeros((4, 56), np.float32)
    tensors[f"{STEM}.1.self_attn.q_proj.lora_B.weight"] = np.zeros((31, 4), np.float32)
    save_file(tensors, file)
    with pytest.raises(InputError) as error:
        peft.load_adapter(str(directory), config)
    message = str(error.value)
    assert "3 tensors" in message
    assert f"{STEM}.0.mlp.down_proj.lora_A.weight: missing, expected [4, 56]" in message
    assert f"{STEM}.5.mlp.down_proj.lora_A.weight: found [4, 56], expected no such tensor" in message
    assert f"{STEM}.1.self_attn.q_proj.lora_B.weight: found [31, 4], expected [32, 4]" in message


def test_an_adapter_of_another_base(directory):
    other = LlamaConfig.from_huggingface(str(GOLDEN / "llama3"))
    with pytest.raises(InputError, match=r"q_proj.lora_B.weight: found \[32, 4\], expected \[48, 4\]"):
        peft.load_adapter(str(directory), other)


def test_bfloat16_files_become_float32(config, directory):
    import jax.numpy as jnp

    file = directory / "adapter_model.safetensors"
    tensors = {name: np.asarray(x.astype(jnp.bfloat16)) for name, x in load_file(file).items()}
    save_file(tensors, file)
    adapter, _ = peft.load_adapter(str(directory), config)
    a = adapter.weights["q_proj"]["a"]
    assert a.dtype == np.float32
    stored = tensors[f"{STEM}.1.self_attn.q_proj.lora_A.weight"].astype(np.float32)
    np.testing.assert_array_equal(a[1], stored.T)


def test_pickle_alone_is_refused(config, directory):
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
    with pytest.raises(InputError, match="adapter_model.bin(.|\n)*refused"):
        peft.load_adapter(str(directory), config)


def test_not_an_adapter(config, tmp_path):
    with pytest.raises(InputError, match="adapter_config.json does not exist; expected a PEFT adapter"):
        peft.load_adapter(str(tmp_path), config)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="adapter_config.json: not JSON"):
        peft.load_adapter(str(tmp_path), config)
