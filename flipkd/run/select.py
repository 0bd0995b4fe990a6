"""Which pairs the LLM is asked: a band of probabilities, or the most uncertain ones up to an exact number.

The uncertainty of a pair is how near its probability is to the threshold. To take exactly the N nearest of a whole job,
all units are read twice, each time into a histogram of 65,536 bins, first over the upper half of a distance's bits and
then, in the one bin where the budget ends, over the lower half: then the cut is known exactly. Where several pairs lie
at the cut, the first ones in input order are taken. Memory grows with the number of units, not of pairs.
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
    """

    center: float
    cut: int
    at_cut: Mapping[str, int] = field(default_factory=dict)

    def chosen(self, values: Values, unit: str) -> Mask:
        """bool [P] for the P values of a whole unit, NaN where a pair has none."""
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
        """The values of a unit, in order. A file that cannot be read has none, where those are skipped."""
        try:
            with ShardReader(self.scores, unit.shard, may_skip=True) as reader:
                for table in unit.read(reader, [self.name], _BATCH_ROWS):
                    yield as_numbers(table.column(self.name))
        except InputError:
            if not self.skip_bad_shards:
                raise


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
    """

    def count(unit: WorkUnit, upper: int | None) -> npt.NDArray[np.int64]:
        bins = np.zeros(_BINS, np.int64)
        for values in column.values(unit):
            distances, scored = _distances(values, center)
            kept = distances[scored].astype(np.int64)
            kept = kept >> 16 if upper is None else kept[kept >> 16 == upper] & (_BINS - 1)
            bins += np.bincount(kept, minlength=_BINS)
        return bins

    def count_ties(unit: WorkUnit) -> int:
        return sum(
            int(np.count_nonzero(scored & (distances == cut)))
            for distances, scored in (_distances(values, center) for values in column.values(unit))
        )

    with ThreadPoolExecutor(threads, "flipkd-select") as pool:
        upper_bins = _sum(pool.map(lambda unit: count(unit, None), units))
        scored_pairs = int(upper_bins.sum())
        wanted = rows_of(scored_pairs)
        if not wanted:
            return Nearest(center, 0), 0, scored_pairs
        upper, left = _bin_of(upper_bins, wanted)
        lower_bins = _sum(pool.map(lambda unit: count(unit, upper), units))
        lower, left = _bin_of(lower_bins, left)
        cut = upper << 16 | lower
        if left == lower_bins[lower]:  # all at the cut are wanted
            return Nearest(center, cut + 1), wanted, scored_pairs
        at_cut: dict[str, int] = {}
        for unit, ties in zip(units, pool.map(count_ties, units), strict=True):
            if left and ties:
                at_cut[unit.output] = min(ties, left)
                left -= at_cut[unit.output]
    return Nearest(center, cut, at_cut), wanted, scored_pairs


def _sum(counts: Iterator[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    total = np.zeros(_BINS, np.int64)
    for one in counts:
        total += one
    return total


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
