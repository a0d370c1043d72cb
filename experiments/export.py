"""The tuned model for Hugging Face users: merged weights, or the adapter alone in PEFT's format; or the reward model.

python -m experiments.export --workdir=runs/demo --output=runs/demo/export [--merge]
python -m experiments.export --workdir=runs/demo --output=runs/demo/reward --role=reward_model"""

import os
import shutil
import sys

from experiments import cli


def command(argv):
    parser = cli.parser(__doc__)
    parser.add_argument("--workdir", required=True, help="of a run that has trained a policy")
    parser.add_argument("--output", required=True, help="directory to write")
    parser.add_argument("--merge", action="store_true", help="whole weights with the adapter in them")
    parser.add_argument(
        "--role",
        choices=("policy", "reward_model"),
        default="policy",
        help="reward_model: whole, as a LlamaForSequenceClassification",
    )
    flags, overrides = cli.parse(parser, argv)
    config = cli.load_saved(flags.workdir, overrides)

    from experiments import pipeline
    from experiments.judging import tuned_stage
    from rlhf_jax.checkpoints import huggingface, peft
    from rlhf_jax.errors import InputError
    from rlhf_jax.models import lora
    from rlhf_jax.training.checks import check_config
    from rlhf_jax.training.console import Console
    from rlhf_jax.training.loop import StopRequest
    from rlhf_jax.training.run import Run

    check_config(config, tuple(pipeline.STAGES))
    if os.path.exists(flags.output) and not os.path.isdir(flags.output):
        raise InputError(f"--output: {flags.output} is a file; give a directory.")
    console = Console()
    run = Run(config, flags.workdir, console, StopRequest())
    if flags.role == "reward_model":
        name = export_reward_model(run, flags.output)
        console.note(
            f"reward model written to {flags.output}; {name}:path={flags.output} names it as a reward"
        )
        return
    stage = tuned_stage(run)
    role, settings, meta = run.load_role(stage)
    if role.base is None and not flags.merge:
        peft.save_adapter(
            flags.output, role.adapter, settings, base_model_name=base_directory(run, flags.output)
        )
        tell_suffix(flags.output, meta, console)
        console.note(f"adapter of stage {stage} written to {flags.output}")
        return
    weights = role.base
    if weights is None:
        weights = lora.merge(run.unquantised(before_sft=stage == "sft"), role.adapter, settings)
    huggingface.save_llama(flags.output, run.model.config, weights, run.tokenizer.tokenizer)
    tell_suffix(flags.output, meta, console)
    console.note(f"weights of stage {stage} written to {flags.output}")


def export_reward_model(run, output: str) -> str:
    """Base, adapter and head in one checkpoint with its tokenizer. Returns what config.rewards.components calls it."""
    import jax

    from rlhf_jax.checkpoints import huggingface
    from rlhf_jax.checkpoints import roles as role_files
    from rlhf_jax.models import lora, roles
    from rlhf_jax.rewards.models.catalogue import MODELS

    path = run.role_path("reward_model")
    kind = role_files.read_meta(path).get("kind")
    if kind in MODELS:
        shutil.copytree(path, output, dirs_exist_ok=True)
        return kind
    role, settings, _ = run.load_role("reward_model")
    weights = run.unquantised() if role.base is None else role.base
    if role.depth is not None:
        weights = weights | {"layers": jax.tree.map(lambda x: x[: role.depth], weights["layers"])}
    if role.adapter is not None:
        weights = lora.merge(weights, role.adapter, settings)
    config = roles.shallower(run.model.config, role.depth)
    head = role.head["kernel"][:, None]
    huggingface.save_scorer(output, config, weights, head, run.tokenizer.tokenizer, role.pooling)
    return "decoder"


def tell_suffix(output: str, meta: dict, console) -> None:
    """A README where the policy is one that reads a text after each prompt: without it, it is another policy."""
    if "prompt_suffix" not in meta:
        return
    suffix, ids = meta["prompt_suffix"], meta["prompt_suffix_ids"]
    with open(os.path.join(output, "README.md"), "w", encoding="utf-8") as file:
        file.write(
            "# How to prompt this model\n\n"
            f"It was tuned to read the text `{suffix}` (tokens {ids}) right after the prompt: it asks for "
            "completions of the best reward quantile (Quark, arXiv:2205.13636). Append these tokens to yours:\n\n"
            f"```python\nids = tokenizer(prompt).input_ids + {ids}\n```\n"
        )
    console.note(f"put {suffix!r} (tokens {ids}) after each prompt: README.md in {output} says so")


def base_directory(run, output: str) -> str:
    """What the adapter belongs to. After supervised fine-tuning that is no published model: it is written beside."""
    if not run.has_role("sft"):
        return run.config.model.path if os.path.isdir(run.config.model.path) else run.model_path
    from rlhf_jax.checkpoints import huggingface

    directory = os.path.join(output, "base")
    shutil.rmtree(directory, ignore_errors=True)
    huggingface.save_llama(directory, run.model.config, run.unquantised(), run.tokenizer.tokenizer)
    return directory


if __name__ == "__main__":
    cli.main(command, sys.argv[1:])
