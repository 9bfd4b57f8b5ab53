"""The `parquet` source: rows of Parquet files, read one row group at a time."""

import dataclasses
import functools
import pathlib
from typing import Any, Callable, Iterator, Mapping, Sequence

import numpy as np

from research.config import nearest
from research.data.files import MOST_OPEN, find_files, unopened
from research.data.records import BadRow, Records, first_line, one_of
from research.errors import InputError

# Row groups that a source keeps: so many bytes of them and so many at most, and always the last.
_KEPT_BYTES = 1 << 29
_KEPT_GROUPS = 64


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
        field = "template" if self.template else self._single()[0]
        opened, kept = functools.lru_cache(MOST_OPEN)(_open), {}
        return [_File(name, path, wanted, field, opened, kept) for name, path in find_files(self.paths, self.cache_dir)]


def _errors() -> tuple[type[Exception], ...]:
    import pyarrow as pa  # a quarter of a second that other sources don't need

    return pa.ArrowException, OSError, UnicodeDecodeError


def _open(name: str, path: pathlib.Path) -> Any:
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path, page_checksum_verification=True)
    except _errors() as error:
        if isinstance(error, OSError) and error.errno:  # Arrow's own words for a broken file come without
            raise unopened(name, error.errno) from None
        raise InputError("paths", f"{name} is no whole Parquet file ({first_line(error)})", "copy it again") from None


class _File:
    """One file.

    Args that the files of a source share:
      opened: _open, which closes all files but those that were used last.
      kept: (file, row group) -> its table, the last that was used at the end: documents are mostly read in turn.
    """

    def __init__(self, name: str, path: pathlib.Path, wanted: Sequence[str], field: str,
                 opened: Callable[[str, pathlib.Path], Any], kept: dict[tuple[str, int], Any]):
        self.name, self._kept = name, kept
        self._open = functools.partial(opened, name, path)
        file = self._open()
        known = file.schema_arrow.names
        self._columns = sorted({column if column in known else column.split(".")[0] for column in wanted})
        for column in self._columns:
            if column not in known:
                raise InputError(field, f"{name} has no column {column!r}", nearest(column, known))
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        self._starts_G1 = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))

    def rows(self) -> Iterator[tuple[int, Any]]:
        for group in range(len(self._starts_G1) - 1):
            first, stop = int(self._starts_G1[group]), int(self._starts_G1[group + 1])
            try:
                table = self._group(group)
            except _errors() as error:
                bad = BadRow(f"row group {group} (rows {first} to {stop - 1}) can't be read ({first_line(error)})")
                yield from ((row, bad) for row in range(first, stop))
                continue
            yield from ((row, self._row(table, row - first)) for row in range(first, stop))

    def row(self, index: int) -> Mapping[str, Any]:
        group = int(np.searchsorted(self._starts_G1, index, side="right")) - 1
        return self._row(self._group(group), index - int(self._starts_G1[group]))

    def _group(self, group: int) -> Any:
        key, kept = (self.name, group), self._kept
        table = kept.pop(key) if key in kept else None
        if table is None:
            table = self._open().read_row_group(group, columns=self._columns)
            while kept and (len(kept) >= _KEPT_GROUPS
                            or table.nbytes + sum(other.nbytes for other in kept.values()) > _KEPT_BYTES):
                del kept[next(iter(kept))]
        kept[key] = table
        return table

    def _row(self, table: Any, index: int) -> Any:
        try:
            return {name: table.column(name)[index].as_py() for name in self._columns}
        except UnicodeDecodeError:
            return BadRow("isn't UTF-8")
