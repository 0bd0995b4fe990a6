"""Progress of a job on stderr: a bar with an ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

_LINE_INTERVAL_S = 30.0


class _Lines(tqdm):  # type: ignore[type-arg]
    """tqdm that prints whole lines, for logs: no carriage returns, no cursor movements."""

    _shown: float = 0

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Prints the state as one line."""
        del msg, pos
        if self.n == self._shown:  # nothing new: also at the start, and when tqdm closes
            return
        self._shown = self.n
        state = dict(self.format_dict)
        state.update(bar_format="{desc}: {n_fmt} of {total_fmt} {unit}, {rate_fmt}, about {remaining} left")
        print(self.format_meter(**state), file=sys.stderr, flush=True)


def progress_bar(description: str, total_rows: int, unit: str, shown: bool) -> Any:
    """A tqdm over rows; the first line comes with the first finished unit."""
    terminal = sys.stderr.isatty()
    options: dict[str, Any] = {
        "total": total_rows,
        "desc": description,
        "unit": f" {unit}",
        "unit_scale": True,
        "disable": not shown,
        "smoothing": 0.05,
        "dynamic_ncols": terminal,
    }
    if terminal:
        return tqdm(**options)
    return _Lines(mininterval=_LINE_INTERVAL_S, maxinterval=_LINE_INTERVAL_S, leave=False, **options)
