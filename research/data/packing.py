"""Documents to rows of equal length; a row is a pure function of its number.

A row is a dict of arrays of length L: tokens_L, targets_L, positions_L, segment_ids_L, document_index_L
(int32) and weights_L (float32). targets are the tokens one place on; weights are 0 where there is no target
in the same document. segment_ids count from 1 in each row, 0 is padding. positions restart at 0 with each
document and each row. document_index is the document's number in the cache, -1 for padding.
"""

from typing import Protocol, Sequence

import numpy as np

from research.data import order
from research.data.cache import TokenCache
from research.data.vocabulary import PAD

Row = dict[str, np.ndarray]


class Rows(Protocol):
    """A sequence of rows."""

    seq_len: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...

    def documents(self, index: int) -> list[str]:
        """The names of the documents in a row."""


def make_rows(cache: TokenCache, seq_len: int, packed: bool, seed: int) -> Rows:
    """Rows of `seq_len` over all documents of the cache, which come in an order that `seed` decides.

    packed: the documents are joined to one stream and row r reads stream[r L : r L + L + 1]; else each
    document has rows of its own, the last one padded. Either way each token is a target exactly once, but for
    each document's first.
    """
    return (PackedRows if packed else SeparateRows)(cache, seq_len, seed)


class PackedRows:
    """Rows over one stream of documents; only the last row is padded."""

    def __init__(self, cache: TokenCache, seq_len: int, seed: int):
        self.seq_len = seq_len
        self._cache = cache
        lengths_D = np.diff(cache.offsets_D1)
        self._order_D = order.permutation(len(lengths_D), "documents", seed)
        self._starts_D1 = np.concatenate(([0], np.cumsum(lengths_D[self._order_D], dtype=np.int64)))

    def __len__(self) -> int:
        return -(-max(int(self._starts_D1[-1]) - 1, 0) // self.seq_len)

    def documents(self, index: int) -> list[str]:
        return _names(self._cache, self[index])

    def __getitem__(self, index: int) -> Row:
        index = range(len(self))[index]
        begin = index * self.seq_len
        end = min(begin + self.seq_len + 1, int(self._starts_D1[-1]))
        first = int(np.searchsorted(self._starts_D1, begin, side="right")) - 1
        spans = []
        while begin < end:
            start, stop = int(self._starts_D1[first]), min(int(self._starts_D1[first + 1]), end)
            document = int(self._order_D[first])
            offset = int(self._cache.offsets_D1[document]) + begin - start
            spans.append((document, offset, offset + stop - begin))
            begin, first = stop, first + 1
        return _row(self._cache, spans, self.seq_len)


class SeparateRows:
    """Rows of one document each, in segment 1."""

    def __init__(self, cache: TokenCache, seq_len: int, seed: int):
        self.seq_len = seq_len
        self._cache = cache
        lengths_D = np.diff(cache.offsets_D1)
        self._order_D = order.permutation(len(lengths_D), "documents", seed)
        rows_D = -(-(lengths_D[self._order_D] - 1) // seq_len)
        self._starts_D1 = np.concatenate(([0], np.cumsum(rows_D, dtype=np.int64)))

    def __len__(self) -> int:
        return int(self._starts_D1[-1])

    def documents(self, index: int) -> list[str]:
        return _names(self._cache, self[index])

    def __getitem__(self, index: int) -> Row:
        index = range(len(self))[index]
        place = int(np.searchsorted(self._starts_D1, index, side="right")) - 1
        document = int(self._order_D[place])
        begin = int(self._cache.offsets_D1[document]) + (index - int(self._starts_D1[place])) * self.seq_len
        end = min(begin + self.seq_len + 1, int(self._cache.offsets_D1[document + 1]))
        return _row(self._cache, [(document, begin, end)], self.seq_len)


class SpreadRows:
    """At most `limit` rows, evenly spread over `parts`; document numbers count on from part to part."""

    def __init__(self, parts: Sequence[Rows], documents: Sequence[int], limit: int):
        self.seq_len = parts[0].seq_len
        self._parts = parts
        self._ends_P = np.cumsum([len(part) for part in parts])
        self._first_document_P = np.concatenate(([0], np.cumsum(documents)))[:-1]
        total = int(self._ends_P[-1])
        self._chosen_R = np.arange(min(total, limit), dtype=np.int64) * total // max(min(total, limit), 1)

    def __len__(self) -> int:
        return len(self._chosen_R)

    def __getitem__(self, index: int) -> Row:
        part, place = self._find(index)
        row = self._parts[part][place]
        document_L = row["document_index_L"]
        return {**row, "document_index_L": np.where(
            document_L < 0, -1, document_L + self._first_document_P[part]).astype(np.int32)}

    def documents(self, index: int) -> list[str]:
        part, place = self._find(index)
        return self._parts[part].documents(place)

    def _find(self, index: int) -> tuple[int, int]:
        """(part, row in it)"""
        chosen = int(self._chosen_R[index])
        part = int(np.searchsorted(self._ends_P, chosen, side="right"))
        return part, chosen - (int(self._ends_P[part - 1]) if part else 0)


def padding_row(seq_len: int) -> Row:
    """A row in which nothing counts."""
    return {
        "tokens_L": np.full(seq_len, PAD, np.int32), "targets_L": np.full(seq_len, PAD, np.int32),
        "weights_L": np.zeros(seq_len, np.float32), "positions_L": np.zeros(seq_len, np.int32),
        "segment_ids_L": np.zeros(seq_len, np.int32), "document_index_L": np.full(seq_len, -1, np.int32),
    }


def _names(cache: TokenCache, row: Row) -> list[str]:
    return [cache.document_ids[document] for document in dict.fromkeys(row["document_index_L"].tolist()) if document >= 0]


def _row(cache: TokenCache, spans: Sequence[tuple[int, int, int]], seq_len: int) -> Row:
    """The row of (document, begin, end) token ranges in turn, at most seq_len + 1 tokens in all."""
    row = padding_row(seq_len)
    place = 0
    for segment, (document, begin, end) in enumerate(spans, start=1):
        tokens_S = cache.tokens_T[begin:end]
        here = slice(place, min(place + len(tokens_S), seq_len))
        size = here.stop - here.start
        row["tokens_L"][here] = tokens_S[:size]
        row["positions_L"][here] = np.arange(size)
        row["segment_ids_L"][here] = segment
        row["document_index_L"][here] = document
        # Each token but the span's first is the target of the place before it. A span starts a document or a
        # row: its first token is a document's <s>, no target, or was the last target of the row before.
        targets = slice(place, place + len(tokens_S) - 1)
        row["targets_L"][targets] = tokens_S[1:]
        row["weights_L"][targets] = 1.0
        if place:
            row["targets_L"][place - 1] = tokens_S[0]
        place += len(tokens_S)
    return row
