"""Tonight's figures against their limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from flipkd.nightly.config import GateLimits
from flipkd.nightly.stability import chance_limit, population_stability_index, relative_change, share

Facts = Mapping[str, Any]
Verdict = Literal["passed", "tripped", "first night"]
# These compare with the last night; without one there is nothing to say.
COMPARING = (
    "max_score_psi", "max_probability_psi", "max_pairs_change", "max_records_change", "max_new_record_share",
    "max_match_rate_change", "max_reason_share_increase",
)  # fmt: skip


def judge(limits: GateLimits, tonight: Facts, last: Facts | None) -> list[dict[str, Any]]:
    """Every gate that is set.

    Args:
        limits: the limits.
        tonight: what ``night.json`` holds, but for the gates.
        last: that of the last night; None where there is none.

    Returns:
        Per gate its ``name``, ``value`` and ``limit``, the ``last`` night's value of what has one, and a ``verdict``:
        ``passed``, ``tripped`` (a value that cannot be measured trips), or ``first night``.
    """
    gates: list[dict[str, Any]] = []
    if limits.require_last_night:
        verdict: Verdict = "tripped" if last is None else "passed"
        gates.append({"name": "require_last_night", "value": None, "limit": None, "last": None, "verdict": verdict})
    for name, limit in limits.limits():
        value = figure(name, tonight, last)
        before = None if last is None or name in COMPARING else figure(name, last, None)
        if name in COMPARING and last is None:
            verdict = "first night"
        elif value is None or (value > limit if name.startswith("max_") else value < limit):
            verdict = "tripped"
        else:
            verdict = "passed"
        gates.append({"name": name, "value": value, "limit": limit, "last": before, "verdict": verdict})
    return gates


def figure(gate: str, tonight: Facts, last: Facts | None) -> float | None:
    """The value that a gate looks at; None where it cannot be measured."""
    kind, _, key = gate.partition(" ")
    rows_in, reasons = tonight["pairs"]["rows_in"], tonight["reasons"]
    match kind:
        case "max_skipped_files":
            return float(tonight["skipped_files"])
        case "min_match_rate" | "max_match_rate":
            return match_rate(tonight)
        case "max_unscored_share":
            return share(sum(reasons.values()), rows_in)
        case "max_reason_share":
            return share(reasons.get(key, 0), rows_in)
        case "min_gold_pairs":
            evaluation = tonight["evaluation"]
            return None if evaluation is None else float(evaluation["labelled"]["pairs"])
        case "min_metric":
            metrics = (tonight["evaluation"] or {}).get("metrics")
            return None if metrics is None else metrics[key]["value"]
    return None if last is None else _compared(kind, tonight, last)


def _compared(kind: str, tonight: Facts, last: Facts) -> float | None:
    match kind:
        case "max_score_psi":
            return (psi("score", tonight, last) or {}).get("value")
        case "max_probability_psi":
            return (psi("probability", tonight, last) or {}).get("value")
        case "max_pairs_change":
            return relative_change(tonight["pairs"]["rows_in"], last["pairs"]["rows_in"])
        case "max_records_change":
            return _most(
                [_records_change(facts, last["records"].get(side)) for side, facts in tonight["records"].items()]
            )
        case "max_new_record_share":
            return _most([facts["new_share"] for facts in tonight["records"].values()])
        case "max_match_rate_change":
            rates = match_rate(tonight), match_rate(last)
            return None if rates[0] is None or rates[1] is None else relative_change(rates[0], rates[1])
        case "max_reason_share_increase":
            if not tonight["pairs"]["rows_in"] or not last["pairs"]["rows_in"]:
                return None  # there are no shares of no pairs
            return max((now - before for now, before in reason_shares(tonight, last).values()), default=0.0)
    raise AssertionError(kind)


def match_rate(facts: Facts) -> float | None:
    """Matches among the scored pairs."""
    return share(facts["match"]["matches"], facts["match"]["judged"])


def reason_shares(tonight: Facts, last: Facts) -> dict[str, tuple[float, float]]:
    """Per reason of either night, the share of its pairs: tonight's and last night's."""
    return {
        reason: (
            share(tonight["reasons"].get(reason, 0), tonight["pairs"]["rows_in"]) or 0.0,
            share(last["reasons"].get(reason, 0), last["pairs"]["rows_in"]) or 0.0,
        )
        for reason in sorted({*tonight["reasons"], *last["reasons"]})
    }


def psi(column: str, tonight: Facts, last: Facts) -> dict[str, float] | None:
    """Stability index of a column over last night's bins, and what chance alone explains; None without values.

    ``tonight["columns"][column]["last_counts"]`` holds tonight's values in last night's bins.
    """
    own, before = tonight["columns"].get(column), last["columns"].get(column)
    if own is None or before is None:
        return None
    value = population_stability_index(own["last_counts"], before["counts"])
    limit = chance_limit(own["last_counts"], before["counts"])
    return None if value is None or limit is None else {"value": value, "chance_limit": limit}


def _records_change(tonight: Facts, last: Facts | None) -> float | None:
    return None if last is None else relative_change(tonight["records"], last["records"])


def _most(values: list[float | None]) -> float | None:
    """The largest; None where one of them is not known."""
    known = [value for value in values if value is not None]
    return max(known) if known and len(known) == len(values) else None
