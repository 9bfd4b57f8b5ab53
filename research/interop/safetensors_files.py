"""Directories of safetensors files, read and written one tensor at a time. Pickles are never opened.

A file is the length of its header (8 bytes, little endian), the header (JSON: name -> dtype, shape, where its bytes begin and
end after the header), then the bytes. A model in several files has an index beside them that says which tensor is where.
https://huggingface.co/docs/safetensors. The package of that name writes a file only from tensors that are all in memory.
"""

import dataclasses
import json
import math
import os
import pathlib
from typing import Any, Callable, Iterator, Mapping, NamedTuple

import ml_dtypes
import numpy as np

from research.errors import InputError

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_LONGEST_HEADER = 100_000_000  # bytes; the package's own bound


class Entry(NamedTuple):
    file: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # byte offset in the file


@dataclasses.dataclass(frozen=True)
class TensorFiles:
    """The tensors of a model's directory by name; nothing but headers is read before `read`."""

    entries: Mapping[str, Entry]

    @classmethod
    def open(cls, directory: pathlib.Path) -> "TensorFiles":
        """Raises InputError: no safetensors file, one that is cut or malformed, a pickle, or a path out of `directory`."""
        if (directory / INDEX).exists():
            return cls(_indexed(directory))
        if (directory / ONE_FILE).exists():
            return cls(_header(inside(directory, ONE_FILE)))
        pickles = sorted(path.name for path in directory.iterdir() if path.suffix in _PICKLES) if directory.is_dir() else []
        if pickles:
            raise InputError("--input", f"{directory / pickles[0]} is a pickle, which could run any code when it is read",
                             "save the model as safetensors (save_pretrained does)")
        raise InputError("--input", f"{directory} has no {ONE_FILE} and no {INDEX}", "name a model's directory")

    def read(self, name: str) -> np.ndarray:
        """Raises InputError, as `dtype` does."""
        entry, dtype = self.entries[name], self.dtype(name)
        count = math.prod(entry.shape)
        with open(entry.file, "rb") as file:
            file.seek(entry.start)
            array = np.fromfile(file, dtype, count)
        if array.size != count:
            raise _broken(entry.file, f"ends inside {name}")
        return array.reshape(entry.shape)

    def dtype(self, name: str) -> np.dtype:
        """Raises InputError: the tensor is of a kind that isn't converted (quantized, integers)."""
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise InputError("--input", f"{name} is {entry.dtype}", f"convert it to one of {', '.join(DTYPES)}")
        return DTYPES[entry.dtype]


def inside(directory: pathlib.Path, name: str) -> pathlib.Path:
    """directory / name, which must not lead out of it, by its name or by a link. A hub cache's links to its own blobs may.

    Raises:
      InputError: it does, it isn't a file, or it is a pickle.
    """
    unusable = InputError("--input", f"{name[:80]!r} can't be the name of a file", "download the model again")
    if not name.isprintable():  # NUL, half a surrogate pair, a new line in our one line
        raise unusable
    bare = pathlib.PurePath(name)
    root = directory.resolve()
    roots = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]
    path = directory / name
    try:
        resolved, is_file = path.resolve(), path.is_file()
    except (OSError, RuntimeError):  # too long, links in a ring
        raise unusable from None
    if bare.is_absolute() or ".." in bare.parts or not any(resolved.is_relative_to(r) for r in roots):
        raise InputError("--input", f"{name!r} leads out of {directory}", "keep the model's files in its directory")
    if bare.suffix in _PICKLES:
        raise InputError("--input", f"{path} is a pickle, which could run any code when it is read", "save it as safetensors")
    if not is_file:
        raise InputError("--input", f"{path} is missing", "download the model again")
    return path


def read_json(directory: pathlib.Path, name: str) -> dict[str, Any]:
    """A JSON file of `directory` that holds a table. Raises InputError."""
    path = inside(directory, name)
    try:
        if path.stat().st_size > _LONGEST_HEADER:
            raise _broken(path, f"is larger than {_LONGEST_HEADER} bytes")
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _broken(path, f"is not JSON ({error})") from None
    if not isinstance(data, dict):
        raise _broken(path, "is not a table of fields")
    return data


def _broken(path: pathlib.Path, problem: str) -> InputError:
    return InputError("--input", f"{path} {problem}", "download or save it again")


def _indexed(directory: pathlib.Path) -> dict[str, Entry]:
    index = read_json(directory, INDEX)
    weight_map = index["weight_map"] if "weight_map" in index else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise _broken(directory / INDEX, "has no weight_map from tensors to files")
    entries: dict[str, Entry] = {}
    for file in sorted(set(weight_map.values())):
        found = _header(inside(directory, file))
        for name in found:
            if name not in weight_map or weight_map[name] != file:
                raise _broken(directory / INDEX, f"doesn't say that {name} is in {file}")
        entries |= found
    for name, file in weight_map.items():
        if name not in entries:
            raise _broken(directory / file, f"has no {name}, which the index says it has")
    return entries


def _header(path: pathlib.Path) -> dict[str, Entry]:
    """Every tensor must lie in the file, as long as its dtype and shape say, without gaps or overlaps."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise _broken(path, "is cut or is no safetensors file")
            text = file.read(length)
    except OSError as error:
        raise _broken(path, f"can't be read ({error})") from None
    try:
        header = json.loads(text)
        tensors = {name: (str(t["dtype"]), _whole(t["shape"]), *_whole(t["data_offsets"], 2))
                   for name, t in header.items() if name != "__metadata__"}
        spans = sorted((start, end, name) for name, (_, _, start, end) in tensors.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _broken(path, "has a broken header") from None
    if bad := [name for name in tensors if not name.isprintable()]:
        raise _broken(path, f"has a broken header: no tensor is called {bad[0]!r}")
    end = 0
    for start, stop, name in spans:
        dtype, shape = tensors[name][:2]
        if start != end or stop < start or min(shape, default=0) < 0:
            raise _broken(path, f"has a broken header at {name}")
        if dtype in DTYPES and stop - start != DTYPES[dtype].itemsize * math.prod(shape):
            raise _broken(path, f"says that {name} of shape {list(shape)} has {stop - start} bytes")
        end = stop
    if 8 + length + end != size:
        raise _broken(path, f"is {size} bytes long, its header says {8 + length + end}")
    return {name: Entry(path, dtype, shape, 8 + length + start) for name, (dtype, shape, start, _) in tensors.items()}


def _whole(values: Any, count: int | None = None) -> tuple[int, ...]:
    """Raises ValueError: not a list of whole numbers, or of another length."""
    if not isinstance(values, list) or any(type(x) is not int for x in values) or (count or len(values)) != len(values):
        raise ValueError(values)
    return tuple(values)


def write(directory: pathlib.Path, tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
          value: Callable[[str], np.ndarray], shard_bytes: int) -> Iterator[str]:
    """Writes `tensors` (name -> dtype, shape) in order, calling `value` for one at a time; yields each name when it is written.

    One file, or, above `shard_bytes`, several with an index; a tensor is never cut.
    """
    sizes = {name: dtype.itemsize * math.prod(shape) for name, (dtype, shape) in tensors.items()}
    shards: list[list[str]] = [[]]
    for name in tensors:
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + sizes[name] > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    files = [ONE_FILE] if len(shards) == 1 else [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, names in zip(files, shards):
        header, start = {"__metadata__": {"format": "pt"}}, 0
        for name in names:
            dtype, shape = tensors[name]
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, start + sizes[name]]}
            start += sizes[name]
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(directory / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                array = np.ascontiguousarray(value(name))
                if (array.dtype, array.shape) != tensors[name]:
                    raise ValueError(f"{name}: {array.dtype}{array.shape} is not {tensors[name]}")
                array.tofile(out)
                del array  # its memory, before the next is made
                yield name
            out.flush()
            os.fsync(out.fileno())
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
