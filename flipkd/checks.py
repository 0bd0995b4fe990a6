"""Checks that several configurations share. Each names the option and what it may be."""

from __future__ import annotations

import os
import types
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from typing import Any, Union, get_args, get_origin, get_type_hints

from flipkd.errors import ConfigError

WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def check_types(config: Any) -> None:
    """Refuses fields of a frozen dataclass whose values are not of their types; for its ``__post_init__``.

    A path becomes text, a list a tuple, and a number of NumPy's one of Python's, so that all can be written as JSON.
    What a ``Literal`` may be, and how long a tuple, is left to the class.

    Raises:
        ConfigError: names the field.
    """
    hints = get_type_hints(type(config))
    for field in fields(config):
        value = getattr(config, field.name)
        taken = _of_type(hints[field.name], value, field.name)
        if taken is not value:
            object.__setattr__(config, field.name, taken)


def _of_type(hint: Any, value: Any, name: str) -> Any:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        (hint,) = [one for one in inner if one is not type(None)]
        return None if value is None else _of_type(hint, value, name)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{name} must be a tuple, as in ('a', 'b'), not {_told(value)}")
        return tuple(_of_type(inner[0], one, f"{name}[{place}]") for place, one in enumerate(value))
    if isinstance(hint, type) and is_dataclass(hint):
        if not isinstance(value, hint):
            raise ConfigError(f"{name} must be {hint.__name__}(...), not {_told(value)}")
    elif hint in WORDS:
        return _plain(hint, value, name)
    return value


def _plain(kind: Any, value: Any, name: str) -> Any:
    """A value of ``str``, ``int``, ``float`` or ``bool``, as the plain one of these."""
    if isinstance(value, bool) == (kind is bool):
        if kind is str and isinstance(value, os.PathLike):
            value = os.fspath(value)
        if isinstance(value, kind):
            return value
        numbers: Any = {int: Integral, float: Real}.get(kind, ())
        if isinstance(value, numbers):
            # A whole number for another one stays as it is: it is in the fingerprints of runs.
            return value if type(value) is int else kind(value)
    raise ConfigError(f"{name} must be {WORDS[kind]}, not {_told(value)}")


def _told(value: Any) -> str:
    return repr(value) if isinstance(value, str | int | float | None) else f"of type {type(value).__name__}"


def check_positive(name: str, value: int) -> None:
    """Refuses what is below 1."""
    if value < 1:
        raise ConfigError(f"--{name} must be at least 1, not {value}")


def check_cache(cache: str | None, limit_bytes: int | None) -> None:
    """Refuses a limit of no cache."""
    if limit_bytes is not None:
        check_positive("cache-limit", limit_bytes)
        if cache is None:
            raise ConfigError("--cache-limit needs --cache")


def check_cosine(name: str, value: float | None) -> None:
    """Refuses what no cosine is compared with: a number below -1 or above 1, or NaN."""
    _check_range(name, value, -1, "it is compared with the score, which is a cosine")


def check_probability(name: str, value: float | None, why: str) -> None:
    """Refuses what is no probability, NaN too."""
    _check_range(name, value, 0, why)


def _check_range(name: str, value: float | None, least: int, why: str) -> None:
    if value is None:
        return
    if value != value:
        raise ConfigError(f"--{name} must be a number, not NaN")
    if not least <= value <= 1:
        raise ConfigError(f"--{name} must be from {least} to 1, not {value:g}: {why}")
