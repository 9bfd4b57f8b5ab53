"""The `arrayrecord` source: the records of ArrayRecord files, by index."""

import dataclasses
import pathlib
from typing import Any, Iterator, Literal, Mapping, Sequence

from research.data.files import find_files
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
        return [_File(name, path, self.format) for name, path in find_files(self.paths, self.cache_dir)]


class _File:
    def __init__(self, name: str, path: pathlib.Path, format: str):
        from array_record.python import array_record_module

        self.name, self._format = name, format
        self._reader = array_record_module.ArrayRecordReader(str(path))
        if not self._reader.ok():
            raise InputError("paths", f"{name} is no whole ArrayRecord file", "copy it again")

    def rows(self) -> Iterator[tuple[int, Any]]:
        for row in range(self._reader.num_records()):
            try:
                yield row, self.row(row)
            except BadRow as error:
                yield row, error

    def row(self, index: int) -> Mapping[str, Any]:
        try:
            content, = self._reader.read([index])
        except (RuntimeError, ValueError) as error:
            raise BadRow(f"can't be read ({first_line(error)})") from None
        return {"text": content} if self._format == "text" else parse_object(content)
