"""Prompts and examples of published data sets."""

import pytest

from rlhf_jax.data import formats
from tests.data.made_rows import refused, rows

ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
GSM8K = {"question": "Half of 2,400?", "answer": "2400 / 2 = <<2400/2=1200>>1200\n#### 1,200"}
VERL = {
    "data_source": "math", "prompt": [{"role": "user", "content": "1 + 1?"}], "ability": "MATH",
    "reward_model": {"ground_truth": "2", "style": "rule"},
}  # fmt: skip


def test_alpaca_has_its_own_template():
    with_input, without, null = formats.examples(
        rows(ALPACA, {**ALPACA, "input": ""}, {**ALPACA, "input": None})
    )
    assert with_input.prompt.endswith("\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n")
    assert without.prompt.endswith("request.\n\n### Instruction:\nAdd.\n\n### Response:\n")
    assert without.prompt == null.prompt and with_input.completion == "3"
    assert formats.prompts(rows(ALPACA))[0].text == with_input.prompt
    assert formats.prompts(rows({"instruction": "Add.", "input": "1 2"}))[0].text == with_input.prompt
    assert "line 2: 'input' is 3; expected a string" in refused(
        formats.examples, ALPACA, {**ALPACA, "input": 3}
    )
    assert "line 2: 'output' is empty" in refused(formats.examples, ALPACA, {**ALPACA, "output": ""})


def test_gsm8k_as_examples_and_as_questions_to_be_checked():
    (example,) = formats.examples(rows(GSM8K))
    assert (example.prompt, example.completion) == (GSM8K["question"] + "\n", GSM8K["answer"])
    (prompt,) = formats.prompts(rows(GSM8K))
    assert (prompt.text, prompt.row.fields["answer"]) == (example.prompt, "1200")
    assert prompt.row.fields["solution"] == GSM8K["answer"] and prompt.row.line == 1
    plain, number = formats.prompts(rows({**GSM8K, "answer": "1,200"}, {**GSM8K, "answer": 1200}))
    assert plain.row.fields["answer"] == "1,200" and number.row.fields["answer"] == 1200
    cut = {**GSM8K, "answer": "1200\n####"}
    assert "line 2: 'answer' is " in refused(formats.prompts, GSM8K, cut) and formats.examples(rows(cut))
    assert "line 2: 'answer' is null" in refused(formats.prompts, GSM8K, {**GSM8K, "answer": None})
    assert formats.prompts(rows({"question": "Why?"}))[0].text == "Why?\n"


def test_the_answer_is_what_the_rewards_read():
    from rlhf_jax.rewards import rules

    (prompt,) = formats.prompts(rows(GSM8K))
    score = rules.exact_match(after="####")
    texts = ["so\n#### 1200", "so\n#### 1201"]
    assert score([prompt.text] * 2, texts, [prompt.row.fields["answer"]] * 2) == [1.0, 0.0]


def test_ground_truth_becomes_the_answer():
    (prompt,) = formats.prompts(rows(VERL))
    assert (prompt.text, prompt.row.fields["answer"]) == (VERL["prompt"], "2")
    for value in (None, {}, {"ground_truth": ["2"]}, {"ground_truth": ""}):
        message = refused(formats.prompts, VERL, {**VERL, "reward_model": value})
        assert "line 2: 'reward_model' is" in message and "expected an object with 'ground_truth'" in message


@pytest.mark.parametrize("row", [ALPACA, GSM8K, VERL])
def test_an_instruction_stands_before_each(row):
    (prompt,) = formats.prompts(rows(row), instruction="Be brief.")
    assert str(prompt.text if isinstance(prompt.text, str) else prompt.text[0]["content"]).startswith(
        "Be brief.\n\n\n"
    )
