"""Every gate, alone: it trips, the night is held back with a report, and the last good night stays the current one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flipkd.nightly.config import GateLimits
from flipkd.nightly.gates import judge
from flipkd.nightly.measure import RecordFacts
from tests.nightly.conftest import FIRST, GOLD, RECORDS, SECOND, THIRD, Bank

EVALUATE = {"labels": "gold.parquet", "bootstrap": 5}


def fewer_pairs(bank: Bank) -> None:
    bank.pairs(SECOND, rows=GOLD + 20)


def others(bank: Bank) -> None:
    """Half of the pairs name records that are not there."""
    ids = np.arange(300)
    bank.pairs(SECOND, {"left_id": ids % RECORDS, "right_id": np.where(ids % 2, ids % RECORDS, 10_000)})


def same_texts(bank: Bank) -> None:
    """Every left record has the text of its right one: all scores of a pair with itself are 1."""
    bank.customers(SECOND, bank.texts[1][:RECORDS])
    ids = np.arange(300) % RECORDS
    bank.pairs(SECOND, {"left_id": ids, "right_id": ids})


def more_customers(bank: Bank) -> None:
    bank.customers(SECOND, [*bank.texts[0], *bank.texts[1][:20]])


def one_class(bank: Bank) -> None:
    table = pq.read_table(bank.folder / "gold.parquet")
    pq.write_table(table.set_column(2, "label", pa.array([1] * GOLD)), bank.folder / "gold.parquet")


def no_gold_pairs(bank: Bank) -> None:
    """The step that makes the candidates leaves the gold pairs out."""
    ids = np.arange(300)
    bank.pairs(SECOND, {"left_id": ids % RECORDS, "right_id": (ids + 50) % RECORDS})


def gold_without_scores(bank: Bank) -> None:
    """The gold pairs are candidates, and their right records are not there."""
    ids = np.arange(300)
    bank.pairs(SECOND, {"left_id": ids % RECORDS, "right_id": 10_000 + ids})
    gold = pa.table({"left_id": ids[:GOLD], "right_id": 10_000 + ids[:GOLD], "label": ids[:GOLD] % 2})
    pq.write_table(gold, bank.folder / "gold.parquet")


def labels_of_another_night(bank: Bank) -> None:
    """The candidates bring their labels themselves, and tonight's have none."""
    ids = np.arange(300)
    columns = {"left_id": ids % RECORDS, "right_id": ids % RECORDS, "label": pa.nulls(300, pa.int8())}
    bank.pairs(SECOND, columns)


@pytest.mark.parametrize(
    ("change", "gates"),
    [
        (
            same_texts,
            {"max_score_psi": (0.25, None), "max_match_rate": (0.9, 1.0), "max_match_rate_change": (0.5, None)},
        ),
        (fewer_pairs, {"max_pairs_change": (0.3, 200 / 300), "min_match_rate": (0.95, None)}),
        (
            more_customers,
            {"max_records_change": (0.1, 0.2), "max_new_record_share": (0.1, 20 / 120)},
        ),
        (
            others,
            {
                "max_unscored_share": (0.4, 0.5),
                "max_reason_share missing_record": (0.4, 0.5),
                "max_reason_share_increase": (0.4, 0.5),
            },
        ),
        (None, {"min_gold_pairs": (GOLD + 1, GOLD), "min_metric roc_auc": (0.999, None)}),
        *(
            (change, {"min_gold_pairs": (10, 0), "min_metric roc_auc": (0.0, None)})
            for change in (no_gold_pairs, gold_without_scores, labels_of_another_night)
        ),
        (one_class, {"min_metric average_precision": (0.1, None)}),  # cannot be measured
    ],
)
def test_gates_that_trip_hold_the_night_back(bank: Bank, change: Any, gates: dict[str, Any]) -> None:
    if change is not None:
        change(bank)
    limits: dict[str, Any] = {"max_score_psi": None, "max_skipped_files": None}
    for gate, (limit, _) in gates.items():
        name, _, key = gate.partition(" ")
        limits[name] = {key: limit} if key else limit
    is_gold = any(gate.startswith(("min_gold", "min_metric")) for gate in gates)
    evaluate = {"bootstrap": 5} if change is labels_of_another_night else EVALUATE
    result = bank.run(SECOND, code=3, gates=limits, **({"evaluate": evaluate} if is_gold else {}))
    facts, last = bank.facts(SECOND, "_held"), bank.facts(FIRST)
    assert [one["verdict"] for one in facts["gates"]] == ["tripped"] * len(gates)
    page = (bank.nights / "_held" / SECOND / "report/night.html").read_text()
    assert f"Held back: {len(gates)} of {len(gates)} gates tripped" in page
    assert page.count("TRIPPED") == len(gates)
    assert not (bank.nights / SECOND).exists()
    assert bank.current()["date"] == FIRST
    found = {one["name"]: one["value"] for one in facts["gates"]}
    for gate, (_, value) in gates.items():
        assert f"gate {gate}:" in result.output
        if value is not None:
            assert found[gate] == pytest.approx(value)
        # One gate alone holds a night back, from just beyond its value on.
        name, _, key = gate.partition(" ")
        if found[gate] is not None:
            beyond = found[gate] + (1e-9 if name.startswith("min_") else -1e-9)
            for limit, verdict in ((found[gate], "passed"), (beyond, "tripped")):
                only = GateLimits(
                    max_skipped_files=None, **{"max_score_psi": None, name: {key: limit} if key else limit}
                )
                assert [one["verdict"] for one in judge(only, facts, last)] == [verdict]


@pytest.mark.parametrize(
    "gates",
    [{"max_unscored_share": 0.5}, {"max_reason_share": {"missing_id": 0.5}}, {"max_reason_share_increase": 0.5}],
)
@pytest.mark.parametrize("empty", ["tonight", "last"])
def test_a_share_of_no_pairs_cannot_be_measured(first_night: Bank, gates: dict[str, Any], empty: str) -> None:
    facts = first_night.facts(FIRST)
    none = {**facts, "pairs": {"rows_in": 0, "rows_out": 0}, "reasons": {}}
    limits = GateLimits(max_skipped_files=None, max_score_psi=None, **gates)
    tonight, last = (none, facts) if empty == "tonight" else (facts, none)
    is_measured = empty == "last" and "max_reason_share_increase" not in gates
    (gate,) = judge(limits, tonight, last)
    assert gate["verdict"] == ("passed" if is_measured else "tripped")
    assert (gate["value"] is None) is not is_measured
    (gate,) = judge(limits, facts, facts)
    assert (gate["verdict"], gate["value"]) == ("passed", 0.0)


def test_a_night_without_pairs_is_held_from_the_first_on(bank: Bank) -> None:
    early = "2026-01-01"
    bank.customers(early, bank.texts[0])
    bank.pairs(early, {"left_id": pa.array([], pa.int64()), "right_id": pa.array([], pa.int64())})
    gates = {"max_score_psi": None, "max_unscored_share": 0.1}
    assert "gate max_unscored_share: cannot be measured" in bank.run(early, code=3, gates=gates).output
    assert bank.facts(early, "_held")["pairs"]["rows_in"] == 0


def test_a_share_of_no_records_cannot_be_measured() -> None:
    shares = RecordFacts({"left": 0, "right": 4}, {"left": 0, "right": 1}).shares()
    assert shares == {"left": None, "right": 0.25}
    assert RecordFacts({"left": 4}, {"left": None}).shares() == {"left": None}


def test_the_probability_has_gates_of_its_own(bank: Bank) -> None:
    (bank.folder / "calibration.json").write_text(json.dumps({"slope": 10.0, "intercept": -5.0}))
    score = {"calibration": "calibration.json"}
    gates = {"max_probability_psi": 0.2}
    result = bank.run(SECOND, code=3, score=score, gates=gates)  # last night had no probability
    assert "gate max_probability_psi: cannot be measured" in result.output
    bank.run(SECOND, "--accept", "calibrated from tonight on", score=score, gates=gates)
    bank.customers(THIRD, bank.texts[0])
    bank.pairs(THIRD, seed=1)
    bank.run(THIRD, score=score, gates=gates)
    columns = bank.facts(THIRD)["columns"]
    assert set(columns) == {"score", "probability"}
    assert sum(columns["probability"]["last_counts"]) == 300


def test_there_must_be_a_last_night_if_asked_for(bank: Bank) -> None:
    early = "2026-01-01"
    bank.customers(early, bank.texts[0])
    bank.pairs(early)
    bank.run(early, code=3, gates={"require_last_night": True})
    assert bank.facts(early, "_held")["last_night"] is None


def test_a_held_night_is_no_measure_for_the_next_one(bank: Bank) -> None:
    same_texts(bank)
    bank.run(SECOND, code=3)
    bank.customers(THIRD, bank.texts[1][:RECORDS])  # wrong in the same way, and compared with the good one again
    ids = np.arange(300) % RECORDS
    bank.pairs(THIRD, {"left_id": ids, "right_id": ids})
    bank.run(THIRD, code=3)
    assert bank.facts(THIRD, "_held")["last_night"] == FIRST


def test_somebody_may_release_a_held_night_and_says_why(bank: Bank) -> None:
    same_texts(bank)
    gates = {"max_pairs_change": 0.5}
    assert "is not finished" in bank.run(SECOND, "--accept", "fine", code=2, gates=gates).output
    bank.run(SECOND, code=3, gates=gates)
    assert "needs a reason" in bank.run(SECOND, "--accept", " ", code=2, gates=gates).output
    assert "give one of them" in bank.run(SECOND, "--accept", "x", "--overwrite", code=2, gates=gates).output
    bank.run(SECOND, "--accept", "a new source since today", gates=gates)
    assert bank.current()["date"] == SECOND
    assert bank.current()["gates"] == "accepted"
    accepted = json.loads((bank.nights / SECOND / "accepted.json").read_text())
    assert accepted["reason"] == "a new source since today"
    assert accepted["accepted"].endswith("+00:00")
    bank.run(SECOND, gates=gates)  # and it stays released
    bank.run(SECOND, "--accept", "again", gates=gates)
    assert json.loads((bank.nights / SECOND / "accepted.json").read_text()) == accepted


def test_a_night_accepted_by_a_killed_process_is_released_by_the_next(
    bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    same_texts(bank)
    bank.run(SECOND, code=3)

    def stop(*_: Any) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("flipkd.nightly.night.Nights.settle", stop)
        bank.run(SECOND, "--accept", "fine", code=1)
    assert bank.current()["date"] == FIRST
    bank.run(SECOND)
    assert bank.current()["date"] == SECOND


def test_a_night_without_gold_pairs_is_held_and_can_be_accepted_or_mended(
    bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {
        "evaluate": EVALUATE, "gates": {"max_score_psi": None, "min_gold_pairs": 10, "min_metric": {"roc_auc": 0.0}}
    }  # fmt: skip

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    good = (bank.folder / "gold.parquet").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("flipkd.nightly.night.count_scores", stop)
        bank.run(SECOND, code=1, **options)  # broken off when the gold pairs were there yet
    assert (bank.nights / "_unfinished" / SECOND / "evaluation/report.html").exists()
    gold = pq.read_table(bank.folder / "gold.parquet")
    ids = pa.array(np.arange(GOLD) + 10_000)  # of another system
    pq.write_table(gold.set_column(0, "left_id", ids), bank.folder / "gold.parquet")
    told = bank.run(SECOND, code=3, **options)
    assert f"none of the {GOLD} labelled pairs of" in told.stderr
    assert "must be those of the scores" in told.stderr
    held = bank.nights / "_held" / SECOND
    assert not (held / "evaluation").exists()
    evaluation = bank.facts(SECOND, "_held")["evaluation"]
    assert (evaluation["labelled"]["pairs"], evaluation["metrics"]) == (0, None)
    page = (held / "report/night.html").read_text()
    assert "No gold pair has a score, so nothing was measured" in page
    assert "evaluation/report.html" not in page
    bank.run(SECOND, "--accept", "they come tomorrow", **options)
    assert bank.current()["date"] == SECOND
    (bank.folder / "gold.parquet").write_bytes(good)
    bank.run(SECOND, "--overwrite", **options)
    assert bank.facts(SECOND)["evaluation"]["labelled"]["pairs"] == GOLD
    assert (bank.nights / SECOND / "evaluation/report.html").exists()
