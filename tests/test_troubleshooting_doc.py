"""Messages that docs/troubleshooting.md quotes are messages of the code; options and reasons in it exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from flipkd.cli import main
from flipkd.config import SCORE_COLUMNS
from flipkd.data.pairs import REASONS
from jobs.nightly import nightly
from tests.documents import DOCS, sections, table

DOC = DOCS / "troubleshooting.md"
ROWS = [row for section in sections(DOC).values() for row in table(section)]


@pytest.fixture(scope="module")
def messages() -> list[str]:
    """Every string of the source; where something is put into one stands a NUL."""
    found = []
    for path in (Path(__file__).parent.parent / "flipkd").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def quoted() -> list[str]:
    """What flipkd says: a cell that is all code."""
    cells = re.findall(r"^\|[^|]*\| `([^`]*)` \|", DOC.read_text(), re.MULTILINE)
    return [cell for cell in cells if not cell.startswith("flipkd says")]


@pytest.mark.parametrize("message", quoted())
def test_a_quoted_message_is_one_of_the_code(message: str, messages: list[str]) -> None:
    parts = [re.escape(part.strip()) for part in message.split("...")]
    assert len(max(parts, key=len)) > 8
    pattern = re.compile(".*".join(parts), re.DOTALL)
    assert any(pattern.search(text) for text in messages)


def test_most_rows_quote_a_message() -> None:
    assert len(ROWS) > 35
    assert len(quoted()) > 24


def test_reasons_columns_and_options_exist() -> None:
    text = DOC.read_text()
    assert {*re.findall(r"reason `(\w+)`", text)} <= {*REASONS}
    assert {*re.findall(r"\| column `(\w+)`", text)} <= {*SCORE_COLUMNS}
    options = [option for command in (*main.commands.values(), nightly) for option in command.params]
    flags = {flag for option in options for flag in (*option.opts, *option.secondary_opts)}
    assert {*re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)} <= flags
