"""YAML that somebody else may have made: one way to read it, one error for whatever is wrong.

Read by YAML's safe loader, which makes no Python objects; without aliases, as a few lines of aliases of aliases stand
for gigabytes; and without a key that stands twice, where plain YAML takes the last one without a word.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 1 << 20
_MOST_LEVELS = 8  # what is deeper is no option of flipkd's


def read_options_text(path: Path) -> str:
    """The text of a file of options, YAML or another.

    Raises:
        ValueError: it is larger than any such file is, or not UTF-8.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"has more than {MOST_BYTES} bytes, which no file of options has")
    return data.decode("utf-8")


def parse_yaml(text: str) -> Any:
    """What a YAML text says: mappings, lists, and values that YAML knows by itself.

    Raises:
        ValueError: it is not YAML, or holds what is not read: tags, aliases, merges, keys that stand twice, more than a
            few levels. Says where.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        place = f"line {mark.line + 1} " if mark is not None else ""
        raise ValueError(f"{place}is not YAML that is read: {problem or str(error).splitlines()[0]}") from error
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except ValueError as error:  # of values that look like what they are not, as the date 2026-13-01
        raise ValueError(f"is not YAML that is read: {error}") from error
    except (LookupError, AttributeError, TypeError) as error:  # of `!!int ""` and the like
        raise ValueError("is not YAML that is read: a value is not of the type that its tag says") from error


class _Loader(yaml.SafeLoader):
    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not read; write the value out", mark)
        if self._depth > _MOST_LEVELS:
            raise yaml.composer.ComposerError(None, None, "it is nested too deeply", mark)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """In place of YAML's merges, for which nothing is left without aliases."""
        seen = set()
        for key_node, _ in node.value:
            mark = key_node.start_mark
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, "merges (<<) are not read", mark)
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain value", mark)
            key = self.construct_object(key_node)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {str(key)[:100]!r} stands twice", mark)
            seen.add(key)
