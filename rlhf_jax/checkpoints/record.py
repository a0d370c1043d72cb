"""The record of a step: its meta, metrics and every leaf's shape, dtype and digest, as sealed JSON beside the arrays.

Knows nothing of orbax's calls, of directories but the step's own, or of what is done about a bad record."""

import hashlib
import json
import math
import os

FILE = os.path.join("meta", "metadata")  # in a step's directory, where orbax puts the JSON item `meta`


def make(step: int, leaves: dict, digests: dict, meta: dict, metrics: dict | None) -> dict:
    """leaves, digests: by path. Metrics that are not finite count as absent."""
    return {
        "step": step,
        "meta": meta,
        "metrics": {name: _finite(value) for name, value in (metrics or {}).items()},
        "leaves": {
            name: {"shape": list(x.shape), "dtype": str(x.dtype), "digest": digests[name]}
            for name, x in leaves.items()
        },
    }


def sealed(content: dict) -> dict:
    """What is written to disk."""
    return {"content": content, "sha256": seal(content)}


def seal(content: dict) -> str:
    """So that one changed character of a meta item shows; it lists every leaf in order, so it seals the tree too."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def read(step_directory: str) -> tuple[dict | None, str | None]:
    """(content, None) or (None, what is wrong)."""
    file, name = os.path.join(step_directory, FILE), os.path.basename(step_directory)
    try:
        with open(file, encoding="utf-8") as opened:
            item = json.load(opened)
        content = item["content"]
        if item["sha256"] != seal(content):
            return None, f"{file}: not what was saved"
        if str(content["step"]) != name:
            return None, f"{file}: of step {content['step']}"
    except FileNotFoundError:
        return None, f"{file}: missing"
    except Exception as error:
        return None, f"{file}: {one_line(error)}"
    return content, None


def differences(stored: dict, asked: dict) -> list[str]:
    """One sentence for each leaf that is not as asked for. stored: the record's leaves; asked: arrays or shapes."""
    differ = [f"{name}: not in the checkpoint" for name in asked if name not in stored]
    differ += [f"{name}: in the checkpoint, not expected" for name in stored if name not in asked]
    for name in asked.keys() & stored.keys():
        found, expected = stored[name], asked[name]
        if (tuple(found["shape"]), found["dtype"]) != (expected.shape, str(expected.dtype)):
            differ.append(
                f"{name}: found {found['dtype']}{found['shape']}, "
                f"expected {expected.dtype}{list(expected.shape)}"
            )
    return sorted(differ)


def one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def _finite(value) -> float | None:
    value = float(value)
    return value if math.isfinite(value) else None
