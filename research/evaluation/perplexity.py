"""Loss on held-out documents with a standard error: nats per token, perplexity, bits per byte; by document, by position."""

import dataclasses
import hashlib
import math
from typing import Any, Callable, Iterable, Mapping

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What one set showed.

    Attributes:
      summary: loss, se, perplexity, bits_per_byte, tokens, documents (`summarise`).
      document_D, tokens_D, nll_D: each counted document's index in the set's sources, its counted tokens, and the sum of
        their losses in nats; sorted by index. Two runs that were evaluated on the same set are paired by it.
      sha256: hex, over the counted tokens and whose documents' they are, in turn: equal where the same was asked of two
        models, whatever each was trained on, and however its rows are cut and batched.
      loss_by_position: mean loss of the tokens at positions 0, 1, 2-3, 4-7, ... of their document's row: how much the
        model gains from context. Buckets without a counted token are left out.
    """

    summary: dict[str, float]
    document_D: np.ndarray
    tokens_D: np.ndarray
    nll_D: np.ndarray
    sha256: str
    loss_by_position: dict[str, float]


def summarise(sums_D: np.ndarray, counts_D: np.ndarray, total_bytes: float) -> dict[str, float]:
    """Summed losses and counted tokens per document -> loss, se, perplexity, bits_per_byte, tokens, documents.

    loss = sum / count is a ratio of two random sums, so its standard error is that of the ratio estimator over documents
    (Cochran 1977, section 2.11): tokens of one document are not independent. bits_per_byte = sum / (ln 2 * bytes) does
    not depend on the tokenizer.
    """
    seen = counts_D > 0
    sums_D, counts_D = sums_D[seen], counts_D[seen]
    total, count, documents = float(sums_D.sum()), float(counts_D.sum()), int(seen.sum())
    if not count:
        raise ValueError("an evaluation set without a counted token")
    loss = total / count
    residual = float(np.sum(np.square(sums_D - loss * counts_D)))
    se = math.sqrt(residual * documents / max(documents - 1, 1)) / count
    return {"loss": loss, "se": se, "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": total / math.log(2) / total_bytes if total_bytes else math.nan,
            "tokens": int(count), "documents": documents}


def bucket_of(positions: np.ndarray) -> np.ndarray:
    """Positions 0, 1, 2-3, 4-7, ... -> bucket numbers 0, 1, 2, 3, ..."""
    return np.frexp(np.asarray(positions, np.float64))[1]


def bucket_name(bucket: int) -> str:
    """0 -> "0", 1 -> "1", 2 -> "2-3", 3 -> "4-7"."""
    return str(bucket) if bucket < 2 else f"{1 << (bucket - 1)}-{(1 << bucket) - 1}"


class _Sums:
    """Running sums of losses and weights by a whole number."""

    def __init__(self):
        self.by_key: dict[int, tuple[float, float]] = {}

    def add(self, keys: np.ndarray, nll: np.ndarray, weights: np.ndarray) -> None:
        found, inverse = np.unique(keys, return_inverse=True)
        totals = np.bincount(inverse.ravel(), (nll * weights).ravel(), len(found))
        counts = np.bincount(inverse.ravel(), weights.ravel(), len(found))
        for key, total, count in zip(found.tolist(), totals.tolist(), counts.tolist()):
            before = self.by_key[key] if key in self.by_key else (0.0, 0.0)
            self.by_key[key] = (before[0] + total, before[1] + count)

    def counted(self) -> list[tuple[int, float, float]]:
        """(key, summed loss, weight), sorted, of the keys with any weight."""
        return [(key, total, count) for key, (total, count) in sorted(self.by_key.items()) if count > 0]


def evaluate(
    nll: Callable[[Any, Mapping[str, Any]], jax.Array], params: Any, batches: Iterable[Mapping[str, np.ndarray]],
    put: Callable[[Mapping[str, np.ndarray]], Mapping[str, jax.Array]], token_bytes_V: np.ndarray, progress: Callable = iter,
) -> Evaluation:
    """Over `batches` of rows. `nll(params, rows)` -> nll_BxL; `put` lays a batch out on the devices.

    Raises:
      ValueError: no token is counted.
    """
    by_document, by_position, total_bytes, digest = _Sums(), _Sums(), 0.0, hashlib.sha256()
    for batch in progress(batches):
        nll_BxL = np.asarray(jax.device_get(nll(params, put(batch))), np.float64)
        weights_BxL = batch["weights_BxL"]
        asked_Nx2 = np.stack([batch["document_index_BxL"], batch["targets_BxL"]], -1)[weights_BxL > 0]
        digest.update(asked_Nx2.astype("<i4").tobytes())
        total_bytes += float(np.sum(token_bytes_V[batch["targets_BxL"]] * weights_BxL))
        by_document.add(batch["document_index_BxL"], nll_BxL, weights_BxL)
        by_position.add(bucket_of(batch["positions_BxL"]), nll_BxL, weights_BxL)
    documents = by_document.counted()
    nll_D, tokens_D = np.array([total for _, total, _ in documents]), np.array([count for _, _, count in documents])
    return Evaluation(
        summarise(nll_D, tokens_D, total_bytes), np.array([key for key, _, _ in documents]), tokens_D, nll_D,
        digest.hexdigest(), {bucket_name(bucket): total / count for bucket, total, count in by_position.counted()})


def flat_evaluations(losses_E: Iterable[float], ses_E: Iterable[float]) -> int:
    """How many evaluations in a row, up to the last, have not gained on the best by more than their standard error.

    The best moves only when it is beaten by more than that, so slow progress adds up and counts once it is visible.
    """
    best, flat = math.inf, 0
    for loss, se in zip(losses_E, ses_E):
        better = loss < best - (se if math.isfinite(best) else 0.0)
        best, flat = (loss, 0) if better else (best, flat + 1)
    return flat
