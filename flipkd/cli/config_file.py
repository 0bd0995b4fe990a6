"""``--config``: a YAML or TOML file of options. It holds names and plain values, and can do nothing else.

YAML is read by its safe loader, which makes no Python objects, and without aliases: a few lines of aliases of aliases
stand for gigabytes.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import yaml

_MOST_BYTES = 1 << 20
_MOST_LEVELS = 8  # what is deeper than a list of values is refused in any case
_PLAIN = (str, int, float, bool, type(None))


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, without aliases and without depth."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read; write the value out")
        if self._depth > _MOST_LEVELS:
            raise yaml.YAMLError("nested too deeply")
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


def read_config_file(path: Path) -> dict[str, Any]:
    """The options in a file: each value is plain, or a list of plain values.

    Raises:
        ValueError: it cannot be read, or holds anything else; names the option.
        OSError: there is no such file.
    """
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"has more than {_MOST_BYTES} bytes, which no list of options has")
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text) if path.suffix.lower() == ".toml" else yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(f"is not YAML that can be read: {str(error).splitlines()[0]}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError("must hold options and their values")
    for name, value in values.items():
        if not all(isinstance(one, _PLAIN) for one in (value if isinstance(value, list) else [value])):
            raise ValueError(
                f"option {str(name)[:100]!r}: a value must be text, a number, true or false, or a list of them"
            )
    return values
