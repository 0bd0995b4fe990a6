"""The report as one HTML file: no script, nothing loaded from elsewhere, readable on a phone, in the dark and in print.

Every word that does not stand in this file goes through ``html.escape``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --text: #1c2024; --soft: #5b646e; --page: #ffffff; --card: #f5f7f9; --grid: #dde2e7;
  --match: #0b6bcb; --other: #c2570c; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e9ec; --soft: #a3adb7; --page: #14171a; --card: #1e2327;
  --grid: #343b42; --match: #5fb0ff; --other: #ff9d5c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 66rem; font: 16px/1.5 system-ui, sans-serif; color: var(--text);
  background: var(--page); overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { margin: .5rem 0; max-width: 46rem; } .soft { color: var(--soft); font-size: .9rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.card { background: var(--card); border-radius: .5rem; padding: .6rem .8rem; }
.card b { display: block; font-size: 1.45rem; line-height: 1.3; } .card span { color: var(--soft); font-size: .85rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; } figure svg { display: block; width: 100%; height: auto; max-width: 34rem; }
figcaption { color: var(--soft); font-size: .9rem; }
.table { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; min-width: 100%; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; } th:first-child, td:first-child { text-align: left; padding-left: 0; }
th.text, td.text { white-space: normal; text-align: left; min-width: 6rem; }
.range { color: var(--soft); font-size: .85em; }
@media (max-width: 44rem) { .range { display: block; } table { font-size: .82rem; }
  th, td { padding: .3rem; } th.text, th.text, td.text { min-width: 4.6rem; } }
.warning { border-left: .25rem solid var(--other); padding: .1rem 0 .1rem .8rem; margin: .6rem 0; }
code { font-family: ui-monospace, monospace; font-size: .9em; }
@media print { :root { color-scheme: light; --text: #000000; --soft: #444444; --page: #ffffff; --card: #f2f2f2;
  --grid: #cccccc; --match: #0b4f9c; --other: #a84300; }
  body { max-width: none; padding: 0; font-size: 10pt; } h2 { break-after: avoid; }
  figure, .card, tr, .warning { break-inside: avoid; } .pictures { grid-template-columns: 1fr 1fr; }
  .table { overflow: visible; } th, td { padding: .15rem .4rem; } }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """The whole file around parts that are HTML already."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="referrer" content="no-referrer">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def heading(text: str, level: int = 2) -> str:
    """A heading."""
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph; ``kind`` is ``soft`` or ``warning``."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def cards(values: Sequence[tuple[str, str, str]]) -> str:
    """Large figures: (figure, what it is, small print)."""
    one = '<div class="card"><b>{}</b>{}<br><span>{}</span></div>'
    return f'<div class="cards">{"".join(one.format(*map(escape, value)) for value in values)}</div>'


def pictures(values: Sequence[tuple[str, str]]) -> str:
    """SVG pictures, made by ``flipkd.report.pictures``, with a line below each."""
    one = "<figure>{}<figcaption>{}</figcaption></figure>"
    return f'<div class="pictures">{"".join(one.format(svg, escape(text)) for svg, text in values)}</div>'


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], text_columns: Sequence[int] = ()) -> str:
    """A table; a cell is text, or (figure, range) whose range is printed small."""
    kinds = [' class="text"' if place in text_columns else "" for place in range(len(header))]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for name, kind in zip(header, kinds, strict=True))
    lines = []
    for row in rows:
        cells = []
        for kind, cell in zip(kinds, row, strict=True):
            cells.append(f"<td{kind}>{_cell(cell)}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _cell(cell: Any) -> str:
    if isinstance(cell, tuple):
        figure, small = cell
        return f'{escape(str(figure))} <span class="range">{escape(str(small))}</span>'
    return escape(str(cell))


def number(value: float | None, digits: int = 3) -> str:
    """A figure, or a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def count(value: float) -> str:
    """A number of pairs, with thin spaces."""
    return f"{value:,.0f}".replace(",", "\u202f")


def ranged(figure: Mapping[str, Any], low: str = "low", high: str = "high", value: str = "value") -> tuple[str, str]:
    """A figure and its interval."""
    if figure.get(low) is None:
        return number(figure.get(value)), ""
    return number(figure.get(value)), f"{number(figure[low])} to {number(figure[high])}"
