"""A checkpoint's parameters, written and read piece by piece, so that no whole model is ever in memory.

Orbax writes the checkpoint with arrays of one element; then each is made again, with its shape, in the store that Orbax keeps
them in (zarr in OCDBT, through tensorstore), cut along layers and experts. To Orbax it is a checkpoint like any other.
"""

import json
import math
import os
import pathlib
import shutil
from typing import Any, Mapping

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from research.errors import InputError
from research.params import unflatten
from research.schema import CHECKPOINTS, SCHEMA_VERSION
from research.training.checksums import checksum_of_part
from research.training.manifest import check_step, complete_manifest, write_manifest
from research.training.restore import checkpoint_step
from research.training.workdir import write_json

ITEMS = ("params", "meta")
_SUMMED = 2**20  # elements whose checksum is computed at a time: they are copied for it
_META = ("meta", "metadata")  # where Orbax keeps the composite's JSON item


def _spec(directory: pathlib.Path, path: str) -> dict[str, Any]:
    # An array's key: its path with dots, as Orbax writes it.
    store = {"driver": "ocdbt", "base": directory.absolute().as_uri() + "/", "path": path.replace("/", ".") + "/"}
    return {"driver": "zarr", "kvstore": store, "recheck_cached_data": "open"}


def _index_of(index: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """How many elements come before array[index]."""
    return sum(i * math.prod(shape[axis + 1:]) for axis, i in enumerate(index))


def _checksum(value: np.ndarray, start: int) -> int:
    """`checksum_of_part`, a piece at a time."""
    flat = value.reshape(-1)
    return sum(checksum_of_part(jnp.asarray(flat[i:i + _SUMMED]), start + i) for i in range(0, flat.size, _SUMMED))


class ParameterWriter:
    """Writes checkpoint `step` of `workdir`: every part of every array once, then `commit`. Nothing is seen of it before."""

    def __init__(self, workdir: pathlib.Path, arrays: Mapping[str, tuple[tuple[int, ...], np.dtype]], pieces: Mapping[str, int],
                 step: int = 0):
        """`arrays`: path -> (shape, dtype). `pieces`: path -> how many leading axes `write`'s indices have."""
        self._arrays, self._step = arrays, step
        self._final = workdir / CHECKPOINTS / str(step)
        self._working = workdir / CHECKPOINTS / f".{step}.partial"
        shutil.rmtree(self._working, ignore_errors=True)
        self._working.mkdir(parents=True)
        skeleton = unflatten({path: np.zeros((1,), dtype) for path, (_, dtype) in arrays.items()})
        with ocp.CheckpointManager(self._working.absolute(), item_names=ITEMS) as manager:
            manager.save(step, args=ocp.args.Composite(params=ocp.args.StandardSave(skeleton), meta=ocp.args.JsonSave({})))
        self._missing = {path: math.prod(shape[:pieces[path]]) for path, (shape, _) in arrays.items()}
        self._sums = dict.fromkeys(arrays, 0)
        self._open = {path: self._make(path, pieces[path]) for path in arrays}

    def _make(self, path: str, leading: int) -> Any:
        shape, dtype = self._arrays[path]
        metadata = {"shape": list(shape), "chunks": [1] * leading + list(shape[leading:]), "dtype": _zarr_name(dtype),
                    "compressor": {"id": "zstd", "level": 1}}
        spec = _spec(self._working / str(self._step) / "params", path) | {"metadata": metadata}
        return tensorstore.open(spec, create=True, delete_existing=True).result()

    def write(self, path: str, index: tuple[int, ...], value: np.ndarray) -> None:
        shape, dtype = self._arrays[path]
        value = value.astype(dtype, copy=False)
        self._sums[path] += _checksum(value, _index_of(index, shape))
        self._open[path][index].write(value).result()
        self._missing[path] -= 1

    def commit(self) -> None:
        left = [path for path, count in self._missing.items() if count]
        if left:
            raise ValueError(f"parts of {left[0]} were not written")
        meta = {"schema": SCHEMA_VERSION, "step": self._step,
                "params": {path: [list(shape), str(dtype)] for path, (shape, dtype) in self._arrays.items()}}
        directory = epath.Path(self._working / str(self._step))
        write_json(directory.joinpath(*_META), meta)
        write_manifest(directory, self._step, {f"params/{path}": total % 2**32 for path, total in self._sums.items()})
        complete_manifest(directory, self._step)
        os.replace(self._working / str(self._step), self._final)
        self.discard()

    def discard(self) -> None:
        """Removes what isn't committed."""
        shutil.rmtree(self._working, ignore_errors=True)


class ParameterReader:
    """Reads the parameters of a checkpoint of `workdir` (the latest by default) in pieces, and checks their checksums.

    They are the averaged ones where the run averages. What was stored as one chunk is held until another of its array is read:
    a layer's part of an imported model, or of a run's weights that aren't small.
    """

    def __init__(self, workdir: pathlib.Path, step: int | None = None):
        self.step = checkpoint_step(workdir, step, "--input")
        directory = workdir.absolute() / CHECKPOINTS / str(self.step)
        self._signed = check_step(epath.Path(directory), self.step, items=("params", "averaged", "meta"))
        self._meta = json.loads(directory.joinpath(*_META).read_text(encoding="utf-8"))
        self._item = "averaged" if "averaged" in self._meta else "params"
        self._directory = directory / self._item
        self.arrays = {path: (tuple(shape), np.dtype(jnp.dtype(dtype)))
                       for path, (shape, dtype) in self._meta[self._item].items()}
        self._stores: dict[str, Any] = {}
        self._held: dict[str, tuple[tuple[int, ...], np.ndarray]] = {}  # path -> (where it begins, what was read last)
        self._sums = dict.fromkeys(self.arrays, 0)

    def read(self, path: str, index: tuple[int, ...]) -> np.ndarray:
        """array[index]; every part must be read once before `verify`."""
        if path not in self._stores:
            self._stores[path] = self._open(path)
        store, (shape, _) = self._stores[path], self.arrays[path]
        chunk = store.chunk_layout.read_chunk.shape[:len(index)]
        start = tuple(i - i % size for i, size in zip(index, chunk))
        if path not in self._held or self._held[path][0] != start:
            self._held.pop(path, None)  # its memory, before the next comes
            rows = tuple(slice(i, min(i + size, whole)) for i, size, whole in zip(start, chunk, shape))
            self._held[path] = start, np.asarray(store[rows].read().result())
        value = self._held[path][1][tuple(i - first for i, first in zip(index, start))]
        self._sums[path] += _checksum(value, _index_of(index, shape))
        return value

    def _open(self, path: str) -> Any:
        try:
            store = tensorstore.open(_spec(self._directory, path), read=True).result()
        except ValueError as error:
            raise InputError("--input", f"{path} of step {self.step} can't be read ({str(error).splitlines()[0]})",
                             "restore the run's files") from None
        if (tuple(store.shape), store.dtype.numpy_dtype) != self.arrays[path]:
            raise InputError("--input", f"{path} isn't the array that its checkpoint says", "restore the run's files")
        return store

    def release(self) -> None:
        """Frees what is held."""
        self._held.clear()

    def verify(self) -> None:
        """Raises InputError: a part wasn't what was saved."""
        for path, total in self._sums.items():
            if self._signed["arrays"][f"{self._item}/{path}"] != total % 2**32:
                raise InputError("--input", f"{path} of step {self.step} doesn't have the checksum it was saved with",
                                 "restore the run's files")


def _zarr_name(dtype: np.dtype) -> str:
    return "bfloat16" if dtype == jnp.bfloat16 else dtype.str
