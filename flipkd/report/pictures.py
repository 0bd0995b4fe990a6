"""The pictures of a report, as SVG to stand inside HTML. No word in them comes from the data."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from flipkd.report.pairs import LabelledPairs
from flipkd.report.timeline import Span

# Stand for the page's own colours, which change with its scheme; matplotlib writes them, and they are replaced.
_COLORS = {"#010101": "var(--text)", "#020202": "var(--match)", "#030303": "var(--other)", "#040404": "var(--grid)"}
_TEXT, _MATCH, _OTHER, _GRID = _COLORS
_BINS = 40


def precision_recall(curve: dict[str, list[float]], chosen: Sequence[tuple[float, float]]) -> str:
    """Precision over recall with its band.

    Args:
        curve: ``recall``, ``precision``, ``low``, ``high``.
        chosen: (recall, precision) of thresholds to mark.
    """

    def draw(axes: Any) -> None:
        if curve["low"] and curve["low"][0] is not None:
            axes.fill_between(curve["recall"], curve["low"], curve["high"], color=_MATCH, alpha=0.2, linewidth=0)
        axes.plot(curve["recall"], curve["precision"], color=_MATCH, linewidth=2, marker="o", markersize=3)
        for recall, precision in chosen:
            axes.plot(recall, precision, color=_OTHER, marker="D", markersize=8, linestyle="none")
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.03))

    return _svg(draw, "precision-recall", "Precision over recall")


def score_histogram(pairs: LabelledPairs, threshold: float | None) -> str:
    """Share of each class per step of the score; each class adds up to one."""
    low, high = float(pairs.score.min()), float(pairs.score.max())
    edges = np.linspace(low, high if high > low else low + 1e-3, _BINS + 1)

    def draw(axes: Any) -> None:
        for is_match, color, name in ((False, _OTHER, "no match"), (True, _MATCH, "match")):
            chosen = pairs.label == is_match
            if chosen.any():
                weight = pairs.weight[chosen] / max(pairs.weight[chosen].sum(), 1e-300)
                height, _ = np.histogram(pairs.score[chosen], edges, weights=weight)
                axes.stairs(height, edges, fill=True, color=color, alpha=0.35)
                axes.stairs(height, edges, color=color, linewidth=1.5, label=name)
        if threshold is not None:
            axes.axvline(threshold, color=_TEXT, linewidth=1, linestyle="--", label="best F1")
        axes.set(xlabel="score", ylabel="share of the class")
        axes.legend(frameon=False, labelcolor=_TEXT)

    return _svg(draw, "histogram", "Scores of matches and of others")


def reliability_diagram(rows: Sequence[dict[str, float]]) -> str:
    """Seen share of matches over said probability; the size of a point grows with its pairs."""

    def draw(axes: Any) -> None:
        said, seen = ([row[name] for row in rows] for name in ("probability", "share_of_matches"))
        axes.plot([0, 1], [0, 1], color=_TEXT, linewidth=1, linestyle="--")
        axes.plot(said, seen, color=_MATCH, linewidth=1.5)
        most = max(row["weight"] for row in rows)
        axes.scatter(said, seen, s=[20 + 100 * row["weight"] / most for row in rows], color=_MATCH)
        axes.set(xlabel="probability said", ylabel="share of matches seen", xlim=(-0.02, 1.02), ylim=(-0.02, 1.04))

    return _svg(draw, "reliability", "Reliability")


def two_histograms(
    edges: Sequence[float], heights: Mapping[str, Sequence[float]], column: str, threshold: float | None
) -> str:
    """Shares per step of one column, one outline over the other.

    Args:
        edges: [B + 1].
        heights: by name, [B] shares; one or two of them.
        column: of the scores: ``score`` or ``probability``.
        threshold: to be marked.
    """

    def draw(axes: Any) -> None:
        seen = [place for shares in heights.values() for place, height in enumerate(shares) if height > 0]
        for (name, shares), color, fill in zip(heights.items(), (_MATCH, _OTHER), (True, False), strict=False):
            if fill:
                axes.stairs(shares, edges, fill=True, color=color, alpha=0.35)
            axes.stairs(shares, edges, color=color, linewidth=1.5, label=name)
        if threshold is not None:
            axes.axvline(threshold, color=_TEXT, linewidth=1, linestyle="--", label="threshold")
        if seen:
            axes.set_xlim(edges[min(seen)], edges[max(seen) + 1])
        axes.set(xlabel=column, ylabel="share of the pairs")
        axes.legend(frameon=False, labelcolor=_TEXT)

    return _svg(draw, f"nights-{column}", f"Distribution of the {column}")


def time_line(spans: Sequence[Span]) -> str:
    """A bar per stage, from where the one before it ended, with its seconds."""

    def draw(axes: Any) -> None:
        starts = np.cumsum([0.0, *(span.seconds for span in spans)])
        axes.barh(range(len(spans)), [span.seconds for span in spans], left=starts[:-1], height=0.6, color=_MATCH)
        names = [f"{span.name}, {_duration(span.seconds)}" for span in spans]
        axes.set(yticks=range(len(spans)), yticklabels=names, xlabel="seconds")
        axes.set(xlim=(0, float(starts[-1]) or 1.0), ylim=(len(spans) - 0.4, -0.6))

    return _svg(draw, "time-line", "Seconds of each stage", height=1.0 + 0.34 * max(len(spans), 2))


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _svg(draw: Callable[[Any], None], name: str, title: str, height: float = 3.3) -> str:
    """One picture; the same bytes for the same data."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # As text and not as outlines: smaller, and it can be searched. Ids must not clash with the other pictures'.
    settings = {"svg.fonttype": "none", "svg.hashsalt": f"flipkd {name}", "font.size": 11}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.6, height), layout="constrained", facecolor="none")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        axes.set_facecolor("none")
        draw(axes)
        axes.grid(color=_GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(colors=_TEXT)
        for side, spine in axes.spines.items():
            spine.set_color(_TEXT)
            spine.set_visible(side in ("left", "bottom"))
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set_color(_TEXT)
        sink = io.StringIO()
        figure.savefig(sink, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = sink.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    for color, variable in _COLORS.items():
        text = text.replace(color, variable)
    text = text.replace("font: 11px 'DejaVu Sans'", "font: 11px sans-serif")
    return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
