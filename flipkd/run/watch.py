"""Follows a job until it ends, by looking at its output folder again and again."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

from tqdm import tqdm

from flipkd.run.status import status

# Exit codes, as those of the job itself; one that was broken off has failed.
_EXIT_CODES = {"finished": 0, "partial": 3, "broken off": 1}
_TERMINAL_INTERVAL_S = 2.0
_LINE_INTERVAL_S = 30.0
# A lock may be free for a moment: a job that was restarted takes it again.
_DEAD_LOOKS = 2
_DEAD_WAIT_S = 2.0


class _Screen(Protocol):
    def show(self, facts: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def watch(folder: str, *, interval_s: float | None = None, as_json: bool = False) -> int:
    """Shows how far the job is, on stdout, until it is finished or nobody works on it any more.

    On a terminal a bar; elsewhere, or with ``as_json``, a line (an object) every ``interval_s``.

    Args:
        folder: see ``flipkd.run.status.status``.
        interval_s: seconds between two looks; None: 2 on a terminal, 30 elsewhere.
        as_json: whether objects are printed.

    Returns:
        The exit code: 0 finished, 3 partial, 1 broken off: the job has failed or was killed.

    Raises:
        InputError: the folder is not an output of flipkd.
    """
    on_terminal = sys.stdout.isatty() and not as_json
    wait = interval_s or (_TERMINAL_INTERVAL_S if on_terminal else _LINE_INTERVAL_S)
    screen: _Screen = _Bar() if on_terminal else _Lines(json.dumps if as_json else _line)
    dead, seen = 0, -1
    try:
        while True:
            facts = status(folder)
            done = facts.get("rows_done", facts.get("steps_done", 0))
            is_dead = facts["state"] == "unfinished" and not facts["running"]
            dead = dead + 1 if is_dead and done == seen else int(is_dead)
            seen = done
            if dead >= _DEAD_LOOKS:
                facts["state"] = "broken off"
            if not is_dead or facts["state"] == "broken off":
                screen.show(facts)
            if facts["state"] in _EXIT_CODES:
                return _EXIT_CODES[facts["state"]]
            time.sleep(min(wait, _DEAD_WAIT_S) if is_dead else wait)
    finally:
        screen.close()


def _line(facts: dict[str, Any]) -> str:
    """``score: 1200 of 8000 pairs, 3 of 20 units, 350 rows/s, about 0:19 left``."""
    kind = facts.get("stage") or facts["kind"] or "starting"
    if facts["state"] != "unfinished":
        kind = f"{facts['kind']}: {facts['state']}"
    parts = []
    if "steps" in facts:
        parts.append(f"{facts['steps_done']} of {facts['steps']} steps")
    if "rows" in facts:
        parts.append(f"{facts['rows_done']} of {facts['rows']} {facts.get('unit_name', 'rows')}")
        parts.append(f"{facts['units_done']} of {facts['units']} units")
    if facts["state"] == "unfinished":
        parts += _pace(facts)
    if facts["state"] == "broken off":
        parts.append(facts.get("error") or "the job is not running; run it again, it goes on from here")
    return f"{kind}: {', '.join(parts)}" if parts else kind


def _pace(facts: dict[str, Any]) -> list[str]:
    rate, left = facts.get("rows_per_second"), facts.get("seconds_left")
    parts = [f"{rate:.0f} {facts.get('unit_name', 'rows')}/s"] if rate else []
    return parts if left is None else [*parts, f"about {tqdm.format_interval(left)} left"]


class _Lines:
    def __init__(self, form: Callable[[dict[str, Any]], str]) -> None:
        self._form = form

    def show(self, facts: dict[str, Any]) -> None:
        print(self._form(facts), flush=True)

    def close(self) -> None:
        """Nothing is open."""


class _Bar:
    """A bar for each stage, then the last word. The rate and the ETA are the job's own, not what is seen here."""

    def __init__(self) -> None:
        self._name = ""
        self._bar: Any = None

    def show(self, facts: dict[str, Any]) -> None:
        if facts["state"] != "unfinished":
            self.close()
            print(_line(facts), flush=True)
            return
        name = facts.get("stage") or facts["kind"] or "starting"
        if name != self._name:
            self.close()
            form = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
            self._bar = tqdm(desc=name, file=sys.stdout, bar_format=form, unit_scale=True, dynamic_ncols=True)
            self._name = name
        self._bar.total = facts.get("rows", facts.get("steps"))
        self._bar.n = facts.get("rows_done", facts.get("steps_done", 0))
        self._bar.set_postfix_str(", ".join(_pace(facts)), refresh=False)
        self._bar.refresh()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
