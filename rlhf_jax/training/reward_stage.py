"""The stage reward_model: records of its kind, its members one after the other, their gate, and what is held out.

What a kind reads, trains on and puts out is in algorithms/reward_models.py; here a config becomes calls of offline.fit.
"""

import dataclasses
import os
from collections.abc import Callable

import jax
import numpy as np

from rlhf_jax.data import formats, sources
from rlhf_jax.errors import InputError
from rlhf_jax.losses.decorrelation import rank_correlation, verbosity_penalties
from rlhf_jax.models import heads, readout, roles
from rlhf_jax.models.readout import Readout
from rlhf_jax.models.roles import Role
from rlhf_jax.parallel import hosts, sharding
from rlhf_jax.training import constitution, preferences
from rlhf_jax.training.algorithms.gating import GATING, whole
from rlhf_jax.training.algorithms.reward_models import KINDS
from rlhf_jax.training.algorithms.reward_records import Known, Scale, pairwise_group
from rlhf_jax.training.offline import encode_group, fit, read_all
from rlhf_jax.training.run import Run, all_dropped, held_out, settings_of

NAME = "reward_model"
REFERENCE_RECORDS = 2048  # at most so many training records give an ensemble's units and a gate's penalties


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """What the finished model says about records that it has not seen."""

    kind: str
    train_records: int
    pairs: np.ndarray  # [M, 2] scores of pairs, the better first
    gold: np.ndarray | None  # [M, 2] gold rewards of the same completions, where the records have them
    figures: dict  # the kind's own


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Records with their ids, of those that config.data keeps."""

    records: list
    groups: list


def reward_model(run: Run, evaluator: Callable | None = None) -> None:
    """A reward model of config.reward_model.kind. evaluator: (run, HeldOut) -> None, called at the end."""
    section = run.config[NAME]
    settings = settings_of(NAME, section)
    if section.layers > run.model.config.num_layers:
        raise InputError(
            f"config.reward_model.layers is {section.layers}; this model has {run.model.config.num_layers}."
        )
    stage = _Stage(run, section, settings)
    members, read = zip(*(stage.member(n) for n in range(settings.members)), strict=True)
    role, meta = members[0], {"step": section.steps, "kind": settings.kind}
    if settings.members > 1:
        role = stage.ensemble(members)
    if stage.scale is not None:
        meta["aspects"] = dataclasses.asdict(stage.scale)
    run.save_role(NAME, role, meta)
    if evaluator is not None and all(one is not None for one in read):
        evaluator(run, stage.held_out(role, read))


class _Stage:
    """The records of a kind and how one member is trained on them."""

    def __init__(self, run: Run, section, settings):
        self.run, self.section, self.settings, self.kind = run, section, settings, KINDS[settings.kind]
        train, test = reward_records(run)
        self.scale = Scale.of(settings, train) if self.kind.rated else None
        known = Known.of(settings, [*train, *test], self.scale)
        self.train, self.test = (_encode(run, records, self.kind.group, known) for records in (train, test))
        self.judged = self.test  # what is judged by pairs
        if self.kind.gated:
            self.gated_readout = gated_readout(settings, self.scale.names)
            pairs = gate_pairs(run, train, test, self.scale)
            known = Known.of(settings, [*pairs[0], *pairs[1]])
            self.gate_train, self.judged = (_encode(run, part, pairwise_group, known) for part in pairs)
        in_pairs = KINDS["pairwise"] if self.kind.gated else self.kind
        self.pairs = np.array(in_pairs.pairs(self.judged.records, self.scale), int).reshape(-1, 2, 2)

    def member(self, number: int) -> tuple[Role, dict | None]:
        """(its role, what it reads of the held-out records)."""
        run, section, kind = self.run, self.section, self.kind
        role = first_role(run, section, self.settings, kind.outputs(self.scale), number)
        frozen, tail = {"base": run.base}, f"_member_{number}" if number else ""
        role, _, found = fit(
            run,
            NAME,
            self.train.groups,
            self.test.groups,
            {"reward": role},
            frozen,
            log_as=NAME + tail,
            member=number,
            read=lambda trained, frozen, batch: self.read(trained["reward"], frozen["base"], batch),
            judge=(lambda found: {}) if kind.gated or kind.group is pairwise_group else self.accuracy,
        )
        if not kind.gated:
            return role, found
        role, of_pairs = self.gated(role, number, tail)
        if of_pairs is None or found is None:
            return role, None
        return role, {"scores": of_pairs["scores"], "outputs": found["outputs"]}

    def read(self, role: Role, base, batch) -> dict:
        return read(self.run.model, role, base, batch)

    def accuracy(self, found) -> dict:
        """Held-out pairs, of the kinds whose own loss knows none."""
        if found is None or not len(self.pairs):
            return {}
        better, worse = at_pairs(found["scores"], self.pairs).T
        return {"accuracy": float((better > worse).mean())}

    # The gate of aspects

    def gated(self, role: Role, number: int, tail: str) -> tuple[Role, dict]:
        """The aspects, frozen, with a gate trained on pairs."""
        run, settings = self.run, self.settings
        role = self.decorrelated(role)
        gate = readout.init_gate(
            jax.random.fold_in(run.rng(NAME, number), 2),
            run.model.config.hidden_size,
            len(self.scale.names),
            settings.gate_width,
            settings.gate_layers,
        )
        section = self.section.copy_and_resolve_references()
        with section.unlocked():
            section.steps, section.optimizer.learning_rate = settings.gate_steps, settings.gate_learning_rate
        frozen = {"base": run.base, "aspects": role}
        trained, _, found = fit(
            run,
            NAME,
            self.gate_train.groups,
            self.judged.groups,
            {"reward": Role(gate=gate)},
            frozen,
            section=section,
            algorithm=GATING,
            log_as=f"{NAME}{tail}_gate",
            member=number,
            read=lambda trained, frozen, batch: self.read(whole(trained, frozen), frozen["base"], batch),
        )
        return role.replace(gate=trained.gate), found

    def decorrelated(self, role: Role) -> Role:
        """Its aspects with a penalty on verbosity, each as large as the training records ask for."""
        run, settings, names, how = self.run, self.settings, self.scale.names, self.gated_readout
        if how.verbosity is None:
            return role.replace(readout=how)

        @jax.jit
        def read(base, role, batch):
            outputs = roles.scores_and_outputs(run.model, base, role, batch)[1]
            tokens = batch.completion_mask.sum(-1)
            return outputs[:, 0], readout.verbosity(how, outputs, tokens)[:, 0]

        records = self.train.groups[:REFERENCE_RECORDS]
        outputs, measured = read_all(run, records, self.section.batch_size, lambda b: read(run.base, role, b))
        penalties = verbosity_penalties(outputs, measured, settings.decorrelation)
        told = [
            f"{name} {rank_correlation(outputs[:, k], measured):+.2f}, "
            f"now {rank_correlation(outputs[:, k] - penalties[k] * measured, measured):+.2f}"
            for k, name in enumerate(names)
        ]
        run.console.note(f"{NAME}: rank correlation with {settings.verbosity}: {'; '.join(told)}")
        penalty = sharding.place(np.float32(penalties), sharding.replicated(run.mesh))
        return role.replace(readout=how, head=role.head | {"penalty": penalty})

    # Ensembles

    def ensemble(self, members) -> Role:
        """All members, each in deviations of its own scores on training records."""
        run, settings = self.run, self.settings
        scores = jax.jit(lambda base, role, batch: roles.scores(run.model, base, role, batch))
        records = (self.gate_train if self.kind.gated else self.train).groups[:REFERENCE_RECORDS]
        mean, std = [], []
        for member in members:
            read = lambda batch, member=member: (scores(run.base, member, batch), batch.weights)
            found, weights = read_all(run, records, self.section.batch_size, read)
            mean.append(found[weights > 0].mean())
            std.append(max(found[weights > 0].std(), 1e-6))
        statistics = {"mean": np.float32(mean), "std": np.float32(std)}
        return Role(
            head=sharding.place(statistics, sharding.replicated(run.mesh)),
            members=tuple(members),
            readout=Readout(settings.combine, spread_coeff=settings.spread_coeff),
        )

    # Held-out records

    def held_out(self, role: Role, read) -> HeldOut:
        """read: of each member."""
        scores, figures = read[0]["scores"], {}
        if role.members:
            stacked = np.stack([one["scores"] for one in read])
            scores, spread = hosts.gather(readout.combined(role.readout, stacked, role.head))
            each = [self.accuracy(one).get("accuracy") for one in read]
            figures["members"] = {"accuracy": each, "disagreement": float(np.mean(spread))}
        figures |= own_figures(
            self.settings.kind, self.scale, self.test.records, read[0], self.judged.records
        )
        gold = golds(self.judged.records)
        return HeldOut(
            self.settings.kind,
            len((self.gate_train if self.kind.gated else self.train).records),
            at_pairs(scores, self.pairs),
            None if gold is None else np.array([[gold[i][g] for i, g in pair] for pair in self.pairs]),
            figures,
        )


def first_role(run: Run, section, settings, outputs: int | None, number: int = 0) -> Role:
    """A member before training; outputs: of its head, as Kind.outputs has them."""
    rng, depth = run.rng(NAME, number), section.layers or None
    head = heads.init_reward(jax.random.fold_in(rng, 1), run.model.config.hidden_size, outputs)
    role = run.new_role(rng, section.train, run.base, head, depth, section.pooling)
    return role.replace(readout=KINDS[settings.kind].readout(settings))


def read(model, role: Role, base, batch) -> dict:
    """What is kept of held-out records."""
    scores, outputs = roles.scores_and_outputs(model, base, role, batch)
    return {"scores": scores} | ({"outputs": outputs} if role.readout != Readout() else {})


def gated_readout(settings, names) -> Readout:
    index = {name: n for n, name in enumerate(names)} | {"tokens": readout.TOKENS, "": None}
    if settings.verbosity not in index:
        raise InputError(
            f"config.reward_model.verbosity is {settings.verbosity!r}; expected tokens, an aspect "
            f"({', '.join(names)}), or nothing."
        )
    return Readout("gated", settings.gate_temperature, index[settings.verbosity])


def at_pairs(scores, pairs):
    """[N, G] scores of records -> [M, 2] of pairs of (record, completion)."""
    return scores[pairs[..., 0], pairs[..., 1]]


def _encode(run: Run, records, group, known: Known) -> Encoded:
    encoded = [(record, found) for record in records for found in encode_group(run, *group(known, record))]
    if records and not encoded:
        raise InputError(all_dropped(len(records), run.config.data.prompt_tokens))
    return Encoded([record for record, _ in encoded], [found for _, found in encoded])


def golds(records) -> list[list[float]] | None:
    """The gold rewards of each record's completions, as the stage `preferences` writes them; None if one has none."""
    found = []
    for record in records:
        row = {} if record.row is None else record.row.fields
        if "gold_0" in row and "gold_1" in row:
            found.append([row[f"gold_{row['choice']}"], row[f"gold_{1 - row['choice']}"]])
        elif isinstance(row.get("gold"), list):
            by_text = dict(zip(row["completions"], row["gold"], strict=True))
            found.append([by_text[text] for text in record.completions])
        elif "gold" in row:
            found.append([row["gold"]])
        else:
            return None
    return found


def own_figures(kind: str, scale: Scale | None, records, read: dict, judged) -> dict:
    """What a kind is judged by beside pairs."""
    if kind == "classification":
        z = read["outputs"][:, 0]
        accepted = np.array([record.accepted for record in records])
        return {"label_accuracy": float(((z[:, 1] > z[:, 0]) == accepted).mean())}
    if kind == "ranking":
        real = np.array([len(record.completions) for record in records])
        scores = np.where(np.arange(read["scores"].shape[1]) < real[:, None], read["scores"], -np.inf)
        return {"top1_accuracy": float((scores.argmax(1) == 0).mean())}
    if scale is None:
        return {}
    outputs = read["outputs"][:, 0] if kind == "multi_objective" else read["scores"]
    aspects = {}
    for k, (name, mean, std) in enumerate(zip(scale.names, scale.mean, scale.std, strict=True)):
        known = [n for n, record in enumerate(records) if name in record.ratings]
        if not known:
            continue
        targets = np.array([records[n].ratings[name] for n in known])
        error = np.square(outputs[known, k] * std + mean - targets).mean()
        variance = targets.var()
        aspects[name] = {
            "records": len(known),
            "mean_squared_error": float(error),
            "r2": float(1 - error / variance) if variance > 0 else None,
        }
    return {"aspects": aspects}


# Data


def reward_records(run: Run) -> tuple[list, list]:
    """(training records, held-out records) of the kind, of the config's data or of the stage `preferences`."""
    data, form = run.config.data, KINDS[preferences.kind_of(run)].read
    if not data.preferences:
        return _made(run, preferences.FILES, form)
    return _split(run, data.preferences, data.eval_preferences, form, together=form is not formats.pairs)


def preference_pairs(run: Run, form=formats.pairs):
    """(training pairs, held-out pairs) of the config's data, or of the stage `preferences`. form: what reads the
    former; the held-out ones are of the kind of the others."""
    data = run.config.data
    if not data.preferences:
        return _made(run, preferences.FILES, formats.pairs)
    return _split(run, data.preferences, data.eval_preferences, form)


def gate_pairs(run: Run, train, test, scale: Scale) -> tuple[list, list]:
    """Pairs for the gate: config.reward_model.gate_preferences, those of the stage `preferences`, or, where there
    are ratings alone, completions of one prompt by their mean rating."""
    if run.config[NAME].gate_preferences:
        return _split(run, run.config[NAME].gate_preferences, "", formats.pairs)
    if not run.config.data.preferences:
        return _made(run, preferences.GATE_FILES, formats.pairs)

    def pair(records, better, worse):
        better, worse = records[better[0]], records[worse[0]]
        return formats.Pair(better.prompt, better.completion, worse.completion, row=better.row)

    of = KINDS["multi_objective"].pairs
    found = tuple([pair(records, *two) for two in of(records, scale)] for records in (train, test))
    if not found[0]:
        raise InputError(
            "config.reward_model.gate_preferences is empty, and no prompt of config.data.preferences has two "
            "completions rated differently; kind multi_objective needs pairs for its gate. Give a file of them."
        )
    return found


def _made(run: Run, files: dict, form):
    if "constitution" in run.config.stages and "preferences" not in run.config.stages:
        pairs = constitution.records(run, "pairs", form)
        cut = len(pairs) - held_out(len(pairs), run.config.data.held_out_pairs)
        return pairs[:cut], pairs[cut:]
    # Already with the instruction in front: these prompts were sampled from.
    paths = [run.path(files[name]) for name in ("train", "held_out")]
    return tuple(form(sources.read_rows(path)) if os.path.getsize(path) else [] for path in paths)


def _split(run: Run, spec: str, held_out_spec: str, form, together=False):
    """together: completions of one prompt, where they follow each other, are not split."""
    records = run.records(spec, form)
    if held_out_spec:
        if form is formats.pairs_or_labelled:
            form = formats.labelled if isinstance(records[0], formats.Labelled) else formats.pairs
        return records, run.records(held_out_spec, form)
    cut = len(records) - held_out(len(records), run.config.data.held_out_pairs)
    while together and 0 < cut < len(records) and records[cut].prompt == records[cut - 1].prompt:
        cut -= 1
    return records[:cut], records[cut:]
