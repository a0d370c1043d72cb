"""Reward functions that fail in every way there is, in real workers."""

import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.rewards.functions import REPORTED, RewardFunction

USER = '''
import os, sys, time

def size(prompts, completions):
    return [float(len(text)) for text in completions]

def naughty(completions):
    """The length; a completion may ask for something else."""
    return [ACTS[text]() if text in ACTS else float(len(text)) for text in completions]

def hang():
    while True:
        pass

def fail():
    raise ValueError("I do not like this one")

ACTS = {"raise": fail, "hang": hang, "die": lambda: os._exit(9), "exit": lambda: sys.exit(3),
        "none": lambda: None, "nan": lambda: float("nan"), "inf": lambda: -float("inf"), "huge": lambda: 1e300,
        "text": lambda: "1.0", "object": object, "segfault": lambda: os.kill(os.getpid(), 11)}

def returns(kind):
    return {"none": None, "short": [1.0], "long": [1.0] * 99, "one": 1.0, "dict": {"a": 1, "b": 2}, "text": "ab",
            "endless": iter(int, 1)}[kind]

def whole(completions, kind):
    return returns(kind[0])

def whole_batch_only(completions):
    return [2.0] if len(completions) == 1 else None

def slow_together(completions):
    time.sleep(0.4 * (len(completions) - 1))
    return [1.0] * len(completions)

def takes(prompts, completions, label):
    return [float(p + c == l["text"]) for p, c, l in zip(prompts, completions, label)]

def takes_all(completions, **fields):
    return [len(fields)] * len(completions)

def modules(completions):
    return [float(any(name in sys.modules for name in ("jax", "numpy", "flax", "__mp_main__")))] * len(completions)

def numpy_array(completions):
    import numpy as np
    return np.array([len(text) > 1 for text in completions])

def generator(completions):
    print("printing does no harm", flush=True)
    return (len(text) for text in completions)

def pid(completions):
    return [os.getpid()] * len(completions)

def wrong_names(ps, cs):
    return [0.0] * len(cs)

def child_and_hang(completions):
    import subprocess
    child = subprocess.Popen(["sleep", "600"])
    with open(completions[0], "w") as file:
        file.write(f"{os.getpid()} {child.pid}")
    hang()
'''


@pytest.fixture
def reward(tmp_path, monkeypatch):
    """reward("function", **settings) -> (RewardFunction, its lines)."""
    (tmp_path / "user_rewards.py").write_text(USER)
    (tmp_path / "broken_rewards.py").write_text("import no_such_package\n")
    (tmp_path / "exiting_rewards.py").write_text("import os\nos._exit(4)\n")
    monkeypatch.syspath_prepend(tmp_path)
    made = []

    def make(spec, **settings):
        lines = []
        made.append(RewardFunction(spec if ":" in spec else f"user_rewards:{spec}", lines.append, **settings))
        return made[-1], lines

    yield make
    for one in made:
        one.close()


def gone(pid):
    """True once the process has ended (a zombie, where nobody waits for it, has)."""
    for _ in range(60):
        try:
            if pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_scores_in_order_and_one_worker_for_all_batches(reward):
    function, lines = reward("size")
    scores, failed = function.score(["p"] * 3, ["a", "", "\ud800🙂\x00\u2028"])
    assert scores.dtype == np.float32 and scores.tolist() == [1, 0, 4] and not failed.any()
    scores, failed = function.score([], [])
    assert scores.shape == failed.shape == (0,)
    big = ["x" * 1_000_000] * 4  # more than a socket holds
    assert function.score(big, big)[0].tolist() == [1e6] * 4
    pids, _ = reward("pid")
    assert pids.score([""], [""])[0] == pids.score([""], [""])[0]
    assert lines == []


@pytest.mark.parametrize("name, expected", [("numpy_array", [0, 1]), ("generator", [1, 2])])
def test_whatever_holds_numbers_is_a_result(reward, name, expected):
    function, _ = reward(name)
    assert function.score(["", ""], ["a", "bb"])[0].tolist() == expected


def test_the_worker_starts_without_jax_numpy_or_the_main_module(reward):
    start = time.monotonic()
    function, _ = reward("modules")
    assert function.score([""], [""])[0] == 0
    assert time.monotonic() - start < 3


@pytest.mark.parametrize(
    "act, reason",
    [
        ("raise", "ValueError: I do not like this one (user_rewards.py, line 16)"),
        ("exit", "SystemExit: 3"),
        ("none", "returned None"),
        ("nan", "returned nan"),
        ("inf", "returned -inf"),
        ("huge", "returned 1e+300"),
        ("text", "returned '1.0', which is not a number"),
        ("object", "which is not a number"),
        ("die", "the worker exited with status 9"),
        ("segfault", "the worker died of SIGSEGV"),
        ("hang", "no answer within"),
    ],
)
def test_one_bad_sample_fails_alone_and_is_reported_once(reward, act, reason):
    limit = 2.0
    function, lines = reward("naughty", timeout_seconds=limit, failure_score=-7.0)
    start = time.monotonic()
    scores, failed = function.score(["p0", "p1", "p2", "p3"], ["a", act, "ccc", "dddd"])
    assert time.monotonic() - start < 2 * limit + 1
    assert scores.tolist() == [1, -7, 3, 4] and failed.tolist() == [False, True, False, False]
    assert len(lines) == 1 and reason in lines[0], lines
    assert (
        "reward naughty: " in lines[0] and "counts as -7. Prompt 'p1'" in lines[0] and repr(act) in lines[0]
    )
    assert function.score(["p"], ["four"])[0] == 4  # a worker is there again
    assert len(lines) == 1


def test_failures_may_be_taken_out(reward):
    function, lines = reward("naughty", failure_score=float("nan"))
    scores, failed = function.score(["", "", ""], ["raise", "bb", "nan"])
    assert np.isnan(scores).tolist() == failed.tolist() == [True, False, True]
    assert len(lines) == 2 and all("counts as nan" in line for line in lines)


@pytest.mark.parametrize(
    "kind, found",
    [
        ("none", "returned None; expected a list"),
        ("short", "returned 1 scores for 2"),
        ("long", "returned more than 2 scores for 2"),
        ("one", "returned 1.0; expected a list"),
        ("dict", "returned {'a': 1, 'b': 2}; expected a list"),
        ("text", "returned 'ab'; expected a list"),
        ("endless", "returned more than 2"),
    ],
)
def test_a_result_of_another_form(reward, kind, found):
    function, lines = reward("whole")
    scores, failed = function.score(["p", "q"], ["a", "b"], {"kind": [kind, kind]})
    if kind == "short":  # right for a sample alone: what was wrong with the batch is said all the same
        assert scores.tolist() == [1, 1] and not failed.any() and len(lines) == 1
        assert found in lines[0] and "one by one, none failed" in lines[0]
        return
    assert failed.all() and (scores == 0).all() and len(lines) == 2
    assert found.replace("for 2", "for 1").replace("than 2", "than 1") in lines[0].replace(
        "list of 1", "list of 2"
    )


def test_a_batch_that_is_too_slow_as_a_whole_is_said_to_be(reward):
    function, lines = reward("slow_together", timeout_seconds=0.8)
    scores, failed = function.score(["p"] * 4, list("abcd"))
    assert scores.tolist() == [1] * 4 and not failed.any()
    assert len(lines) == 1 and "no answer within 0.8 s" in lines[0] and "First prompt 'p'" in lines[0]


def test_a_batch_of_hanging_samples_keeps_its_limit(reward):
    function, lines = reward("naughty", timeout_seconds=1.0)
    start = time.monotonic()
    scores, failed = function.score(["p"] * 40, ["fine"] + ["hang"] * 39)
    assert time.monotonic() - start < 2 + 8 * 1.0  # seconds for a restart, at the most
    assert scores.tolist() == [4] + [0] * 39 and failed.sum() == 39
    assert len(lines) == REPORTED + 1 and "39 of 40 samples" in lines[-1]


def test_long_and_controlling_text_is_quoted_in_reports(reward):
    function, lines = reward("naughty")
    function.score(["\x1b[2J\n" + "x" * 5000], ["raise"])
    assert len(lines[0]) < 400 and "\\x1b[2J\\n" in lines[0] and "\n" not in lines[0]


def test_fields_by_name(reward):
    function, _ = reward("takes")
    assert function.required == ["prompts", "completions", "label"]
    label = [{"text": "pa"}, {"text": "pb"}]
    scores, _ = function.score(["p", "p"], ["a", "a"], {"label": label, "unused": [object(), object()]})
    assert scores.tolist() == [1, 0]
    with pytest.raises(InputError, match="takes needs 'label'.*they give answer, completions, prompts"):
        function.score(["p"], ["a"], {"answer": ["x"]})
    with pytest.raises(ValueError, match="different lengths"):
        function.score(["p"], ["a"], {"label": label})
    everything, _ = reward("takes_all")
    odd = {"array": [np.arange(2), np.float32(1)], "time": [np.datetime64("2020-01-01"), b"x"]}
    assert everything.score(["p", "p"], ["a", "a"], odd)[0].tolist() == [3, 3]


def test_fields_that_cannot_be_sent_are_a_failure(reward):
    function, lines = reward("takes_all")
    loop = []
    loop.append(loop)
    _, failed = function.score(["p", "p"], ["a", "b"], {"x": [loop, 1]})
    assert failed.tolist() == [True, False] and "cannot be sent" in lines[0]


def test_rules_run_here_and_keep_the_same_promises(reward):
    function, lines = reward("exact_match:ignore_case=true")
    scores, failed = function.score(["p", "q", "r"], ["A", "b", "c"], {"answer": ["a", None, "d"]})
    assert scores.tolist() == [1, 0, 0] and failed.tolist() == [False, True, False]
    assert len(lines) == 1 and "answer is None" in lines[0] and "Prompt 'q'" in lines[0]
    with pytest.raises(InputError, match="needs 'answer'"):
        function.score(["p"], ["a"])


def test_a_regex_that_backtracks_for_ever(reward):
    function, lines = reward("regex:pattern=(a+)+$", timeout_seconds=1.5)
    scores, failed = function.score(["p"] * 3, ["aaa", "a" * 60 + "b", "c"])
    assert scores.tolist() == [1, 0, 0] and failed.tolist() == [False, True, False]
    assert len(lines) == 1 and "no answer within" in lines[0]


def test_maths_in_a_worker(reward):
    pytest.importorskip("math_verify")
    function, lines = reward("math:sample_seconds=1")
    scores, failed = function.score(
        ["p"] * 3, ["\\boxed{42}", "9**9**9**9", "41"], {"answer": ["42", "42", ""]}
    )
    assert scores.tolist() == [1, 0, 0] and failed.tolist() == [False, False, True]
    assert len(lines) == 1 and "cannot be read as mathematics" in lines[0]


@pytest.mark.parametrize(
    "spec, found",
    [
        ("no_such_module:f", "No module named 'no_such_module'\\. Correct"),
        ("broken_rewards:f", "No module named 'no_such_package' \\(broken_rewards.py, line 1\\)"),
        ("exiting_rewards:f", "the worker exited with status 4"),
        ("user_rewards:nothing", "no function 'nothing'"),
        ("user_rewards:wrong_names", "takes ps, cs; .*Give it an argument `completions`"),
    ],
)
def test_a_function_that_cannot_be_loaded_ends_the_run_at_the_start(reward, spec, found):
    with pytest.raises(InputError, match=found):
        reward(spec)


@pytest.mark.parametrize("settings", [{"timeout_seconds": 0}, {"timeout_seconds": float("nan")}])
def test_settings_are_checked(reward, settings):
    with pytest.raises(InputError, match="timeout_seconds"):
        reward("size", **settings)
    with pytest.raises(InputError, match="failure_score"):
        reward("size", failure_score=float("inf"))


def test_a_function_that_vanishes_does_not_end_the_run(reward, tmp_path):
    function, lines = reward("naughty")
    (tmp_path / "user_rewards.py").write_text("import no_such_package")
    scores, failed = function.score(["", ""], ["die", "b"])
    assert failed.all() and scores.tolist() == [0, 0] and "no_such_package" in lines[0]


def test_close_ends_the_worker_and_twice_is_once(reward):
    function, _ = reward("pid")
    pid = int(function.score([""], [""])[0][0])
    with function:
        pass
    assert gone(pid)
    function.close()


def test_a_hung_worker_is_killed_with_what_it_started(reward, tmp_path):
    function, _ = reward("child_and_hang", timeout_seconds=0.5)
    function.score([""], [str(tmp_path / "pids")])
    assert all(gone(int(pid)) for pid in (tmp_path / "pids").read_text().split())


@pytest.mark.parametrize("end", ["kill", "os._exit", "return"])
def test_no_worker_outlives_the_run(reward, tmp_path, end):
    """Not even one that hangs; and a script without a `__main__` guard is not run again by its worker."""
    reward("size")  # writes the module
    idle, leave = end == "return", "(sys.stdin.read(), os._exit(76))"
    script = tmp_path / "run.py"
    script.write_text(
        "import os, sys, threading\n"
        "from rlhf_jax.rewards.functions import RewardFunction\n"
        f"function = RewardFunction('user_rewards:{'pid' if idle else 'child_and_hang'}', print)\n"
        + (f"threading.Thread(target=lambda: {leave}).start()\n" if end == "os._exit" else "")
        + f"print(int(function.score([''], [{str(tmp_path / 'pids')!r}])[0][0]), flush=True)\n"
    )
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    environment = os.environ | {"PYTHONPATH": path}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen([sys.executable, script], env=environment, **pipes) as run:
        if idle:
            assert gone(int(run.stdout.read()))
            return
        for _ in range(200):
            if (tmp_path / "pids").exists() and len((tmp_path / "pids").read_text().split()) == 2:
                break
            time.sleep(0.05)
        if end == "kill":
            run.kill()
        run.stdin.close()
        run.wait(10)
    assert all(gone(int(pid)) for pid in (tmp_path / "pids").read_text().split())
