"""What users name things, and what records hold, cannot become part of the report's page."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from flipkd.report.config import EvaluateConfig
from flipkd.report.evaluate import evaluate
from flipkd.report.html import cards, heading, page, paragraph, pictures, table
from tests.privacy.canary import write

EVIL = (
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    "</style><img src=x onerror=alert(3)>",
    "</title></head><body onload=alert(4)>",
    "<svg onload=alert(5)><text>$x$</text></svg>",
    "]]><!--",
    "--><iframe src='https://example.invalid'></iframe>",
    "\"' onmouseover='alert(6)",
    "$\\mathrm{x}$ \\n $x_{1}$",
    "a\nb\rc\x00d\u2028e\u202e<b>",
    "&lt;script&gt;&#60;b&#62;",
    "{{7*7}} ${7*7} <%= 7 %>",
    "javascript:alert(8)",
)


class Shape(HTMLParser):
    """The elements of a page, their attributes, and its words."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: set[tuple[str, str]] = set()
        self.words: list[str] = []
        self.others: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {(tag, name) for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def handle_comment(self, data: str) -> None:
        self.others.append(data)

    def unknown_decl(self, data: str) -> None:
        self.others.append(data)

    def handle_pi(self, data: str) -> None:
        self.others.append(data)


def report(folder: Path, names: tuple[str, ...]) -> str:
    """A report that shows examples and slices of columns of these names, whose values are the names too."""
    rows = 60
    generator = np.random.default_rng(0)
    label = np.arange(rows) % 3 == 0
    columns: dict[str, object] = {
        "left_id": [names[row % len(names)] for row in range(rows)],
        "right_id": [f"{row}{names[row % len(names)]}" for row in range(rows)],
        "label": label.astype(np.int8),
        "score": pa.array(np.clip(generator.normal(np.where(label, 0.7, 0.4), 0.2), -1, 1), pa.float32()),
        "reason": pa.nulls(rows, pa.string()),
    }
    for name in names:
        columns[name] = [names[row // 20 % len(names)] for row in range(rows)]
    scores = write(folder / "in/0.parquet", **columns)
    evaluate(EvaluateConfig(str(scores.parent), str(folder / "report"), slices=names, show_examples=5, bootstrap=5))
    return (folder / "report/report.html").read_text(encoding="utf-8")


def test_a_page_of_evil_names_has_the_elements_of_a_plain_one(tmp_path: Path) -> None:
    plain = Shape(report(tmp_path / "plain", tuple(f"name {place}" for place in range(len(EVIL)))))
    text = report(tmp_path / "evil", EVIL)
    evil = Shape(text)
    assert evil.tags == plain.tags
    assert evil.attributes == plain.attributes
    assert evil.others == plain.others
    assert "script" not in evil.tags
    shown = "".join(evil.words)
    for name in EVIL:
        # HTML has no NUL, and reads every line end as one.
        assert name.replace("\x00", "\ufffd").replace("\r", "\n") in shown.replace("\x00", "\ufffd").replace("\r", "\n")


@pytest.mark.parametrize("name", EVIL)
def test_every_part_of_a_page(name: str) -> None:
    def parts(word: str) -> str:
        cells = table([word, word], [[word, (word, word)]], text_columns=(0,))
        figures = [cards([(word, word, word)]), pictures([("<svg></svg>", word)])]
        return page(word, [heading(word), paragraph(word, "soft"), paragraph(word), *figures, cells])

    evil, plain = Shape(parts(name)), Shape(parts("name"))
    assert (evil.tags, evil.attributes, evil.others) == (plain.tags, plain.attributes, plain.others)


def test_no_word_in_a_picture_comes_from_the_data(tmp_path: Path) -> None:
    text = report(tmp_path, EVIL)
    pictures = [part.split("</svg>")[0] for part in text.split("<svg")[1:]]
    assert len(pictures) == 3
    words = {word for part in pictures for word in Shape("<svg" + part).words if any(map(str.isalpha, word))}
    assert all(not any(name in word for name in EVIL) for word in words)
    assert {word.strip() for word in words if "{" not in word} <= {
        "recall", "precision", "score", "share of the class", "no match", "match", "best F1", "probability said",
        "share of matches seen",
    }  # fmt: skip
