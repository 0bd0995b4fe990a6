"""The demo's steps on the screen: which one runs, how long it took, how long all of it will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any


class Steps:
    """Runs steps in turn and says so.

    Args:
        seconds: name of each step to the seconds it took on the README's machine: they are shares of the whole, and
            what has passed so far says how fast this machine is.
        say: gets a line.
    """

    def __init__(self, seconds: Mapping[str, float], say: Callable[[str], None]) -> None:
        self._left = dict(seconds)
        self._count = len(seconds)
        self._say = say
        self._done_here, self._done_there = 0.0, 0.0

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        """Runs one step and returns what it returns."""
        number = self._count - len(self._left) + 1
        self._say(f"[{number}/{self._count}] {name}, about {_minutes(self._estimate())} to the end")
        started = time.perf_counter()
        result = work()
        seconds = time.perf_counter() - started
        expected = self._left.pop(name)
        # A step whose work was there already says nothing about the machine.
        if seconds > 0.3 * expected:
            self._done_here += seconds
            self._done_there += expected
        return result

    def _estimate(self) -> float:
        # Ten seconds at the README's pace, so that a first short step does not decide alone.
        pace = (self._done_here + 10) / (self._done_there + 10)
        return pace * sum(self._left.values())


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
