"""What the sources of records share (jsonl, parquet, arrayrecord, tfds, huggingface): rows to documents.

A row is a table of named values; a document is one of them, or a template filled in with several. A row that gives no
text is bad: the run stops and names it, or it is left out and counted.
"""

import array
import dataclasses
import functools
import hashlib
import string
from typing import Any, Iterator, Literal, Mapping, Protocol, Sequence

import numpy as np
from absl import logging

from research.config import Node, nearest
from research.data import documents
from research.data.files import DEFAULT_CACHE
from research.errors import InputError


class BadRow(Exception):
    """One row gives no document; the text says why."""


class Shard(Protocol):
    """A file (or split) of rows.

    Attributes:
      name: without absolute paths; document names begin with it.
    """

    name: str

    def rows(self) -> Iterator[tuple[int, Any]]:
        """(number, row) in turn; a row is a mapping, or a BadRow in its place."""

    def row(self, index: int) -> Mapping[str, Any]:
        """One row that was good."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Records(Node):
    """The arguments that every source of records has. Documents are named SHARD#ROW; rows count from 0.

    Attributes:
      template: text with {names} of fields, e.g. "Q: {question}\\nA: {answer}"; "{{" is a brace. In place of a single
        field.
      on_error: what a bad row (unreadable, a field that is missing or no text) does: "stop" with its file and number,
        or "skip": left out, counted and logged. Rows of white space alone are left out either way.
      group_by: a field whose value (a text or a number) groups the documents into sub-sources with rows, shares and a
        cache of their own: a language, a domain.
      groups: of them, these alone.
      group_weights: their shares of this source's weight, each group's named, e.g. {"en": 3, "de": 1}; 0 leaves one
        out. Without it each has the share of its tokens.
      cache_dir: for remote and packed files; `data.cache_dir` where it isn't given.
    """

    template: str | None = None
    on_error: Literal["stop", "skip"] = "stop"
    group_by: str | None = None
    groups: tuple[str, ...] = ()
    group_weights: dict = dataclasses.field(default_factory=dict)
    cache_dir: str = DEFAULT_CACHE

    def validate(self):
        for name, value in (("groups", self.groups), ("group_weights", self.group_weights)):
            if value and self.group_by is None:
                raise InputError(name, "there are no groups", "name the field that makes them: group_by")
        for name, weight in self.group_weights.items():
            if type(weight) not in (int, float) or not 0 <= weight < float("inf"):
                raise InputError(f"group_weights.{name}", f"{weight!r} is no share", "give a number, 0 or more")
        if self.group_weights and not any(self.group_weights.values()):
            raise InputError("group_weights", "sum to nothing", "give one group a weight above 0")
        self._pieces  # a bad template is found at once

    # What a kind of source defines: its shards, in the order of their names + "#", and its single field.

    def _shards(self) -> Sequence[Shard]:
        raise NotImplementedError

    def _single(self) -> tuple[str, str]:
        """(name of the argument that names the field, the field)."""
        raise NotImplementedError

    # The documents.

    def __len__(self) -> int:
        return len(self._index.row_D)

    def document_id(self, index: int) -> str:
        return _name(self._index.shards[self._index.shard_D[index]].name, int(self._index.row_D[index]))

    def document(self, index: int) -> documents.Document:
        shard = self._index.shards[self._index.shard_D[index]]
        return documents.Document(self.document_id(index), self._text(shard.row(int(self._index.row_D[index]))))

    def fingerprint(self) -> str:
        return documents.combine(["records", *(part for pair in self._index.digests for part in pair)])

    @property
    def skipped(self) -> int:
        """How many bad rows were left out."""
        return self._index.skipped

    def grouped(self) -> dict[str, "Group"]:
        """Name of the group -> its documents, by name; empty without `group_by`.

        Raises:
          InputError: `groups` or `group_weights` name one that there isn't, or `group_weights` lacks one.
        """
        if self.group_by is None:
            return {}
        found = [name for name, _ in self._index.digests]
        for name in self.group_weights:
            if name not in found:
                raise InputError(f"group_weights.{name}", "there is no such group", nearest(name, found))
        if self.group_weights and (missing := [name for name in found if name not in self.group_weights]):
            raise InputError("group_weights", f"has no share for {', '.join(missing[:5])}", "give 0 to leave it out")
        return {name: Group(self, digest, np.flatnonzero(self._index.group_D == code))
                for code, (name, digest) in enumerate(self._index.digests)
                if not self.group_weights or self.group_weights[name]}

    @functools.cached_property
    def _index(self) -> "_Index":
        index = _Indexer(self)
        shards = tuple(self._shards())
        with documents.reading("row") as bar:
            for number, shard in enumerate(shards):
                bar.set_postfix_str(f"{number + 1} of {len(shards)}: {shard.name}", refresh=False)
                for row, record in shard.rows():
                    index.add(number, shard.name, row, record)
                    bar.update()
        result = index.finish(shards)
        for name in self.groups:
            if name not in index.seen:
                raise InputError("groups", f"there is no group {name!r}", nearest(name, sorted(index.seen)))
        return result

    @functools.cached_property
    def _pieces(self) -> tuple[tuple[str, str | None], ...]:
        """((literal, field after it or None), ...) of the template, or of the single field."""
        if self.template is None:
            return (("", self._single()[1]),)
        argument, _ = self._single()
        cure = "write it as in \"{title}\\n{body}\"; \"{{\" is a brace"
        try:
            parsed = list(string.Formatter().parse(self.template))
        except ValueError as error:
            raise InputError("template", f"can't be read ({error})", cure) from None
        if any(name == "" or spec or conversion for _, name, spec, conversion in parsed):
            raise InputError("template", "has a field without a name, or with a format", cure)
        if not any(name for _, name, _, _ in parsed):
            raise InputError("template", "names no field", f"{cure}, or give {argument} instead")
        return tuple((literal, name) for literal, name, _, _ in parsed)

    def _text(self, record: Mapping[str, Any]) -> str:
        if self.template is None:
            return _as_text(record, self._pieces[0][1], plain=True)
        return "".join(literal + ("" if name is None else _as_text(record, name, plain=False))
                       for literal, name in self._pieces)


def one_of(field: str | None, name: str, template: str | None) -> None:
    """Raises InputError where both a field and a template are given."""
    if field is not None and template is not None:
        raise InputError(name, "and template are both given", "keep one of the two")


def first_line(error: BaseException) -> str:
    """What an error says, short enough for one line of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" *")]
    return lines[0][:160] if lines else type(error).__name__


class Indexed:
    """A shard over a library's own sequence of rows."""

    def __init__(self, name: str, data: Sequence[Mapping[str, Any]]):
        self.name, self._data = name, data

    def rows(self) -> Iterator[tuple[int, Any]]:
        for row in range(len(self._data)):
            try:
                yield row, self.row(row)
            except (OSError, RuntimeError, ValueError) as error:
                yield row, BadRow(f"can't be read ({first_line(error)})")

    def row(self, index: int) -> Mapping[str, Any]:
        return self._data[index]


@dataclasses.dataclass(frozen=True)
class Group:
    """The documents of one group of a source; a source itself."""

    source: Records
    digest: str
    index_D: np.ndarray

    def __len__(self) -> int:
        return len(self.index_D)

    def document_id(self, index: int) -> str:
        return self.source.document_id(int(self.index_D[index]))

    def document(self, index: int) -> documents.Document:
        return self.source.document(int(self.index_D[index]))

    def fingerprint(self) -> str:
        return documents.combine(["records", "", self.digest])


@dataclasses.dataclass(frozen=True)
class _Index:
    """shard_D int32, row_D int64, group_D int32 of each document; (name, sha256) of each group."""

    shards: tuple[Shard, ...]
    shard_D: np.ndarray
    row_D: np.ndarray
    group_D: np.ndarray
    digests: tuple[tuple[str, str], ...]
    skipped: int


class _Indexer:
    """Goes once over all rows: which are documents, of which group, and a digest of every name and text."""

    def __init__(self, source: Records):
        self._source = source
        self._shard, self._row, self._group = array.array("i"), array.array("q"), array.array("i")
        self._codes: dict[str, int] = {}  # in the order of their first documents
        self._digests: dict[str, Any] = {}
        self._bad, self._first = 0, ""
        self._rows = 0
        self.seen: set[str] = set()

    def add(self, number: int, shard: str, row: int, record: Any) -> None:
        self._rows += 1
        source = self._source
        try:
            if isinstance(record, BadRow):
                raise record
            text = source._text(record)
            group = "" if source.group_by is None else _as_text(record, source.group_by, plain=False)
        except BadRow as error:
            problem = f"{shard}, row {row}: {error}"
            if source.on_error == "stop":
                argument = "paths" if hasattr(source, "paths") else source._single()[0]
                raise InputError(argument, problem,
                                 'repair it, or set on_error to "skip" to leave bad rows out') from None
            self._bad += 1
            self._first = self._first or problem
            return
        self.seen.add(group)
        if not text.strip() or (source.groups and group not in source.groups):
            return
        if group not in self._digests:
            self._digests[group] = hashlib.sha256()
            self._codes[group] = len(self._codes)
        for part in (_name(shard, row), text):
            data = part.encode("utf-8", "surrogatepass")
            self._digests[group].update(len(data).to_bytes(8, "big") + data)
        self._shard.append(number)
        self._row.append(row)
        self._group.append(self._codes[group])

    def finish(self, shards: tuple[Shard, ...]) -> _Index:
        if self._bad:
            logging.warning("%s: left out %d bad rows of %d; the first: %s", type(self._source).__name__.lower(),
                            self._bad, self._rows, self._first)
        names = sorted(self._digests)
        code_of = np.array([names.index(name) for name in self._codes], np.int32)
        group_D = code_of[np.array(self._group, np.int32)] if len(self._group) else np.zeros(0, np.int32)
        return _Index(shards, np.array(self._shard, np.int32), np.array(self._row, np.int64), group_D,
                      tuple((name, self._digests[name].hexdigest()) for name in names), self._bad)


def _name(shard: str, row: int) -> str:
    return f"{shard}#{row:09d}"


def _as_text(record: Mapping[str, Any], field: str, plain: bool) -> str:
    """The field's text; "a.b" also looks inside. plain: numbers are no text."""
    if not isinstance(record, Mapping):
        raise BadRow("isn't a table of fields")
    value: Any = record
    for part in (field,) if field in record else field.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise BadRow(f"has no field {field!r} ({nearest(field, list(record))})")
        value = value[part]
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise BadRow(f"field {field!r} isn't UTF-8") from None
    if isinstance(value, np.generic):
        value = value.item()
    if not isinstance(value, str) and (plain or type(value) not in (int, float, bool)):
        raise BadRow(f"field {field!r} is {'empty' if value is None else type(value).__name__}, not text")
    text = str(value)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON may hold half of a surrogate pair
        raise BadRow(f"field {field!r} holds half a character (a lone surrogate)") from None
    return text
