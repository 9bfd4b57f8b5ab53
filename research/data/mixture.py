"""The global order of training: sample number -> (source, row), whatever the number of hosts and devices."""

import fractions
import functools
import math
import threading
from typing import Sequence

import numpy as np

from research.data import order
from research.errors import InputError

BLOCK = 1024  # samples


class Mixture:
    """An endless order over several sources of rows.

    Samples come in blocks. A block has a whole number of each source's rows: by largest remainder, and what
    rounding gives or takes is carried to the next block, so that shares of a long run are exact. Its order is
    shuffled. Each source's rows come in epochs, each a new permutation of all its rows.

    Args:
      weights: shares of the sources; they need not sum to one.
      lengths: rows of each source.
      seed: another seed, another order.

    Raises:
      InputError: no sources, a weight that isn't above 0, a source without rows.
    """

    def __init__(self, weights: Sequence[float], lengths: Sequence[int], seed: int):
        if not lengths or len(weights) != len(lengths):
            raise InputError("data.sources", f"{len(lengths)}, with {len(weights)} weights", "give each one")
        for i, (weight, length) in enumerate(zip(weights, lengths)):
            if not (weight > 0 and math.isfinite(weight)):
                raise InputError(f"data.sources.{i}.weight", f"{weight} is not above 0",
                                 "leave the source out instead")
            if length < 1:
                raise InputError(f"data.sources.{i}", "has no rows to train on", "give it more documents")
        # A float is a fraction with a power of two below: whole numbers in the same ratio exist, exactly.
        ratios = [fractions.Fraction(weight) for weight in weights]
        common = math.lcm(*(ratio.denominator for ratio in ratios))
        self._units = [int(ratio * common) for ratio in ratios]
        self._lengths, self._seed = tuple(lengths), seed
        # Samples of each source before each block, as far as it was asked for.
        self._before: list[tuple[int, ...]] = [(0,) * len(lengths)]
        self._carry = [0] * len(lengths)
        # Readers ahead may be an epoch ahead: two a source.
        self._epoch = functools.lru_cache(maxsize=2 * len(lengths))(order.permutation)
        self._lock = threading.Lock()

    def sample(self, index: int) -> tuple[int, int]:
        """(source number, row number) of sample `index` (0, 1, ...). Pure; several threads may call it."""
        block, place = divmod(index, BLOCK)
        before, after = self._counts(block), self._counts(block + 1)
        source_J, rank_J = _block(tuple(b - a for a, b in zip(before, after)), self._seed, block)
        source = int(source_J[place])
        epoch, rank = divmod(before[source] + int(rank_J[place]), self._lengths[source])
        return source, int(self._epoch(self._lengths[source], "epoch", self._seed, source, epoch)[rank])

    def _counts(self, block: int) -> tuple[int, ...]:
        """Samples of each source in all blocks before this one."""
        with self._lock:
            while len(self._before) <= block:
                counts = self._next_block()
                self._before.append(tuple(a + b for a, b in zip(self._before[-1], counts)))
            return self._before[block]

    def _next_block(self) -> list[int]:
        total = sum(self._units)
        # In units of 1/total of a sample.
        due = [carry + BLOCK * units for carry, units in zip(self._carry, self._units)]
        counts = [max(0, amount // total) for amount in due]
        # A source that was rounded up may be owed less than nothing now: the sum can be off to either side.
        while (missing := BLOCK - sum(counts)) != 0:
            owed = [amount - count * total for amount, count in zip(due, counts)]
            if missing > 0:
                counts[max(range(len(owed)), key=lambda i: (owed[i], -i))] += 1
            else:
                counts[min((i for i in range(len(owed)) if counts[i]), key=lambda i: (owed[i], -i))] -= 1
        self._carry = [amount - count * total for amount, count in zip(due, counts)]
        return counts


@functools.lru_cache(maxsize=16)
def _block(counts: tuple[int, ...], seed: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """source_J, rank_J: of each place in the block, its source and how many of that source came before."""
    source_J = np.repeat(np.arange(len(counts)), counts)[order.permutation(BLOCK, "block", seed, block)]
    rank_J = np.zeros(BLOCK, np.int64)
    for source, count in enumerate(counts):
        rank_J[source_J == source] = np.arange(count)
    return source_J, rank_J
