"""Logs on stderr: plain lines, or one JSON object a line. The same in the command's process and in its Ray workers.

A JSON line has ``time`` (UTC, ISO 8601), ``level``, ``logger``, ``message``, ``process``, and the fields that flipkd's
own records carry (``extra={"fields": {...}}``, plain values). What else a library hangs on a record is left out. Of an
exception only its kind and its place in the code are told: its message may quote a record.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal

from flipkd.urls import hide_secrets

LogFormat = Literal["text", "json"]
LOG_FORMATS: tuple[LogFormat, ...] = ("text", "json")

# What a command says for itself in a JSON log: its progress, its last word. That is there whatever the level.
COMMAND_LOGGER = "flipkd.command"

_ExceptionInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


@dataclass(frozen=True)
class LogOptions:
    """How a process logs; travels to Ray workers.

    Args:
        level: of the root logger: debug, info, warning or error.
        form: ``text`` or ``json``.
    """

    level: str = "warning"
    form: LogFormat = "text"


_current: LogOptions | None = None


def current_options() -> LogOptions | None:
    """What ``log_to_stderr`` was told; None in a program that sets up its own logs."""
    return _current


@contextlib.contextmanager
def logging_to_stderr(options: LogOptions) -> Iterator[None]:
    """Logs, and Python's warnings, go to stderr until the end of the context."""
    global _current
    root = logging.getLogger()
    before = (root.level, _current)
    handler = log_to_stderr(options)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)
        root.setLevel(before[0])
        _current = before[1]


def log_to_stderr(options: LogOptions) -> logging.Handler:
    """The same for the rest of the process, as a Ray worker wants it. Returns the handler."""
    global _current
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_formatter(options))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(options.level.upper())
    logging.getLogger(COMMAND_LOGGER).setLevel(logging.INFO)
    logging.captureWarnings(True)
    _current = options
    return handler


def adopt_handlers(*names: str) -> None:
    """In a JSON log, what a library prints on stderr by handlers of its own is JSON too, from the same level on.

    The handlers are replaced: one may have ways past its formatter, as that of Ray in a worker.
    """
    if _current is None or _current.form != "json":
        return
    for name in names:
        library = logging.getLogger(name)
        for old in _console_handlers(library):
            new = logging.StreamHandler(old.stream)
            new.setFormatter(_formatter(_current))
            new.setLevel(_current.level.upper())
            new.filters = list(old.filters)
            library.removeHandler(old)
            library.addHandler(new)


def log_as_worker(options: LogOptions, *names: str) -> None:
    """For the rest of a process that a cluster has started; ``names`` as in ``adopt_handlers``.

    What the cluster's own library has set up to print all logs goes: each would stand there twice.
    """
    root = logging.getLogger()
    for handler in _console_handlers(root):
        root.removeHandler(handler)
    log_to_stderr(options)
    adopt_handlers(*names)


def _console_handlers(logger: logging.Logger) -> list[logging.StreamHandler[Any]]:
    return [
        handler
        for handler in logger.handlers
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)
    ]


def _formatter(options: LogOptions) -> logging.Formatter:
    return _JsonFormatter() if options.form == "json" else _TextFormatter()


class _TextFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return hide_secrets(super().format(record))

    def formatException(self, ei: _ExceptionInfo) -> str:  # noqa: N802
        return "\n".join(f"  {line}" for line in _places(ei))


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        values: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": hide_secrets(record.getMessage().strip()),
            "process": record.process,
        }
        if record.exc_info:
            values["exception"] = _places(record.exc_info)
        return json.dumps({**getattr(record, "fields", {}), **values}, default=lambda value: type(value).__name__)


def _places(info: _ExceptionInfo) -> list[str]:
    """The kind of an exception, and the lines of code that it came through, without its message."""
    kind, _, trace = info
    frames = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(trace)]
    return [*frames, kind.__name__ if kind is not None else "no exception"]
