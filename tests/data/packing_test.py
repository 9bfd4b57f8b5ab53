"""Rows against a plain oracle: every token a target once, documents apart, padding inert."""

import json

import numpy as np
import pytest

from research.data.packing import SpreadRows, make_rows, padding_row
from tests.data.corpora import make_cache

LENGTHS = {
    "mixed": [5, 2, 17, 3, 9, 2, 2, 31, 4], "one": [10], "tiny": [2, 2, 2, 2, 2], "exact": [8, 8, 9],
    "smallest": [2], "none": []}
CASES = [(name, seq_len, packed) for name in LENGTHS if name != "none" for seq_len in (1, 2, 4, 8, 50)
         for packed in (True, False)]


def oracle(cache, order, seq_len: int, packed: bool) -> list[dict]:
    """Token by token. `order`: the documents' numbers in the order of the stream."""
    offsets = cache.offsets_D1
    docs = [[(int(t), d, i) for i, t in enumerate(cache.tokens_T[offsets[d]:offsets[d + 1]])] for d in order]
    streams = [sum(docs, [])] if packed else docs
    rows = []
    for stream in streams:
        for begin in range(0, len(stream) - 1, seq_len):
            row = padding_row(seq_len)
            segment, last, position = 0, None, 0
            for place, (token, document, _) in enumerate(stream[begin:begin + seq_len]):
                if document != last:
                    segment, last, position = segment + 1, document, 0
                row["tokens_L"][place], row["document_index_L"][place] = token, document
                row["segment_ids_L"][place], row["positions_L"][place] = segment, position
                position += 1
            for place, (token, _, i) in enumerate(stream[begin + 1:begin + seq_len + 1]):
                row["targets_L"][place], row["weights_L"][place] = token, float(i > 0)
            rows.append(row)
    return rows


def document_order(rows) -> list[int]:
    seen: dict[int, None] = {}
    for i in range(len(rows)):
        seen.update(dict.fromkeys(int(d) for d in rows[i]["document_index_L"] if d >= 0))
    return list(seen)


@pytest.mark.parametrize("name,seq_len,packed", CASES)
def test_rows_are_the_oracles(name, seq_len, packed, tmp_path):
    cache = make_cache(tmp_path, LENGTHS[name])
    rows = make_rows(cache, seq_len, packed, seed=3)
    order = document_order(rows)
    assert sorted(order) == list(range(len(LENGTHS[name])))
    expected = oracle(cache, order, seq_len, packed)
    assert len(rows) == len(expected)
    for i, row in enumerate(expected):
        for key, value in row.items():
            np.testing.assert_array_equal(rows[i][key], value, err_msg=f"row {i} {key}")
            assert rows[i][key].dtype == value.dtype and rows[i][key].shape == (seq_len,)


@pytest.mark.parametrize("name,seq_len,packed", CASES)
def test_each_token_is_a_target_once_and_never_across_documents(name, seq_len, packed, tmp_path):
    cache = make_cache(tmp_path, LENGTHS[name])
    rows = make_rows(cache, seq_len, packed, seed=1)
    counted = []
    for i in range(len(rows)):
        row = rows[i]
        on = row["weights_L"] > 0
        counted += row["targets_L"][on].tolist()
        assert (row["segment_ids_L"][on] > 0).all() and (row["document_index_L"][on] >= 0).all()
        pairs = zip(row["tokens_L"][on].tolist(), row["targets_L"][on].tolist())
        assert all(b in (a + 1, 2) or a == 1 for a, b in pairs)  # make_cache numbers them in turn
        assert row["segment_ids_L"].max() == len(set(row["segment_ids_L"].tolist()) - {0})
    wanted = [t for d in range(len(LENGTHS[name]))
              for t in cache.tokens_T[cache.offsets_D1[d] + 1:cache.offsets_D1[d + 1]].tolist()]
    assert sorted(counted) == sorted(wanted)


@pytest.mark.parametrize("packed", [True, False])
def test_a_row_is_a_pure_function_of_its_number(packed, tmp_path):
    cache = make_cache(tmp_path, LENGTHS["mixed"] * 5)
    rows, again = make_rows(cache, 8, packed, seed=0), make_rows(cache, 8, packed, seed=0)
    for i in reversed(range(len(rows))):
        for key, value in again[i].items():
            np.testing.assert_array_equal(rows[i][key], value)
    np.testing.assert_array_equal(rows[-1]["tokens_L"], rows[len(rows) - 1]["tokens_L"])
    with pytest.raises(IndexError):
        rows[len(rows)]
    assert document_order(rows) != document_order(make_rows(cache, 8, packed, seed=1))
    assert document_order(rows) != sorted(document_order(rows))


@pytest.mark.parametrize("packed", [True, False])
def test_a_row_names_its_documents(packed, tmp_path):
    caches = [make_cache(tmp_path / name, LENGTHS["mixed"] * 2) for name in "ab"]
    for name, cache in zip("ab", caches):
        names = [f"{name}{d}" for d in range(len(cache.offsets_D1) - 1)]
        (cache.path / "documents.json").write_text(json.dumps(names))
    parts = [make_rows(cache, 8, packed, seed=0) for cache in caches]
    for i in range(len(parts[0])):
        inside = dict.fromkeys(parts[0][i]["document_index_L"].tolist())
        assert parts[0].documents(i) == [f"a{d}" for d in inside if d >= 0] and parts[0].documents(i)
    spread = SpreadRows(parts, [len(LENGTHS["mixed"]) * 2] * 2, 10**6)
    assert spread.documents(0) == parts[0].documents(0) and spread.documents(len(parts[0])) == parts[1].documents(0)


def test_the_order_of_documents_never_changes(tmp_path):
    """A value written down: it must hold on every machine, numpy and Python."""
    rows = make_rows(make_cache(tmp_path, [3] * 8), 4, True, seed=0)
    assert document_order(rows) == [4, 2, 1, 0, 7, 3, 6, 5]


def test_no_documents_no_rows(tmp_path):
    cache = make_cache(tmp_path / "some", [2])
    empty = type(cache)(np.zeros(0, np.uint16), np.zeros(1, np.int64), 0, tmp_path)
    for packed in (True, False):
        rows = make_rows(empty, 8, packed, seed=0)
        assert len(rows) == 0
        assert len(SpreadRows([rows], [0], 5)) == 0


def test_spread_rows_cover_all_parts_evenly(tmp_path):
    lengths = {"a": [20] * 10, "b": [2], "c": [20] * 30}
    caches = [make_cache(tmp_path / name, lengths[name]) for name in lengths]
    parts = [make_rows(cache, 10, True, seed=0) for cache in caches]
    every = SpreadRows(parts, [10, 1, 30], 10**6)
    assert len(every) == sum(map(len, parts))
    found = np.concatenate([every[i]["document_index_L"] for i in range(len(every))])
    assert sorted(set(found.tolist())) == [-1, *range(41)]
    np.testing.assert_array_equal(every[len(parts[0])]["tokens_L"], parts[1][0]["tokens_L"])
    few = SpreadRows(parts, [10, 1, 30], 16)
    assert len(few) == 16
    first = sum(int(few[i]["document_index_L"].max()) < 10 for i in range(16))
    assert 3 <= first <= 5
