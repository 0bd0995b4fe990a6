"""The columns that a template names.

Apart from ``records``, since model folders tell a template too, and a model is loaded where there is no pyarrow: vLLM's
environment has none.
"""

from __future__ import annotations

import re

from flipkd.errors import ConfigError

_MARK = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def template_parts(template: str, option: str = "--template") -> list[tuple[str, str | None]]:
    """A template such as ``{name} | {address}`` as pieces of text, each with the column that follows it, or None.

    What stands in braces is a column's name, whatever it holds (a dot, a colon), and nothing else: a template cannot
    reach attributes, or format. ``{{`` and ``}}`` are braces in the text.

    Args:
        template: the template.
        option: that it is from, for messages.

    Raises:
        ConfigError: a brace stands alone, or there is no name in a pair of them.
    """
    parts: list[tuple[str, str | None]] = []
    text, end = "", 0
    for mark in _MARK.finditer(template):
        text += template[end : mark.start()]
        end = mark.end()
        if mark.group() in ("{{", "}}"):
            text += mark.group()[0]
        elif not mark[1]:
            told = "names no column in a pair of braces" if mark.group() == "{}" else "does not parse: a brace is alone"
            raise ConfigError(f"{option} {template!r} {told}; write it as in '{{name}}'")
        else:
            parts.append((text, mark[1]))
            text = ""
    return [*parts, (text + template[end:], None)]


def template_fields(template: str, option: str = "--template") -> list[str]:
    """The column names in a template, in order, each once; see ``template_parts``.

    Raises:
        ConfigError: the template does not parse, or names no column.
    """
    fields = list(dict.fromkeys(field for _, field in template_parts(template, option) if field is not None))
    if not fields:
        raise ConfigError(f"{option} {template!r} names no column; write one in braces, as in '{{name}}'")
    return fields
