"""The RLHF pipeline of Vertex AI from its parameter file: reward model, reinforcement, bulk inference on eval prompts.

python -m experiments.vertex --parameter_values=parameters.json --workdir=runs/vertex

The file is one JSON object with the pipeline's own names:
  required  preference_dataset   rows input_text, candidate_0, candidate_1, choice
            prompt_dataset       rows input_text
            large_model_reference  llama-2-7b, llama-2-13b, their -chat forms, a Hugging Face directory or id
  optional  eval_dataset, instruction, prompt_sequence_length, target_sequence_length, kl_coeff (0: no reference),
            reward_model_train_steps, reinforcement_learning_train_steps, reward_model_learning_rate_multiplier,
            reinforcement_learning_rate_multiplier
  ignored   model_display_name, tensorboard_resource_id, deploy_model, project, location (of the cloud service)
Data are files, globs, or names of data sets. configs.vertex.steps_from_epochs(examples, epochs) turns epochs into
steps. Policy and reward model share one frozen base, so a -chat model is the base of both (on Vertex AI the reward
model of a -chat model starts from the plain one)."""

import difflib
import json
import os
import sys

from experiments import cli
from rlhf_jax.errors import InputError

NOT_LLAMA = ("t5-", "text-bison", "chat-bison")  # the pipeline's other models
LIMITS = {"prompt_sequence_length": 8192, "target_sequence_length": 1024}


def read_parameters(path: str) -> dict:
    """The checked parameters. Raises: InputError naming the file, the parameter, and what is expected."""
    from configs import vertex

    if not os.path.isfile(path):
        raise InputError(f"--parameter_values: {path} is not a file.")
    try:
        with open(path, encoding="utf-8") as file:
            parameters = json.load(file)
    except ValueError as error:
        raise InputError(f"{path}: not a JSON file ({error}).") from None
    if not isinstance(parameters, dict):
        raise InputError(f"{path}: expected one JSON object of parameters.")
    known = [*vertex.REQUIRED, *vertex.DEFAULTS, *vertex.CLOUD_ONLY]
    for name in parameters:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"the parameters are {', '.join(known)}."
            raise InputError(f"{path}: unknown parameter {name!r}; {hint}")
    for name in vertex.REQUIRED:
        value = parameters.get(name)
        if not isinstance(value, str) or not value:
            raise InputError(f"{path}: {name!r} is required, a non-empty string; found {json.dumps(value)}.")
    reference = parameters["large_model_reference"]
    if reference.lower().startswith(NOT_LLAMA):
        raise InputError(
            f"{path}: large_model_reference {reference!r} is not of the Llama family; expected one of "
            f"{', '.join(vertex.SIZES)}, or a local directory or Hugging Face id of a Llama-family checkpoint."
        )
    given = [name for name in vertex.DEFAULTS if name in parameters]
    return parameters | {
        name: _checked(path, name, parameters[name], vertex.DEFAULTS[name]) for name in given
    }


def _checked(path, name, value, default):
    """`value` in the type of the default. None stands for the default of a string, as the service has it."""
    number = type(value) in (int, float)
    if isinstance(default, str):
        fine, expected = value is None or isinstance(value, str), "a string"
    elif isinstance(default, int):
        limit = LIMITS.get(name, 10**9)
        fine = number and 1 <= value <= limit and value == int(value)  # 64.0 is how some writers spell 64
        expected = f"a whole number from 1 to {limit}"
    elif name == "kl_coeff":
        fine, expected = number and 0 <= value < 1e9, "a number from 0; 0: no reference"
    else:
        fine, expected = number and 0 < value < 1e9, "a number above 0"
    if not fine:
        raise InputError(f"{path}: {name} is {json.dumps(value)}; expected {expected}.")
    return type(default)(value or default if isinstance(default, str) else value)


def command(argv):
    parser = cli.parser(__doc__)
    parser.add_argument("--parameter_values", required=True, metavar="FILE.json")
    parser.add_argument("--workdir", required=True)
    cli.add_processes(parser)
    flags, overrides = cli.parse(parser, argv)
    cli.join_processes(flags)
    parameters = read_parameters(flags.parameter_values)

    from configs import vertex
    from experiments import pipeline
    from rlhf_jax.parallel import hosts

    config = cli.override(vertex.get_config(parameters), overrides)
    ignored = [name for name in vertex.CLOUD_ONLY if name in parameters]
    if ignored and hosts.is_first():
        print(f"note: {', '.join(ignored)} belong to the cloud service and have no effect here", flush=True)
    pipeline.run(config, flags.workdir, f"python -m experiments.vertex {' '.join(argv)}")


if __name__ == "__main__":
    cli.main(command, sys.argv[1:])
