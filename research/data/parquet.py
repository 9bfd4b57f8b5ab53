"""The `parquet` source: rows of Parquet files, read one row group at a time."""

import dataclasses
import pathlib
from typing import Any, Iterator, Mapping, Sequence

import numpy as np

from research.config import nearest
from research.data.files import find_files
from research.data.records import BadRow, Records, first_line, one_of
from research.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parquet(Records):
    """Documents from Parquet files. Only the columns that are named are read.

    Attributes:
      paths: files or globs, local or remote (files.find_files).
      column: whose text is the document. Default "text"; not together with `template`.

    Raises:
      InputError: no such file, no Parquet file, no such column; a bad row, or a row group that can't be read (all of
        its rows are bad), with on_error="stop".
    """

    paths: tuple[str, ...]
    column: str | None = None

    def validate(self):
        super().validate()
        one_of(self.column, "column", self.template)
        if not self.paths:
            raise InputError("paths", "is empty", "name at least one file")

    def _single(self) -> tuple[str, str]:
        return "column", self.column or "text"

    def _shards(self) -> Sequence["_File"]:
        wanted = [name for _, name in self._pieces if name is not None]
        wanted += [self.group_by] if self.group_by else []
        return [_File(name, path, wanted, "template" if self.template else self._single()[0])
                for name, path in find_files(self.paths, self.cache_dir)]


class _File:
    """One file; keeps the row group that was read last, since documents are mostly read in turn."""

    def __init__(self, name: str, path: pathlib.Path, wanted: Sequence[str], field: str):
        import pyarrow as pa  # a quarter of a second that other sources don't need
        import pyarrow.parquet as pq

        self._errors = (pa.ArrowException, OSError, UnicodeDecodeError)
        self.name = name
        try:
            self._file = pq.ParquetFile(path, page_checksum_verification=True)
        except self._errors as error:
            raise InputError("paths", f"{name} is no whole Parquet file ({first_line(error)})",
                             "copy it again") from None
        known = self._file.schema_arrow.names
        self._columns = sorted({column if column in known else column.split(".")[0] for column in wanted})
        for column in self._columns:
            if column not in known:
                raise InputError(field, f"{name} has no column {column!r}", nearest(column, known))
        sizes = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        self._starts_G1 = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))
        self._last: tuple[int, Any] = (-1, None)

    def rows(self) -> Iterator[tuple[int, Any]]:
        for group in range(self._file.num_row_groups):
            first, stop = int(self._starts_G1[group]), int(self._starts_G1[group + 1])
            try:
                table = self._group(group)
            except self._errors as error:
                bad = BadRow(f"row group {group} (rows {first} to {stop - 1}) can't be read ({first_line(error)})")
                yield from ((row, bad) for row in range(first, stop))
                continue
            yield from ((row, self._row(table, row - first)) for row in range(first, stop))

    def row(self, index: int) -> Mapping[str, Any]:
        group = int(np.searchsorted(self._starts_G1, index, side="right")) - 1
        return self._row(self._group(group), index - int(self._starts_G1[group]))

    def _group(self, group: int) -> Any:
        if self._last[0] != group:
            self._last = (group, self._file.read_row_group(group, columns=self._columns))
        return self._last[1]

    def _row(self, table: Any, index: int) -> Any:
        try:
            return {name: table.column(name)[index].as_py() for name in self._columns}
        except UnicodeDecodeError:
            return BadRow("isn't UTF-8")
