"""Prompts, and examples to imitate: rows to records of the formats that say nothing of better and worse.

Where a format has no separator of its own between prompt and completion, it is that of its authors' code."""

import dataclasses
from collections.abc import Callable

from rlhf_jax.data import conversations
from rlhf_jax.data.fields import FieldError, shown, text
from rlhf_jax.data.records import Example, Prompt
from rlhf_jax.data.sources import Row

# Of Stanford Alpaca (Taori et al. 2023), with and without an input.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:\n"
)
FINAL = "####"  # before GSM8K's final answer


def prompt(field: str) -> Callable[[Row], Prompt]:
    return lambda row: Prompt(conversations.prompt(row, field), row)


def example(prompt: str, completion: str) -> Callable[[Row], Example]:
    return lambda row: Example(
        conversations.prompt(row, prompt), conversations.completion(row, completion), row
    )


def plain_text(row: Row) -> Example:
    return Example("", text(row, "text"), row)


def conversation_prompt(field: str) -> Callable[[Row], Prompt]:
    return lambda row: Prompt(conversations.without_the_last_reply(row, field), row)


def conversation_example(field: str) -> Callable[[Row], Example]:
    return lambda row: Example(*conversations.up_to_the_last_reply(row, field), row)


def prompt_of(parse: Callable[[Row], object]) -> Callable[[Row], Prompt]:
    """The prompt of what `parse` makes of a row: a record, or several of one prompt."""

    def prompt(row):
        found = parse(row)
        return Prompt((found[0] if isinstance(found, list) else found).prompt, row)

    return prompt


def alpaca_text(row: Row) -> str:
    instruction, more = text(row, "instruction"), row.fields.get("input")
    if more is None or more == "":
        return ALPACA.format(instruction=instruction)
    return ALPACA_INPUT.format(instruction=instruction, input=text(row, "input"))


def instruction_prompt(row: Row) -> Prompt:
    return Prompt([{"role": "user", "content": text(row, "instruction")}], row)


def alpaca_prompt(row: Row) -> Prompt:
    return Prompt(alpaca_text(row), row)


def alpaca(row: Row) -> Example:
    return Example(alpaca_text(row), text(row, "output"), row)


def question(row: Row) -> Prompt:
    return Prompt(text(row, "question") + "\n", row)


def solved_question(row: Row) -> Example:
    return Example(text(row, "question") + "\n", text(row, "answer"), row)


def checkable_question(row: Row) -> Prompt:
    """A question whose field `answer`, which rewards read, is what follows the last #### in it, commas between digits
    left out; all of it is kept as `solution`. An answer without #### stays as it is."""
    asked, answer = question(row), row.fields["answer"]
    if type(answer) in (int, float):
        return asked
    _, found, final = text(row, "answer").rpartition(FINAL)
    if not found:
        return asked
    final = final.strip().replace(",", "")
    if not final:
        raise FieldError("answer", f"is {shown(answer)}; expected the final answer after {FINAL}")
    return _with_answer(asked, final, solution=answer)


def verifiable_prompt(row: Row) -> Prompt:
    """A prompt in verl's form: `reward_model` holds `ground_truth`, which becomes the field `answer`."""
    found = row.fields["reward_model"]
    answer = found.get("ground_truth") if isinstance(found, dict) else None
    if type(answer) not in (str, int, float) or answer == "":
        raise FieldError(
            "reward_model", f"is {shown(found)}; expected an object with 'ground_truth', text or a number"
        )
    return _with_answer(Prompt(conversations.prompt(row, "prompt"), row), answer)


def _with_answer(asked: Prompt, answer, **more) -> Prompt:
    row = asked.row
    return dataclasses.replace(
        asked, row=dataclasses.replace(row, fields={**row.fields, **more, "answer": answer})
    )
