"""The `arrayrecord` source: the records of ArrayRecord files, by index."""

import dataclasses
import functools
import pathlib
from typing import Any, Callable, Iterator, Literal, Mapping, Sequence

from research.data.files import MOST_OPEN, find_files, unopened
from research.data.jsonl import parse_object
from research.data.records import BadRow, Records, first_line, one_of
from research.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayRecord(Records):
    """Documents from ArrayRecord files (the format that Grain and TensorFlow Datasets read at random).

    Attributes:
      paths: files or globs, local or remote (files.find_files).
      format: a record is "text" (UTF-8) or "json" (an object). For tf.train.Example see the source tfds.
      field: of a json record, the one whose text is the document; default "text"; not together with `template`.

    Raises:
      InputError: no such file, no ArrayRecord file; a bad record with on_error="stop".
    """

    paths: tuple[str, ...]
    format: Literal["text", "json"] = "text"
    field: str | None = None

    def validate(self):
        super().validate()
        one_of(self.field, "field", self.template)
        if not self.paths:
            raise InputError("paths", "is empty", "name at least one file")
        if self.format == "text" and (self.field or self.template or self.group_by):
            raise InputError("format", "is text, which has no fields", 'set it to "json", or name no fields')

    def _single(self) -> tuple[str, str]:
        return "field", self.field or "text"

    def _shards(self) -> Sequence["_File"]:
        opened = functools.lru_cache(MOST_OPEN)(_open)  # closes all files but those that were used last
        return [_File(name, path, self.format, opened) for name, path in find_files(self.paths, self.cache_dir)]


def _open(name: str, path: pathlib.Path) -> Any:
    from array_record.python import array_record_module

    reader = array_record_module.ArrayRecordReader(str(path))
    if reader.ok():
        return reader
    try:
        path.open("rb").close()  # the reader doesn't say why
    except OSError as error:
        raise unopened(name, error.errno) from None
    raise InputError("paths", f"{name} is no whole ArrayRecord file", "copy it again")


class _File:
    def __init__(self, name: str, path: pathlib.Path, format: str, opened: Callable[[str, pathlib.Path], Any]):
        self.name, self._format = name, format
        self._open = functools.partial(opened, name, path)
        self._open()  # a file that isn't whole is found at once

    def rows(self) -> Iterator[tuple[int, Any]]:
        for row in range(self._open().num_records()):
            try:
                yield row, self.row(row)
            except BadRow as error:
                yield row, error

    def row(self, index: int) -> Mapping[str, Any]:
        try:
            content, = self._open().read([index])
        except (RuntimeError, ValueError) as error:
            raise BadRow(f"can't be read ({first_line(error)})") from None
        return {"text": content} if self._format == "text" else parse_object(content)
