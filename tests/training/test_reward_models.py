"""Every kind of reward model: its objective against float64, what must not change it, and that it learns."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.data.formats import Labelled, Pair, Ranking, Rated
from rlhf_jax.data.sources import Row
from rlhf_jax.errors import InputError
from rlhf_jax.models import heads, readout, roles
from rlhf_jax.models.readout import Readout
from rlhf_jax.models.roles import Role
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.parallel import sharding
from rlhf_jax.training.algorithms import reward_models
from rlhf_jax.training.algorithms.gating import gating_objective
from rlhf_jax.training.algorithms.reward_models import KINDS, RewardModelSettings
from rlhf_jax.training.algorithms.reward_records import Known, Scale, pairwise_group
from rlhf_jax.training.algorithms.row import Network
from rlhf_jax.training.offline import grouped
from rlhf_jax.training.state import TrainState
from rlhf_jax.training.update import make_update
from tests.training import made_feedback as made

VARIANTS = [
    ("pairwise", dict(center_coeff=0.1)),
    ("pairwise", dict(center_coeff=0.1, margin_coeff=0.5, label_smoothing=0.1)),
    ("pairwise", dict(loss="logexp", label_smoothing=0.1)),
    ("token_level", dict(center_coeff=0.1, margin_coeff=0.5, label_smoothing=0.1)),
    ("ranking", dict(center_coeff=0.1)),
    ("ranking", dict(ranking_loss="pairs", margin_coeff=0.5, label_smoothing=0.1, center_coeff=0.1)),
    ("ranking", dict(ranking_loss="pairs", loss="logexp")),
    ("classification", dict(label_smoothing=0.1)),
    ("regression", dict()),
    ("regression", dict(huber_delta=0.7)),
    ("multi_objective", dict()),
    ("gate", dict(label_smoothing=0.1)),
]
IDS = ["-".join([kind, *(f"{k}={v}" for k, v in changes.items())]) for kind, changes in VARIANTS]
OUTPUTS = {"classification": 2, "multi_objective": 3, "gate": 3}
PENALTY = np.float32([0.3, -0.2, 0.1])


@pytest.fixture(autouse=True)
def cheap_trunk(monkeypatch):
    monkeypatch.setattr(roles, "states", made.states)


def made_roles(kind):
    """(trained, frozen) with a trunk that is trained but for a gate's."""
    head = heads.init_reward(jax.random.key(1), made.WIDTH, OUTPUTS.get(kind))
    table = jax.tree.map(jnp.asarray, made.table(3))
    if kind == "gate":
        aspects = Role(head=head | {"penalty": PENALTY}, readout=Readout("gated", 2.0, readout.TOKENS))
        gate = readout.init_gate(jax.random.key(2), made.WIDTH, 3, hidden=4, layers=1)
        return {"reward": Role(gate=gate)}, {"base": table, "aspects": aspects}
    how = Readout("logit") if kind == "classification" else Readout("mean" if kind in OUTPUTS else "scalar")
    return {"reward": Role(head=head, base=table, readout=how)}, {"base": {}}


def objective_of(kind, changes):
    settings = RewardModelSettings(kind="multi_objective" if kind == "gate" else kind, **changes)
    assert settings.check() is None
    function = gating_objective if kind == "gate" else reward_models.reward_model_objective
    return settings, functools.partial(function, settings, Network(None, 0))


# The same in float64, row by row


def log_sigmoid(x):
    return -np.logaddexp(0.0, -x)


def reference(kind, settings, trained, frozen, batch):
    """Mean loss over what counts."""
    role = trained["reward"]
    table = (role.base or frozen["base"])["table"]
    states = made.hidden(np, table, batch)
    head = frozen["aspects"].head if kind == "gate" else role.head
    values = states @ head["kernel"] + head["bias"]
    lengths = batch.completion_mask.sum(-1)
    at_end = np.array([[values[b, g, n] for g, n in enumerate(row)] for b, row in enumerate(lengths)])
    total = []
    for b in range(len(lengths)):
        if not batch.weights[b].any():
            continue
        margin = 0.0 if batch.margins is None else float(batch.margins[b])
        soft = 1.0 if batch.soft_labels is None else float(batch.soft_labels[b])
        pair = functools.partial(pair_loss, settings, soft)
        if kind == "pairwise":
            total.append(pair(*at_end[b], margin))
        elif kind == "token_level":
            total.append(token_loss(settings, soft, margin, values[b, :, 1:], batch, b, at_end[b]))
        elif kind == "gate":
            weights = gate_of(role.gate, states[b, 0, 0], 2.0)
            scores = (at_end[b] - lengths[b][:, None] * PENALTY) @ weights * np.exp(role.gate["log_scale"])
            total.append(pair(*scores, margin))
        elif kind == "ranking":
            total.append(ranking_loss(settings, at_end[b], batch, b))
        elif kind == "classification":
            chances = at_end[b, 0] - np.logaddexp(*at_end[b, 0])
            right, wrong = chances[:: 1 if batch.targets[b, 0, 0] == 0 else -1]
            total.append(-(1 - settings.label_smoothing) * right - settings.label_smoothing * wrong)
        elif kind == "regression":
            error, delta = abs(at_end[b, 0] - batch.targets[b, 0, 0]), settings.huber_delta
            huber = error**2 / 2 if error < delta else delta * (error - delta / 2)
            total.append(huber if delta else error**2)
        else:
            known = batch.target_mask[b, 0] > 0
            if known.any():
                total.append(np.square(at_end[b, 0] - batch.targets[b, 0])[known].mean())
    return np.mean(total)


def pair_loss(settings, soft, chosen, rejected, margin):
    difference = chosen - rejected - margin
    center = 0.0 if settings.loss == "logexp" else settings.center_coeff
    one = -soft * log_sigmoid(difference) - (1 - soft) * log_sigmoid(-difference)
    return one + (0.0 if settings.kind == "multi_objective" else center * (chosen + rejected) ** 2)


def token_loss(settings, soft, margin, values, batch, b, ends):
    (chosen, rejected), lengths = batch.completion_ids[b], batch.completion_mask[b].sum(-1)
    start = next(t for t in range(made.R) if chosen[t] != rejected[t])
    span = range(start, max(lengths))
    found = [
        pair_loss(dataclasses.replace(settings, center_coeff=0.0), soft, *values[:, t], margin) for t in span
    ]
    return np.mean(found) + settings.center_coeff * ends.sum() ** 2


def ranking_loss(settings, scores, batch, b):
    scores = scores[batch.weights[b] > 0]
    if settings.ranking_loss == "plackett_luce":
        drawn = [np.log(np.exp(scores[i:]).sum()) - scores[i] for i in range(len(scores))]
        return sum(drawn) + settings.center_coeff * (2 * scores.mean()) ** 2
    ratings, known = batch.targets[b, :, 0], batch.target_mask[b, 0, 0] > 0
    found = []
    for i in range(len(scores)):
        for j in range(i + 1, len(scores)):
            gap = float(ratings[i] - ratings[j]) if known else 0.0
            if gap or not known:
                asked = settings.margin_coeff * gap
                found.append(pair_loss(settings, 1 - settings.label_smoothing, scores[i], scores[j], asked))
    return np.mean(found)


def gate_of(gate, state, temperature):
    logits = np.maximum(state @ gate["kernel_0"] + gate["bias_0"], 0) @ gate["kernel_1"] + gate["bias_1"]
    weights = np.exp((logits - logits.max()) / temperature)
    return weights / weights.sum()


def wide(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


@functools.cache
def found_of(i):
    """(loss, weight, metrics, gradient) of a variant."""
    kind, changes = VARIANTS[i]
    settings, objective = objective_of(kind, changes)
    (trained, frozen), batch = made_roles(kind), made.batch_of(kind, settings)
    loss = jax.jit(jax.value_and_grad(lambda t: objective(t, frozen, {}, batch, None), has_aux=True))
    (value, (weight, metrics)), slope = jax.device_get(loss(trained))
    return value, weight, metrics, slope


@pytest.mark.parametrize("i", range(len(VARIANTS)), ids=IDS)
def test_objective_and_its_gradient(i):
    kind, changes = VARIANTS[i]
    settings = objective_of(kind, changes)[0]
    (trained, frozen), batch = made_roles(kind), made.batch_of(kind, settings)
    value, weight, metrics, slope = found_of(i)
    assert weight == (2 if kind == "multi_objective" else 3)
    assert all(np.isfinite(x) for x in metrics.values())
    exact = functools.partial(reference, kind, settings, batch=batch)
    np.testing.assert_allclose(value, exact(wide(trained), wide(frozen)), rtol=2e-5)
    rng = np.random.default_rng(5)
    for _ in range(3):  # along directions, for as many numbers as there are
        way = jax.tree.map(lambda x: rng.normal(size=x.shape), trained)
        moved = lambda by, way=way: jax.tree.map(lambda x, d: np.float64(x) + by * d, trained, way)
        expected = (exact(moved(1e-5), wide(frozen)) - exact(moved(-1e-5), wide(frozen))) / 2e-5
        found = sum(jax.tree.leaves(jax.tree.map(lambda x, d: (np.float64(x) * d).sum(), slope, way)))
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("i", range(len(VARIANTS)), ids=IDS)
def test_microbatches_padding_and_a_mesh_change_nothing(i):
    """Two microbatches, two more columns of pads, another text where nothing counts, on eight devices: the same step,
    never NaN."""
    kind, changes = VARIANTS[i]
    settings, objective = objective_of(kind, changes)
    trained, frozen = made_roles(kind)
    batch = made.batch_of(kind, settings)
    right = lambda x, value: np.pad(x, ((0, 0), (0, 0), (0, 2)), constant_values=value)
    ids = right(batch.completion_ids, made.PAD)
    other = batch.replace(completion_ids=ids, completion_mask=right(batch.completion_mask, 0))
    ids[-1] = np.where(other.completion_mask[-1] > 0, 7 + np.arange(7), made.PAD)
    if batch.targets is not None:
        other.targets[-1] = np.nan if kind in ("regression", "multi_objective") else 1.0
    state = TrainState(trained, optax.sgd(1.0).init(trained), jnp.int32(0), jax.random.key(0), {})
    update = jax.jit(make_update(objective, optax.sgd(1.0), num_microbatches=2))
    mesh = meshes.make_mesh(1, 2, 4)
    table = sharding.NamedSharding(
        mesh, sharding.spec(("vocab", "embed"), (made.VOCABULARY, made.WIDTH), mesh)
    )
    lie = lambda x: table if x.shape == (made.VOCABULARY, made.WIDTH) else sharding.replicated(mesh)
    place = lambda tree: jax.device_put(tree, jax.tree.map(lie, tree))
    with meshes.activate(mesh):
        new, again = jax.device_get(update(place(state), place(frozen), sharding.put_batch(other, mesh)))
    loss, _, metrics, slope = found_of(i)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(lambda x, before, by: close(x, before - by), new.trained, jax.device_get(trained), slope)
    for name, value in {"loss": loss, **metrics}.items():
        close(again[name], value, err_msg=name)


# Learning, from records on


def record_of(kind, rng, number):
    """One record about completions that are the better, the more of their tokens are below 20."""
    draw = lambda: rng.integers(3, 38, 5)
    worth = lambda ids: float((ids < 20).mean())
    row = Row("made", number, {})
    if kind in ("classification", "regression", "multi_objective"):
        ids = draw()
        if kind == "classification":
            return Labelled("p", ids, worth(ids) > 0.5, row)
        ratings = {"worth": 10 * worth(ids) + rng.normal()}
        if kind == "multi_objective":
            ratings |= {"first": float(ids[0])} if number % 3 else {}
        return Rated("p", ids, ratings, row)
    several = sorted((draw() for _ in range(4 if kind == "ranking" else 2)), key=worth, reverse=True)
    return Ranking("p", tuple(several), None, row) if kind == "ranking" else Pair("p", *several, row=row)


@pytest.mark.parametrize("kind", KINDS)
def test_learns_its_feedback(kind):
    """A linear task: 9 of 10 held-out pairs of different worth are put in order."""
    rng, settings, row = np.random.default_rng(0), RewardModelSettings(kind=kind), KINDS[kind]
    records = [record_of(kind, rng, n) for n in range(256)]
    scale = Scale.of(settings, records) if row.rated else None
    known = Known.of(settings, records, scale)
    encode = lambda prompt, completions, row, more: (
        [3],
        [list(c) for c in completions],
        *([more] if more else []),
    )
    batch = grouped(
        [encode(*row.group(known, record)) for record in records], lengths=(1, 5), pad_id=made.PAD
    )
    head = heads.init_reward(jax.random.key(1), made.WIDTH, row.outputs(scale))
    role = Role(head=head, base=jax.tree.map(jnp.asarray, made.table(3)), readout=row.readout(settings))
    optimizer = optax.adam(0.05)
    state = TrainState(
        {"reward": role}, optimizer.init({"reward": role}), jnp.int32(0), jax.random.key(0), {}
    )
    objective = functools.partial(row.objective, settings, Network(None, 0))
    update = jax.jit(make_update(objective, optimizer))
    batch = jax.tree.map(jnp.asarray, batch)
    for _ in range(60):
        state, metrics = update(state, {"base": {}}, batch)
    ids = np.random.default_rng(9).integers(3, 38, (64, 2, 5)).astype(np.int32)
    new = made.group(0, np.full((64, 2), 5)).replace(completion_ids=ids)
    scores = np.asarray(roles.scores(None, {}, state.trained["reward"], new))
    if kind == "multi_objective":
        role = state.trained["reward"]
        scores = np.asarray(roles.scores_and_outputs(None, {}, role, new)[1])[..., scale.names.index("worth")]
    worth = (ids < 20).mean(-1)
    decided = worth[:, 0] != worth[:, 1]
    right = np.sign(scores[:, 0] - scores[:, 1]) == np.sign(worth[:, 0] - worth[:, 1])
    assert right[decided].mean() > 0.9, right[decided].mean()


# Records


def test_pairs_are_found_in_every_kind_of_record():
    label = lambda prompt, accepted: Labelled(prompt, "c", accepted)
    labels = [label("p", True), label("q", True), label("p", False), label("q", True)]
    assert KINDS["classification"].pairs(labels, None) == [((0, 0), (2, 0))]
    rated = lambda prompt, **ratings: Rated(prompt, "c", ratings)
    ratings = [rated("p", a=1.0, b=9.0), rated("p", a=2.0), rated("q", a=5.0), rated("p", a=1.0, b=1.0)]
    by = lambda **std: KINDS["regression"].pairs(
        ratings, Scale(tuple(std), (0.0,) * len(std), tuple(std.values()))
    )
    assert by(a=1.0) == [((1, 0), (0, 0)), ((1, 0), (3, 0))]
    assert by(a=1.0, b=1.0) == [((1, 0), (0, 0)), ((0, 0), (3, 0)), ((1, 0), (3, 0))]  # by what both have
    assert by(b=1.0) == [((0, 0), (3, 0))]
    ranking = Ranking("p", ("x", "y", "z"), (3.0, 1.0, 1.0))
    assert KINDS["ranking"].pairs([ranking], None) == [((0, 0), (0, 1)), ((0, 0), (0, 2))]
    assert len(KINDS["ranking"].pairs([Ranking("p", ("x", "y", "z"))], None)) == 3
    assert KINDS["pairwise"].pairs([None, None], None) == [((0, 0), (0, 1)), ((1, 0), (1, 1))]


def test_ratings_are_learned_in_deviations_of_the_aspects_named():
    rated = [Rated("p", "c", {"a": 1.0, "b": 0.0}), Rated("p", "d", {"a": 3.0}), Rated("q", "e", {"b": 4.0})]
    settings = RewardModelSettings(kind="multi_objective")
    scale = Scale.of(settings, rated)
    assert scale == Scale(("a", "b"), (2.0, 2.0), (1.0, 2.0))
    assert scale.targets(rated[1]) == {"targets": [[1.0, 0.0]], "target_mask": [[1.0, 0.0]]}
    only = Scale.of(RewardModelSettings(kind="regression", aspects=("b",)), rated)
    assert only.targets(rated[0]) == {"targets": [[-1.0]], "target_mask": [[1.0]]}
    with pytest.raises(InputError, match="aspects is empty and the ratings have a, b"):
        Scale.of(RewardModelSettings(kind="regression"), rated)
    with pytest.raises(InputError, match="no aspect 'c'"):
        Scale.of(RewardModelSettings(kind="multi_objective", aspects=("a", "c")), rated)


def test_extras_of_pairs():
    rows = [Row("f", 1, {"margin": 2}), Row("f", 2, {"score_chosen": 9, "score_rejected": 6.5}), None]
    pairs = [Pair("p", "c", "d", soft, row) for soft, row in zip((None, 0.7, None), rows, strict=True)]
    known = Known.of(RewardModelSettings(margin_coeff=0.5, label_smoothing=0.1), pairs)
    extras = [pairwise_group(known, pair)[3] for pair in pairs]
    assert [x["soft_labels"] for x in extras] == [0.9, 0.7, 0.9]
    assert [x["margins"] for x in extras] == [1.0, 1.25, 0.0]
    assert pairwise_group(Known.of(RewardModelSettings(), pairs[::2]), pairs[0])[3] == {}


@pytest.mark.parametrize(
    "changes",
    [
        dict(loss="logexp", margin_coeff=1.0),
        dict(kind="ranking", label_smoothing=0.1),
        dict(kind="ranking", margin_coeff=0.1),
        dict(kind="regression", label_smoothing=0.1),
        dict(kind="classification", margin_coeff=0.1),
        dict(kind="pairwise", huber_delta=1.0),
        dict(label_smoothing=0.5),
        dict(kind="regression", aspects=("a", "b")),
        dict(kind="multi_objective", aspects=("a", "a")),
    ],
)
def test_settings_that_would_not_be_read_are_refused(changes):
    name = [name for name in changes if name not in ("loss", "kind")][0]
    assert RewardModelSettings(**changes).check().startswith(f"{name} is ")
