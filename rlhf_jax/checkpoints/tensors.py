"""Safetensors files and the layouts of the tensors in them: read by slices, checked as a whole, written as a stream.

A Leaf says which stored tensors make one of our arrays and how their axes map. Nothing here holds more than one array
and one tensor at a time. Knows no model and no config: huggingface.py, peft.py and gguf.py make the leaves."""

import dataclasses
import functools
import json
import math
import os
import re
import shutil
import struct
import uuid
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.errors import InputError
from rlhf_jax.parallel import hosts

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_SHOWN = 30  # lines of a list of wrong tensors; a checkpoint of another model has hundreds


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of ours and the stored tensors it is made of.

    A stored tensor has one axis a group; a group is the axes of ours that are flattened into it. A linear map is
    stored [out, in] and ours is [*in, *out]: groups (out, in), transposed.
    """

    path: tuple[str, ...]
    names: tuple[str, ...]  # one a layer, or a single one
    groups: tuple[tuple[int, ...], ...]
    transposed: bool = False
    stacked: bool = False  # ours has a leading axis of layers

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return tuple(math.prod(group) for group in self.groups)

    @property
    def shape(self) -> tuple[int, ...]:
        inner = sum(self.groups[::-1] if self.transposed else self.groups, ())
        return ((len(self.names),) if self.stacked else ()) + inner

    def stored_slices(self, slices) -> tuple[slice, ...]:
        """The part of a stored tensor that covers these slices of ours (without the layer axis)."""
        parts = []
        for group, own in zip(self.groups, self._by_group(slices), strict=True):
            inner = math.prod(group[1:])
            start, stop, _ = own[0].indices(group[0])
            parts.append(slice(start * inner, stop * inner))
        return tuple(parts)

    def from_stored(self, array, slices=None):
        """Stored axes to ours. `array` is a whole tensor, or what `stored_slices(slices)` cut from one."""
        slices = tuple(slices or (slice(None),) * sum(map(len, self.groups)))
        shape, cut = (), ()
        for group, own in zip(self.groups, self._by_group(slices), strict=True):
            start, stop, _ = own[0].indices(group[0])
            shape += (stop - start, *group[1:])
            cut += (slice(None), *own[1:])
        array = array.reshape(shape)[cut]
        return array.transpose(self._order(len(self.groups[0]))) if self.transposed else array

    def to_stored(self, array):
        if self.transposed:
            array = array.transpose(self._order(len(self.groups[1])))
        return array.reshape(self.stored_shape)

    def _by_group(self, slices):
        groups = self.groups[::-1] if self.transposed else self.groups
        parts = []
        for group in groups:
            parts.append(tuple(slices[: len(group)]))
            slices = slices[len(group) :]
        return parts[::-1] if self.transposed else parts

    def _order(self, first):
        rank = sum(map(len, self.groups))
        return (*range(first, rank), *range(first))


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file: opened for each read, so that no mapping of a large file stays in memory."""

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]

    def read(self, slices=None) -> np.ndarray:
        from safetensors import safe_open

        with safe_open(self.file, framework="numpy") as file:
            whole = file.get_slice(self.name)
            return whole[tuple(slices)] if slices else whole[:]


def inspect(file: str) -> dict[str, Stored]:
    """What a safetensors file says it holds; its data is not read. Raises: InputError if it is not a sound file."""
    from safetensors import SafetensorError, safe_open

    if not os.path.isfile(file):
        raise InputError(f"{file} does not exist. Copy it from where the checkpoint was published.")
    with open(file, "rb") as raw:
        start = raw.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise InputError(
            f"{file} is a Git LFS pointer, not the weights. Run `git lfs pull` in the repository it was cloned from, "
            "or download the file itself."
        )
    try:
        with safe_open(file, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
            return {n: Stored(file, n, s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{file} is not a complete safetensors file ({error}). It may be cut short or damaged: copy it again."
        ) from None


def check(found: dict[str, Stored], leaves: Iterable[Leaf], where: str, hint: str) -> None:
    """Raises: one InputError that lists every missing, surplus and mis-shaped tensor and every unusable dtype."""
    expected = {name: leaf.stored_shape for leaf in leaves for name in leaf.names}
    problems = [f"{n}: missing, expected {list(s)}" for n, s in expected.items() if n not in found]
    for name, stored in found.items():
        if name not in expected:
            problems.append(f"{name}: found {list(stored.shape)}, expected no such tensor")
        elif stored.shape != expected[name]:
            problems.append(f"{name}: found {list(stored.shape)}, expected {list(expected[name])}")
        elif stored.dtype not in DTYPES:
            problems.append(f"{name}: found dtype {stored.dtype}, expected one of {', '.join(DTYPES)}")
    if problems:
        more = [f"... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        listed = "\n  ".join(problems[:_SHOWN] + more)
        raise InputError(f"{where}: {len(problems)} tensors are not as the config says. {hint}\n  {listed}")


def gather(
    leaves: list[Leaf], read: Callable, dtype, shardings: dict | None = None, finish: Callable | None = None
) -> dict:
    """The tree of arrays. The largest come first, so that the copy to the device never doubles the whole.

    Args:
      read: (stored name, slices of it) -> numpy array.
      shardings: a tree like the result with a jax.sharding.Sharding for each array; None puts all on one device.
        Each stored tensor is then cut for the devices of this process only.
      finish: (path, array) -> {name: array} that stands in its place, before the next is read.
    """
    dtype = jnp.dtype(dtype)
    tree = {}
    for leaf in sorted(leaves, key=lambda leaf: -math.prod(leaf.shape)):
        sharding = shardings
        for key in leaf.path if shardings is not None else ():
            sharding = sharding[key]
        made = _make(leaf, read, dtype, sharding)
        parts = {leaf.path[-1]: made} if finish is None else finish(leaf.path, made)
        for name, part in parts.items():
            _put(tree, (*leaf.path[:-1], name), part)
    return tree


def _make(leaf, read, dtype, sharding):
    if sharding is None:
        whole = (slice(None),) * len(leaf.shape)
        (array,) = _fill(leaf, read, dtype, [whole])
        return jax.block_until_ready(jax.device_put(array))
    places = sharding.addressable_devices_indices_map(leaf.shape).values()
    parts = host_parts(leaf, read, dtype, places)
    array = jax.make_array_from_callback(leaf.shape, sharding, lambda index: parts[_key(index, leaf.shape)])
    return jax.block_until_ready(array)


def host_parts(leaf: Leaf, read: Callable, dtype, indices) -> dict:
    """{(start, stop) of each axis: host array} of the parts of an array that some devices hold, each read once.

    read: as of `gather`. indices: of the devices, as a Sharding's devices_indices_map gives them.
    """
    wanted = {_key(index, leaf.shape): index for index in indices}
    return dict(zip(wanted, _fill(leaf, read, dtype, list(wanted.values())), strict=True))


def _fill(leaf, read, dtype, indices):
    """One host array for each index of ours; every stored tensor is visited once."""
    ranges = [_key(index, leaf.shape) for index in indices]
    out = [_aligned([stop - start for start, stop in r], dtype) for r in ranges]
    for number, name in enumerate(leaf.names):
        for array, own in zip(out, ranges, strict=True):
            (first, last), inner = (own[0], own[1:]) if leaf.stacked else ((0, 1), own)
            if not first <= number < last:
                continue
            slices = tuple(slice(*r) for r in inner)
            block = leaf.from_stored(read(name, leaf.stored_slices(slices)), slices)
            target = array[number - first] if leaf.stacked else array
            target[...] = block.astype(dtype) if block.dtype == np.float16 else block
    return out


def _aligned(shape, dtype):
    """An empty array that starts at a multiple of 64 bytes: on a CPU jax then takes it over instead of copying it."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _key(index, shape):
    return tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))


def _put(tree, path, value):
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def get(tree: dict, path: tuple[str, ...]):
    for key in path:
        tree = tree[key]
    return tree


def stored_arrays(leaves: list[Leaf], tree: dict) -> list[tuple[str, tuple, np.dtype, Callable]]:
    """(name, stored shape, dtype, function that makes the array) in order of name, for `write`."""
    items = []
    for leaf in leaves:
        array = get(tree, leaf.path)
        if tuple(array.shape) != leaf.shape:
            raise InputError(
                f"{'/'.join(leaf.path)} has shape {tuple(array.shape)}; the config says {leaf.shape}."
            )
        for number, name in enumerate(leaf.names):
            # One layer at a time: a host copy of a whole stacked array would stay with it.
            part = functools.partial(_part, array, number if leaf.stacked else None)
            make = (lambda own, p: lambda: own.to_stored(p()))(leaf, part)
            items.append((name, leaf.stored_shape, np.dtype(array.dtype), make))
    return sorted(items, key=lambda item: _natural(item[0]))


def _part(array, number):
    return np.asarray(hosts.gather(array if number is None else array[number]))


def write(file: str, items) -> None:
    """A safetensors file, one tensor in memory at a time. items: as `stored_arrays` returns them; of several processes
    each hands over its parts, and the first one writes."""
    if not hosts.is_first():
        for *_, make in items:
            make()
        return
    codes = {name: code for code, name in DTYPES.items()}
    header, offset = {"__metadata__": {"format": "pt"}}, 0  # transformers refuses a file that does not say so
    for name, shape, dtype, _ in items:
        if dtype.name not in codes:
            raise InputError(f"{name} has dtype {dtype.name}; a checkpoint holds one of {', '.join(codes)}.")
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": codes[dtype.name], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for *_, make in items:
            out.write(np.ascontiguousarray(make()).view(np.uint8).reshape(-1).data)


def install(path: str, make: Callable[[str], None], stale: str, last: str) -> None:
    """Write files through a temporary directory, so that a reader never sees half of them.

    Args:
      make: writes into the directory it is given.
      stale: pattern of file names that an earlier save may have left in `path` and that the new files replace.
      last: the file that is moved last, because its presence says that all are there.
    """
    path = os.path.abspath(path)
    if not hosts.is_first():  # it hands over its parts
        make("")
        hosts.sync(last)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    fresh = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{uuid.uuid4().hex[:8]}.new")
    os.mkdir(fresh)
    try:
        make(fresh)
        if not os.path.exists(path):
            os.rename(fresh, path)
        else:
            names = sorted(os.listdir(fresh), key=lambda name: (name == last, name))
            for name in os.listdir(path):
                if re.fullmatch(stale, name) and name not in names:
                    os.remove(os.path.join(path, name))
            for name in names:
                os.replace(os.path.join(fresh, name), os.path.join(path, name))
        hosts.sync(last)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def write_json(directory: str, name: str, value: dict) -> None:
    if not hosts.is_first():
        return
    with open(os.path.join(directory, name), "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, allow_nan=False)
        file.write("\n")


def read_json(file: str, what: str) -> dict:
    try:
        with open(file, encoding="utf-8") as opened:
            value = json.load(opened)
    except FileNotFoundError:
        raise InputError(f"{file} does not exist; expected {what}.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not JSON ({error}); expected {what}.") from None
    if not isinstance(value, dict):
        raise InputError(f"{file}: expected a JSON object, {what}.")
    return value


def _natural(name):
    """layers.2 before layers.10."""
    return [int(part) if part.isdigit() else part for part in name.split(".")]
