"""Arrays that took long to compute and may be computed again: one .npz with what they were made of.

A file of anything else, or that is not what was written, counts as none. Knows nothing of what the arrays mean."""

import hashlib
import json
import os

import numpy as np

from rlhf_jax.errors import StorageError

SEAL = "sealed"  # the entry beside the arrays


def save(path: str, made_of: dict, arrays: dict[str, np.ndarray]) -> None:
    """Whole or not at all. made_of: JSON.  Raises: StorageError."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path + ".new", "wb") as file:
            np.savez(file, **arrays, **{SEAL: np.array(_seal(made_of, arrays))})
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".new", path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error}. Make room and run again.") from error


def load(path: str, made_of: dict) -> dict[str, np.ndarray] | None:
    """The arrays; None if there is no such file, or it is damaged or made of something else."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = dict(file)
    except Exception:  # zipfile and numpy raise of every class; whatever it is, the arrays are made again
        return None
    seal = found.pop(SEAL, None)
    return found if seal is not None and str(seal) == _seal(made_of, found) else None


def _seal(made_of, arrays):
    sealed = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode())
    for name, x in sorted(arrays.items()):
        sealed.update(f"{name} {x.dtype} {x.shape}".encode() + np.ascontiguousarray(x).tobytes())
    return sealed.hexdigest()
