"""The standard error over documents and bits per byte."""

import math

import numpy as np
import pytest

from research.evaluation.perplexity import evaluate, summarise


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
             "document_index_BxL": np.array([[0, 0, 7], [7, 7, -1]])}
    result = evaluate(lambda params, rows: nll, None, [batch], lambda b: b, np.array([0, 1, 2]))
    assert result["loss"] == 3.0 and result["documents"] == 2 and result["tokens"] == 5
    assert result["bits_per_byte"] == pytest.approx(15 / math.log(2) / (0 + 1 + 2 + 2 + 1))
    expected = summarise(np.array([3.0, 12.0]), np.array([2.0, 3.0]), 6.0)
    assert result["se"] == pytest.approx(expected["se"])


def test_an_empty_set_is_an_error():
    with pytest.raises(ValueError, match="without a counted token"):
        summarise(np.array([0.0]), np.array([0.0]), 0.0)
