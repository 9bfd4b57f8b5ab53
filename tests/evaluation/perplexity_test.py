"""The standard error over documents and bits per byte."""

import math

import numpy as np
import pytest

from research.data.loader import evaluation_batches
from research.data.pipeline import prepare
from research.evaluation.perplexity import bucket_name, bucket_of, evaluate, flat_evaluations, summarise
from research.schema import DataConfig, Source, Validation


def test_summary_by_hand():
    result = summarise(np.array([6.0, 2.0, 0.0]), np.array([3.0, 1.0, 0.0]), total_bytes=16.0)
    assert result["loss"] == 2.0 and result["se"] == 0.0 and result["documents"] == 2 and result["tokens"] == 4
    assert result["perplexity"] == pytest.approx(math.e**2) and result["bits_per_byte"] == pytest.approx(8 / math.log(2) / 16)


def test_standard_error_covers_the_truth_when_documents_differ():
    """Documents with their own mean and length: the error over documents is right, the one over tokens far too small."""
    rng = np.random.default_rng(0)
    covered = naive = 0
    for _ in range(400):
        counts = rng.integers(20, 200, 60).astype(float)
        sums = np.array([rng.normal(2.0 + rng.normal(0, 0.5), 0.3, int(n)).sum() for n in counts])
        result = summarise(sums, counts, 1.0)
        covered += abs(result["loss"] - 2.0) < 1.96 * result["se"]
        naive += abs(result["loss"] - 2.0) < 1.96 * 0.6 / math.sqrt(counts.sum())
    assert 0.90 < covered / 400 < 0.98 and naive / 400 < 0.6


def test_batches_are_gathered_by_document_and_padding_is_left_out():
    nll = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 100.0]])
    batch = {"targets_BxL": np.array([[0, 1, 2], [2, 1, 0]]), "weights_BxL": np.array([[1, 1, 1], [1, 1, 0.0]]),
             "document_index_BxL": np.array([[0, 0, 7], [7, 7, -1]]), "positions_BxL": np.array([[0, 1, 0], [1, 2, 0]])}
    evaluation = evaluate(lambda params, rows: nll, None, [batch], lambda b: b, np.array([0, 1, 2]))
    result = evaluation.summary
    assert result["loss"] == 3.0 and result["documents"] == 2 and result["tokens"] == 5
    assert result["bits_per_byte"] == pytest.approx(15 / math.log(2) / (0 + 1 + 2 + 2 + 1))
    expected = summarise(np.array([3.0, 12.0]), np.array([2.0, 3.0]), 6.0)
    assert result["se"] == pytest.approx(expected["se"])
    assert evaluation.document_D.tolist() == [0, 7] and evaluation.tokens_D.tolist() == [2, 3]
    assert evaluation.nll_D.tolist() == [3.0, 12.0]
    assert evaluation.loss_by_position == {"0": 2.0, "1": 3.0, "2-3": 5.0}
    moved = {**batch, "document_index_BxL": np.array([[0, 0, 6], [6, 6, -1]])}
    again, other = (evaluate(lambda params, rows: nll, None, [b], lambda b: b, np.array([0, 1, 2])) for b in (batch, moved))
    assert again.sha256 == evaluation.sha256 != other.sha256


def test_the_hash_is_of_what_is_asked_and_not_of_how_it_is_cut(tmp_path):
    def asked(rows_a_batch: int = 4, seed: int = 0, documents: int = 9, **changes) -> str:
        data = DataConfig((Source("synthetic"),), cache_dir=str(tmp_path), validation=(
            Validation(sources=(Source("synthetic", {"documents": documents, "length": 90, "seed": seed}),)),), **changes)
        rows = prepare(data, 264, 0, quiet=True).validation["heldout"]
        return evaluate(lambda _, batch: np.zeros(batch["targets_BxL"].shape), None, evaluation_batches(rows, rows_a_batch),
                        lambda batch: batch, np.ones(264)).sha256

    whole = asked()
    assert asked(3) == asked(seq_len=40) == asked(packed=False) == asked(holdout=0.3) == whole
    assert len({whole, asked(seed=1), asked(documents=10)}) == 3


def test_position_buckets_double():
    positions = np.arange(70)
    assert bucket_of(positions)[[0, 1, 2, 3, 4, 7, 8, 63, 64]].tolist() == [0, 1, 2, 2, 3, 3, 4, 6, 7]
    for position, bucket in zip(positions.tolist(), bucket_of(positions).tolist()):
        first, _, last = bucket_name(bucket).partition("-")
        assert int(first) <= position <= int(last or first)


FLAT = [
    ([], 0),
    ([3.0], 0),
    ([3.0, 2.0, 1.0], 0),
    ([3.0, 2.99, 2.98], 2),
    ([3.0, 2.99, 2.98, 2.8], 0),  # three small gains are a large one together
    ([3.0, 2.0, 2.1, 2.0, 1.95], 3),
]


@pytest.mark.parametrize("losses, flat", FLAT)
def test_flat_evaluations_are_counted(losses, flat):
    assert flat_evaluations(losses, [0.1] * len(losses)) == flat


def test_an_empty_set_is_an_error():
    with pytest.raises(ValueError, match="without a counted token"):
        summarise(np.array([0.0]), np.array([0.0]), 0.0)
