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
    result = bank.run(SECOND, code=3, gates=limits, **({"evaluate": EVALUATE} if is_gold else {}))
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
