"""Reward models with a tokenizer of their own: what is trained is what scores, padded or not; losses in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from transformers import AutoTokenizer

from rlhf_jax.checkpoints import encoders, tiny_encoder
from rlhf_jax.checkpoints import roles as role_files
from rlhf_jax.checkpoints.pairrm import with_markers
from rlhf_jax.data import batching
from rlhf_jax.data.formats import Labelled, Pair, Rated
from rlhf_jax.models import encoder_heads
from rlhf_jax.models.roles import Role
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.parallel import sharding
from rlhf_jax.rewards.models import catalogue
from rlhf_jax.rewards.models.pairs_of_texts import SequenceTokenizer
from rlhf_jax.rewards.models.steamshp import wording
from rlhf_jax.training.algorithms.reward_models import KINDS, RewardModelSettings
from rlhf_jax.training.algorithms.reward_records import Known, Scale
from rlhf_jax.training.algorithms.text_rewards import TEXT_KINDS, letters
from rlhf_jax.training.offline import beside
from rlhf_jax.training.text_reward_stage import Backbone, completions_of, encoded

CORPUS = ["the food was wonderful and quick", "POST RESPONSE A B Which response is better?"] * 2
PAIRS = [
    Pair("the food", " was wonderful", " was cold and late, and cost too much"),
    Pair([{"role": "user", "content": "say [SEP]"}], "no", "yes <|source|>", soft_label=0.7),
    Pair("", "a", " b\n\nc"),
]
LABELS = [Labelled("the food", " was wonderful", True), Labelled("the food", " was cold and late", False)]
RATINGS = [Rated("the food", " was wonderful", {"x": 3.0}), Rated("so", " cold and late", {"x": -1.0})]
VARIANTS = [
    ("encoder", dict(center_coeff=0.1), PAIRS),
    ("encoder", dict(objective="classification", label_smoothing=0.1, encoder_pooling="mean"), LABELS),
    ("encoder", dict(objective="regression", huber_delta=0.5), RATINGS),
    ("pairrm", dict(label_smoothing=0.1, center_coeff=0.1), PAIRS),
    ("steamshp", dict(label_smoothing=0.1), PAIRS),
]
IDS = [f"{kind}-{changes.get('objective', 'pairwise')}" for kind, changes, _ in VARIANTS]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    where = tmp_path_factory.mktemp("models")
    made = lambda kind: tiny_encoder.make(str(where / kind), CORPUS, kind, vocab_size=312, width=32)
    return {"deberta": made("deberta"), "t5": made("t5")}


def trainable(tiny, settings):
    """(config, role, tokenizer) with a head that says something."""
    if settings.kind == "steamshp":
        config, params = encoders.load_t5(tiny["t5"])
        return config, Role(base=params), SequenceTokenizer(tiny["t5"])
    config, params, _ = encoders.load_encoder(tiny["deberta"])
    head = {"pairrm": "pairrm"}.get(
        settings.kind, "mean" if settings.encoder_pooling == "mean" else "cls_gelu"
    )
    outputs = 2 if settings.objective == "classification" else 1
    config = dataclasses.replace(config, head=head, num_labels=outputs)
    made = encoder_heads.init(jax.random.key(1), head, config.hidden_size, outputs, std=0.5)
    return config, Role(base=params, head=made), SequenceTokenizer(tiny["deberta"])


def prepared(tiny, kind, changes, records, more=0):
    """(settings, config, network, role, tokenizer, known, batch); more: columns and rows of padding."""
    settings = RewardModelSettings(kind=kind, **changes)
    assert settings.check() is None
    config, role, tokenizer = trainable(tiny, settings)
    row, of_records = TEXT_KINDS[kind], KINDS[settings.feedback]
    network = row.network(config, tokenizer)
    known = Known.of(settings, records, Scale.of(settings, records) if of_records.rated else None)
    groups = [encoded(row, network, of_records.group(known, record)) for record in records]
    longest = max(len(ids) for group in groups for ids, _ in group[0])
    batch = batching.sequences(
        [group[0] for group in groups], length=longest + more, pad_id=0, batch_size=len(records) + more
    )
    fields = [group[1] if len(group) > 1 else {} for group in groups]
    return (
        settings,
        config,
        network,
        role,
        tokenizer,
        known,
        batch.replace(**beside(fields, *batch.weights.shape)),
    )


def saved(tmp_path, kind, config, role, tokenizer):
    path = str(tmp_path / "reward_model")
    role_files.save_text_role(path, config, role.base, role.head, tokenizer.source, {"kind": kind})
    assert role_files.read_meta(path) == {"kind": kind}
    return catalogue.MODELS[kind](path, batch_size=2, mesh=meshes.make_mesh(2, 2, 2))


def log_sigmoid(x):
    return -np.logaddexp(0.0, -x)


def reference(settings, known, records, scores, reward):
    """Mean loss by what the finished model says of texts. scores: [N, G] float64; reward: the TextReward."""
    found = []
    for record, row in zip(records, scores, strict=True):
        if settings.feedback == "pairwise":
            right = 1.0 - settings.label_smoothing if record.soft_label is None else record.soft_label
            asked = [
                (record.prompt, record.chosen, record.rejected),
                (record.prompt, record.rejected, record.chosen),
            ]
            orders = [row[0] - row[1]]
            if settings.kind != "encoder":
                orders = np.float64(reward._remembered(asked)) * [1, -1]
            if settings.kind == "steamshp":  # probabilities
                orders = [np.log(p / (1 - p)) for p in (orders[0], 1 + orders[1])]
            each = [-right * log_sigmoid(x) - (1 - right) * log_sigmoid(-x) for x in orders]
            centre = settings.center_coeff * row.sum() ** 2 if settings.kind == "encoder" else 0.0
            found.append(np.mean(each) + centre)
        elif settings.objective == "classification":
            right = (1.0 - settings.label_smoothing) if record.accepted else settings.label_smoothing
            found.append(-right * log_sigmoid(row[0]) - (1 - right) * log_sigmoid(-row[0]))
        else:
            error = abs(row[0] - known.scale.targets(record)["targets"][0][0])
            d = settings.huber_delta
            found.append(error**2 / 2 if error < d else d * (error - d / 2))
    return np.mean(found)


@pytest.mark.parametrize(("kind", "changes", "records"), VARIANTS, ids=IDS)
def test_what_is_trained_is_what_scores(tiny, tmp_path, kind, changes, records):
    """Three columns and rows more than there need be: at use there are others, and a mesh."""
    settings, config, network, role, tokenizer, known, batch = prepared(tiny, kind, changes, records, more=3)
    reward = saved(tmp_path, kind, config, role, tokenizer)
    asked = [record.prompt for record in records], [completions_of(record) for record in records]
    at_use, row = np.float64(reward.score(*asked)), TEXT_KINDS[kind]
    assert np.abs(np.diff(at_use.ravel())).max() > 1e-3

    @jax.jit
    def run(role, batch):
        found = row.objective(settings, network, {"reward": role}, {}, {}, batch, None)
        answers = None
        if kind == "steamshp":
            answers = jnp.exp(letters(network, role, batch)).sum(-1)
        return row.scores(network, role, batch), found, answers

    in_training, (loss, (weight, metrics)), answers = run(role, batch)
    np.testing.assert_allclose(in_training[: len(records)], at_use, atol=1e-5)
    expected = reference(settings, known, records, at_use, reward)
    if kind == "steamshp":  # what is neither A nor B costs too
        expected -= np.log(np.float64(answers[: len(records)])).mean()
    assert weight == len(records) and float(loss) == pytest.approx(expected, abs=1e-4)
    if settings.feedback == "pairwise":
        assert metrics["margin"] == pytest.approx((at_use[:, 0] - at_use[:, 1]).mean(), abs=1e-5)
        assert metrics["accuracy"] == pytest.approx((at_use[:, 0] > at_use[:, 1]).mean())


@pytest.mark.parametrize(("kind", "changes", "records"), [VARIANTS[i] for i in (0, 3, 4)], ids=TEXT_KINDS)
def test_gradient_is_that_of_the_loss_and_padding_cannot_matter(tiny, kind, changes, records):
    """Of the output map against differences, and of all with columns and rows of padding, on a mesh."""
    settings, config, network, role, tokenizer, _, batch = prepared(tiny, kind, changes, records)
    padded = prepared(tiny, kind, changes, records, more=3)[-1]
    objective = functools.partial(TEXT_KINDS[kind].objective, settings, network)
    run = jax.jit(jax.value_and_grad(lambda role, batch: objective({"reward": role}, {}, {}, batch, None)[0]))
    loss, gradient = run(role, batch)
    mesh = meshes.make_mesh(1, 2, 4)
    with meshes.activate(mesh):
        shardings = Backbone(config, role, tokenizer).shardings(mesh)
        placed = jax.device_put(role, shardings), sharding.put_batch(padded, mesh)
        loss_padded, gradient_padded = run(*placed)
    assert float(loss) == pytest.approx(float(loss_padded), abs=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), gradient, gradient_padded)
    largest = [float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient.base)]
    assert np.isfinite(largest).all() and max(largest) > 1e-3

    out = lambda role: role.base["lm_head"] if kind == "steamshp" else role.head["out"]
    direction = jax.random.normal(jax.random.key(5), out(role)["kernel"].shape)

    def moved(by):
        kernel = out(role)["kernel"] + by * direction
        if kind == "steamshp":
            return role.replace(base=role.base | {"lm_head": {"kernel": kernel}})
        return role.replace(head=role.head | {"out": role.head["out"] | {"kernel": kernel}})

    step = 1e-2
    slope = (float(run(moved(step), batch)[0]) - float(run(moved(-step), batch)[0])) / (2 * step)
    assert float((out(gradient)["kernel"] * direction).sum()) == pytest.approx(slope, rel=2e-2, abs=1e-3)


def test_a_tiny_t5_learns_which_of_two_texts_has_the_better_word(tmp_path):
    """From random weights: it has to see which text a word is in, by places alone. Chance gets half of these right."""
    better, worse = (" good", " fine", " warm", " quick"), (" bad", " late", " cold", " rude")
    pairs = [Pair("", f" the food was{a}", f" the food was{b}") for a in better for b in worse]
    corpus = ["".join(wording("", pair.chosen, pair.rejected)) for pair in pairs]
    path = tiny_encoder.make(str(tmp_path / "t5"), corpus, "t5", vocab_size=330, width=32)
    settings, _, network, role, _, _, batch = prepared({"t5": path}, "steamshp", {}, pairs)
    optimizer = optax.adam(3e-3)

    def objective(role):
        loss, (_, metrics) = TEXT_KINDS["steamshp"].objective(
            settings, network, {"reward": role}, {}, {}, batch, None
        )
        right = jnp.argmax(letters(network, role, batch), axis=-1) == 0
        return loss, (right.mean(), metrics["answered"].mean())

    @jax.jit
    def train(role):
        def step(carry, _):
            role, state = carry
            (loss, found), gradient = jax.value_and_grad(objective, has_aux=True)(role)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(role, updates), state), (loss, *found)

        return jax.lax.scan(step, (role, optimizer.init(role)), length=60)[1]

    loss, right, answered = np.asarray(train(role))
    assert right[0] < 0.8 and answered[0] < 0.1
    assert right[-1] == 1.0 and answered[-1] > 0.9 and loss[-1] < 0.2


def test_markers_get_rows_of_their_own(tiny):
    config, params, _ = encoders.load_encoder(tiny["deberta"])
    there = AutoTokenizer.from_pretrained(tiny["deberta"])
    same, kept = with_markers(dataclasses.replace(config, marker_ids=None), params, there, jax.random.key(0))
    assert same == config and kept is params
    without = AutoTokenizer.from_pretrained(tiny["t5"])
    bare = dataclasses.replace(config, vocab_size=len(without), marker_ids=None)
    table = {"embedding": params["words"]["embedding"][: len(without)]}
    assert len(without) == len(table["embedding"])
    grown, more = with_markers(bare, params | {"words": table}, without, jax.random.key(0))
    assert grown.marker_ids == tuple(range(bare.vocab_size, bare.vocab_size + 3))
    rows = more["words"]["embedding"]
    assert len(rows) == grown.vocab_size == len(without)
    np.testing.assert_array_equal(rows[:-3], table["embedding"])
    assert 0.2 < float(rows[-3:].std()) / config.initializer_range < 2
