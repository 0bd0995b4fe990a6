"""``--config``: a YAML or TOML file of options. It holds names and plain values, and can do nothing else."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from flipkd.data.yaml_files import parse_yaml, read_options_text

_PLAIN = (str, int, float, bool, type(None))


def read_config_file(path: Path) -> dict[str, Any]:
    """The options in a file: each value is plain, or a list of plain values.

    Raises:
        ValueError: it cannot be read, or holds anything else; names the option.
        OSError: there is no such file.
    """
    text = read_options_text(path)
    try:
        values = tomllib.loads(text) if path.suffix.lower() == ".toml" else parse_yaml(text)
    except RecursionError:  # of TOML; YAML has a limit of its own
        raise ValueError("is nested too deeply") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError("must hold options and their values")
    for name, value in values.items():
        if not all(isinstance(one, _PLAIN) for one in (value if isinstance(value, list) else [value])):
            raise ValueError(
                f"option {str(name)[:100]!r}: a value must be text (a date in quotes), a number, true or false, or a "
                "list of them"
            )
    return values
