"""Run: what the stages of one workdir share - config, mesh, tokenizer, frozen base, prompts, and where roles lie.

With stages.py the only place in the package that reads the config object. Everything is made on first use, so a run
that is already done loads nothing."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp

from rlhf_jax.checkpoints import gguf, huggingface, quantised, tiny
from rlhf_jax.checkpoints import roles as role_files
from rlhf_jax.data import batching, formats, sources, tiny_corpus
from rlhf_jax.data.tokenization import load_tokenizer
from rlhf_jax.errors import InputError
from rlhf_jax.models import lora, roles, splash
from rlhf_jax.models.config import LlamaConfig
from rlhf_jax.models.llama import Llama
from rlhf_jax.models.roles import Role
from rlhf_jax.parallel import hosts, sharding
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.rewards.models.catalogue import MODELS
from rlhf_jax.sampling.beam import BeamConfig
from rlhf_jax.sampling.generate import SamplingConfig
from rlhf_jax.training.algorithms import ALGORITHMS, Network
from rlhf_jax.training.algorithms.reward_models import TEXT_KINDS
from rlhf_jax.training.loop import Logging
from rlhf_jax.training.optimizer import make_optimizer, make_schedule

# Of the random streams. A number once given stays: with another, no run of before could be repeated.
SALTS = {"sft": 1, "preferences": 2, "reward_model": 3, "ppo": 4, "evaluation": 5, "dpo": 6, "a2c": 7, "reinforce": 8,
         "reinforce_pp": 9, "rloo": 10, "grpo": 11, "kto": 12, "orpo": 13, "cpo": 14, "simpo": 15,
         "trpo": 16, "remax": 17, "raft": 18, "online_dpo": 19, "quark": 20, "ppo_ptx": 21,
         "gate": 22, "constitution": 23}  # fmt: skip

MEMBER_SEEDS = 100_003  # between the seeds of an ensemble's members


class Run:
    def __init__(self, config, workdir: str, console, stop):
        self.config, self.workdir, self.console, self.stop = config, os.path.abspath(workdir), console, stop

    # Where things are

    def path(self, *parts: str) -> str:
        return os.path.join(self.workdir, *parts)

    def role_path(self, name: str) -> str:
        return self.path("roles", name)

    def has_role(self, name: str) -> bool:
        return role_files.exists(self.role_path(name))

    @functools.cached_property
    def model_path(self) -> str:
        """The directory of the base; the two built-in models are made on first use, hub ids are fetched."""
        if self.config.model.path == "tiny":
            corpus = [opening + text for opening, text in self.tiny_corpus]
            hosts.once(lambda: tiny.make(self.path("base"), corpus, seed=self.config.seed))
            return self.path("base")
        if self.config.model.path == "smollm2":
            with hosts.alone():  # each host has a cache of its own
                return gguf.embedded_model()
        return huggingface.resolve(self.config.model.path)

    @functools.cached_property
    def tiny_corpus(self):
        openings = [row.fields["input_text"] for row in sources.openings()]
        return tiny_corpus.continuations(openings, seed=self.config.seed)

    @property
    def gold(self) -> str:
        """The rule that is measured and never trained on; empty if there is none, or it is what is trained on."""
        trains_policy = any(row.online for name, row in ALGORITHMS.items() if name in self.config.stages)
        chosen_by = trains_policy or self.config.evaluation.best_of > 1
        trained_on = self.config.rewards.components if chosen_by else ()
        return "" if self.config.gold in trained_on else self.config.gold

    # The model

    @functools.cached_property
    def mesh(self):
        return meshes.make_mesh(**self.config.mesh.to_dict())

    @functools.cached_property
    def tokenizer(self):
        config = self._loaded[0]
        tokenizer = load_tokenizer(self.model_path, config.eos_ids)
        tokenizer.check_vocabulary(config.vocab_size)
        return tokenizer

    @functools.cached_property
    def _loaded(self):
        config, params = self._load(self.config.model.quantise)
        self.check_lengths(config)
        return config, params

    def check_lengths(self, config: LlamaConfig) -> None:
        """Raises: InputError if what the stages read is longer than the model's context."""
        longest = self.config.data.prompt_tokens + self.config.data.completion_tokens + 1
        if longest > config.max_position:
            raise InputError(
                f"config.data.prompt_tokens {self.config.data.prompt_tokens} + completion_tokens "
                f"{self.config.data.completion_tokens} + 1 is more than the model's context of {config.max_position}."
            )
        if "sft" in self.config.stages and self.config.sft.packed_tokens > config.max_position:
            raise InputError(
                f"config.sft.packed_tokens is {self.config.sft.packed_tokens}, more than the model's context of "
                f"{config.max_position}; lower it."
            )

    @functools.cached_property
    def model(self) -> Llama:
        config, section = self._loaded[0], self.config.model
        fields = {"dtype": jnp.dtype(section.dtype), "remat": section.remat, "attention": self.attention}
        return Llama(dataclasses.replace(config, **fields))

    @property
    def attention(self) -> str:
        """The form of LlamaConfig.attention that the config asks for on this run's devices."""
        rows = (ALGORITHMS[name] for name in self.config.stages if name in ALGORITHMS)
        if self.config.model.attention == "auto" and any(row.linearises for row in rows):
            return "plain"
        return splash.choose(self.config.model.attention, self.mesh.devices.flat[0].platform)

    def _load(self, kind: str, adapter=None, settings=None):
        dtype = jnp.dtype(self.config.model.param_dtype)
        return quantised.load_llama(self.model_path, kind, dtype, self.mesh, adapter, settings)

    @property
    def raw_base(self) -> dict:
        """The base as loaded."""
        if self._loaded[1] is None:
            self._loaded = self._load(self.config.model.quantise)
        return self._loaded[1]

    @functools.cached_property
    def base(self) -> dict:
        """The frozen base of reward model and RL: as loaded, or with the run's supervised fine-tuning in it."""
        if not self.has_role("sft"):
            return self.raw_base
        role, settings, _ = self.load_role("sft")
        if self.config.model.quantise != "none":
            if role.base is not None:
                raise InputError(
                    f"config.model.quantise is {self.config.model.quantise!r}, and {self.role_path('sft')} holds whole "
                    "weights in the place of an adapter; export them and give them as config.model.path."
                )
            # Two do not fit one chip; the raw one is read again where it is asked for.
            self._loaded = (self._loaded[0], None)
            return self._load(self.config.model.quantise, role.adapter, settings)[1]
        if role.base is not None:
            return role.base
        with meshes.activate(self.mesh):
            as_loaded = jax.tree.map(lambda x: x.sharding, self.raw_base)
            merge = jax.jit(lora.merge, static_argnums=2, out_shardings=as_loaded)
            return merge(self.raw_base, role.adapter, settings)

    def unquantised(self, before_sft: bool = False) -> dict:
        """`base` (before_sft: `raw_base`) for weights that leave the run: read again, if the run's are quantised."""
        if self.config.model.quantise == "none":
            return self.raw_base if before_sft else self.base
        _, params = self._load("none")
        if before_sft or not self.has_role("sft"):
            return params
        role, settings, _ = self.load_role("sft")
        return lora.merge(params, role.adapter, settings)

    @functools.cached_property
    def base_values(self) -> int:
        """How many weights the base has, however they are held."""
        return roles.count(sharding.llama_abstract(self.model.config)[0])

    def load_role(self, name: str):
        """(role on the mesh, LoRA settings, meta)."""
        dtype = jnp.dtype(self.config.model.param_dtype)
        role, settings, meta = role_files.load_role(self.role_path(name), self.model.config, dtype, self.mesh)
        return (
            sharding.place(role, sharding.role_shardings(role, self.model.config, self.mesh)),
            settings,
            meta,
        )

    def load_reward(self):
        """The reward model: a Role, or of the kinds with a tokenizer of their own a TextReward (rewards/models)."""
        path = self.role_path("reward_model")
        kind = role_files.read_meta(path).get("kind")
        return MODELS[kind](path, mesh=self.mesh) if kind in TEXT_KINDS else self.load_role("reward_model")[0]

    def save_role(self, name: str, role: Role, meta: dict) -> None:
        settings = self.lora if role.adapter is not None or role.members else None
        role_files.save_role(
            self.role_path(name), role, self.model.config, settings, self.tokenizer.tokenizer, meta
        )

    @property
    def lora(self) -> lora.LoraConfig:
        return lora.LoraConfig.from_names(**self.config.lora.to_dict())

    def new_role(
        self, rng, train: str, base: dict, head: dict | None = None, depth=None, pooling="last"
    ) -> Role:
        """A fresh role: an adapter, or (train="full") weights of its own in float32, which start as the base's."""
        config = roles.shallower(self.model.config, depth)
        if train == "full":
            own = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), base)
            return Role(None, head, own, depth, pooling)
        split = sharding.adapter_shardings(config, self.lora, self.mesh)
        adapter = sharding.place(lora.init(rng, config, self.lora), split)
        return Role(adapter, head, None, depth, pooling)

    def network(self, temperature: float = 1.0) -> Network:
        return Network(self.model, self.config.model.vocab_chunk, temperature or 1.0)

    def sampling(self, num_completions: int, temperature: float | None = None) -> SamplingConfig:
        section = self.config.sampling
        return SamplingConfig(
            max_new_tokens=self.config.data.completion_tokens,
            temperature=section.temperature if temperature is None else temperature,
            top_k=section.top_k,
            top_p=section.top_p,
            min_p=section.min_p,
            repetition_penalty=section.repetition_penalty,
            num_completions=num_completions,
            eos_ids=self.eos_ids,
            min_new_tokens=section.min_new_tokens,
            pad_id=self.tokenizer.pad_id,
            vocab_size=self.tokenizer.vocabulary_size,
            slots=section.slots,
            halvings=section.halvings,
        )

    def decoding(self) -> SamplingConfig | BeamConfig:
        """How the stage `evaluation` makes its completions."""
        section = self.config.evaluation
        num_beams, length_penalty = section.num_beams, section.length_penalty
        if num_beams == 1:
            return self.sampling(section.num_completions, section.temperature)
        return BeamConfig(
            max_new_tokens=self.config.data.completion_tokens,
            num_beams=num_beams,
            num_return=section.num_completions,
            length_penalty=length_penalty,
            eos_ids=self.eos_ids,
            min_new_tokens=self.config.sampling.min_new_tokens,
            pad_id=self.tokenizer.pad_id,
            vocab_size=self.tokenizer.vocabulary_size,
        )

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return self.tokenizer.eos_ids

    # Data

    def rng(self, stage: str, member: int = 0):
        """The stage's key: every draw is fold_in(key, step), so nothing random has to be saved. member: of an ensemble,
        the first of which is as if it were alone."""
        seed = self.config.seed + member * MEMBER_SEEDS
        return jax.random.fold_in(jax.random.key(seed), SALTS[stage])

    def records(self, spec: str, form) -> list:
        """The records of a data spec; form: formats.prompts, pairs or another reader."""
        data = self.config.data
        with self.console.heard("rlhf_jax.data"):
            rows = sources.read_rows(spec, max_bad_records=data.max_bad_records)
            return form(rows, instruction=data.instruction, max_bad_records=data.max_bad_records)

    @functools.cached_property
    def prompt_sets(self) -> dict:
        """{"train": prompts, "held_out": prompts}: formats.Prompt each; held out from the end unless given."""
        data = self.config.data
        train = (
            self.records(data.prompts, formats.prompts)
            if data.prompts
            else formats.prompts(sources.openings(), instruction=data.instruction)
        )
        if data.eval_prompts:
            return {"train": train, "held_out": self.records(data.eval_prompts, formats.prompts)}
        cut = len(train) - held_out(len(train), data.held_out_prompts)
        return {"train": train[:cut], "held_out": train[cut:]}

    def encode_prompts(self, prompts) -> list[tuple[object, list[int]]]:
        """(prompt, ids) of each prompt that fits by the config's rule."""
        encoded = [(prompt, self.encode_prompt(prompt.text, prompt.row)) for prompt in prompts]
        kept = [(prompt, ids) for prompt, ids in encoded if ids is not None]
        if prompts and not kept:
            raise InputError(all_dropped(len(prompts), self.config.data.prompt_tokens))
        return kept

    def encode_prompt(self, text, row=None) -> list[int] | None:
        """Ids by the config's rule; None if that drops it. row: where the text was found, for messages."""
        data, tokenizer = self.config.data, self.tokenizer
        try:
            return tokenizer.encode_prompt(text, data.prompt_tokens, overflow=data.prompt_overflow)
        except InputError as error:
            where = "" if row is None else f"{row.source}, line {row.line}: "
            raise InputError(
                f"{where}{error} (config.data.prompt_tokens, config.data.prompt_overflow)"
            ) from None

    @functools.cached_property
    def encoded_prompts(self) -> dict:
        return {name: self.encode_prompts(prompts) for name, prompts in self.prompt_sets.items()}

    @functools.cached_property
    def prompt_length(self) -> int:
        """P of every prompt batch: the longest prompt there is, so that short ones do not pay for the limit."""
        return max(len(ids) for encoded in self.encoded_prompts.values() for _, ids in encoded)

    def logging(self, stage: str) -> Logging:
        section = self.config.logging
        names = (
            "log_every_steps",
            "save_every_steps",
            "samples_every_steps",
            "num_samples",
            "keep_latest",
            "keep_best",
            "wandb_project",
            "watchdog_seconds",
        )
        return Logging(**{name: section[name] for name in names}, tags=section.tags[stage].to_dict())

    def put(self, batch, axis: int = 0):
        return sharding.put_batch(batch, self.mesh, axis)


def all_dropped(count: int, prompt_tokens: int) -> str:
    return (
        f"None of the {count} prompts has at most config.data.prompt_tokens {prompt_tokens} tokens, and "
        'config.data.prompt_overflow is "drop". Raise the former or choose "truncate_left".'
    )


def held_out(available: int, wanted: int) -> int:
    """How many records to keep for evaluation: as many as asked, at most a fifth of them."""
    return min(wanted, available // 5)


def resumable(
    run: Run,
    records,
    batch_size: int,
    lengths: tuple[int, ...],
    member: int = 0,
    tokenizer: str | None = None,
    **sorting,
) -> batching.ResumableData:
    """Records in an order that depends on the seed (and the member of an ensemble) alone, with a fingerprint of all
    that decides it.

    Args:
      tokenizer: the fingerprint of the records' own; None: of the run's.
      sorting: sort_batches and length of ResumableData.
    """
    return batching.ResumableData(
        records,
        seed=run.config.seed + member * MEMBER_SEEDS,
        batch_size=batch_size,
        identity={"lengths": list(lengths), "tokenizer": tokenizer or run.tokenizer.fingerprint},
        **sorting,
    )


def settings_of(name: str, section):
    """The algorithm's settings, each field from the key of the same name."""
    kind = ALGORITHMS[name].settings
    return kind(**{field.name: section[field.name] for field in dataclasses.fields(kind)})


def optimizer_of(section, total_updates: int):
    """(optimizer, its learning rate by update)."""
    fields = section.optimizer.to_dict()
    schedule = make_schedule(
        fields.pop("schedule"), fields.pop("learning_rate"), fields.pop("warmup_steps"), total_updates
    )
    return make_optimizer(schedule, **fields), schedule


def announce(run: Run, stage: str, trained: dict, what: str, network: str | None = None) -> None:
    """What is about to run, before the first compilation. network: None: roles of the run's decoder."""
    of_decoder = network is None
    if of_decoder:
        config = run.model.config
        network = f"{run.base_values / 1e6:.1f}M base values ({config.num_layers} layers, "
        network += f"width {config.hidden_size})"
    run.console.note(
        f"{stage}: {what}; {network}, {roles.count(trained) / 1e6:.2f}M trained; "
        f"mesh {dict(run.mesh.shape)} on {jax.devices()[0].platform}; the first step compiles"
    )
    if of_decoder:
        tell_cut(run, stage)


def tell_cut(run: Run, what: str) -> None:
    """How many texts were cut or dropped since the last time."""
    cut = {name.replace("_", " "): count for name, count in run.tokenizer.counts.items() if count}
    if cut:
        run.console.note(
            f"{what}: {', '.join(f'{count} {name}' for name, count in cut.items())} "
            "(config.data.prompt_tokens, completion_tokens)"
        )
        run.tokenizer.counts.clear()
