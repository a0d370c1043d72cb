"""What is printed: a bar in a terminal, lines elsewhere, and never a control character of a model's."""

import io
import logging
import re
import subprocess
import sys

import pytest

from rlhf_jax.training import console

NASTY = "ok\x1b[31mred\x1b[0m\x1b]0;title\x07\x9b2J\rback\x08\u202egnp\ud83c[bold]not markup[/bold] [/b]"


def plain(**options):
    file = io.StringIO()
    return console.Console(file=file, **options), file


def controls(text):
    return re.findall("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text)


def test_clean_strips_escapes_controls_and_surrogates():
    assert console.clean(NASTY) == "okred2Jbackgnp\ufffd[bold]not markup[/bold] [/b]"
    assert console.clean("tab\tand\nnewline שלום 🎈") == "tab\tand\nnewline שלום 🎈"


def test_a_logger_is_heard_once_a_line_and_only_meanwhile(caplog):
    out, file = plain(width=200)
    logger = logging.getLogger("rlhf_jax.heard")
    for _ in range(2):
        with out.heard("rlhf_jax.heard"):
            logger.info("p.jsonl: 3 rows")
            logger.warning("left out 1")
    logger.info("nobody asked")
    assert file.getvalue() == "p.jsonl: 3 rows\nwarning: left out 1\n" and not caplog.records
    with pytest.raises(ZeroDivisionError), out.heard("rlhf_jax.heard"):
        _ = 1 / 0
    assert logger.propagate and not logger.handlers and logger.level == logging.NOTSET


@pytest.mark.parametrize("terminal", [False, True])
def test_everything_printed_is_cleaned_and_markup_is_text(terminal):
    out, file = plain(terminal=terminal, width=200)
    out.note(NASTY)
    out.warn(NASTY)
    out.table(NASTY, [NASTY, "n"], [[NASTY, 1.5]])
    out.samples(NASTY, [{"prompt": NASTY, "completion": NASTY, "reward": 1.0, "kl": None}])
    with out.stage(NASTY, 2) as progress:
        progress.step(1, {"reward": 1.0, NASTY: 2.0})
    text = file.getvalue()
    if terminal:  # rich's own sequences colour the text and move the bar; the model's must not be among them
        assert "\x1b]0;" not in text
        assert "\x9b" not in text
        assert "\x08" not in text
        assert "\u202e" not in text
    else:
        assert not controls(text)
    assert text.count("[bold]not markup[/bold]") >= 5


def test_plain_lines_come_at_the_interval_and_at_the_end():
    out, file = plain(log_every_steps=10)
    with out.stage("ppo", 25) as progress:
        for step in range(1, 26):
            progress.step(
                step, {"reward": step / 10, "kl": 0.5, "tokens_per_second": 1234.5, "grad_norm": 2.0}
            )
    lines = file.getvalue().splitlines()
    assert lines[0] == "ppo: 25 steps"
    assert [line.split()[1] for line in lines[1:-1]] == ["1/25", "11/25", "21/25", "25/25"]
    assert lines[1] == "ppo 1/25  reward 0.1  kl 0.5  tokens/s 1,234  grad_norm 2"
    assert re.search(r"\d+:\d\d left$", lines[2])
    assert lines[-1].startswith("ppo: done in ")


def test_steps_without_metrics_print_nothing_and_resume_says_from_where():
    out, file = plain()
    with out.stage("sft", 9, start=4) as progress:
        progress.step(5)
        progress.step(6, {"loss": None, "accuracy": float("nan")})
    assert file.getvalue().splitlines()[:2] == ["sft: from step 4 to 9", "sft 6/9  loss -  accuracy nan"]


def test_an_exception_passes_and_the_step_is_named():
    out, file = plain()
    with pytest.raises(KeyboardInterrupt), out.stage("ppo", 10) as progress:
        progress.step(3, {"loss": 1.0})
        raise KeyboardInterrupt
    assert "ppo: stopped at step 3" in file.getvalue()


def test_bar_shows_progress_and_the_headline_metrics():
    out, file = plain(terminal=True, width=140)
    with out.stage("ppo", 4) as progress:
        for step in range(1, 5):
            progress.step(
                step, {"reward": 0.25, "kl": 1.5, "loss": 2.0, "tokens_per_second": 400.0, "grad_norm": 9.0}
            )
            out.note("a line above the bar")
    text = file.getvalue()
    assert "4/4" in text
    assert "reward 0.25  kl 1.5  loss 2  tokens/s 400" in text
    assert "grad_norm" not in text


def test_samples_are_limited_and_columns_follow_the_rows():
    out, file = plain()
    rows = [
        {"prompt": f"prompt{i}", "completion": "one\ntwo " + "x" * 500, "reward": i / 2} for i in range(9)
    ]
    out.samples("step 10", rows, limit=2)
    text = file.getvalue()
    assert "prompt1" in text
    assert "prompt2" not in text
    assert "one\\ntwo" in text
    assert "..." in text
    assert text.count("x") < 500
    assert "gold" not in text
    out.samples("step 20", [{**rows[0], "gold_reward": 0.125, "kl": 3.0}])
    assert "gold" in file.getvalue()
    assert "0.125" in file.getvalue()
    out.samples("none", [])


def test_streams_that_hold_only_ascii_do_not_break():
    raw = io.BytesIO()
    out = console.Console(file=io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    out.note("שלום 🎈 é")
    out.table("t", ["a"], [["é"]])
    assert b"?" in raw.getvalue()


def test_quiet_prints_nothing_and_long_lines_stay_whole():
    out, file = plain(quiet=True)
    with out.stage("ppo", 1) as progress:
        progress.step(1, {"loss": 1.0})
    assert file.getvalue() == ""
    out, file = plain(width=40)
    out.note("word " * 30)
    assert len(file.getvalue().splitlines()) == 1


def test_import_leaves_rich_alone():
    code = "import sys, rlhf_jax.training.console; sys.exit('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
