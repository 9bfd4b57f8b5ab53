"""The `jsonl` source: one JSON object a line, plain or gzipped."""

import dataclasses
import json
import pathlib
from typing import Any, Iterator, Mapping, Sequence

import numpy as np

from research.data.files import find_files, unzipped
from research.data.records import BadRow, Records, one_of
from research.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonLines(Records):
    """Documents from .jsonl files (.jsonl.gz is unpacked into the cache). Empty lines are left out, but count as rows.

    Attributes:
      paths: files or globs, local or remote (files.find_files).
      field: whose text is the document; "a.b" is b inside a. Default "text"; not together with `template`.

    Raises:
      InputError: no such file; a bad row with on_error="stop".
    """

    paths: tuple[str, ...]
    field: str | None = None

    def validate(self):
        super().validate()
        one_of(self.field, "field", self.template)
        if not self.paths:
            raise InputError("paths", "is empty", "name at least one file")

    def _single(self) -> tuple[str, str]:
        return "field", self.field or "text"

    def _shards(self) -> Sequence["_Lines"]:
        return [_Lines(name, unzipped(name, path, self.cache_dir))
                for name, path in find_files(self.paths, self.cache_dir)]


class _Lines:
    """One file: where each line starts, found by the scan."""

    def __init__(self, name: str, path: pathlib.Path):
        self.name = name
        self._path = path
        self._start_R = np.zeros(0, np.int64)

    def rows(self) -> Iterator[tuple[int, Any]]:
        starts, place = [], 0
        with open(self._path, "rb") as file:
            for line in file:
                starts.append(place)
                place += len(line)
                if not line.strip():
                    continue
                try:
                    yield len(starts) - 1, parse_object(line)
                except BadRow as error:
                    yield len(starts) - 1, error
        self._start_R = np.array(starts, np.int64)

    def row(self, index: int) -> Mapping[str, Any]:
        with open(self._path, "rb") as file:
            file.seek(int(self._start_R[index]))
            return parse_object(file.readline())


def parse_object(line: bytes) -> Mapping[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow(f"isn't UTF-8 (byte {error.start} of the line)") from None
    except json.JSONDecodeError as error:
        raise BadRow(f"isn't JSON ({error.msg} at column {error.colno})") from None
    except (RecursionError, ValueError):  # nested too deep, a number too long
        raise BadRow("isn't JSON that can be read") from None
    if not isinstance(record, dict):
        raise BadRow(f"is a {type(record).__name__}, not an object")
    return record
