"""The learning curve of a run as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flipkd.data.commit import write_private_file


def draw_learning_curve(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss over steps, and below it the validation metrics, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    trained = [line for line in lines if "loss" in line]
    names = sorted({name for line in trained for name in line if name == "loss" or name.startswith("loss_")})
    for name in names:
        points = [(line["step"], line[name]) for line in trained if name in line]
        upper.plot(*zip(*points, strict=True), label=name.removeprefix("loss_"), linewidth=2 if name == "loss" else 1)
    for name in ("auc", "f1", "average_precision", "spearman"):
        points = [(line["step"], line["validation"][name]) for line in lines if name in line.get("validation", {})]
        if points:
            lower.plot(*zip(*points, strict=True), marker="o", label=name)
    upper.set_ylabel("training loss")
    lower.set_ylabel("validation")
    lower.set_xlabel("step")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=120)
    write_private_file(str(path), sink.getvalue())
