"""Models that judge text: the tournament, the memory, batching, what each model is given to read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.checkpoints import encoders, huggingface, tiny, tiny_encoder
from rlhf_jax.data.tokenization import load_tokenizer
from rlhf_jax.errors import InputError
from rlhf_jax.models import encoder_heads
from rlhf_jax.models.llama import Llama
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.parallel import sharding
from rlhf_jax.rewards import specs
from rlhf_jax.rewards.models import catalogue, comparing, judge
from rlhf_jax.rewards.models.function import ModelFunction
from rlhf_jax.rewards.models.pairs_of_texts import SequenceTokenizer
from rlhf_jax.rewards.models.remembering import Remembered

CORPUS = [
    "the food was wonderful and quick",
    "POST RESPONSE A B Which response is better?",
    "Request helpful",
] * 2
PROMPTS = ["the food", [{"role": "user", "content": "say [SEP] <|candidate1|> again"}]]
COMPLETIONS = [[" was wonderful", " was cold", " was wonderful"], ["no\n\nmore", "yes", "<|source|>"]]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """(directory, config, params, tokenizer) of a tiny decoder."""
    directory = tiny.make(str(tmp_path_factory.mktemp("models") / "llama"), CORPUS, vocab_size=320, width=32)
    config, params = huggingface.load_llama(directory)
    return directory, config, params, load_tokenizer(directory, config.eos_ids)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Directory of a tiny DeBERTa; kind of head, outputs -> directory with that head."""
    where = tmp_path_factory.mktemp("models")
    bare = tiny_encoder.make(str(where / "bare"), CORPUS, vocab_size=320, width=32)
    config, params, _ = encoders.load_encoder(bare)
    from transformers import AutoTokenizer

    def make(kind, outputs=1):
        path, own = (
            str(where / f"{kind}{outputs}"),
            dataclasses.replace(config, head=kind, num_labels=outputs),
        )
        head = encoder_heads.init(jax.random.key(1), kind, config.hidden_size, outputs, std=0.5)
        encoders.save_encoder(path, own, params, head, AutoTokenizer.from_pretrained(bare))
        return path

    return bare, make


def test_a_tournament_by_hand():
    wins = {
        ("a", "b"): 0.9,
        ("b", "a"): 0.3,
        ("a", "c"): 0.6,
        ("c", "a"): 0.6,
        ("b", "c"): 0.5,
        ("c", "b"): 0.7,
    }
    compare = lambda asked: [wins[first, second] for _, first, second in asked]
    scores = comparing.against_the_others(compare, ["x"], [["a", "b", "c"]], even=0.5)
    # a beats b by (0.9 + 0.7) / 2 and c by (0.6 + 0.4) / 2
    np.testing.assert_allclose(scores, [[(0.8 + 0.5) / 2, (0.2 + 0.4) / 2, (0.5 + 0.6) / 2]], atol=1e-6)
    biased = lambda asked: [3.0] * len(asked)  # always the first
    np.testing.assert_array_equal(
        comparing.against_the_others(biased, ["x"], [["a", "b"]], even=0.0), [[0.0, 0.0]]
    )


def test_each_question_is_answered_once_and_the_oldest_forgotten():
    asked = []
    remembered = Remembered(
        lambda questions: asked.extend(questions) or [len(q[1]) for q in questions], capacity=2
    )
    messages = ([{"role": "user", "content": "p"}], "xx")
    np.testing.assert_array_equal(remembered([("p", "x"), messages, ("p", "x")]), [1, 2, 1])
    assert asked == [("p", "x"), messages]
    remembered([("p", "x")]), remembered([("p", "xxx")])
    assert len(asked) == 3
    remembered([("p", "x")]), remembered([messages])
    assert asked[3:] == [messages]


def test_a_published_decoder_scores_at_the_end_token(llama, tmp_path):
    _, config, params, tokenizer = llama
    head = jax.random.normal(jax.random.key(3), (config.hidden_size, 2))
    huggingface.save_scorer(str(tmp_path / "rm"), config, params, head, tokenizer.tokenizer)
    mesh = meshes.make_mesh(2, 4, 1)
    model = catalogue.decoder(str(tmp_path / "rm"), output=1, batch_size=2, mesh=mesh)
    scores = model.score(PROMPTS[:1], COMPLETIONS[:1])
    for text, score in zip(COMPLETIONS[0], scores[0], strict=True):
        ids = jnp.array([tokenizer.encode_prompt(PROMPTS[0]) + tokenizer.encode_completion(text)])
        hidden = Llama(config).apply({"params": params}, ids, jnp.ones_like(ids), method=Llama.hidden)
        assert score == pytest.approx(float(hidden[0, -1] @ head[:, 1]), abs=1e-4)
    with pytest.raises(InputError, match="has 2 outputs; output=2"):
        catalogue.decoder(str(tmp_path / "rm"), output=2)
    with pytest.raises(InputError, match="no reward head"):
        catalogue.decoder(llama[0])
    with pytest.raises(InputError, match="chat template"):
        catalogue.decoder(str(tmp_path / "rm"), template=True).score(PROMPTS[:1], COMPLETIONS[:1])


def test_a_score_does_not_depend_on_what_else_is_asked(classifier):
    path = classifier[1]("cls_gelu")
    together = catalogue.encoder(path, batch_size=4).score(PROMPTS, COMPLETIONS)
    alone = [catalogue.encoder(path, batch_size=1).score(PROMPTS[1:], [[text]]) for text in COMPLETIONS[1]]
    np.testing.assert_allclose(together[1], np.ravel(alone), atol=1e-5)
    assert together[0, 0] == together[0, 2] and len(set(together.ravel().tolist())) == 5


def test_two_classes_are_a_difference_and_more_have_to_be_named(classifier):
    two, three = classifier[1]("cls_gelu", 2), classifier[1]("cls_gelu", 3)
    logits = [catalogue.encoder(two, output=i).score(PROMPTS, COMPLETIONS) for i in (0, 1)]
    np.testing.assert_allclose(
        catalogue.encoder(two).score(PROMPTS, COMPLETIONS), logits[1] - logits[0], atol=1e-5
    )
    for path, said in ((three, "3 outputs; output=-1"), (classifier[0], "no head that scores")):
        with pytest.raises(InputError, match=said):
            catalogue.encoder(path)


def test_text_never_becomes_a_special_token_and_keeps_to_its_room(classifier):
    tokenizer = SequenceTokenizer(classifier[0])
    ids, _ = tokenizer.pair("[CLS] a [SEP]", "<|source|> [PAD]", 512)
    assert [i for i in ids if i < 7] == [1, 2, 2]
    prompt, completion = "p" * 40 + "q", "x" * 40 + "y"
    ids, types = tokenizer.pair(prompt, completion, 23)  # 20 without the special ones: half each
    end_of_prompt, start = tokenizer.plain(prompt)[-10:], tokenizer.plain(completion)[:10]
    assert ids == [1, *end_of_prompt, 2, *start, 2] and len(types) == 23
    ids, _ = tokenizer.pair("ab", completion, 23)
    assert ids == [
        1,
        *tokenizer.plain("ab"),
        2,
        *tokenizer.plain(completion)[: 20 - len(tokenizer.plain("ab"))],
        2,
    ]


def test_pairrm_reads_its_markers_once_whatever_the_texts_say(classifier):
    path = classifier[1]("pairrm")
    model = catalogue.pairrm(path, candidate_tokens=3)
    ids, _ = model.comparison.input(PROMPTS[1], *COMPLETIONS[1][1:])
    assert [i for i in ids if i < 7] == [1, 4, 2, 1, 5, 2, 1, 6, 2]
    assert ids.index(6) - ids.index(5) <= 3 + 3
    scores = model.score(PROMPTS, COMPLETIONS)
    assert scores[0, 0] == scores[0, 2] != scores[0, 1]
    np.testing.assert_allclose(scores.sum(1), 0.0, atol=1e-6)
    with pytest.raises(InputError, match="no PairRM"):
        catalogue.pairrm(classifier[1]("cls_gelu"))


def test_steamshp_is_asked_as_its_card_says(tmp_path):
    path = tiny_encoder.make(str(tmp_path / "t5"), CORPUS, "t5", vocab_size=320, width=32)
    model = catalogue.steamshp(path, max_tokens=200)
    ids, _ = model.question.input("a\npost", "one\n\nline", "two")
    text = model.question._tokenizer._backend.decode(ids, skip_special_tokens=False)
    said = (
        "POST: a post\n\n RESPONSE A: one line\n\n RESPONSE B: two\n\n Which response is better? RESPONSE</s>"
    )
    assert text == said
    short = catalogue.steamshp(path, max_tokens=90)
    ids, _ = short.question.input("x" * 500, "y" * 500, "z" * 500)
    assert len(ids) == 90 and ids[-1] == 1
    scores = model.score(PROMPTS, COMPLETIONS)
    np.testing.assert_allclose(scores.mean(1), 0.5, atol=1e-6)
    assert model.score(PROMPTS, [["a"], ["b"]]).shape == (2, 1)  # against a full stop


def test_a_judge_weighs_two_labels_in_both_orders(llama):
    _, config, params, tokenizer = llama
    mesh = meshes.make_mesh(1, 8, 1)
    placed = jax.device_put(params, sharding.llama_shardings(config, mesh))
    model = judge.Judge(Llama(config), placed, tokenizer, batch_size=4, mesh=mesh)
    (there,) = model.prefer(["the food"], [" was {cold}"], [" was wonderful"])
    labels = [tokenizer.encode_completion(f" {label}", add_eos=False)[0] for label in "AB"]

    def first_wins(first, second):
        asked = model._question("the food", first, second)
        text = tokenizer.decode(asked)
        assert f"Response A: {first.strip()}\n\nResponse B: {second.strip()}\n" in text
        assert text.endswith("better response is Response") and judge.PRINCIPLE in text
        ids = jnp.array([asked])
        logits = Llama(config).apply({"params": params}, ids, jnp.ones_like(ids))[0, -1]
        return float(jax.nn.softmax(logits[jnp.array(labels)])[0])

    one, other = first_wins(" was {cold}", " was wonderful"), first_wins(" was wonderful", " was {cold}")
    assert there == pytest.approx((one + 1 - other) / 2, abs=1e-5) and one != pytest.approx(
        1 - other, abs=1e-4
    )
    scores = model.score(["the food"], [[" was {cold}", " was wonderful"]])
    np.testing.assert_allclose(scores, [[there, 1 - there]], atol=1e-6)


def test_a_spec_names_a_model_and_loads_nothing(classifier, tmp_path):
    spec = specs.parse("encoder:path=nowhere/at-all,batch_size=4")
    assert spec.model and spec.name == "encoder"
    for text, said in (
        ("encoder:batch_size=4", "path is missing"),
        ("encoder:path=x,mesh=1", "'mesh=1' is not NAME=VALUE"),
        ("encodr:path=x", "did you mean 'encoder'"),
    ):
        with pytest.raises(InputError, match=said):
            specs.parse(text)
    with pytest.raises(InputError, match="not a directory"):
        ModelFunction(f"encoder:path={tmp_path}/missing", print).check()


def test_what_is_not_finite_is_reported_and_counts_as_said(classifier, monkeypatch):
    said = []
    function = ModelFunction(f"encoder:path={classifier[1]('cls_gelu')}", said.append, failure_score=-2.0)
    function.check()
    scores, failed = function.score(PROMPTS, COMPLETIONS)
    assert scores.shape == (6,) and not failed.any() and not said
    monkeypatch.setattr(function._model, "score", lambda *_: np.array([[1.0, np.nan, 1.0], [np.inf, 1, 1]]))
    scores, failed = function.score(PROMPTS, COMPLETIONS)
    np.testing.assert_array_equal(scores, [1, -2, 1, -2, 1, 1])
    assert failed.sum() == 2 and "2 of 6 scores are not finite" in said[0]
    with pytest.raises(InputError, match="it needs 2 or more"):
        ModelFunction(f"pairrm:path={classifier[0]}", print).score(["p"], [["a"]])
