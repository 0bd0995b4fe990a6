"""From the mappings of a YAML file to frozen dataclasses: names and types are checked, and an error names the key."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from flipkd.checks import WORDS
from flipkd.errors import ConfigError

T = TypeVar("T")
Given = Mapping[type, Mapping[str, Any]]


def build(cls: type[T], values: Any, where: str, given: Given) -> T:
    """Makes a dataclass, and the dataclasses inside it, from a mapping.

    Args:
        cls: the dataclass; its fields are the known keys (``-`` in a key stands for ``_``).
        values: the mapping. Text alone stands for ``{folder: text}`` where the class has a field ``folder``.
        where: what the mapping is, for messages.
        given: per class, the fields that the program sets and that are therefore no keys.

    Raises:
        ConfigError: a key is not known, missing, or has a value of another type; or the class refuses the values.
    """
    own = given.get(cls, {})
    known = {field.name: field for field in fields(cls) if field.name not in own}  # type: ignore[arg-type]
    if isinstance(values, str) and "folder" in known:
        values = {"folder": values}
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected keys and their values; known keys are {', '.join(sorted(known))}")
    hints = get_type_hints(cls)
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ConfigError(f"{where}: unknown key {key!r}; known keys are {', '.join(sorted(known))}")
        if name in found:
            raise ConfigError(f"{where}: {name} stands twice")
        found[name] = _convert(hints[name], value, f"{where}, {name}", given)
    for name, field in known.items():
        if name not in found and field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(f"{where}: {name} is missing")
    try:
        return cls(**found, **own)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _convert(hint: Any, value: Any, where: str, given: Given) -> Any:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        (hint,) = [one for one in inner if one is not type(None)]
        return _convert(hint, value, where, given)
    if isinstance(hint, type) and is_dataclass(hint):
        return build(hint, value, where, given)
    if origin is Literal:
        if value not in inner or isinstance(value, bool):
            raise ConfigError(f"{where}: must be one of {', '.join(map(str, inner))}, not {value!r}")
        return value
    if origin is tuple:
        return _tuple(inner, value, where, given)
    if origin is not None:  # Mapping[str, X]
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected names and their values, not {value!r}")
        return {
            _plain(str, key, where): _convert(inner[1], one, f"{where}, {key}", given) for key, one in value.items()
        }
    return _plain(hint, value, where)


def _tuple(inner: tuple[Any, ...], value: Any, where: str, given: Given) -> tuple[Any, ...]:
    if isinstance(value, str) and inner[0] is str:  # as on the command line
        # A blank before an LLM's label is part of it.
        value = value.split(",") if where.endswith("labels") else [part.strip() for part in value.split(",")]
    if not isinstance(value, list):
        raise ConfigError(f"{where}: expected a list, as in [a, b], not {value!r}")
    kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
    if len(kinds) != len(value):
        raise ConfigError(f"{where}: expected a list of {len(kinds)}, not of {len(value)}")
    return tuple(_convert(kind, one, where, given) for kind, one in zip(kinds, value, strict=True))


def _plain(kind: type, value: Any, where: str) -> Any:
    """A value of ``str``, ``int``, ``float`` or ``bool``; a whole number is a number too, nothing else is turned."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    hint = "; put it into quotes" if kind is str and value is not None and not isinstance(value, list | Mapping) else ""
    raise ConfigError(f"{where}: must be {WORDS[kind]}, not {value!r}{hint}")
