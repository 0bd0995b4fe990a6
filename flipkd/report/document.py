"""What the report says, from the values of ``metrics.json`` and the pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flipkd.report import html
from flipkd.report.html import count, number, ranged

_NAMES = {"roc_auc": "ROC AUC", "average_precision": "average precision", "best_f1": "best F1"}
_UNMATCHED = "{} labelled pairs ({} matches) are not among the scores: they were never candidates, or the ids differ."


def document(facts: Mapping[str, Any], pictures: Sequence[tuple[str, str]], examples: Mapping[str, Any] | None) -> str:
    """The HTML report.

    Args:
        facts: what ``metrics.json`` holds.
        pictures: (SVG, caption).
        examples: ``columns``, ``false_matches`` and ``missed_matches`` (rows of values), or None.
    """
    parts = [html.heading("How good are these scores?", 1), html.paragraph(_introduction(facts), "soft")]
    parts += [html.paragraph(warning, "warning") for warning in facts["warnings"]]
    if facts["metrics"] is not None:
        parts.append(_cards(facts))
        parts.append(html.paragraph(_reading(facts), "soft"))
    parts.append(html.pictures(pictures))
    if facts["metrics"] is not None:
        parts += _thresholds(facts) + _metrics(facts)
    parts += _calibration(facts) + _slices(facts) + _rows(facts)
    if examples is not None:
        parts += _examples(examples)
    return html.page("flipkd evaluation", parts)


def _introduction(facts: Mapping[str, Any]) -> str:
    pairs = facts["labelled"]
    text = (
        f"{count(pairs['pairs'])} labelled pairs with a score, {count(pairs['matches'])} of them matches, out of "
        f"{count(facts['rows']['rows'])} rows of the run."
    )
    if facts["labels_from"] == "sample":
        text += " They are a stratified sample of the run: every figure is weighted, and estimates the whole run."
    elif facts["weighted"]:
        text += " Every figure is weighted by the weight column."
    return text


def _cards(facts: Mapping[str, Any]) -> str:
    metrics = facts["metrics"]
    values = []
    for name, title in _NAMES.items():
        figure, interval = ranged(metrics[name])
        small = interval if name != "best_f1" else f"{interval}; from score {number(metrics[name]['threshold'])}"
        values.append((figure, title, small))
    calibration = facts["calibration"]
    if calibration is not None:
        error = f"error {number(calibration['held_out_calibration_error'])} on held-out pairs"
        values.append((calibration["method"], "calibration", error))
    return html.cards(values)


def _reading(facts: Mapping[str, Any]) -> str:
    return (
        f"Ranges are 95 % intervals of {facts['bootstrap_resamples']} bootstrap resamples; they take pairs as "
        "independent. Best F1 is the best over all thresholds on these pairs: a threshold set elsewhere does a little "
        "worse. Pairs without a score are in none of these figures; they are counted below."
    )


def _thresholds(facts: Mapping[str, Any]) -> list[str]:
    found = []
    for scale, thresholds in facts["thresholds"].items():
        on = "score" if scale == "score" else "probability (score --calibration)"
        header = ["for", "threshold", "precision", "recall", "precision at least", "F1"]
        header += ["pairs of the run"] if scale == "score" else []
        rows = [_threshold_row(name, row)[: len(header)] for name, row in _named_thresholds(thresholds)]
        found += [html.heading(f"Thresholds on the {on}"), html.table(header, rows, text_columns=(0,))]
    found.append(
        html.paragraph(
            "A pair matches from the threshold on (--threshold). “Precision at least” is its lower bound, true "
            "in 95 of 100 cases. A threshold that was chosen on these pairs looks slightly better than it is; "
            "“cautious” asks the lower bound, not the estimate, for the wanted precision.",
            "soft",
        )
    )
    return found


def _named_thresholds(thresholds: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    named = [("best F1", thresholds["best_f1"])]
    wanted = thresholds.get("precision")
    if wanted is not None:
        named += [(f"precision {wanted['wanted']:g}", wanted["estimate"])]
        named += [(f"precision {wanted['wanted']:g}, cautious", wanted["cautious"])]
    cost = thresholds.get("cost_ratio")
    if cost is not None:
        named.append((f"least cost, {cost['ratio']:g} to 1", cost))
    named += [(f"recall {row['for_recall']:g}", row) for row in thresholds["table"]]
    return [(name, row or {}) for name, row in named]


def _threshold_row(name: str, row: Mapping[str, Any]) -> list[Any]:
    if row.get("threshold") is None:
        return [name, "none does", "–", "–", "–", "–", "–"]
    return [
        name,
        number(row["threshold"], 4),
        ranged(row, "precision_low", "precision_high", "precision"),
        ranged(row, "recall_low", "recall_high", "recall"),
        number(row["precision_lower_bound"]),
        number(row["f1"]),
        count(row["pairs_in_run"]) if "pairs_in_run" in row else "–",
    ]


def _metrics(facts: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, figure in facts["metrics"].items():
        title = _NAMES.get(name, name.replace("_", " "))
        rows.append([title, number(figure["value"]), ranged(figure)[1]])
    return [html.heading("All figures"), html.table(["figure", "value", "95 % interval"], rows)]


def _calibration(facts: Mapping[str, Any]) -> list[str]:
    calibration = facts["calibration"]
    if calibration is None:
        return []
    rows = []
    for name, quality in sorted(calibration["held_out"].items(), key=lambda entry: entry[1]["log_loss"]):
        title = name.replace("_", " ") + (" (chosen)" if name == calibration["method"] else "")
        rows.append([title, number(quality["log_loss"], 4), number(quality["brier"], 4)])
    text = (
        "From score to probability: calibration.json, for score --calibration. Each form was fitted without each fifth "
        "of the pairs in turn and judged on that fifth; the lower log loss was chosen. The probability is that of "
        "pairs labelled like these: "
    )
    text += (
        "this sample stands for the run."
        if facts["labels_from"] == "sample"
        else "if matches are more frequent among the labelled pairs than in the run, it is too high there (label a "
        "sample of the run: evaluate --sample)."
    )
    header = ["form", "log loss", "Brier score"]
    return [html.heading("Calibration"), html.paragraph(text), html.table(header, rows)]


def _slices(facts: Mapping[str, Any]) -> list[str]:
    parts = []
    for column, rows in facts["slices"].items():
        parts.append(html.heading(f"By {column}"))
        lines = []
        for row in rows:
            metrics = row["metrics"] or {}
            lines.append(
                [
                    _slice_name(row),
                    count(row["pairs"]),
                    count(row["matches"]),
                    ranged(metrics["roc_auc"]) if metrics else row["note"],
                    ranged(metrics["average_precision"]) if metrics else "–",
                    number(row["precision"]),
                    number(row["recall"]),
                ]
            )
        header = ["value", "pairs", "matches", "ROC AUC", "average precision", "precision", "recall"]
        parts.append(html.table(header, lines, text_columns=(0,)))
    if parts:
        parts.append(html.paragraph("Precision and recall at the threshold of the best F1 over all pairs.", "soft"))
    return parts


def _slice_name(row: Mapping[str, Any]) -> str:
    if "values" in row:
        return f"{row['values']} rare values"
    return "(null)" if row["value"] is None else str(row["value"])


def _rows(facts: Mapping[str, Any]) -> list[str]:
    rows, labels = facts["rows"], facts["labels"]
    lines = [["rows", count(rows["rows"]), ""], ["with a score", count(rows["scored"]), ""]]
    for reason, number_of_rows in rows["unscored"].items():
        labelled, matches = labels["unscored"].get(reason, (0, 0))
        lines.append([reason, count(number_of_rows), f"{count(labelled)} labelled, {count(matches)} matches"])
    parts = [html.heading("Rows and labels"), html.table(["rows of the run", "number", "labels"], lines)]
    parts.append(
        html.paragraph(
            "A pair without a score is in no metric. A match among them can never be found: recall over all labelled "
            f"matches, with a score or without, is {number(facts['recall_ceiling'])} times the recall shown."
        )
    )
    table, sample = labels["labels"], labels["sample"]
    if table is not None:
        names = ("rows", "unlabelled", "null_key", "duplicates", "conflicts", "pairs")
        lines = [[name.replace("_", " "), count(table[name])] for name in names]
        lines += [
            ["not among the scores", count(labels["unmatched"])],
            ["repeated in the scores", count(labels["repeated"])],
        ]
        parts.append(html.table(["table of labels", "rows"], lines))
        if labels["unmatched"]:
            text = _UNMATCHED.format(count(labels["unmatched"]), count(labels["unmatched_matches"]))
            parts.append(html.paragraph(text))
    if sample is not None:
        lines = [[name.replace("_", " "), count(value)] for name, value in sample.items()]
        parts.append(html.table(["sample", "number"], lines))
    return parts


def _examples(examples: Mapping[str, Any]) -> list[str]:
    parts = [html.paragraph("What follows shows records (--show-examples).", "warning")]
    for name, title in (("false_matches", "Worst false matches"), ("missed_matches", "Worst missed matches")):
        parts.append(html.heading(title))
        parts.append(html.table(examples["columns"], examples[name], text_columns=range(len(examples["columns"]))))
    return parts
