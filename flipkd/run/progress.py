"""Progress on stderr: a bar with an ETA on a terminal, plain lines elsewhere, objects in a JSON log."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from tqdm import tqdm

from flipkd.logs import COMMAND_LOGGER, current_options
from flipkd.run.observe import CommandState

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
        self._print(dict(self.format_dict))

    def _print(self, state: dict[str, Any]) -> None:
        state.update(bar_format="{desc}: {n_fmt} of {total_fmt}{unit}, {rate_fmt}, about {remaining} left")
        print(self.format_meter(**state), file=sys.stderr, flush=True)


class _Records(_Lines):
    """The same as records of the log, with the numbers as fields."""

    def _print(self, state: dict[str, Any]) -> None:
        stage, unit, done, total = state["prefix"], state["unit"].strip(), round(state["n"]), state["total"]
        rate = state["rate"] or (state["n"] - state["initial"]) / max(state["elapsed"], 1e-9)
        left = round((total - done) / rate, 1) if total and rate > 0 else None
        fields = {
            "stage": stage,
            "unit": unit,
            "done": done,
            "total": total,
            "per_second": round(rate, 1),
            "seconds_left": left,
        }
        logging.getLogger(COMMAND_LOGGER).info("%s: %s of %s %s", stage, done, total, unit, extra={"fields": fields})


def progress_bar(description: str, total_rows: int, unit: str, shown: bool, initial: float = 0) -> Any:
    """A tqdm over rows; the first line comes with the first finished unit.

    Args:
        description: what is under way.
        total_rows: of all units.
        unit: what a row is.
        shown: whether it is shown at all.
        initial: rows that were done before, of which nothing can be learned about the time that is left.
    """
    terminal, log = sys.stderr.isatty(), current_options()
    options: dict[str, Any] = {
        "total": total_rows,
        "initial": initial,
        "desc": description,
        "unit": f" {unit}",
        "unit_scale": True,
        "disable": not shown,
        "smoothing": 0.05,
        "dynamic_ncols": terminal,
    }
    is_json = log is not None and log.form == "json"
    if terminal and not is_json:
        return tqdm(**options)
    kind = _Records if is_json else _Lines
    return kind(mininterval=_LINE_INTERVAL_S, maxinterval=_LINE_INTERVAL_S, leave=False, **options)


class ProgressBar:
    """Shows each stage of a command in a bar of its own; see ``flipkd.run.observe.Publisher``."""

    interval_s = 1.0

    def __init__(self) -> None:
        self._bars: list[Any] = []

    def publish(self, state: CommandState) -> None:
        """Shows the stages that have begun; the last line of one comes when it ends."""
        for stage in state.stages[len(self._bars) :]:
            bar = progress_bar(stage.kind, stage.rows, stage.unit_name, True, stage.resumed_rows)
            bar.start_t = bar.last_print_t = time.time() - stage.seconds
            self._bars.append(bar)
        for bar, stage in zip(self._bars, state.stages, strict=True):
            bar.update(stage.rows_done - bar.n)
            if not stage.is_running:
                bar.close()
