"""How long a connection to Ray lives: from the first stage that needs one to the end of the command or the night."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass
class _Session:
    depth: int = 0
    address: str | None = None
    close: Callable[[], object] | None = None


_session, _lock = _Session(), threading.Lock()


@contextlib.contextmanager
def ray_session() -> Iterator[None]:
    """What is connected inside is shut down at the end of the outermost session; what was there before stays."""
    with _lock:
        _session.depth += 1
    try:
        yield
    finally:
        with _lock:
            _session.depth -= 1
            if not _session.depth and _session.close is not None:
                close, _session.address, _session.close = _session.close, None, None
                close()


def opened(address: str, close: Callable[[], object]) -> None:
    """Says that a connection was made, and how the end of the session closes it."""
    _session.address, _session.close = address, close


def opened_address() -> str | None:
    """Address of the connection that this session has made; None where there is none, or somebody else's."""
    return _session.address
