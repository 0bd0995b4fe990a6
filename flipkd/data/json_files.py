"""JSON that may be damaged, or made by somebody else: one way to read it, one error for whatever is wrong.

Model folders hold JSON too, and are read where there is no pyarrow: nothing here imports it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flipkd.errors import ConfigError


def parse_object(data: bytes | str) -> dict[str, Any]:
    """The object in a JSON text.

    Raises:
        ValueError: it is not JSON, nested too deeply, or not an object. Says where, and quotes nothing of it.
    """
    try:
        values = json.loads(data)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError(f"a JSON {type(values).__name__}, not an object")
    return values


def read_option_file(option: str, path: str | Path) -> bytes:
    """The bytes of a local file that an option names.

    Raises:
        ConfigError: there is no such file, or it cannot be read; names the option and the file.
    """
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{option} {path}: there is no such file") from None
    except (OSError, ValueError) as error:  # ValueError: no path at all
        why = getattr(error, "strerror", None) or "this is no path"
        raise ConfigError(f"{option} {path}: the file cannot be read: {why}") from error


def check_fields(values: dict[str, Any], **kinds: type | tuple[type, ...]) -> None:
    """Looks for fields and their types; ``bool`` does not pass for ``int``.

    Raises:
        ValueError: names the first that is missing or of another type.
    """
    for name, kind in kinds.items():
        wanted = kind if isinstance(kind, tuple) else (kind,)
        value = values.get(name)
        if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
            raise ValueError(f"{name!r} is missing, or not of type {' or '.join(one.__name__ for one in wanted)}")
