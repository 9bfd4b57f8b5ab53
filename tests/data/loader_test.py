"""Batches don't depend on how many processes share them, on reading ahead, or on where a run was resumed."""

import contextlib
import itertools
import threading

import numpy as np
import pytest

from research.data.loader import Loader, evaluation_batches
from research.data.mixture import Mixture, sample_at
from research.data.packing import make_rows
from research.errors import InputError
from tests.data.corpora import make_cache

WEIGHTS, SEED, LENGTH = (0.75, 0.25), 5, 8
FIELDS = {"tokens_BxL", "targets_BxL", "weights_BxL", "positions_BxL", "segment_ids_BxL"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    root = tmp_path_factory.mktemp("rows")
    rng = np.random.default_rng(0)
    caches = [make_cache(root / name, rng.integers(2, 30, count).tolist())
              for name, count in (("a", 40), ("b", 9))]
    return [make_rows(cache, LENGTH, True, seed=0) for cache in caches]


def batches(rows, count: int, batch_size: int = 8, **options) -> list[dict]:
    with contextlib.closing(Loader(rows, WEIGHTS, SEED, batch_size, **options)) as loader:
        return list(itertools.islice(loader, count))


def assert_same(ours: list[dict], theirs: list[dict]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)
            assert a[key].dtype == b[key].dtype


def test_batches_are_the_samples_of_the_mixture(rows):
    mix = Mixture(WEIGHTS, [len(r) for r in rows], SEED)
    for step, batch in enumerate(batches(rows, 5, microbatches=2)):
        assert batch.keys() == FIELDS
        for j in range(8):
            source, row = mix.sample(step * 8 + j)
            for name in FIELDS:
                assert batch[name].shape == (2, 4, LENGTH)
                expected = rows[source][row][name.replace("_BxL", "_L")]
                np.testing.assert_array_equal(batch[name][j // 4, j % 4], expected)
        assert batch["weights_BxL"].dtype == np.float32 and batch["tokens_BxL"].dtype == np.int32


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_one_global_batch(rows, processes, microbatches):
    whole = batches(rows, 6, microbatches=microbatches)
    parts = [batches(rows, 6, microbatches=microbatches, process_index=p, process_count=processes)
             for p in range(processes)]
    joined = [{key: np.concatenate([part[step][key] for part in parts], axis=1) for key in whole[0]}
              for step in range(6)]
    assert_same(joined, whole)


def test_microbatches_are_the_same_samples(rows):
    for one, many in zip(batches(rows, 4), batches(rows, 4, microbatches=4)):
        for key in one:
            np.testing.assert_array_equal(one[key].reshape(-1, LENGTH), many[key].reshape(-1, LENGTH))


@pytest.mark.parametrize("at", [1, 3, 200])
def test_resume_goes_on_where_it_stopped(rows, at):
    with contextlib.closing(Loader(rows, WEIGHTS, SEED, 8)) as loader:
        taken = list(itertools.islice(loader, at))
        state = loader.next_sample
        assert state == 8 * at  # what was read ahead doesn't count
        rest = list(itertools.islice(loader, 4))
    assert len(taken) == at
    assert_same(batches(rows, 4, start_sample=state), rest)


def test_another_batch_size_goes_on_with_the_same_samples(rows):
    """A batch ramp: 3 steps of 4, then steps of 8, read the samples that steps of 4 would have read."""
    ramp = batches(rows, 2, batch_size=8, start_sample=12)
    plain = batches(rows, 4, batch_size=4, start_sample=12)
    for key in plain[0]:
        ours, theirs = (np.concatenate([b[key][0] for b in some]) for some in (ramp, plain))
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("start", [0, 3])
def test_skipped_samples_are_left_out_of_the_same_order(rows, start, processes):
    """Ranges inside a batch, over its edge, at the start; resumed or not, however many processes share it."""
    skips, plain = ((0, 3), (9, 10), (21, 40)), batches(rows, 12)
    places = [sample_at(place, skips) for place in range(8 * 6)]
    assert places == [sample for sample in range(8 * 6 + 23) if not any(begin <= sample < end for begin, end in skips)]
    for p in range(processes):
        found = batches(rows, 6 - start, start_sample=8 * start, skips=skips, process_index=p, process_count=processes)
        for key in FIELDS:
            whole = np.concatenate([batch[key][0] for batch in plain])[places[8 * start:]]
            whole = whole.reshape(-1, processes, 8 // processes, LENGTH)
            np.testing.assert_array_equal(np.stack([batch[key][0] for batch in found]), whole[:, p])


@pytest.mark.parametrize("threads,prefetch", [(0, 0), (1, 1), (5, 16)])
def test_reading_ahead_changes_nothing(rows, threads, prefetch):
    assert_same(batches(rows, 20, threads=threads, prefetch=prefetch), batches(rows, 20))


def test_close_twice_and_an_error_in_a_row_arrives(rows):
    loader = Loader(rows, WEIGHTS, SEED, 8)
    next(loader)
    loader.close()
    loader.close()

    class Broken(list):
        seq_len = LENGTH

        def __len__(self):
            return 3

        def pick(self, index):
            raise OSError("the disk is gone")

    with contextlib.closing(Loader([Broken()], [1.0], 0, 2)) as broken:
        with pytest.raises(OSError, match="the disk is gone"):
            next(broken)


@pytest.mark.parametrize("batch_size,microbatches,processes", [(6, 4, 1), (8, 2, 8), (7, 1, 2), (0, 1, 1)])
def test_batches_that_cannot_be_divided_name_the_field(rows, batch_size, microbatches, processes):
    with pytest.raises(InputError) as caught:
        Loader(rows, WEIGHTS, SEED, batch_size, microbatches, 0, processes)
    assert caught.value.field == "train.batch_size"


@pytest.mark.parametrize("limit", [None, 1, 4, 5, 10**6])
def test_evaluation_is_every_row_once_then_padding(rows, limit):
    source = rows[0]
    found = list(evaluation_batches(source, 4, limit))
    count = min(len(source), limit) if limit else len(source)
    assert len(found) == -(-count // 4)
    for key in (*FIELDS, "document_index_BxL"):
        joined = np.concatenate([batch[key] for batch in found])
        assert all(batch[key].shape == (4, LENGTH) for batch in found)
        expected = np.stack([source[i][key.replace("_BxL", "_L")] for i in range(count)])
        np.testing.assert_array_equal(joined[:count], expected)
        if key in ("weights_BxL", "segment_ids_BxL"):
            assert not joined[count:].any()
        if key == "document_index_BxL":
            assert (joined[count:] == -1).all()


def test_batches_are_placed_by_the_reading_threads(rows):
    def place(batch):
        return threading.current_thread(), batch

    with contextlib.closing(Loader(rows, WEIGHTS, SEED, 8)) as plain, \
            contextlib.closing(Loader(rows, WEIGHTS, SEED, 8, place=place)) as placed:
        for _ in range(3):
            batch, (thread, same) = next(plain), next(placed)
            assert thread is not threading.main_thread()
            assert batch.keys() == same.keys() and all((batch[name] == same[name]).all() for name in batch)
        assert plain.next_sample == placed.next_sample == 24
