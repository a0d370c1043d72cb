"""The RLHF pipeline of Vertex AI from its parameter file: reward model, reinforcement, bulk inference on eval prompts.

python -m experiments.vertex --parameter_values=parameters.json --workdir=runs/vertex

The file is one JSON object with the pipeline's own names:
  required  preference_dataset   rows input_text, candidate_0, candidate_1, choice
            prompt_dataset       rows input_text
            large_model_reference  llama-2-7b, llama-2-13b, their -chat forms, a Hugging Face directory or id
  optional  eval_dataset, instruction, prompt_sequence_length, target_sequence_length, kl_coeff (0: no reference),
            reward_model_train_steps, reinforcement_learning_train_steps, reward_model_learning_rate_multiplier,
            reinforcement_learning_rate_multiplier
configs.vertex.steps_from_epochs(examples, epochs) turns epochs into steps."""

import difflib
import json
import os
import sys

from experiments import cli
from rlhf_jax.errors import InputError

NOT_LLAMA = ("t5-", "text-bison", "chat-bison")
LIMITS = {"prompt_sequence_length": 8192, "target_sequence_length": 1024}


def read_parameters(path: str) -> dict:
    """The checked parameters. Raises: InputError naming the file, the parameter, and what is expected."""
    from configs import vertex

    if not os.path.isfile(path):
        raise InputError(f"--parameter_values: {path} does not exist.")
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
            raise InputError(
                f"{path}: unknown parameter {name!r}" + (f"; did you mean {near[0]!r}?" if near else ".")
            )
    for name in vertex.REQUIRED:
        if not isinstance(parameters.get(name), str) or not parameters[name]:
            raise InputError(
                f"{path}: {name!r} is required, a non-empty string; found {parameters.get(name)!r}."
            )
    for name, default in vertex.DEFAULTS.items():
        if name in parameters:
            _check(path, name, parameters[name], default)
    reference = parameters["large_model_reference"]
    if reference.startswith(NOT_LLAMA):
        raise InputError(f"{path}: large_model_reference {reference!r} is not of the Llama family.")
    return parameters


def _check(path, name, value, default):
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, str):
        fine, expected = isinstance(value, str), "a string"
    elif isinstance(default, int):
        limit = LIMITS.get(name, 10**9)
        fine, expected = (
            number and value == int(value) and 1 <= value <= limit,
            f"a whole number from 1 to {limit}",
        )
    elif name == "kl_coeff":
        fine, expected = number and 0 <= value < float("inf"), "0 or more"
    else:
        fine, expected = number and 0 < value < float("inf"), "a number above 0"
    if not fine:
        raise InputError(f"{path}: {name} is {value!r}; expected {expected}.")


def command(argv):
    parser = cli.parser(__doc__)
    parser.add_argument("--parameter_values", required=True, metavar="FILE.json")
    parser.add_argument("--workdir", required=True)
    flags, overrides = cli.parse(parser, argv)
    parameters = read_parameters(flags.parameter_values)

    from configs import vertex
    from experiments import pipeline

    config = cli.override(vertex.get_config(parameters), overrides)
    ignored = [name for name in vertex.CLOUD_ONLY if name in parameters]
    if ignored:
        print(f"note: {', '.join(ignored)} belong to the cloud service and have no effect here", flush=True)
    pipeline.run(config, flags.workdir, f"python -m experiments.vertex {' '.join(argv)}")


if __name__ == "__main__":
    cli.main(command, sys.argv[1:])
