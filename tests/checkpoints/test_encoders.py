"""Encoder and T5 directories: what is written is read back, published layouts, and errors that name the tensor."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from rlhf_jax.checkpoints import encoders, pairrm, tiny_encoder
from rlhf_jax.errors import InputError
from rlhf_jax.models import encoder_heads
from rlhf_jax.models.encoder_config import DebertaConfig
from tests.checkpoints.made_models import edit_json, rewrite

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "encoders"
CLASSES = {  # of transformers, which reads a class by the names of its tensors
    "bert": ("BertForSequenceClassification", "bert.encoder.layer.1.output.dense.weight", "bert.pooler.dense.weight"),
    "roberta": ("RobertaForSequenceClassification", "roberta.embeddings.LayerNorm.bias", "classifier.out_proj.weight"),
    "deberta_v3": ("DebertaV2ForSequenceClassification", "deberta.encoder.LayerNorm.weight", "pooler.dense.bias"),
    "deberta_v2": ("DebertaV2ForSequenceClassification", "deberta.encoder.conv.conv.weight", "classifier.weight"),
    "pairrm": ("DebertaV2PairRM", "pretrained_model.encoder.rel_embeddings.weight", "head_layer.4.weight"),
}  # fmt: skip


@pytest.fixture
def copied(tmp_path):
    def copy(name):
        return pathlib.Path(shutil.copytree(GOLDEN / name, tmp_path / name))

    return copy


def equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("shard_bytes", [10**9, 20000])
@pytest.mark.parametrize("name", CLASSES)
def test_round_trip(tmp_path, name, shard_bytes):
    config, params, head = encoders.load_encoder(str(GOLDEN / name))
    out = tmp_path / "m"
    encoders.save_encoder(str(out), config, params, head, shard_bytes=shard_bytes)
    loaded_config, loaded, loaded_head = encoders.load_encoder(str(out))
    assert loaded_config == config
    equal((loaded, loaded_head), (params, head))
    architecture, *some = CLASSES[name]
    assert json.loads((out / "config.json").read_text())["architectures"] == [architecture]
    if shard_bytes == 10**9:
        stored, original = (
            load_file(out / "model.safetensors"),
            load_file(GOLDEN / name / "model.safetensors"),
        )
        assert set(some) <= set(stored)
        if name != "bert":  # whose golden file has the names of old
            assert set(stored) == set(original)
        for key in set(stored) & set(original):
            np.testing.assert_array_equal(stored[key], original[key])
    else:
        assert len(list(out.glob("model-*.safetensors"))) > 2


@pytest.mark.parametrize("name", ["t5", "flan"])
def test_t5_round_trip(tmp_path, name):
    config, params = encoders.load_t5(str(GOLDEN / name))
    assert (config.tie_embeddings, config.scale_output, config.gated) == (
        (True, True, False) if name == "t5" else (False, False, True)
    )
    encoders.save_t5(str(tmp_path / "m"), config, params)
    loaded_config, loaded = encoders.load_t5(str(tmp_path / "m"))
    assert loaded_config == config
    equal(loaded, params)


def test_flan_as_transformers_5_writes_it(copied):
    # It says tied for every T5; the head in the file is another matrix than the embedding all the same.
    directory = copied("flan")
    edit_json(directory / "config.json", tie_word_embeddings=True, scale_decoder_outputs=False)
    config, params = encoders.load_t5(str(directory))
    expected_config, expected = encoders.load_t5(str(GOLDEN / "flan"))
    assert config == expected_config
    equal(params, expected)


@pytest.mark.parametrize("keep_shared", [True, False])
def test_a_t5_file_with_its_embedding_by_other_names_is_tied(copied, keep_shared):
    _, expected = encoders.load_t5(str(GOLDEN / "t5"))
    directory = copied("t5")

    def copies(tensors):
        for name in ("lm_head.weight", "encoder.embed_tokens.weight"):
            tensors[name] = tensors["shared.weight"].copy()
        if not keep_shared:
            del tensors["shared.weight"]

    rewrite(directory, copies)
    config, params = encoders.load_t5(str(directory))
    assert config.tie_embeddings
    equal(params, expected)


@pytest.mark.parametrize("name", ["bert", "roberta", "deberta_v3"])
def test_a_bare_backbone_without_prefixes(copied, name):
    _, expected, _ = encoders.load_encoder(str(GOLDEN / name))
    directory = copied(name)

    def bare(tensors):
        for key in list(tensors):
            value = tensors.pop(key)
            if not key.startswith(("classifier.", "pooler.", "cls.")):
                tensors[key.partition(".")[2]] = value

    rewrite(directory, bare)
    edit_json(directory / "config.json", architectures=["Model"])
    config, params, head = encoders.load_encoder(str(directory))
    assert config.head is None and head is None
    equal(params, expected)


def test_a_config_that_does_not_say_its_class_has_the_head_of_its_weights(copied):
    directory = copied("roberta")
    edit_json(directory / "config.json", architectures=None)
    config, _, head = encoders.load_encoder(str(directory))
    assert config.head == "cls_tanh" and head["out"]["kernel"].shape == (24, 3)


def test_a_head_of_our_own(tmp_path):
    config, params, _ = encoders.load_encoder(str(GOLDEN / "deberta_v3"))
    head = encoder_heads.init(jax.random.key(0), "mean", config.hidden_size, 5)
    with pytest.raises(InputError, match="config.head is None, but a head is given"):
        encoders.save_encoder(str(tmp_path / "m"), dataclasses.replace(config, head=None), params, head)
    config = dataclasses.replace(config, head="mean", num_labels=5)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    encoders.save_encoder(str(tmp_path / "m"), config, half, head)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    loaded_config, loaded, loaded_head = encoders.load_encoder(str(tmp_path / "m"), jnp.bfloat16)
    assert loaded_config == config
    equal((loaded, loaded_head), (half, head))


# PairRM as its authors publish it, with the settings of their ranker for a config


@pytest.fixture
def ranker(tmp_path):
    shape = dict(
        zip(("num_layers", "num_heads", "hidden_size", "intermediate_size"), (1, 2, 8, 12), strict=True)
    )
    config = DebertaConfig(
        **shape,
        vocab_size=20,
        head_dim=4,
        embedding_size=8,
        head="pairrm",
        num_labels=1,
        marker_ids=(17, 18, 19),
    )
    params = tiny_encoder.init_params(encoders.model_of(config))
    head = encoder_heads.init(jax.random.key(0), "pairrm", 8)
    encoders.save_encoder(str(tmp_path / "m"), config, params, head)
    settings = {
        "ranker_type": "pairranker",
        "model_type": "deberta",
        "model_name": "microsoft/deberta-v3-large",
    }
    (tmp_path / "m" / "config.json").write_text(json.dumps(settings))
    added = [{"id": 17 + i, "content": token} for i, token in enumerate(pairrm.MARKER_TOKENS)]
    (tmp_path / "m" / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    return tmp_path / "m", config, params, head


def test_pairrm_with_the_settings_of_its_ranker(ranker, monkeypatch):
    directory, config, params, head = ranker
    monkeypatch.setitem(pairrm._SHAPES, "microsoft/deberta-v3-large", (1, 2, 8, 12))
    loaded_config, loaded, loaded_head = encoders.load_encoder(str(directory))
    assert loaded_config == config
    equal((loaded, loaded_head), (params, head))
    (directory / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"has the id of <\|source\|>"):
        encoders.load_encoder(str(directory))
    edit_json(directory / "config.json", ranker_type="summareranker")
    with pytest.raises(InputError, match="ranker_type is 'summareranker'"):
        encoders.load_encoder(str(directory))


def test_a_ranker_of_another_size_than_it_says_is_an_error(ranker):
    with pytest.raises(
        InputError, match=r"encoder.layer.23.attention.output.dense.weight: missing, expected \[1024, 1024\]"
    ):
        encoders.load_encoder(str(ranker[0]))


# Errors


def test_an_unknown_model_type_names_the_known_ones(copied):
    directory = copied("bert")
    edit_json(directory / "config.json", model_type="electra")
    with pytest.raises(
        InputError, match="model_type is 'electra'; .* bert, roberta, xlm-roberta, deberta-v2 .*load_t5"
    ):
        encoders.load_encoder(str(directory))


def test_wrong_tensors_are_listed_together(copied):
    directory = copied("deberta_v3")

    def spoil(tensors):
        del tensors["deberta.encoder.layer.1.attention.self.key_proj.bias"]
        tensors["classifier.weight"] = np.zeros((2, 24), np.float32)
        tensors["deberta.encoder.layer.2.output.dense.bias"] = np.zeros(24, np.float32)

    rewrite(directory, spoil)
    with pytest.raises(InputError) as error:
        encoders.load_encoder(str(directory))
    message = str(error.value)
    assert str(directory) in message and "3 tensors are not as the config says" in message
    for line in (
        "encoder.layer.1.attention.self.key_proj.bias: missing, expected [24]",
        "classifier.weight: found [2, 24], expected [1, 24]",
        "encoder.layer.2.output.dense.bias: found [24], expected no such tensor",
    ):
        assert line in message


def test_one_tensor_by_two_names_is_an_error(copied):
    directory = copied("roberta")
    rewrite(directory, lambda t: t.update({"embeddings.LayerNorm.weight": np.ones(24, np.float32)}))
    with pytest.raises(InputError, match="are the same tensor by two names"):
        encoders.load_encoder(str(directory))


@pytest.mark.parametrize("load", [encoders.load_encoder, encoders.load_t5])
def test_pickles_are_refused_with_what_converts_them(copied, load):
    is_t5 = load is encoders.load_t5
    directory = copied("t5" if is_t5 else "bert")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    name = "AutoModelForSeq2SeqLM" if is_t5 else "AutoModelForSequenceClassification"
    with pytest.raises(InputError, match=f"pytorch_model.bin: pickle .*{name}.from_pretrained"):
        load(str(directory))


# The self-made ones


@pytest.mark.parametrize("kind", ["deberta", "t5"])
def test_the_tiny_model_of_each_kind(tmp_path, kind):
    corpus = ["the cat sat on the mat", "a dog ran"] * 9
    path = tiny_encoder.make(str(tmp_path / "m"), corpus, kind, seed=3, vocab_size=270, width=16)
    before = {file.name: file.read_bytes() for file in (tmp_path / "m").iterdir()}
    assert tiny_encoder.make(path, ["another corpus"], kind) == path  # it is there: kept as it is
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "m").iterdir()}
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer("a cat", "a dog")["input_ids"]
    if kind == "t5":
        config, _ = encoders.load_t5(path)
        assert (ids[-1], ids.count(1), config.eos_id) == (1, 2, 1)
    else:
        config, _, head = encoders.load_encoder(path)
        assert head is None and (ids[0], ids[-1], ids.count(2)) == (1, 2, 2)
        markers = tokenizer.convert_tokens_to_ids(["<|source|>", "<|candidate1|>", "<|candidate2|>"])
        assert tuple(markers) == config.marker_ids
        assert tokenizer("<|source|>a cat")["input_ids"][:2] == [1, markers[0]]
    assert tokenizer.pad_token_id == config.pad_id == 0
    assert len(tokenizer) == config.vocab_size == 270 and max(ids) < 270
    assert tokenizer.decode(tokenizer("a dog")["input_ids"], skip_special_tokens=True) == "a dog"


def test_a_tiny_model_of_an_unknown_kind_is_an_error():
    with pytest.raises(InputError, match="kind 'electra' .* bert, roberta, deberta, t5"):
        tiny_encoder.config_of("electra", 270)
