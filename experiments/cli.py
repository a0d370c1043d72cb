"""What every command shares: flags, configs with overrides, and errors as one line and an exit status.

Imports nothing heavy, so that --help answers at once."""

import argparse
import ast
import difflib
import importlib.machinery
import importlib.util
import math
import os
import sys
import traceback

from rlhf_jax.errors import InputError, Interrupted, RunError, StorageError


def parser(description: str) -> argparse.ArgumentParser:
    """Flags of every command; --config.KEY=VALUE overrides come on top."""
    made = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Any key of the config may be overridden: --config.ppo.kl_coeff=0.1",
        allow_abbrev=False,
    )
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return made


def add_processes(made: argparse.ArgumentParser) -> None:
    """Flags of the commands that may run as several processes."""
    group = made.add_argument_group(
        "several processes",
        "the same command on each; SLURM and Open MPI need no flag, a TPU VM --distributed",
    )
    group.add_argument("--distributed", action="store_true", help="find the others by what started them")
    group.add_argument(
        "--coordinator_address", metavar="HOST:PORT", help="of process 0, where that is not known"
    )
    group.add_argument("--num_processes", type=int, help="of all; with --coordinator_address")
    group.add_argument("--process_id", type=int, help="of this one, from 0; with --coordinator_address")


def join_processes(flags: argparse.Namespace) -> None:
    """Before anything else uses a device, and before errors: one told to all ends all."""
    signs = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "SLURM_STEP_NUM_TASKS",
             "OMPI_COMM_WORLD_SIZE", "TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")  # fmt: skip
    asked = (flags.coordinator_address, flags.num_processes, flags.process_id)
    if flags.distributed or asked != (None, None, None) or any(name in os.environ for name in signs):
        from rlhf_jax.parallel import hosts  # imports jax, which a wrong flag need not wait for

        hosts.start(*asked, detect=flags.distributed)


def parse(made: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(flags, overrides as KEY=VALUE). Anything else is an error, never ignored."""
    flags, rest = made.parse_known_args(argv)
    overrides, words = [], list(rest)
    while words:
        word = words.pop(0)
        if not word.startswith("--config."):
            raise InputError(
                f"'{word}' is not a flag of this command; overrides look like --config.KEY=VALUE."
            )
        if "=" not in word:
            if not words or words[0].startswith("--"):
                raise InputError(f"'{word}' has no value; write {word}=VALUE.")
            word = f"{word}={words.pop(0)}"
        overrides.append(word.removeprefix("--config."))
    return flags, overrides


def load_config(spec: str, overrides: list[str]):
    """The config of FILE.py[:SIZE] with overrides, locked. Raises InputError naming file, key or value."""
    path, _, argument = spec.partition(":")
    if not os.path.isfile(path):
        raise InputError(
            f"--config: {path} does not exist (expected a Python file with get_config, then :SIZE)."
        )
    loader = importlib.machinery.SourceFileLoader("rlhf_jax_config", path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    try:
        loader.exec_module(module)
        config = module.get_config(argument) if argument else module.get_config()
    except ValueError as error:
        raise InputError(f"--config={spec}: {error}.") from None
    except Exception as error:  # of the file's own code
        raise InputError(
            f"--config={spec}: {type(error).__name__}: {error}. Expected a Python file with get_config(size)."
        ) from error
    return override(config, overrides)


def load_saved(workdir: str, overrides: list[str]):
    """The config of a run that is there, from its config.json, with overrides, locked."""
    from ml_collections import config_dict

    from rlhf_jax.training.workdir import read_json

    path = os.path.join(workdir, "config.json")
    if not os.path.isfile(path):
        raise InputError(f"{path} does not exist; {workdir} is not the directory of a run that was started.")

    def tuples(x):
        if isinstance(x, dict):
            return {k: tuples(v) for k, v in x.items()}
        return tuple(x) if isinstance(x, list) else x

    return override(config_dict.ConfigDict(tuples(read_json(path))), overrides)


def override(config, overrides: list[str]):
    """Set KEY=VALUE pairs, each of the type it has; then lock."""
    for text in overrides:
        key, _, value = text.partition("=")
        *path, leaf = key.split(".")
        node = config
        for i, name in enumerate([*path, leaf]):
            if not hasattr(node, "keys") or name not in node:
                known = [".".join([*path[:i], other]) for other in node] if hasattr(node, "keys") else []
                near = difflib.get_close_matches(key, known, 1) or difflib.get_close_matches(
                    key, flat(config), 1
                )
                hint = f"did you mean {near[0]}?" if near else f"keys here: {', '.join(known) or 'none'}."
                raise InputError(f"--config.{key}: no such key; {hint}")
            if i < len(path):
                node = node[name]
        with config.unlocked():
            node[leaf] = convert(key, value, node[leaf])
    return config.lock()


def flat(config, prefix="") -> dict:
    """{dotted key: value} of the leaves."""
    leaves = {}
    for name, value in config.items():
        leaves |= flat(value, f"{prefix}{name}.") if hasattr(value, "items") else {prefix + name: value}
    return leaves


def convert(key: str, text: str, old):
    """`text` as a value of the type of `old`."""
    if hasattr(old, "items") and not key.startswith("logging.tags."):  # those are dicts that a user fills
        near = next(iter(old.keys()), "KEY")
        raise InputError(f"--config.{key} is a section; set its keys, as in --config.{key}.{near}=VALUE.")
    if isinstance(old, str):
        return text
    spelled = {"true": True, "false": False}.get(text.strip().lower(), None)
    try:
        value = spelled if spelled is not None else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = tuple(part.strip() for part in text.split(",")) if isinstance(old, tuple) else None
    if isinstance(old, tuple) and not isinstance(value, tuple):
        value = tuple(value) if isinstance(value, list) else (value,) if value is not None else None
    if isinstance(old, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(old) and not (hasattr(old, "items") and isinstance(value, dict)):
        raise InputError(f"--config.{key}: {text!r} is not a {type(old).__name__} (it is {old!r} now).")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"--config.{key}: {text!r} is not a finite number.")
    return value


def main(command, argv=None) -> None:
    """Run `command(argv)` and exit: 0, or the status of the error, told in one message on standard error."""
    argv = sys.argv[1:] if argv is None else argv
    # A hub that cannot be reached should say so once, not after a minute of retries in the background.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # That PyTorch is missing is as it should be.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        command(argv)
        if _hosts() is not None:
            _hosts().finish()
    except RunError as error:
        if isinstance(error, StorageError) and _hosts() is not None:
            _hosts().wait_for_news()
        _say(error, argv)
        _exit(error.status, error)
    except OSError as error:
        told = f"{error}. What was saved before is kept; run the same command again once it is mended."
        _say(told, argv)
        _exit(StorageError.status, told)
    except KeyboardInterrupt:
        _say("interrupted before anything was started", argv)
        _exit(Interrupted.status, "interrupted")
    except BaseException as error:  # a bug; of one process alone the interpreter tells it
        if _hosts() is None or not _hosts().several():
            raise
        _hosts().wait_for_news()
        traceback.print_exc()
        _exit(1, f"{type(error).__name__}: {error}")
    sys.stdout.flush()


def _hosts():
    """parallel.hosts, if this command has had to do with it."""
    return sys.modules.get("rlhf_jax.parallel.hosts")


def _say(error, argv):
    if "--debug" in argv:
        traceback.print_exc()
    who = _hosts().name() if _hosts() is not None else ""
    print(f"error: {who + ': ' if who else ''}{error}", file=sys.stderr, flush=True)


def _exit(status, why):
    sys.stdout.flush()
    if _hosts() is not None:
        _hosts().leave(status, str(why))
    # A failed asynchronous save would hold the interpreter for minutes at exit.
    os._exit(status) if status in (74, 76) else sys.exit(status)
