"""Batches for the loop, read ahead on threads (Grain) while the devices work. Its state: a sample number."""

import collections
from typing import Any, Callable, Iterator, Mapping, Sequence

import grain
import numpy as np

from research.data.mixture import Mixture, Skips, Weight, sample_at
from research.data.packing import Rows, assemble
from research.errors import InputError

_ENDLESS = 1 << 40  # blocks
_BLOCK = 4  # batches that a thread makes in one piece: handing each over by itself takes longer than making it


class Loader:
    """An endless iterator of this process's part of each global batch.

    A batch is a dict tokens_BxL, targets_BxL, positions_BxL, segment_ids_BxL (int32), weights_BxL (float32)
    of arrays of shape (M, B / M / P, L): M microbatches, P processes. Sample j of a global batch of B goes to
    microbatch j // (B / M), in which each process takes one contiguous part, so that the global arrays don't
    depend on P.

    Args:
      rows: of each source (packing.make_rows).
      weights: of each source (mixture.Mixture).
      seed: of the order.
      batch_size: B, over all processes and microbatches.
      microbatches: M.
      process_index, process_count: which part; P = process_count.
      start_sample: how many samples were read before; what `next_sample` was, to resume.
      skips: samples to leave out; those that come instead count on without a gap.
      threads, prefetch: how many threads read ahead, and about how many batches.
      place: what becomes of a batch, on those threads: the loop has them put on the devices.

    Raises:
      InputError: B can't be divided so, a source has no rows.
    """

    def __init__(
        self, rows: Sequence[Rows], weights: Sequence[Weight], seed: int, batch_size: int,
        microbatches: int = 1, process_index: int = 0, process_count: int = 1, start_sample: int = 0,
        threads: int = 2, prefetch: int = 8, skips: Skips = (),
        place: Callable[[Mapping[str, np.ndarray]], Any] | None = None,
    ):
        if batch_size < 1 or batch_size % (microbatches * process_count):
            raise InputError(
                "train.batch_size", f"{batch_size} can't be divided into {microbatches} microbatches over "
                f"{process_count} processes", f"choose a multiple of {microbatches * process_count}")
        if len({source.seq_len for source in rows}) > 1:
            raise ValueError("sources of rows of different lengths")
        self._rows, self._mixture = rows, Mixture(weights, [len(source) for source in rows], seed)
        self._batch_size, self._microbatches = batch_size, microbatches
        self._local = batch_size // microbatches // process_count
        self._offset = process_index * self._local
        self._start, self._skips = start_sample, skips
        self.next_sample = start_sample
        self._place = place
        blocks = grain.MapDataset.range(_ENDLESS).map(self._block)
        ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, prefetch // _BLOCK))
        self._blocks = iter(blocks.to_iter_dataset(ahead))
        self._ready: collections.deque = collections.deque()

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Any:
        if not self._ready:
            self._ready.extend(next(self._blocks))
        self.next_sample += self._batch_size
        return self._ready.popleft()

    def close(self) -> None:
        """Stops reading ahead. Closing twice is no error."""
        self._blocks.close()

    def _block(self, block: int) -> list[Any]:
        batches = [self._batch(step) for step in range(block * _BLOCK, (block + 1) * _BLOCK)]
        return [self._place(batch) for batch in batches] if self._place else batches

    def _batch(self, step: int) -> dict[str, np.ndarray]:
        first = self._start + step * self._batch_size + self._offset
        per_microbatch = self._batch_size // self._microbatches
        picks = []
        for microbatch in range(self._microbatches):
            for i in range(self._local):
                source, row = self._mixture.sample(sample_at(first + microbatch * per_microbatch + i, self._skips))
                picks.append(self._rows[source].pick(row))
        shape = (self._microbatches, self._local, -1)
        fields = assemble(picks, self._rows[0].seq_len, documents=False)
        return {name.replace("_RxL", "_BxL"): value.reshape(shape) for name, value in fields.items()}


def documents_between(rows: Sequence[Rows], weights: Sequence[Weight], seed: int, begin: int, end: int) -> list[str]:
    """The names of the documents in the samples begin ... end - 1 of a Loader's order, each once."""
    mixture, found = Mixture(weights, [len(source) for source in rows], seed), {}
    for sample in range(begin, end):
        source, row = mixture.sample(sample)
        found |= dict.fromkeys(rows[source].documents(row))
    return list(found)


def evaluation_batches(
    rows: Rows, batch_size: int, limit: int | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """The first `limit` rows (default: all), in order, as (batch_size, L) arrays; the last one is filled up.

    Beside the training fields a batch has document_index_BxL (int32, -1 in padding), for errors over
    documents. Every process is given the whole batch.
    """
    count = len(rows) if limit is None else min(limit, len(rows))
    for begin in range(0, count, batch_size):
        picks = [rows.pick(i) for i in range(begin, min(begin + batch_size, count))]
        picks += [(None, (), 0)] * (batch_size - len(picks))
        yield {name.replace("_RxL", "_BxL"): value for name, value in assemble(picks, rows.seq_len).items()}
