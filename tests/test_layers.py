"""Which room may import which, read from the imports themselves (those for type checking count too)."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LAYERS = [
    {"errors", "types"},
    {"models", "parallel", "losses"},
    {"checkpoints", "data"},
    {"sampling"},
    {"rewards"},
    {"training", "evaluation"},
]
# parallel lays out what models define, so it may read them; nothing else crosses a row.
ALLOWED_SIDEWAYS = {("parallel", "models"), ("checkpoints", "data")}
OPENERS = ("data", "checkpoints", "evaluation")  # rooms that open files; in training these files alone do
TRAINING_OPENERS = ("metrics.py", "loop.py", "workdir.py")
CONFIG_READER = "models/config.py"  # LlamaConfig.from_huggingface takes the path of a config.json

FILES = sorted((ROOT / "rlhf_jax").rglob("*.py"))


def room_of(path):
    parts = path.relative_to(ROOT / "rlhf_jax").parts
    return parts[0].removesuffix(".py")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def level(room):
    return next(i for i, rooms in enumerate(LAYERS) if room in rooms)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    room = room_of(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] in ("experiments", "configs"):
            pytest.fail(f"{path} imports {name}: nothing imports experiments or configs")
        if parts[0] != "rlhf_jax" or room == "__init__" or parts[1] == room:
            continue
        if room == "losses":
            pytest.fail(f"{path} imports {name}: losses import nothing of ours but losses")
        other = parts[1]
        assert level(other) < level(room) or (room, other) in ALLOWED_SIDEWAYS, f"{path} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_code_is_safe_and_files_are_opened_where_they_should_be(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        assert name not in (
            "eval",
            "exec",
            "pickle.load",
            "pickle.loads",
            "marshal.loads",
            "yaml.load",
            "os.system",
        )
        for keyword in node.keywords:
            if keyword.arg in ("trust_remote_code", "shell"):
                assert ast.unparse(keyword.value) == "False", f"{path}: {ast.unparse(node)}"
        if name == "open":
            room = room_of(path)
            named = room == "training" and path.name in TRAINING_OPENERS
            assert room in OPENERS or named or path.as_posix().endswith(CONFIG_READER), f"{path} opens a file"


def test_only_training_run_and_stages_read_the_config_object():
    readers = (
        "run.py",
        "stages.py",
        "online.py",
        "offline.py",
        "preferences.py",
        "checks.py",
        "reward_stage.py",
        "text_reward_stage.py",
        "constitution.py",
        "phases.py",
        "planning.py",
        "plan_fixes.py",
    )
    for path in FILES:
        if "ConfigDict" in path.read_text() or "run.config." in path.read_text():
            assert room_of(path) == "training" and path.name in readers, path
