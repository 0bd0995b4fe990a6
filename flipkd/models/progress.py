"""How far a call of a model is, for who wants to know: most of a unit's time, at times minutes, is one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

# Called with how many of the call's inputs are done, and how many there are.
Listener = Callable[[int, int], None]

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextlib.contextmanager
def listening(listener: Listener | None) -> Iterator[None]:
    """Models that are called in this context, in this thread, tell the listener how far they are."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def tell(done: int, total: int) -> None:
    """Says that ``done`` of ``total`` inputs are done."""
    listener = _listener.get()
    if listener is not None:
        listener(done, total)
