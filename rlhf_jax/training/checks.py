"""Values of a config, checked before anything is compiled: ranges, choices and pairs that contradict each other.

Keys and types are the parser's business; here it is what the numbers mean."""

from rlhf_jax.errors import InputError
from rlhf_jax.models import quantise
from rlhf_jax.models.lora import LoraConfig
from rlhf_jax.rewards import rules
from rlhf_jax.training import labelling, scoring
from rlhf_jax.training.algorithms import ALGORITHMS, reward_models
from rlhf_jax.training.run import settings_of
from rlhf_jax.training.wandb_writer import check_installed

POSITIVE = ("learning_rate", "steps", "batch_size", "num_microbatches", "num_minibatches", "rollout_epochs",
            "rank", "alpha", "prompt_tokens", "completion_tokens", "num_pairs", "num_completions",
            "save_every_steps", "log_every_steps", "samples_every_steps", "coin_scale",
            "reward_reference_batches", "keep_latest", "eps", "clip_epsilon", "value_clip", "ptx_batch_size",
            "clip_low", "clip_high", "beta", "discopop_tau", "timeout_seconds", "kl_horizon", "max_kl",
            "head_multiplier", "num_beams", "repetition_penalty", "max_kl_per_token", "cg_iterations",
            "cg_tolerance", "backtrack_factor", "n_step", "reference_sync_mix", "kl_budget_rate", "keep",
            "num_quantiles", "pool_size", "best_of", "members", "gate_steps", "backbone_learning_rate",
            "gate_learning_rate", "gate_width", "gate_layers", "gate_temperature", "rounds", "num_prompts",
            "critique_tokens", "max_pairs", "preview_completions", "bootstrap_samples", "min_pairs", "significance",
            "warn_length_growth", "watchdog_seconds", "length_buckets", "sort_batches")  # fmt: skip
NOT_NEGATIVE = ("kl_coeff", "kl_target", "kl_loss_coeff", "temperature", "top_k", "warmup_steps",
                "weight_decay", "clip_norm", "value_coeff", "ptx_coeff", "stop_approx_kl",
                "clip_epsilon_high", "entropy_coeff", "reward_clip", "dual_clip", "ratio_clip",
                "center_coeff", "eval_every_steps", "held_out_prompts", "held_out_pairs", "vocab_chunk",
                "min_new_tokens", "num_samples", "keep_best", "layers", "packed_tokens", "cg_damping",
                "backtrack_steps", "max_refills", "overlong_buffer_tokens", "overlong_penalty",
                "reference_sync_steps", "reference_steps", "margin_coeff", "huber_delta", "spread_coeff",
                "preview_prompts", "warn_loss_gap", "refuse_loss_gap", "memorised_loss", "slots")  # fmt: skip
FRACTION = ("gamma", "gae_lambda", "b1", "b2", "max_bad_records", "top_p", "min_p", "label_smoothing",
            "backtrack_factor", "accept_ratio", "missing_ratings", "min_accuracy", "warn_accuracy_gap",
            "refuse_accuracy_gap", "warn_ece", "refuse_ece", "warn_saturation", "warn_spread", "refuse_spread",
            "warn_length_correlation", "refuse_length_correlation", "warn_seen")  # fmt: skip
CHOICES = {
    "on_refusal": ("stop", "warn"),
    "schedule": ("linear", "cosine", "constant"),
    "train": ("lora", "full"),
    "value": ("shared", "own", "reward"),
    "kl_kind": ("k1", "k2", "k3", "exact"),
    "kl_control": ("fixed", "adaptive", "budget"),
    "missing_eos_rule": ("none", "penalty", "replace"),
    "loss": ("logsigmoid", "logexp"),
    "pooling": ("last", "mean"),
    "reference": ("base", "cached"),
    "remat": ("none", "dots", "full"),
    "attention": ("auto", "plain", "splash"),
    "quantise": quantise.KINDS,
    "prompt_overflow": ("truncate_left", "error", "drop"),
    "dtype": ("float32", "bfloat16"),
    "param_dtype": ("float32", "bfloat16", "float16"),
} | reward_models.CHOICES


def check_config(config, known_stages) -> None:
    """Raises: InputError naming the key, its value and what is expected. config: ConfigDict."""
    _check_values("config", config)
    LoraConfig.from_names(**config.lora.to_dict())
    scoring.check(config.rewards)
    if config.preferences.labeller:
        section = config.reward_model if "reward_model" in config else None
        kind = reward_models.feedback_of(section.kind, section.objective) if section else "pairwise"
        labelling.check(config.preferences.labeller, kind)
    if config.gold and config.gold not in rules.RULES:
        raise InputError(
            f"config.gold is {config.gold!r}; expected one of {', '.join(rules.RULES)}, or nothing."
        )
    if not config.sampling.top_p > 0:
        raise InputError(f"config.sampling.top_p is {config.sampling.top_p}; expected above 0, at most 1.")
    if config.sampling.min_new_tokens > config.data.completion_tokens:
        raise InputError(
            f"config.sampling.min_new_tokens is {config.sampling.min_new_tokens}, more than "
            f"config.data.completion_tokens {config.data.completion_tokens}."
        )
    if config.sampling.halvings < -1:
        raise InputError(f"config.sampling.halvings is {config.sampling.halvings}; expected -1 or more.")
    beams, asked = config.evaluation.num_beams, config.evaluation.num_completions
    if 1 < beams < asked:
        raise InputError(
            f"config.evaluation.num_completions is {asked}, more than config.evaluation.num_beams {beams}; "
            "the completions are the best of the beams. Ask for fewer, or for more beams."
        )
    if not 0 <= config.seed < 2**63:
        raise InputError(f"config.seed is {config.seed}; expected 0 or more, below 2**63.")
    if config.logging.wandb_project:
        check_installed()
    unknown = [stage for stage in config.stages if stage not in known_stages]
    if unknown or not config.stages:
        raise InputError(
            f"config.stages is {tuple(config.stages)}; expected some of {', '.join(known_stages)}."
        )
    for name in config.stages:
        if name in ALGORITHMS:
            if name not in config:
                raise InputError(f"config.stages has {name!r}, of which this config has no section.")
            _check_stage(name, config[name])
            if ALGORITHMS[name].online:
                _check_rollouts(name, config)
    _check_attention(config)
    _check_quantised(config)
    if "preferences" in config.stages and config.preferences.ranking_size < 2:
        raise InputError(
            f"config.preferences.ranking_size is {config.preferences.ranking_size}; expected 2 or more completions."
        )
    longest = config.data.prompt_tokens + config.data.completion_tokens + 1
    if "sft" in config.stages and 0 < config.sft.packed_tokens < longest:
        raise InputError(
            f"config.sft.packed_tokens is {config.sft.packed_tokens}; expected 0 (no packing), or a row that holds the "
            f"longest example: config.data.prompt_tokens {config.data.prompt_tokens} + completion_tokens "
            f"{config.data.completion_tokens} + 1, {longest} or more."
        )
    section = config.evaluation
    if section.best_of > 1 and (section.temperature == 0 or section.num_beams > 1):
        raise InputError(
            f"config.evaluation.best_of is {section.best_of}, which needs config.evaluation.temperature above 0 and "
            "num_beams 1: it chooses among samples."
        )
    if config.data.preferences and "preferences" in config.stages:
        raise InputError(
            "config.data.preferences is given and config.stages has 'preferences'; leave one of them out."
        )


def _check_compared(name, config):
    """A learned reward that compares the completions of a prompt needs as many."""
    if scoring.LEARNED not in config.rewards.components or "reward_model" not in config:
        return
    kind = config.reward_model.kind
    asked = {f"config.{name}.num_completions": config[name].num_completions}
    if ALGORITHMS[name].greedy_baseline:
        asked[f"the greedy completion that {name} compares with"] = 1
    for key, count in asked.items():
        if count < reward_models.TEXT_KINDS.get(kind, 1):
            raise InputError(
                f"config.reward_model.kind {kind!r} scores a completion by comparing it with others of its prompt; "
                f"{key} is {count}, expected {reward_models.TEXT_KINDS[kind]} or more."
            )


def _check_values(where, section):
    for name, value in section.items():
        key = f"{where}.{name}"
        if name == "tags":  # keyed by metrics, whose names are also those of settings
            continue
        if hasattr(value, "items"):
            _check_values(key, value)
        elif name in CHOICES and value not in CHOICES[name]:
            raise InputError(f"{key} is {value!r}; expected one of {', '.join(CHOICES[name])}.")
        elif name in POSITIVE and not value > 0:
            raise InputError(f"{key} is {value!r}; expected a number above 0.")
        elif name in NOT_NEGATIVE and not value >= 0:
            raise InputError(f"{key} is {value!r}; expected 0 or more.")
        elif name in FRACTION and not 0 <= value <= 1:
            raise InputError(f"{key} is {value!r}; expected a number between 0 and 1.")


def _check_attention(config):
    for name in config.stages:
        if config.model.attention == "splash" and name in ALGORITHMS and ALGORITHMS[name].linearises:
            raise InputError(
                f"config.model.attention is 'splash', whose kernels cannot be differentiated forwards, "
                f"as config.{name} needs; expected plain or auto."
            )


def _check_quantised(config):
    """What needs the weights themselves."""
    kind = config.model.quantise
    for name in config.stages:
        if kind == "none" or name not in ALGORITHMS:
            continue
        section = config[name]
        text = name == "reward_model" and section.kind in reward_models.TEXT_KINDS  # weights of its own
        if section.train == "full" and not text:
            raise InputError(
                f"config.{name}.train is 'full', and config.model.quantise {kind!r}: codes cannot be trained. "
                f"Expected config.{name}.train lora, or config.model.quantise none."
            )
        if (
            "reference_sync_steps" in section
            and section.reference_sync_steps
            and section.reference_sync_mix < 1
        ):
            raise InputError(
                f"config.{name}.reference_sync_mix is {section.reference_sync_mix}, and config.model.quantise "
                f"{kind!r}: quantised weights cannot be mixed. Expected 1, a copy of the policy."
            )


def _check_stage(name, section):
    minibatches = section.num_minibatches if "num_minibatches" in section else 1
    pieces = minibatches * section.num_microbatches
    if section.batch_size % pieces:
        raise InputError(
            f"config.{name}.batch_size {section.batch_size} cannot be cut into {minibatches} minibatches of "
            f"{section.num_microbatches} microbatches; make it a multiple of {pieces}."
        )
    wrong = settings_of(name, section).check()
    if wrong:
        raise InputError(f"config.{name}.{wrong}")


def _check_rollouts(name, config):
    if "reward_model" in config.stages and "value" in config[name] and config[name].value == "reward":
        settings = settings_of("reward_model", config.reward_model)
        if not settings.linear:
            raise InputError(
                f"config.{name}.value is 'reward', and config.reward_model (kind {settings.kind!r}, members "
                f"{settings.members}) has no linear head to start a value from; expected own or shared."
            )
    _check_compared(name, config)
    buffer, longest = config[name].overlong_buffer_tokens, config.data.completion_tokens
    if buffer > longest:
        raise InputError(
            f"config.{name}.overlong_buffer_tokens is {buffer}, more than config.data.completion_tokens {longest}."
        )
    if ALGORITHMS[name].greedy_baseline and config.rewards.normalise != "none":
        raise InputError(
            f"config.rewards.normalise is {config.rewards.normalise!r}, which scores a sample against other samples: "
            f"{name} could not compare it with its greedy completion. Expected none."
        )
