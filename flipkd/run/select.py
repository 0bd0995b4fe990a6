"""Which pairs the LLM is asked: a band of probabilities, or the most uncertain ones up to an exact number.

The uncertainty of a pair is how near its probability is to the threshold. To take exactly the N nearest of a whole job,
all units are read twice, each time into a histogram of 65,536 bins, first over the upper half of a distance's bits and
then, in the one bin where the budget ends, over the lower half: then the cut is known exactly. Where more pairs lie at
the cut than are wanted, the first ones in input order are taken, and all units are read a third time to count them.
Memory grows with the number of units, not of pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from flipkd.data.columns import as_numbers
from flipkd.data.location import Location
from flipkd.data.shards import ShardReader
from flipkd.errors import InputError
from flipkd.run.units import WorkUnit, fingerprint

_BATCH_ROWS = 1 << 20
_BINS = 1 << 16

Values = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Distances = npt.NDArray[np.uint32]
Counts = npt.NDArray[np.int64]
Count = Callable[[Counts], Counts]  # from distances to what is counted of them


@dataclass(frozen=True)
class Band:
    """Pairs from ``low`` to ``high``, both included."""

    low: float
    high: float

    def chosen(self, values: Values, unit: str) -> Mask:
        """bool [P] for the P values of a whole unit, NaN where a pair has none."""
        del unit
        # As float32, which the values are kept in: 0.7 in a file is a little less than 0.7.
        values = values.astype(np.float32).astype(np.float64)
        low, high = (float(np.float32(bound)) for bound in (self.low, self.high))
        mask: Mask = (values >= low) & (values <= high)
        return mask

    def basis(self, unit: str) -> str:
        """See ``UnitReport.basis``: a pair is in the band whatever other pairs there are."""
        del unit
        return ""


@dataclass(frozen=True)
class Nearest:
    """Pairs that are nearer to ``center`` than ``cut``, and of those at the cut the first ones of each unit.

    Args:
        center: the threshold.
        cut: bits of the distance, see ``_distances``.
        at_cut: how many pairs at the cut are chosen, by the output name of their unit; none in others.
        left_out: output names of the units that could not be read to their end, so that their pairs were not counted.
    """

    center: float
    cut: int
    at_cut: Mapping[str, int] = field(default_factory=dict)
    left_out: frozenset[str] = frozenset()

    def chosen(self, values: Values, unit: str) -> Mask:
        """bool [P] for the P values of a whole unit, NaN where a pair has none.

        Raises:
            InputError: the unit was left out; with its pairs there would be more than the budget allows.
        """
        if unit in self.left_out:
            raise InputError(f"{unit} is left out: its pairs could not be read when they were chosen; run again")
        distances, scored = _distances(values, self.center)
        mask: Mask = scored & (distances < self.cut)
        ties = np.flatnonzero(scored & (distances == self.cut))
        mask[ties[: self.at_cut.get(unit, 0)]] = True
        return mask

    def basis(self, unit: str) -> str:
        """See ``UnitReport.basis``: where the cut is depends on all pairs that can be read."""
        return fingerprint({"cut": self.cut, "at_cut": self.at_cut.get(unit, 0)})


Selection = Band | Nearest


@dataclass(frozen=True)
class ScoreColumn:
    """Where the values stand that decide."""

    scores: Location
    name: str
    skip_bad_shards: bool

    def values(self, unit: WorkUnit) -> Iterator[Values]:
        """The values of a unit, in order.

        Raises:
            InputError: the file cannot be read.
        """
        with ShardReader(self.scores, unit.shard, may_skip=True) as reader:
            for table in unit.read(reader, [self.name], _BATCH_ROWS):
                yield as_numbers(table.column(self.name))


def select_nearest(
    column: ScoreColumn, units: Sequence[WorkUnit], center: float, rows_of: Callable[[int], int], threads: int
) -> tuple[Nearest, int, int]:
    """Finds the pairs that are nearest to the threshold.

    Args:
        column: of the probabilities.
        units: of the whole job.
        center: the threshold.
        rows_of: from the number of scored pairs to how many are wanted, at most as many.
        threads: units that are read at once.

    Returns:
        The selection, how many pairs it holds, and how many have a score.

    Raises:
        InputError: a file cannot be read, and such files are not skipped.
    """
    left_out: set[str] = set()

    def counted(count: Count) -> Iterator[tuple[WorkUnit, Counts]]:
        """The counts of each unit that can be read to its end, summed over its batches; the others are left out."""

        def one(unit: WorkUnit) -> Counts | None:
            total = np.zeros(1, np.int64)
            try:
                for values in column.values(unit):
                    distances, scored = _distances(values, center)
                    total = total + count(distances[scored].astype(np.int64))
            except InputError:
                if not column.skip_bad_shards:
                    raise
                return None
            return total

        present = [unit for unit in units if unit.output not in left_out]
        for unit, counts in zip(present, pool.map(one, present), strict=True):
            if counts is None:
                left_out.add(unit.output)
            else:
                yield unit, counts

    def nearest() -> tuple[Nearest, int, int] | None:
        """None where a unit could be read before, and cannot now: what was counted holds no more."""
        upper_bins = _sum(counted(lambda distances: np.bincount(distances >> 16, minlength=_BINS)))
        known = frozenset(left_out)
        scored_pairs = int(upper_bins.sum())
        wanted = rows_of(scored_pairs)
        if not wanted:
            return Nearest(center, 0, left_out=known), 0, scored_pairs
        upper, left = _bin_of(upper_bins, wanted)
        lower_bins = _sum(counted(lambda distances: _lower_bins(distances, upper)))
        if left_out != known:
            return None
        lower, left = _bin_of(lower_bins, left)
        cut = upper << 16 | lower
        if left == lower_bins[lower]:  # all at the cut are wanted
            return Nearest(center, cut + 1, left_out=known), wanted, scored_pairs
        at_cut: dict[str, int] = {}
        for unit, ties in counted(lambda distances: np.array([np.count_nonzero(distances == cut)])):
            if left and ties[0]:
                at_cut[unit.output] = min(int(ties[0]), left)
                left -= at_cut[unit.output]
        return (Nearest(center, cut, at_cut, known), wanted, scored_pairs) if left_out == known else None

    with ThreadPoolExecutor(threads, "flipkd-select") as pool:
        while (found := nearest()) is None:
            continue
    return found


def _sum(counts: Iterator[tuple[WorkUnit, Counts]]) -> Counts:
    total = np.zeros(_BINS, np.int64)
    for _, one in counts:
        total += one
    return total


def _lower_bins(distances: Counts, upper: int) -> Counts:
    return np.bincount(distances[distances >> 16 == upper] & (_BINS - 1), minlength=_BINS)


def _bin_of(bins: npt.NDArray[np.int64], wanted: int) -> tuple[int, int]:
    """The bin that holds the ``wanted``-th smallest, and how many of it are wanted (at least 1)."""
    sums = np.cumsum(bins)
    place = int(np.searchsorted(sums, wanted))
    return place, wanted - int(sums[place] - bins[place])


def _distances(values: Values, center: float) -> tuple[Distances, Mask]:
    """Distances from the threshold as uint32 [P] (the bits of a float32 that is not negative sort as it does), and
    bool [P]: which pairs have one."""
    distances: npt.NDArray[Any] = np.abs(values - center).astype(np.float32)
    return distances.view(np.uint32), np.isfinite(values)
