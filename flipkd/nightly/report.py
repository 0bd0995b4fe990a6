"""The report of a night: ``night.json`` for programs, ``night.html`` for people. Counts, and nothing of a record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flipkd.nightly.folders import NIGHT_FILE, NIGHT_PAGE
from flipkd.nightly.gates import match_rate, psi, reason_shares
from flipkd.nightly.stability import share
from flipkd.report import html, pictures
from flipkd.report.html import count, number
from flipkd.report.timeline import Span, span_rows

Facts = Mapping[str, Any]
# Gates whose value is no share of a whole.
_COUNTS = ("max_skipped_files", "min_gold_pairs")
_NUMBERS = ("max_score_psi", "max_probability_psi", "min_metric")


def write_report(folder: Path, tonight: Facts, last: Facts | None) -> None:
    """Writes both files into a folder that is published afterwards.

    Args:
        folder: where to.
        tonight: what ``night.json`` holds.
        last: that of the last night; None where there is none.
    """
    (folder / NIGHT_FILE).write_text(json.dumps(tonight, indent=1, allow_nan=False) + "\n")
    (folder / NIGHT_PAGE).write_text(_page(tonight, last), encoding="utf-8")


def _page(tonight: Facts, last: Facts | None) -> str:
    tripped = [gate["name"] for gate in tonight["gates"] if gate["verdict"] == "tripped"]
    parts = [html.heading(f"Night of {tonight['date']}", 1), html.paragraph(_introduction(tonight, last), "soft")]
    if tripped:
        text = f"Held back: {len(tripped)} of {len(tonight['gates'])} gates tripped ({', '.join(tripped)})."
        parts.append(html.paragraph(text, "warning"))
    parts += [html.paragraph(text, "warning") for text in _warnings(tonight, last)]
    parts.append(_cards(tonight, last))
    parts += [html.heading("Gates"), _gates(tonight)]
    parts += [html.heading("Scores and time"), html.pictures(_pictures(tonight, last))]
    parts += [_stability(tonight, last)] if last is not None else []
    parts += _counts(tonight, last)
    parts += _evaluation(tonight)
    parts += _stages(tonight)
    return html.page(f"flipkd night {tonight['date']}", parts)


def _introduction(tonight: Facts, last: Facts | None) -> str:
    pairs = f"{count(tonight['pairs']['rows_in'])} pairs"
    if last is None:
        return f"{pairs}; the first night: there is none to compare with, and gates that need one are not judged."
    return f"{pairs}; compared with {last['date']}, the newest night before it that was released."


def _warnings(tonight: Facts, last: Facts | None) -> list[str]:
    found = []
    if tonight["starts"] > 1:
        found.append(
            f"The night was started {tonight['starts']} times. The time line shows the runs that finished each stage, "
            "without the time of those that were broken off."
        )
    if last is not None and last["encoder_fingerprint"] != tonight["encoder_fingerprint"]:
        found.append("The encoder is not the one of last night: scores of two encoders lie on different scales.")
    if last is not None and last["threshold"] != tonight["threshold"]:
        found.append("The threshold is not the one of last night.")
    if tonight["skipped_files"]:
        found.append(f"{tonight['skipped_files']} files or units could not be read and were skipped.")
    unknown = [side for side, facts in tonight["records"].items() if last is not None and facts["new"] is None]
    if unknown:
        found.append(f"New records ({', '.join(unknown)}) are not counted: last night's vector store is not there.")
    return found + list((tonight["evaluation"] or {}).get("warnings", []))


def _cards(tonight: Facts, last: Facts | None) -> str:
    gates = tonight["gates"]
    passed = sum(gate["verdict"] == "passed" for gate in gates)
    values = [(f"{passed} of {len(gates)}", "gates passed", "held back" if not tonight["passed"] else "released")]
    rate = match_rate(tonight)
    if rate is not None:
        before = "" if last is None else f"last night {_percent(match_rate(last))}"
        values.append((_percent(rate), "match rate", before))
    index = None if last is None else psi("score", tonight, last)
    if index is not None:
        small = f"chance alone: up to {number(index['chance_limit'], 4)}"
        values.append((number(index["value"], 4), "stability index", small))
    for side, facts in tonight["records"].items():
        if facts["new_share"] is not None:
            values.append((_percent(facts["new_share"]), f"new records ({side})", f"of {count(facts['records'])}"))
    figure = ((tonight["evaluation"] or {}).get("metrics") or {}).get("roc_auc")
    if figure is not None:
        values.append((number(figure["value"]), "ROC AUC", "on the gold pairs"))
    return html.cards(values)


def _gates(tonight: Facts) -> str:
    rows = [
        [
            gate["name"],
            _value(gate["name"], gate["value"]),
            _value(gate["name"], gate["limit"]),
            _value(gate["name"], gate["last"]),
            gate["verdict"].upper() if gate["verdict"] == "tripped" else gate["verdict"],
        ]
        for gate in tonight["gates"]
    ]
    table = html.table(["gate", "tonight", "limit", "last night", "verdict"], rows, text_columns=(0,))
    note = "A gate whose value cannot be measured (–) trips. A change is |tonight - last night| / last night."
    return table + html.paragraph(note, "soft")


def _value(gate: str, value: float | None) -> str:
    if value is None:
        return "–"
    kind = gate.partition(" ")[0]
    if kind in _COUNTS:
        return count(value)
    return number(value, 4) if kind in _NUMBERS else _percent(value)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.3g} %"


def _pictures(tonight: Facts, last: Facts | None) -> list[tuple[str, str]]:
    found = []
    judged = "probability" if "probability" in tonight["columns"] else "score"
    for name, facts in sorted(tonight["columns"].items(), reverse=True):
        heights = {f"tonight, {tonight['date']}": _shares(facts)}
        if last is not None and name in last["columns"]:
            heights[f"last night, {last['date']}"] = _shares(last["columns"][name])
        edges, threshold = facts["histogram"]["edges"], tonight["threshold"] if name == judged else None
        svg = pictures.two_histograms(edges, heights, name, threshold)
        found.append((svg, f"Distribution of the {name}; each night adds up to one."))
    spans = [_span(stage) for stage in tonight["stages"]]
    found.append((pictures.time_line(spans), "The stages, one after another."))
    return found


def _shares(facts: Facts) -> list[float]:
    heights = facts["histogram"]["counts"]
    return [height / max(facts["values"], 1) for height in heights]


def _stability(tonight: Facts, last: Facts) -> str:
    parts = []
    for name in tonight["columns"]:
        index = psi(name, tonight, last)
        if index is None:
            continue
        bins = last["columns"][name]
        now, before = tonight["columns"][name]["last_counts"], bins["counts"]
        ends = ["", *(number(edge, 4) for edge in bins["edges"]), ""]
        rows = [
            [
                f"{low or 'lowest'} to {high or 'highest'}",
                *map(_percent, (share(own, sum(now)), share(old, sum(before)))),
            ]
            for low, high, own, old in zip(ends[:-1], ends[1:], now, before, strict=True)
        ]
        text = (
            f"Population stability index of the {name}: {number(index['value'], 4)}, the sum over the bins of "
            "(tonight - last night) ln(tonight / last night). If nothing had changed, it would stay below "
            f"{number(index['chance_limit'], 4)} in 95 of 100 nights of independent pairs."
        )
        parts += [html.paragraph(text), html.table([f"{name} (last night's bins)", "tonight", "last night"], rows)]
    return "".join(parts)


def _counts(tonight: Facts, last: Facts | None) -> list[str]:
    nothing: Facts = {"reasons": {}, "pairs": {"rows_in": 0, "rows_out": 0}, "records": {}}
    before = nothing if last is None else last
    rows = [
        ["pairs in", count(tonight["pairs"]["rows_in"]), "", count(before["pairs"]["rows_in"]), ""],
        ["rows written", count(tonight["pairs"]["rows_out"]), "", count(before["pairs"]["rows_out"]), ""],
    ]
    for reason, (now, then) in reason_shares(tonight, before).items():
        counts = [count(one["reasons"].get(reason, 0)) for one in (tonight, before)]
        rows.append([reason, counts[0], _percent(now), counts[1], _percent(then)])
    for side, facts in tonight["records"].items():
        old = before["records"].get(side)
        rows.append(
            [f"records ({side})", count(facts["records"]), "", "–" if old is None else count(old["records"]), ""]
        )
        new = "–" if facts["new"] is None else count(facts["new"])
        rows.append([f"new records ({side})", new, _percent(facts["new_share"]), "", ""])
    for name, counts in tonight["encoded"].items():
        encoded, distinct = counts.get("encoded_texts", 0), counts.get("distinct_texts", 0)
        rows.append([f"{name}: new texts", count(encoded), _percent(share(encoded, distinct)), "", ""])
    parts = [html.heading("Pairs and records")]
    parts.append(html.table(["", "tonight", "share", "last night", "share"], rows))
    if tonight["rescored"] is not None:
        facts = tonight["rescored"]
        lines = [["answered by the LLM", count(facts["counts"].get("rescored", 0))]]
        lines += [[reason, count(number_of)] for reason, number_of in facts["reasons"].items()]
        parts += [html.heading("Rescored"), html.table(["pairs", "number"], lines)]
    return parts


def _evaluation(tonight: Facts) -> list[str]:
    facts = tonight["evaluation"]
    if facts is None:
        return []
    labelled = facts["labelled"]
    text = f"{count(labelled['pairs'])} labelled pairs with a score, {count(labelled['matches'])} of them matches."
    if labelled["pairs"]:
        text += " The whole report lies beside this one, in evaluation/report.html."
    rows = []
    for name, figure in (facts["metrics"] or {}).items():
        rows.append([name.replace("_", " "), *html.ranged(figure)])
    found = [html.heading("Gold pairs"), html.paragraph(text)]
    return [*found, html.table(["figure", "value", "95 % interval"], rows)] if rows else found


def _stages(tonight: Facts) -> list[str]:
    rows = span_rows([_span(stage) for stage in tonight["stages"]])
    header = ["stage", "rows", "seconds", "rows per second", "share of the work"]
    note = "Shares are of the seconds of all workers together. Planning and loading between the stages is not in them."
    return [html.heading("Stages"), html.table(header, rows, text_columns=(4,)), html.paragraph(note, "soft")]


def _span(stage: Facts) -> Span:
    return Span(stage["name"], stage["seconds"], stage["rows"], stage["parts"])
