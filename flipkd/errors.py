"""The errors that flipkd raises on purpose. Everything else is a bug.

::

    FlipkdError                     exit code 1
    ├── ConfigError                 exit code 2: an option, a column name or a template that cannot be used
    │   └── ColumnError                 a column of a type that cannot be used; whoever reads it names the file
    ├── InputError                  a file or table of the user's that cannot be read as asked
    │   └── ConflictingRecordsError     one record id, two different texts
    ├── OutputError                 the output folder cannot be used: not writable, full, another run's
    │   └── OutputInUseError            another live job holds the lock
    ├── ModelError                  a model folder that cannot be loaded, or may not be; an engine that died
    │   └── NotFiniteError              a model gives numbers that are not finite
    ├── KernelError                 a kernel that was asked for by name cannot run here
    └── ClusterError                the Ray job stalled, lost its workers, or spent its error budget

A message names the file, column or option and the way out. It never holds the text or the id of a record: a record is
named by its file and row.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Sequence

_PACKAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "")


class FlipkdError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = 1


class ConfigError(FlipkdError):
    """An option, column name or template that cannot be used."""

    exit_code = 2


class ColumnError(ConfigError):
    """A column of a type that cannot be used; whoever reads it from a file names that (``ShardReader``)."""


class InputError(FlipkdError):
    """A file or table that cannot be read as asked."""


class ConflictingRecordsError(InputError):
    """The same record id stands twice with different texts."""


class OutputError(FlipkdError):
    """The output folder cannot be used."""


class OutputInUseError(OutputError):
    """Another live job holds the output folder's lock."""


class ModelError(FlipkdError):
    """A model folder that cannot be loaded, or may not be, or an engine that died."""


class NotFiniteError(ModelError):
    """A model gives numbers that are not finite.

    Args:
        message: as of every error.
        places: of the inputs that it gives them for.
    """

    def __init__(self, message: str, places: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.places = list(places)


class KernelError(FlipkdError):
    """A kernel that was asked for by name cannot run here."""


class ClusterError(FlipkdError):
    """The Ray job cannot go on."""


def told_without_data(error: BaseException) -> str:
    """An unexpected exception's kind, and where in flipkd it came up; without its message, which may quote a record."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(_PACKAGE)]
    places = [f"{frame.filename.removeprefix(_PACKAGE)}:{frame.lineno} {frame.name}" for frame in reversed(frames[-3:])]
    return f"{type(error).__module__}.{type(error).__qualname__} in {' < '.join(places) or 'a library'}"
