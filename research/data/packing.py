"""Documents to rows of equal length; a row is a pure function of its number.

A row is a dict of arrays of length L: tokens_L, targets_L, positions_L, segment_ids_L, document_index_L
(int32) and weights_L (float32). targets are the tokens one place on; weights are 0 where there is no target
in the same document. segment_ids count from 1 in each row, 0 is padding. positions restart at 0 with each
document and each row. document_index is the document's number in the cache, -1 for padding.
"""

from typing import Callable, Protocol, Sequence

import numpy as np

from research.data import order
from research.data.cache import TokenCache
from research.data.vocabulary import PAD

Row = dict[str, np.ndarray]
Span = tuple[int, int, int]  # document, and from where to where in the cache's tokens
Pick = tuple[TokenCache, Sequence[Span], int]  # a row: its cache, its spans in turn, the number of the cache's first document


class Rows(Protocol):
    """A sequence of rows."""

    seq_len: int

    def __len__(self) -> int: ...

    def pick(self, index: int) -> Pick:
        """What row `index` is made of, for `assemble`."""

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


class _Picked:
    """Rows and names, for those who say what a row is made of."""

    seq_len: int

    pick: Callable[[int], Pick]

    def __getitem__(self, index: int) -> Row:
        return {name.replace("_RxL", "_L"): value[0] for name, value in assemble([self.pick(index)], self.seq_len).items()}

    def documents(self, index: int) -> list[str]:
        cache, spans, _ = self.pick(index)
        document_index_L = assemble([(cache, spans, 0)], self.seq_len)["document_index_RxL"][0]
        return [cache.document_ids[document] for document in dict.fromkeys(document_index_L.tolist()) if document >= 0]


class PackedRows(_Picked):
    """Rows over one stream of documents; only the last row is padded."""

    def __init__(self, cache: TokenCache, seq_len: int, seed: int):
        self.seq_len = seq_len
        self._cache = cache
        lengths_D = np.diff(cache.offsets_D1)
        self._order_D = order.permutation(len(lengths_D), "documents", seed)
        self._starts_D1 = np.concatenate(([0], np.cumsum(lengths_D[self._order_D], dtype=np.int64)))
        self._total = int(self._starts_D1[-1])
        self._rows = range(-(-max(self._total - 1, 0) // seq_len))

    def __len__(self) -> int:
        return len(self._rows)

    def pick(self, index: int) -> Pick:
        begin = self._rows[index] * self.seq_len
        end = min(begin + self.seq_len + 1, self._total)
        first = int(self._starts_D1.searchsorted(begin, side="right")) - 1
        spans = []
        while begin < end:
            start, stop = int(self._starts_D1[first]), min(int(self._starts_D1[first + 1]), end)
            document = int(self._order_D[first])
            offset = int(self._cache.offsets_D1[document]) + begin - start
            spans.append((document, offset, offset + stop - begin))
            begin, first = stop, first + 1
        return self._cache, spans, 0


class SeparateRows(_Picked):
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

    def pick(self, index: int) -> Pick:
        index = range(len(self))[index]
        place = int(self._starts_D1.searchsorted(index, side="right")) - 1
        document = int(self._order_D[place])
        begin = int(self._cache.offsets_D1[document]) + (index - int(self._starts_D1[place])) * self.seq_len
        end = min(begin + self.seq_len + 1, int(self._cache.offsets_D1[document + 1]))
        return self._cache, [(document, begin, end)], 0


class SpreadRows(_Picked):
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

    def pick(self, index: int) -> Pick:
        part, place = self._find(index)
        cache, spans, _ = self._parts[part].pick(place)
        return cache, spans, int(self._first_document_P[part])

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


def assemble(picks: Sequence[Pick], seq_len: int, documents: bool = True) -> dict[str, np.ndarray]:
    """The rows of `picks`, each of at most seq_len + 1 tokens, as arrays of (rows, L): the fields of a row, named *_RxL.

    Whole arrays are made for rows of one document, and mended from each further one on: most rows have one or two.
    documents: whether document_index_RxL is wanted.
    """
    shape = (len(picks), seq_len)
    stream_RxL1 = np.full((len(picks), seq_len + 1), PAD, np.int32)
    weights_RxL, segment_ids_RxL = np.ones(shape, np.float32), np.ones(shape, np.int32)
    positions_RxL = np.empty(shape, np.int32)
    positions_RxL[:] = count_L = np.arange(seq_len, dtype=np.int32)
    document_index_RxL = np.full(shape, -1, np.int32) if documents else None
    for r, (cache, spans, first_document) in enumerate(picks):
        place = 0
        for segment, (document, begin, end) in enumerate(spans, start=1):
            stop = place + end - begin
            stream_RxL1[r, place:stop] = cache.tokens_T[begin:end]
            if place:
                # Each token but the span's first is the target of the place before it. A span starts a document or a
                # row: its first token is a document's <s>, no target, or was the last target of the row before.
                weights_RxL[r, place - 1] = 0
                positions_RxL[r, place:] = count_L[:seq_len - place]
                segment_ids_RxL[r, place:] = segment
            if documents:
                document_index_RxL[r, place:stop] = first_document + document
            place = stop
        if place <= seq_len:  # the last token has no target
            weights_RxL[r, max(place - 1, 0):] = 0
            positions_RxL[r, place:] = segment_ids_RxL[r, place:] = 0
    fields = {"tokens_RxL": stream_RxL1[:, :-1].copy(), "targets_RxL": stream_RxL1[:, 1:].copy(), "weights_RxL": weights_RxL,
              "positions_RxL": positions_RxL, "segment_ids_RxL": segment_ids_RxL}
    return fields | {"document_index_RxL": document_index_RxL} if documents else fields
