"""The global order of training: sample number -> (source, row), whatever the number of hosts and devices."""

import bisect
import fractions
import functools
import math
import threading
from typing import Sequence

import numpy as np

from research.data import order
from research.errors import InputError

BLOCK = 1024  # samples
# A weight, or one that changes: (sample number, weight) points, rising; straight lines between, constant outside.
Weight = float | Sequence[tuple[int, float]]
_FINE = 1 << 40  # changing shares are rounded to so many parts of one: off by a sample in a quadrillion


class Mixture:
    """An endless order over several sources of rows.

    Samples come in blocks. A block has a whole number of each source's rows: by largest remainder, and what
    rounding gives or takes is carried to the next block, so that shares of a long run are exact. Its order is
    shuffled. Each source's rows come in epochs, each a new permutation of all its rows. Where weights change over
    training, a block has the shares of its middle.

    Args:
      weights: shares of the sources; they need not sum to one, at any sample.
      lengths: rows of each source.
      seed: another seed, another order.

    Raises:
      InputError: no sources, a weight that isn't above 0 (one that changes may be 0 at times), a source without rows.
        `sample`, and with it any read ahead: the weights of that block sum to nothing.
    """

    def __init__(self, weights: Sequence[Weight], lengths: Sequence[int], seed: int):
        if not lengths or len(weights) != len(lengths):
            raise InputError("data.sources", f"{len(lengths)}, with {len(weights)} weights", "give each one")
        points = [((0, weight),) if isinstance(weight, (int, float)) else tuple(weight) for weight in weights]
        for i, (curve, length) in enumerate(zip(points, lengths)):
            values = [weight for _, weight in curve]
            if not (all(math.isfinite(w) and w >= 0 for w in values) and any(values)):
                raise InputError(f"data.sources.{i}.weight", f"{', '.join(map(str, values))} is not above 0",
                                 "leave the source out instead")
            if length < 1:
                raise InputError(f"data.sources.{i}", "has no rows to train on", "give it more documents")
        self._points = points
        self._changing = any(len(curve) > 1 for curve in points)
        self._units = [] if self._changing else _whole([curve[0][1] for curve in points])
        self._check_sums()
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

    def _check_sums(self) -> None:
        """Between two points the sum is a straight line, so it can only be 0 where it is 0 at a point."""
        if not self._changing:
            return
        for sample in sorted({sample for curve in self._points for sample, _ in curve}):
            for block in {max(sample // BLOCK + step, 0) for step in (-1, 0, 1)}:
                if not sum(_weight_at(curve, block) for curve in self._points):
                    place = block * BLOCK + BLOCK // 2
                    raise InputError("data.sources", f"the weights sum to nothing at sample {place}",
                                     "give one of them a later weight above 0 there")

    def _units_of(self, block: int) -> list[int]:
        """Whole numbers in the ratio of the block's weights."""
        if not self._changing:
            return self._units
        weights = [_weight_at(curve, block) for curve in self._points]
        total = math.fsum(weights)
        units = [int(weight / total * _FINE) for weight in weights]
        largest = max(range(len(units)), key=lambda i: (units[i], -i))
        units[largest] += _FINE - sum(units)
        return units

    def _next_block(self) -> list[int]:
        units_of_block = self._units_of(len(self._before) - 1)
        total = sum(units_of_block)
        # In units of 1/total of a sample.
        due = [carry + BLOCK * units for carry, units in zip(self._carry, units_of_block)]
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


Skips = tuple[tuple[int, int], ...]  # ranges [begin, end) of samples that a run leaves out; rising, disjoint


def sample_at(place: int, skips: Skips) -> int:
    """The number of the sample at `place` (0, 1, ...) of the order without `skips`."""
    for begin, end in skips:
        if place < begin:
            break
        place += end - begin
    return place


def with_skip(skips: Skips, begin: int, end: int) -> Skips:
    """`skips` and [begin, end), whose ends lie in none of them (as those that `sample_at` gives); twice is once."""
    return tuple(sorted([*(skip for skip in skips if not begin <= skip[0] < end), (begin, end)]))


def _whole(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the same ratio. A float is a fraction with a power of two below: they exist, exactly."""
    ratios = [fractions.Fraction(weight) for weight in weights]
    common = math.lcm(*(ratio.denominator for ratio in ratios))
    return [int(ratio * common) for ratio in ratios]


def _weight_at(curve: Sequence[tuple[int, float]], block: int) -> float:
    """The weight in the middle of a block. Plain arithmetic: the same on every machine."""
    place = block * BLOCK + BLOCK // 2
    after = bisect.bisect_right(curve, place, key=lambda point: point[0])
    if after in (0, len(curve)):
        return float(curve[max(after - 1, 0)][1])
    (start, low), (stop, high) = curve[after - 1], curve[after]
    return low + (high - low) * ((place - start) / (stop - start))


@functools.lru_cache(maxsize=16)
def _block(counts: tuple[int, ...], seed: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """source_J, rank_J: of each place in the block, its source and how many of that source came before."""
    source_J = np.repeat(np.arange(len(counts)), counts)[order.permutation(BLOCK, "block", seed, block)]
    rank_J = np.zeros(BLOCK, np.int64)
    for source, count in enumerate(counts):
        rank_J[source_J == source] = np.arange(count)
    return source_J, rank_J
