"""JSON that may be damaged, or made by somebody else: one way to read it, one error for whatever is wrong."""

from __future__ import annotations

import json
from typing import Any


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
