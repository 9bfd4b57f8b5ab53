"""The `text` source: the user's own UTF-8 files."""

import dataclasses
import functools
import hashlib
import pathlib
import re
from typing import Literal

import numpy as np

from research.config import Node
from research.data import documents
from research.data.files import DEFAULT_CACHE, find_files, unzipped
from research.errors import InputError

_BLANK_LINES = re.compile(rb"\r?\n(?:[ \t]*\r?\n)+")


@dataclasses.dataclass(frozen=True)
class Text(Node):
    """Documents from text files, plain or gzipped (.gz is unpacked into the cache).

    Names are paths from the files' common directory, then "#" and a number.

    Attributes:
      paths: files or globs ("**" crosses directories), absolute or relative to the working directory, or remote
        (gs://, s3://: files.find_files).
      split_on: what ends a document: "file", "blank_line" (one or more), or "line". The separator and
        documents of white space alone are left out.
      cache_dir: for remote and packed files; `data.cache_dir` where it isn't given.

    Raises:
      InputError: a path that matches no file, a directory, a file that isn't UTF-8, a .gz that isn't whole.
    """

    paths: tuple[str, ...]
    split_on: Literal["file", "blank_line", "line"] = "file"
    cache_dir: str = DEFAULT_CACHE

    def validate(self):
        if not self.paths:
            raise InputError("paths", "is empty", "name at least one file")

    def __len__(self) -> int:
        return len(self._index[0])

    def document_id(self, index: int) -> str:
        file_D, number_D, _, _ = self._index
        name = self._files[file_D[index]][0]
        return name if self.split_on == "file" else f"{name}#{number_D[index]:09d}"

    def document(self, index: int) -> documents.Document:
        file_D, _, start_D, stop_D = self._index
        with open(self._files[file_D[index]][1], "rb") as file:
            file.seek(start_D[index])
            content = file.read(int(stop_D[index] - start_D[index]))
        return documents.Document(self.document_id(index), content.decode("utf-8"))

    def fingerprint(self) -> str:
        self._index  # fills in the digests
        parts = [part for name, path in self._files for part in (name, self._digests[path])]
        return documents.combine(["text", self.split_on, *parts])

    @functools.cached_property
    def _digests(self) -> dict[pathlib.Path, str]:
        return {}

    @functools.cached_property
    def _files(self) -> tuple[tuple[str, pathlib.Path], ...]:
        """(name, path), by name."""
        found = [(name, unzipped(name, path, self.cache_dir)) for name, path in find_files(self.paths, self.cache_dir)]
        return tuple(sorted(found) if self.split_on == "file" else found)

    @functools.cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Each document's file_D, number_D within its file, and byte range start_D, stop_D; all int64."""
        parts = []
        with documents.reading("file", self._files) as files:
            for i, (name, path) in enumerate(files):
                content = path.read_bytes()
                try:
                    content.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise InputError("paths", f"{name} isn't UTF-8 (byte {error.start})",
                                     "convert it: iconv -f OLD -t utf-8") from None
                self._digests[path] = hashlib.sha256(content).hexdigest()
                spans = [(a, b) for a, b in _spans(content, self.split_on) if content[a:b].strip()]
                parts += [(i, number, a, b) for number, (a, b) in enumerate(spans)]
        table_Dx4 = np.array(parts, np.int64).reshape(-1, 4)
        return tuple(table_Dx4.T.copy())


def _spans(content: bytes, split_on: str) -> list[tuple[int, int]]:
    if split_on == "file":
        return [(0, len(content))]
    separators = (_BLANK_LINES if split_on == "blank_line" else re.compile(rb"\r?\n")).finditer(content)
    spans, start = [], 0
    for match in separators:
        spans.append((start, match.start()))
        start = match.end()
    return spans + [(start, len(content))]
