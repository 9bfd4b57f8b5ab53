"""Loss on held-out documents with a standard error: nats per token, perplexity, bits per byte."""

import math
from typing import Any, Callable, Iterable, Mapping

import jax
import numpy as np


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


def evaluate(
    nll: Callable[[Any, Mapping[str, Any]], jax.Array], params: Any, batches: Iterable[Mapping[str, np.ndarray]],
    put: Callable[[Mapping[str, np.ndarray]], Mapping[str, jax.Array]], token_bytes_V: np.ndarray, progress: Callable = iter,
) -> dict[str, float]:
    """`summarise` over `batches` of rows. `nll(params, rows)` -> nll_BxL; `put` lays a batch out on the devices."""
    sums: dict[int, float] = {}
    counts: dict[int, float] = {}
    total_bytes = 0.0
    for batch in progress(batches):
        nll_BxL = np.asarray(jax.device_get(nll(params, put(batch))), np.float64)
        weights_BxL = batch["weights_BxL"]
        total_bytes += float(np.sum(token_bytes_V[batch["targets_BxL"]] * weights_BxL))
        documents, inverse = np.unique(batch["document_index_BxL"], return_inverse=True)
        by_document = np.bincount(inverse.ravel(), (nll_BxL * weights_BxL).ravel(), len(documents))
        tokens = np.bincount(inverse.ravel(), weights_BxL.ravel(), len(documents))
        for document, total, count in zip(documents.tolist(), by_document, tokens):
            sums[document] = (sums[document] if document in sums else 0.0) + total
            counts[document] = (counts[document] if document in counts else 0.0) + count
    keys = list(sums)
    return summarise(np.array([sums[k] for k in keys]), np.array([counts[k] for k in keys]), total_bytes)
