"""The columns that a template names.

Apart from ``records``, since model folders tell a template too, and a model is loaded where there is no pyarrow: vLLM's
environment has none.
"""

from __future__ import annotations

import string

from flipkd.errors import ConfigError


def template_fields(template: str, option: str = "--template") -> list[str]:
    """The column names in a template such as ``{name} | {address}``, in order, each once.

    Args:
        template: the template.
        option: that it is from, for messages.

    Raises:
        ConfigError: the template does not parse, names no column, or asks for more than a plain column (attributes,
            indexing, conversions and format specifications are refused, so a template can reach nothing but columns).
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"{option} {template!r} does not parse: {error}") from error
    fields: list[str] = []
    for _, field, specification, conversion in parts:
        if field is None:
            continue
        if not field or specification or conversion or any(mark in field for mark in ".[]"):
            raise ConfigError(f"{option} {template!r}: write a plain column name in the braces, as in '{{name}}'")
        if field not in fields:
            fields.append(field)
    if not fields:
        raise ConfigError(f"{option} {template!r} names no column; write one in braces, as in '{{name}}'")
    return fields
