"""The stage reward_model where it is no decoder: an encoder, PairRM or SteamSHP, trained whole in the one loop.

Texts go through the backbone's own tokenizer, whole: config.data's limits are the policy's. What a kind reads and puts
out is in algorithms/text_rewards.py; what is left in roles/reward_model is a Hugging Face directory, which a TextReward
of rewards/models reads back, and which is judged through it."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.checkpoints import encoders, huggingface, tiny_encoder
from rlhf_jax.checkpoints import roles as role_files
from rlhf_jax.checkpoints.pairrm import with_markers
from rlhf_jax.data import batching
from rlhf_jax.errors import InputError
from rlhf_jax.models import encoder_heads
from rlhf_jax.models.encoder_config import DebertaConfig
from rlhf_jax.models.roles import Role
from rlhf_jax.models.t5 import T5
from rlhf_jax.parallel import hosts
from rlhf_jax.parallel.sharding import module_shardings
from rlhf_jax.rewards.models.pairs_of_texts import SequenceTokenizer
from rlhf_jax.rewards.models.steamshp import wording
from rlhf_jax.training.algorithms import Algorithm
from rlhf_jax.training.algorithms.reward_models import KINDS, RewardModelSettings
from rlhf_jax.training.algorithms.reward_records import Known, Scale
from rlhf_jax.training.algorithms.text_rewards import TEXT_KINDS
from rlhf_jax.training.offline import Apart, beside, fit
from rlhf_jax.training.reward_stage import NAME, HeldOut, at_pairs, golds, own_figures, reward_records
from rlhf_jax.training.run import Run, settings_of

TINY = "tiny"  # a backbone with random weights, made in the workdir
ASKED_AT_ONCE = 64  # held-out records that the finished model scores between two looks at a stop signal


def reward_model(run: Run, evaluator: Callable | None = None) -> None:
    """evaluator: (run, HeldOut) -> None, called at the end."""
    section = run.config[NAME]
    settings = settings_of(NAME, section)
    kind, of_records = TEXT_KINDS[settings.kind], KINDS[settings.feedback]
    train, test = reward_records(run)
    scale = Scale.of(settings, train) if of_records.rated else None
    pairs = np.array(of_records.pairs(test, scale), int).reshape(-1, 2, 2)

    backbone = load_backbone(run, settings)
    network = kind.network(backbone.config_of_run(run), backbone.tokenizer)
    known = Known.of(settings, [*train, *test], scale)
    encode = lambda records: [encoded(kind, network, of_records.group(known, record)) for record in records]
    groups, held_out = encode(train), encode(test)
    longest = max(len(ids) for group in (*groups, *held_out) for ids, _ in group[0])
    pad_id = backbone.tokenizer.pad_id

    def make_batch(chosen, batch_size=None):
        texts, *more = zip(*chosen, strict=True)
        batch = batching.sequences(texts, length=longest, pad_id=pad_id, batch_size=batch_size)
        fields = more[0] if more else [{}]
        return batch.replace(**beside(fields, *batch.weights.shape))

    def read(trained, frozen, batch):
        return {"scores": kind.scores(network, trained["reward"], batch)}

    def judge(found):
        if found is None or not len(pairs):
            return {}
        better, worse = at_pairs(found["scores"], pairs).T
        return {"accuracy": float((better > worse).mean())}

    section = section.copy_and_resolve_references()
    with section.unlocked():
        section.optimizer.learning_rate = settings.backbone_learning_rate
    role, step, _ = fit(
        run,
        NAME,
        groups,
        held_out,
        {"reward": backbone.role},
        {},
        section=section,
        algorithm=Algorithm(RewardModelSettings, kind.objective, trains=("reward",)),
        # Losses of pairs know their accuracy.
        read=None if settings.feedback == "pairwise" else read,
        judge=judge,
        apart=Apart(
            network,
            make_batch,
            (longest,),
            backbone.tokenizer.fingerprint,
            {"reward": backbone.shardings(run.mesh)},
            f"{type(backbone.config).__name__[:-6]} of {backbone.config.num_layers} layers, width "
            f"{backbone.config.hidden_size}",
        ),
    )
    meta = {"step": step, "kind": settings.kind}
    if scale is not None:
        meta["aspects"] = dataclasses.asdict(scale)
    path, tokenizer = run.role_path(NAME), backbone.tokenizer.source
    role_files.save_text_role(path, backbone.config, role.base, role.head, tokenizer, meta)
    if evaluator is not None and test:
        evaluator(run, held_out_figures(run, settings, scale, len(train), test, pairs))


def encoded(kind, network, group) -> tuple:
    """(G sequences, arrays beside them if there are any) of what a row of KINDS makes of a record."""
    prompt, completions, _, fields = group
    return (kind.inputs(network, prompt, completions), *([fields] if fields else []))


def held_out_figures(run: Run, settings, scale, train_records: int, test, pairs) -> HeldOut:
    """By the finished model as it will be used: read back from its directory, asked by text."""
    reward, scores = run.load_reward(), []
    for start in range(0, len(test), ASKED_AT_ONCE):
        run.stop.check(f"{NAME}, judging")
        some = test[start : start + ASKED_AT_ONCE]
        scores.append(reward.score([record.prompt for record in some], [completions_of(r) for r in some]))
    scores = np.concatenate(scores)
    read = {"scores": scores, "outputs": np.stack([np.zeros_like(scores), scores], axis=-1)}
    gold = golds(test)
    return HeldOut(
        settings.kind,
        train_records,
        at_pairs(scores, pairs),
        None if gold is None else np.array([[gold[i][g] for i, g in pair] for pair in pairs]),
        own_figures(settings.feedback, scale, test, read, test),
    )


def completions_of(record) -> tuple[str, ...]:
    """The better of a pair first."""
    return (record.chosen, record.rejected) if hasattr(record, "chosen") else (record.completion,)


# The backbone


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A checkpoint that is going to be trained: its weights as a role, a head where the kind has one."""

    config: object  # BertConfig, DebertaConfig or T5Config, as it is saved
    role: Role
    tokenizer: SequenceTokenizer

    def config_of_run(self, run: Run):
        """With the run's dtype of the computation, and what its backward pass recomputes."""
        section = run.config.model
        return dataclasses.replace(self.config, dtype=jnp.dtype(section.dtype), remat=section.remat)

    def shardings(self, mesh) -> Role:
        if self.role.head is None:
            return self.role.replace(base=module_shardings(T5(self.config), mesh, num_inputs=3))
        base = module_shardings(encoders.model_of(self.config), mesh)
        return self.role.replace(base=base, head=encoders.head_shardings(self.config, mesh))


def load_backbone(run: Run, settings) -> Backbone:
    """config.reward_model.backbone, with a new head unless it has the one that is trained.

    Raises: InputError naming the key, or the file that is wrong.
    """
    name, rng = settings.backbone, jax.random.fold_in(run.rng(NAME), 1)
    if name == TINY:
        family, corpus = "deberta", [opening + text for opening, text in run.tiny_corpus]
        if settings.kind == "steamshp":  # whose tokenizer then knows the words of the question too
            family, corpus = (
                "t5",
                ["".join(wording(opening, text, text)) for opening, text in run.tiny_corpus],
            )
        path = run.path("encoder")
        hosts.once(lambda: tiny_encoder.make(path, corpus, family, seed=run.config.seed))
    else:
        path = huggingface.resolve(name)
    tokenizer = SequenceTokenizer(path)
    if settings.kind == "steamshp":
        config, params = encoders.load_t5(path, mesh=run.mesh)
        return Backbone(config, Role(base=params), tokenizer)
    config, params, head = encoders.load_encoder(path, mesh=run.mesh)
    if settings.kind == "pairrm":
        if not isinstance(config, DebertaConfig):
            raise InputError(
                f"config.reward_model.backbone is {name!r}, no DeBERTa; kind pairrm needs one, such as "
                "microsoft/deberta-v3-base or llm-blender/PairRM-hf."
            )
        if config.marker_ids is None:
            config, params = with_markers(config, params, tokenizer.source, jax.random.fold_in(rng, 1))
        wanted = ("pairrm", config.num_labels if config.head == "pairrm" else 1)
    else:
        plain = "cls_gelu" if isinstance(config, DebertaConfig) else "cls_tanh"
        own = config.head if config.head in ("cls_gelu", "cls_tanh") else plain
        wanted = (
            "mean" if settings.encoder_pooling == "mean" else own,
            2 if settings.objective == "classification" else 1,
        )
    if head is None or (config.head, config.num_labels) != wanted:
        config = dataclasses.replace(config, head=wanted[0], num_labels=wanted[1])
        head = encoder_heads.init(rng, wanted[0], config.hidden_size, wanted[1], config.initializer_range)
    return Backbone(config, Role(base=params, head=head), tokenizer)
