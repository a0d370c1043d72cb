"""The kinds of reward models, one row each: which records it reads, how these become a batch, its objective, how a
score is read.

Knows scores; how records become batches is in reward_records.py. A kind that is trained in two parts has the second in
gating.py. Sources at the losses (losses/reward_model.py) and the readouts (models/readout.py)."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from rlhf_jax.data import formats
from rlhf_jax.losses import reward_model as losses
from rlhf_jax.losses.decorrelation import CORRELATIONS
from rlhf_jax.losses.masking import masked_mean
from rlhf_jax.models import roles
from rlhf_jax.models.readout import ENSEMBLES, Readout
from rlhf_jax.training.algorithms import reward_records as records
from rlhf_jax.training.algorithms.row import Algorithm, Settings
from rlhf_jax.training.algorithms.supervised import over_pairs


@dataclasses.dataclass(frozen=True)
class RewardModelSettings(Settings):
    kind: str = "pairwise"
    loss: str = "logsigmoid"  # of pairs; or logexp
    center_coeff: float = 0.0  # of pairs and rankings: pulls the mean of the scores to 0
    margin_coeff: float = (
        0.0  # of pairs and ranking_loss pairs: score asked for a unit of difference in ratings
    )
    label_smoothing: float = (
        0.0  # of pairs, gate, ranking_loss pairs, classification: the chance that a label is wrong
    )
    classification_reward: str = "logit"  # or probability, of being accepted
    huber_delta: float = 0.0  # of regression, in deviations of the ratings; 0: squared error
    aspects: tuple[str, ...] = ()  # of the ratings; none named: all there are
    ranking_loss: str = "plackett_luce"  # or pairs: all that a ranking has
    members: int = 1
    combine: str = "mean_std"  # or mean_variance, worst
    spread_coeff: float = 1.0
    gate_steps: int = 64
    gate_learning_rate: float = 1e-3
    gate_width: int = 64
    gate_layers: int = 1
    gate_temperature: float = 10.0
    verbosity: str = "tokens"  # what aspects are freed of: tokens, one of the aspects, or nothing
    decorrelation: str = "spearman"  # or pearson: the correlation with it that vanishes
    gate_preferences: str = (
        ""  # pairs for the gate; empty: what the stage `preferences` made, or pairs of the ratings
    )
    # Of the kinds with a tokenizer of their own (text_rewards.py), which are trained whole.
    backbone: str = "tiny"  # or a hub id, or a directory
    backbone_learning_rate: float = 1e-5
    objective: str = "pairwise"  # of encoder: or classification, regression
    encoder_pooling: str = "cls"  # or mean

    def check(self):
        wrong = None
        with_margin = self.in_pairs and self.loss == "logsigmoid" and self.kind != "steamshp"
        if self.margin_coeff and not with_margin:
            wrong = "margin_coeff", "losses of pairs with loss logsigmoid have"
        elif self.label_smoothing and not (self.in_pairs or self.feedback == "classification"):
            wrong = "label_smoothing", "losses of pairs and kind classification have"
        elif self.huber_delta and self.feedback != "regression":
            wrong = "huber_delta", "kind regression has"
        if wrong:
            name, only = wrong
            ranking = f" and ranking_loss {self.ranking_loss!r}" if self.kind == "ranking" else ""
            return (
                f"{name} is {getattr(self, name)}, which only {only}; expected 0 with kind {self.kind!r}{ranking} and "
                f"loss {self.loss!r}."
            )
        if self.label_smoothing >= 0.5:
            return f"label_smoothing is {self.label_smoothing}; expected less than 0.5, half of the labels wrong."
        if len(set(self.aspects)) < len(self.aspects):
            return f"aspects is {self.aspects}; expected each once."
        if self.kind in TEXT_KINDS:
            if self.members > 1:
                return f"members is {self.members}; expected 1 with kind {self.kind!r}: there are no ensembles of it."
            if self.classification_reward == "probability":
                return f"classification_reward is 'probability'; expected logit with kind {self.kind!r}."
            if self.kind == "steamshp" and self.loss != "logsigmoid":
                return f"loss is {self.loss!r}; expected logsigmoid: kind 'steamshp' has one loss, of two tokens."
        if self.kind != "encoder" and self.objective != "pairwise":
            return f"objective is {self.objective!r}, which kind encoder has; expected pairwise with {self.kind!r}."
        if self.feedback == "regression" and len(self.aspects) > 1:
            return f"aspects is {self.aspects}; regression has one (kind multi_objective has several)."
        return None

    @property
    def in_pairs(self) -> bool:
        """Whether it is trained, or its gate, by a loss of pairs."""
        of_rankings = self.kind == "ranking" and self.ranking_loss == "pairs"
        return of_rankings or self.feedback in ("pairwise", "token_level", "multi_objective")

    @property
    def feedback(self) -> str:
        """The kind whose records it reads: its own, but for those that only read them with another network."""
        return feedback_of(self.kind, self.objective)

    @property
    def linear(self) -> bool:
        """Whether the score is a linear head on one model's state, as a value head is."""
        several = self.members > 1 or self.kind in ("multi_objective", *TEXT_KINDS)
        return not several and not (
            self.kind == "classification" and self.classification_reward == "probability"
        )


@dataclasses.dataclass(frozen=True)
class Kind:
    """One row. A completion is told by (number of the record, number of the completion in it)."""

    read: Callable  # (rows, *, instruction, max_bad_records) -> records
    group: Callable  # (Known, record) -> (prompt, completions, row, fields of GroupedBatch beside them)
    objective: Callable  # as an Algorithm's
    readout: Callable = lambda settings: Readout()  # settings -> Readout
    outputs: Callable = lambda scale: None  # -> K of the head; None: a scalar
    rated: bool = False  # has a Scale
    pairs: Callable = lambda records, scale: []  # -> [(better, worse)], two completions of one prompt
    gated: bool = False  # then a gate is trained, on pairs


# Pairs


def pairwise_objective(settings, network, trained, frozen, controllers, batch, rng):
    """Completion 0 of each group was chosen, 1 rejected."""
    scores = roles.scores(network.model, frozen["base"], trained["reward"], batch)
    chosen, rejected = scores[:, 0], scores[:, 1]
    found = pair_losses(settings, chosen, rejected, batch.margins, batch.soft_labels)
    return over_pairs(batch, found, chosen, rejected, {})


def pair_losses(settings, chosen, rejected, margins=None, soft_labels=None):
    """[...], the loss of each pair; with a soft label, its mean over which of the two is the better."""

    def loss(better, worse, margin):
        if settings.loss == "logexp":
            return losses.pairwise_logexp(better, worse)
        return losses.pairwise_logsigmoid(better, worse, margin, settings.center_coeff)

    as_given = loss(chosen, rejected, margins)
    if soft_labels is None:
        return as_given
    other_way = loss(rejected, chosen, None if margins is None else -margins)
    return soft_labels * as_given + (1.0 - soft_labels) * other_way


def token_level_objective(settings, network, trained, frozen, controllers, batch, rng):
    """A value at every token: pairs are compared from their first different token to the end of the longer one. A score
    is the last one's, or with pooling mean the mean of all."""
    scores, values = roles.scores_and_values(network.model, frozen["base"], trained["reward"], batch)
    chosen, rejected = scores[:, 0], scores[:, 1]
    ids = jnp.where(batch.completion_mask > 0, batch.completion_ids, -1)
    margins = 0.0 if batch.margins is None else batch.margins[:, None]

    def loss(better, worse, margins):
        # A margin is asked at every token that is compared.
        asked = jnp.broadcast_to(values[:, better] - margins, values[:, better].shape)
        return losses.token_level_pairwise(asked, values[:, worse], ids[:, better], ids[:, worse], -1)

    found = loss(0, 1, margins)
    if batch.soft_labels is not None:
        found = batch.soft_labels * found + (1.0 - batch.soft_labels) * loss(1, 0, -margins)
    found = found + settings.center_coeff * jnp.square(chosen + rejected)
    return over_pairs(batch, found, chosen, rejected, {})


# Rankings


def ranking_objective(settings, network, trained, frozen, controllers, batch, rng):
    """One forward of the group, completions best first; those that fill up a shorter ranking weigh nothing."""
    scores = roles.scores(network.model, frozen["base"], trained["reward"], batch)
    real, K = batch.weights > 0, scores.shape[1]
    above = jnp.broadcast_to(jnp.triu(jnp.ones((K, K), bool), 1)[None], (*scores.shape, K))
    compared = above & real[:, :, None] & real[:, None]  # [B, better, worse]
    first, second = (jnp.broadcast_to(x, compared.shape) for x in (scores[:, :, None], scores[:, None]))
    if settings.ranking_loss == "plackett_luce":
        found = losses.plackett_luce(scores, batch.weights)
        # Of two candidates what a pair's centring is.
        found = found + settings.center_coeff * jnp.square(2.0 * masked_mean(scores, batch.weights, axis=1))
    else:
        ratings, known = batch.targets[..., 0], batch.target_mask[..., 0] > 0
        better = jnp.where(known[:, :, None] & known[:, None], ratings[:, :, None] - ratings[:, None], 0.0)
        tie = known[:, :, None] & known[:, None] & (better == 0)
        compared = compared & ~tie
        margins = settings.margin_coeff * better if settings.margin_coeff else None
        smooth = 1.0 - settings.label_smoothing if settings.label_smoothing else None
        pairs = jnp.where(compared, pair_losses(settings, first, second, margins, smooth), 0.0)
        flat = lambda x: x.reshape(x.shape[0], -1)
        found = masked_mean(flat(pairs), flat(compared), axis=1)  # a ranking counts once, however long
    rankings = compared.any((1, 2)).astype(jnp.float32)
    last = jnp.take_along_axis(scores, jnp.maximum(real.sum(1) - 1, 0)[:, None], axis=1)[:, 0]
    right = masked_mean((first > second).reshape(len(scores), -1), compared.reshape(len(scores), -1), axis=1)
    best = jnp.where(real, scores, -jnp.inf).argmax(1) == 0
    metrics = {"accuracy": right, "top1_accuracy": best, "margin": scores[:, 0] - last}
    metrics |= {"chosen_reward": scores[:, 0], "rejected_reward": last}
    metrics = {name: masked_mean(x.astype(jnp.float32), rankings) for name, x in metrics.items()}
    return masked_mean(found, rankings), (rankings.sum(), metrics)


# Single completions


def classification_objective(settings, network, trained, frozen, controllers, batch, rng):
    """Two classes, 1 for accepted."""
    role = trained["reward"]
    return of_labels(settings, batch, *roles.scores_and_outputs(network.model, frozen["base"], role, batch))


def of_labels(settings, batch, scores, outputs):
    """scores: [B, G]. outputs: [B, G, 2] logits."""
    weights = (batch.weights * batch.target_mask[..., 0]).reshape(-1)
    labels, logits = batch.targets.reshape(-1), outputs.reshape(-1, 2)
    found = losses.classification(logits, labels)
    if settings.label_smoothing:
        wrong = losses.classification(logits, 1.0 - labels)
        found = (1.0 - settings.label_smoothing) * found + settings.label_smoothing * wrong
    guess = logits[:, 1] > logits[:, 0]
    metrics = {
        "label_accuracy": guess == (labels > 0),
        "accepted_fraction": labels,
        "score": scores.reshape(-1),
    }
    metrics = {name: masked_mean(x.astype(jnp.float32), weights) for name, x in metrics.items()}
    return masked_mean(found, weights), (weights.sum(), metrics)


def regression_objective(settings, network, trained, frozen, controllers, batch, rng):
    return of_ratings(settings, batch, roles.scores(network.model, frozen["base"], trained["reward"], batch))


def of_ratings(settings, batch, scores):
    """scores: [B, G], in deviations of the ratings."""
    scores = scores.reshape(-1)
    weights = (batch.weights * batch.target_mask[..., 0]).reshape(-1)
    targets = jnp.where(weights > 0, batch.targets.reshape(-1), 0.0)
    found = losses.regression(scores, targets, settings.huber_delta or None)
    metrics = {"squared_error": jnp.square(scores - targets), "score": scores}
    metrics = {name: masked_mean(x, weights) for name, x in metrics.items()}
    return masked_mean(found, weights), (weights.sum(), metrics)


def multi_objective_objective(settings, network, trained, frozen, controllers, batch, rng):
    """Mean over a completion's labelled aspects, then over completions that have one."""
    role = trained["reward"]
    _, outputs = roles.scores_and_outputs(network.model, frozen["base"], role, batch)
    flat = lambda x: x.reshape(-1, x.shape[-1])
    outputs, targets = flat(outputs), flat(batch.targets)
    mask = flat(batch.target_mask * batch.weights[..., None])
    weights = mask.max(1)
    found = losses.multi_objective_regression(outputs, targets, mask)
    loss = masked_mean(found, weights)
    return loss, (weights.sum(), {"squared_error": loss})


KINDS = {
    "pairwise": Kind(formats.pairs, records.pairwise_group, pairwise_objective, pairs=records.both_of_pairs),
    "token_level": Kind(
        formats.pairs, records.pairwise_group, token_level_objective, pairs=records.both_of_pairs
    ),
    "ranking": Kind(
        formats.rankings, records.ranking_group, ranking_objective, pairs=records.pairs_of_rankings
    ),
    "classification": Kind(
        formats.labelled,
        records.labelled_group,
        classification_objective,
        readout=lambda settings: Readout(settings.classification_reward),
        outputs=lambda scale: 2,
        pairs=records.pairs_of_labels,
    ),
    "regression": Kind(
        formats.rated, records.rated_group, regression_objective, rated=True, pairs=records.pairs_of_ratings
    ),
    "multi_objective": Kind(
        formats.rated,
        records.rated_group,
        multi_objective_objective,
        readout=lambda settings: Readout("mean"),
        outputs=lambda scale: len(scale.names),
        rated=True,
        pairs=records.pairs_of_ratings,
        gated=True,
    ),
}

# Networks that are no decoders, with a tokenizer of their own, and how many completions of a prompt they need.
TEXT_KINDS = {"encoder": 1, "pairrm": 2, "steamshp": 1}


def feedback_of(kind: str, objective: str) -> str:
    """The kind of KINDS whose records a reward model of this kind reads."""
    return kind if kind not in TEXT_KINDS else objective if kind == "encoder" else "pairwise"


CHOICES = {
    "kind": (*KINDS, *TEXT_KINDS),
    "objective": ("pairwise", "classification", "regression"),
    "encoder_pooling": ("cls", "mean"),
    "classification_reward": ("logit", "probability"),
    "ranking_loss": ("plackett_luce", "pairs"),
    "combine": ENSEMBLES,
    "decorrelation": CORRELATIONS,
}


def reward_model_objective(settings, *arguments):
    """Of a decoder; those of TEXT_KINDS are in text_rewards.py."""
    return KINDS[settings.kind].objective(settings, *arguments)


ROWS = {"reward_model": Algorithm(RewardModelSettings, reward_model_objective, trains=("reward",))}
