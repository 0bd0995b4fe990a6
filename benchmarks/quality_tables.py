"""The rows of ``benchmarks.quality`` as Markdown tables, and F1 over the share of known labels as a picture.

    python -m benchmarks.quality_tables [--results FILE] [--sweep FILE] [--picture FILE.svg]

Figures are means over the seeds that a row has; after ± stands half the distance of the best seed from the worst one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import save_svg, svg_figure
from benchmarks.quality import summary
from benchmarks.quality_methods import METHODS

_RESULTS = Path(__file__).parent / "results" / "quality.json"
_DRAWN = {
    "teacher": "small model (teacher)",
    "cosent": "student on labels (CoSENT)",
    "cosent_infonce": "student on labels (CoSENT, InfoNCE)",
    "flip": "student, flipped",
    "flip_unlabelled": "student, flipped, with unlabelled pairs",
    "flip_without_infonce": "student, flipped, without InfoNCE",
    "flip_unlabelled_without_infonce": "the same, with unlabelled pairs",
}


def main_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """F1 and AUC in percent of every method on every data set, with all labels."""
    lines = [line for line in summary(rows) if line["labels"] == 1.0 and line["split"] == "test"]
    datasets = list(dict.fromkeys(line["dataset"] for line in lines))
    found = {(line["method"], line["dataset"]): line for line in lines}
    table = ["| method | " + " | ".join(datasets) + " |", "|---" * (len(datasets) + 1) + "|"]
    for method in METHODS:
        cells = [_cell(found.get((method, dataset))) for dataset in datasets]
        if any(cell != "" for cell in cells):
            table.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(table)


def _cell(line: Mapping[str, Any] | None) -> str:
    if line is None:
        return ""
    spread = f" ± {50 * line['f1_spread']:.1f}" if line["seeds"] > 1 else ""
    return f"{100 * line['f1']:.1f}{spread} / {100 * line['auc']:.1f}"


def sweep_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Validation F1 and AUC in percent, as differences from flip's; best mean difference of F1 first."""
    lines = summary(rows)
    datasets = list(dict.fromkeys(line["dataset"] for line in lines))
    found = {(line["method"], line["dataset"]): line for line in lines}
    base = {dataset: found["flip", dataset] for dataset in datasets}
    table = [
        "| changed | " + " | ".join(f"{dataset} F1 / AUC" for dataset in datasets) + " |",
        "|---" * (len(datasets) + 1) + "|",
        "| nothing | "
        + " | ".join(f"{100 * base[dataset]['f1']:.1f} / {100 * base[dataset]['auc']:.1f}" for dataset in datasets)
        + " |",
    ]
    whole = [
        method
        for method in dict.fromkeys(line["method"] for line in lines)
        if method != "flip" and all((method, dataset) in found for dataset in datasets)
    ]

    def gain(method: str) -> float:
        return float(sum(found[method, dataset]["f1"] - base[dataset]["f1"] for dataset in datasets))

    for method in sorted(whole, key=gain, reverse=True):
        cells = [
            f"{100 * (found[method, dataset]['f1'] - base[dataset]['f1']):+.1f} / "
            f"{100 * (found[method, dataset]['auc'] - base[dataset]['auc']):+.1f}"
            for dataset in datasets
        ]
        table.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(table)


def draw(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """F1 over the share of known labels, a panel for each data set, as SVG."""
    lines = [line for line in summary(rows) if line["split"] == "test"]
    shares = {dataset: {line["labels"] for line in lines if line["dataset"] == dataset} for dataset in _names(lines)}
    datasets = [dataset for dataset, found in shares.items() if len(found) > 1]
    figure = svg_figure(3.6 * len(datasets), 3.4)
    for axes, dataset in zip(figure.subplots(1, len(datasets), squeeze=False)[0], datasets, strict=True):
        for method, label in _DRAWN.items():
            points = sorted(
                (line["labels"], line["f1"]) for line in lines if (line["dataset"], line["method"]) == (dataset, method)
            )
            if len(points) < 2:
                continue
            axes.plot([100 * share for share, _ in points], [f1 for _, f1 in points], marker="o", label=label)
        axes.set_xscale("log")
        axes.set_xticks([100 * share for share in sorted(shares[dataset])])
        axes.set_xticks([], minor=True)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")
        axes.set_xlabel("training groups whose labels are known")
        axes.set_title(dataset)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("F1 on the test pairs")
    figure.axes[0].legend(frameon=False, fontsize="small")
    save_svg(figure, path)


def _names(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(line["dataset"] for line in lines))


def main() -> None:
    """Print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=_RESULTS)
    parser.add_argument("--sweep", type=Path, help="a file of --split validation --methods flip,sweep")
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    rows = json.loads(arguments.results.read_text(encoding="utf-8"))["rows"]
    print(main_table(rows))
    if arguments.sweep is not None:
        print("\n" + sweep_table(json.loads(arguments.sweep.read_text(encoding="utf-8"))["rows"]))
    if arguments.picture is not None:
        draw(rows, arguments.picture)


if __name__ == "__main__":
    main()
