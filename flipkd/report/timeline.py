"""Where the time of a job went: its stages, one after another, from what the manifests say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Stages run in this order, whatever the order of a JSON file's keys.
_ORDER = ("texts", "join", "encode", "encode_left", "encode_right", "candidates")


@dataclass(frozen=True)
class Span:
    """One stage.

    Args:
        name: of the stage.
        seconds: from its beginning to its end.
        rows: rows in, or None where it has none.
        parts: seconds of work per part (``read``, ``encode`` ...), summed over all workers.
    """

    name: str
    seconds: float
    rows: int | None = None
    parts: Mapping[str, float] = field(default_factory=dict)


def job_spans(manifest: Mapping[str, Any], name: str | None = None) -> list[Span]:
    """The stages of a job, in the order in which they ran; the job's own work is the last.

    Args:
        manifest: what ``encode``, ``score``, ``teach`` or ``rescore`` returned, or their ``_manifest.json``. A job that
            was broken off tells of the run that finished it alone.
        name: of the job's own work; None for its kind.
    """
    stages = manifest.get("stages", {})
    names = [*(one for one in _ORDER if one in stages), *(one for one in stages if one not in _ORDER)]
    own = name if name is not None else str(manifest.get("kind", "job"))
    return [_span(stages[one], one.replace("_", " ")) for one in names] + [_span(manifest, own)]


def _span(facts: Mapping[str, Any], name: str) -> Span:
    seal = float(facts.get("seal_seconds", 0.0))
    parts = {**facts.get("seconds", {}), **({"seal": seal} if seal else {})}
    return Span(name, round(float(facts.get("wall_seconds", 0.0)) + seal, 3), facts.get("rows_in"), parts)


def span_rows(spans: list[Span]) -> list[list[Any]]:
    """Cells of a table: stage, rows, seconds, rows a second, and the largest parts by their share of the work."""
    lines = []
    for span in spans:
        work = sum(span.parts.values())
        largest = sorted(span.parts.items(), key=lambda part: -part[1])
        told = [f"{name} {seconds / work:.0%}" for name, seconds in largest if work and seconds / work >= 0.005]
        rate = f"{span.rows / span.seconds:,.0f}" if span.rows and span.seconds else "–"
        rows = "–" if span.rows is None else f"{span.rows:,}"
        lines.append([span.name, rows, f"{span.seconds:,.1f}", rate, ", ".join(told) or "–"])
    return [
        [str(cell).replace(",", "\u202f") if place < 4 else cell for place, cell in enumerate(line)] for line in lines
    ]
