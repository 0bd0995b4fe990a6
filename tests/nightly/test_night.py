"""Nights, one after another: what they write, what they encode, and what a second run of one does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from flipkd.cli import main
from flipkd.config import EncoderOptions, ScoreConfig
from flipkd.data.location import Location, open_location
from flipkd.run import encode as encode_module
from flipkd.run.lock import locked
from flipkd.run.score import score
from tests.nightly.conftest import CHANGED, FIRST, GOLD, RECORDS, SECOND, THIRD, Bank, gold_table
from tests.run.test_kill import contents

ROOT = str(Path(__file__).parents[2])
NO_PSI = {"max_score_psi": None}


def snapshot(folder: Path) -> dict[str, int]:
    """Time of the last change of every file; the lock is opened by every job."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "lock")
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


def test_the_first_night_has_a_report_and_is_released(first_night: Bank) -> None:
    facts, folder = first_night.facts(FIRST), first_night.nights / FIRST
    names = {path.name for path in folder.iterdir()}
    assert names == {"_night.json", "_stages.json", "report", "scores", "stores"}
    assert {path.name for path in (folder / "report").iterdir()} == {"_files.json", "night.html", "night.json"}
    assert facts["last_night"] is None
    assert {gate["name"]: gate["verdict"] for gate in facts["gates"]} == {
        "max_skipped_files": "passed", "max_score_psi": "first night"
    }  # fmt: skip
    assert facts["encoded"]["encode left"]["encoded_texts"] == RECORDS
    assert facts["records"]["right"] == {"records": RECORDS + 1, "new": None, "new_share": None}
    assert [stage["name"] for stage in facts["stages"]] == ["encode left", "encode right", "score", "compare"]
    scores = pq.read_table(folder / "scores")
    assert facts["pairs"] == {"rows_in": 300, "rows_out": 300}
    assert facts["match"] == {"judged": 300, "matches": sum(scores.column("match").to_pylist())}
    assert sum(facts["columns"]["score"]["counts"]) == sum(facts["columns"]["score"]["histogram"]["counts"]) == 300
    assert first_night.current() == {
        "format": 1, "date": FIRST, "scores": f"{FIRST}/scores", "report": f"{FIRST}/report/night.html",
        "gates": "passed",
    }  # fmt: skip


def test_reports_hold_nothing_of_a_record_and_belong_to_their_owner(first_night: Bank) -> None:
    for path in (first_night.nights / FIRST).rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
        if path.suffix in (".json", ".html"):
            text = path.read_text()
            assert not any(record in text for table in first_night.texts for record in table if len(record) > 8), path
    page = (first_night.nights / FIRST / "report/night.html").read_text()
    assert page.count("<svg") == 2
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org/", "").replace("http-equiv", "")


def scored_without_a_night(bank: Bank, output: Path, **options: Any) -> pa.Table:
    """The second night's pairs, scored by a job of its own."""
    plain = ScoreConfig(
        str(bank.folder / "pairs" / SECOND),
        str(output),
        encoder=EncoderOptions(bank.values["score"]["encoder"]),
        records=str(bank.folder / "customers" / SECOND),
        right_records=str(bank.folder / "sanctions"),
        **options,
    )
    score(plain)
    return pq.read_table(output)


def test_the_second_night_encodes_what_has_changed_and_scores_as_a_plain_job(bank: Bank, tmp_path: Path) -> None:
    bank.run(SECOND)
    facts = bank.facts(SECOND)
    assert facts["last_night"] == FIRST
    left, right = facts["encoded"]["encode left"], facts["encoded"]["encode right"]
    assert (left["encoded_texts"], left["cached_texts"]) == (CHANGED, RECORDS - CHANGED)
    assert right.get("encoded_texts", 0) == 0
    assert facts["records"]["left"] == {"records": RECORDS, "new": 0, "new_share": 0.0}  # changed ones are not new
    plain = scored_without_a_night(bank, tmp_path / "plain", threshold=0.6)
    assert pq.read_table(bank.nights / SECOND / "scores").equals(plain)
    assert bank.current()["date"] == SECOND
    # Vectors are kept for the newest nights alone, and none in the cache but the texts'.
    assert all((bank.nights / date / "stores/left/store.json").exists() for date in (FIRST, SECOND))
    assert [path.name for path in (bank.folder / "cache").iterdir()] == ["texts"]


def test_ids_that_last_night_did_not_have_are_new_records(bank: Bank) -> None:
    bank.customers(SECOND, bank.texts[0], first_id=10)
    bank.run(SECOND, gates=NO_PSI)
    assert bank.facts(SECOND)["records"]["left"] == {"records": RECORDS, "new": 10, "new_share": 0.1}
    assert bank.facts(SECOND)["encoded"]["encode left"].get("encoded_texts", 0) == 0  # the texts are old


@pytest.mark.parametrize(("limit", "code"), [(1.0, 0), (0.01, 3)])
def test_a_night_that_is_done_is_left_alone_and_ends_as_it_did(bank: Bank, limit: float, code: int) -> None:
    bank.pairs(SECOND, rows=200)
    first = bank.run(SECOND, gates={"max_pairs_change": limit}, code=code)
    before = snapshot(bank.nights)
    for path in (bank.folder / "pairs" / SECOND).iterdir():  # nobody looks at the input again
        path.unlink()
    second = bank.run(SECOND, gates={"max_pairs_change": limit}, code=code)
    assert snapshot(bank.nights) == before
    assert second.output == first.output
    result = bank.run(SECOND, code=1, score={"threshold": 0.5})
    assert "has other options for score" in result.output
    assert snapshot(bank.nights) == before


def run_process(bank: Bank, point: str, date: str) -> int:
    """Runs a night in a process of its own; returns its exit code, -9 for a killed one."""
    command = [sys.executable, "-m", "tests.nightly.faults", point, str(bank.write()), "--date", date, "--no-progress"]
    environment = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode


def test_a_night_killed_while_it_scores_goes_on_to_the_same_bytes(bank: Bank) -> None:
    bank.run(SECOND)
    expected = contents(bank.nights / SECOND / "scores")
    bank.run(SECOND, "--overwrite")  # again, from the beginning
    assert contents(bank.nights / SECOND / "scores") == expected
    bank.pairs(THIRD, seed=1)
    bank.customers(THIRD, bank.texts[0])
    assert run_process(bank, "unit:1.parquet", THIRD) == -signal.SIGKILL
    unfinished = bank.nights / "_unfinished" / THIRD
    done = {path.name: path.stat().st_mtime_ns for path in (unfinished / "scores").glob("*.parquet")}
    assert 0 < len(done) < 10
    assert not (bank.nights / THIRD).exists()
    assert bank.current()["date"] == SECOND  # a consumer still sees the last good night
    bank.run(THIRD)
    scores = bank.nights / THIRD / "scores"
    assert len(contents(scores)) == 10
    assert {name: (scores / name).stat().st_mtime_ns for name in done} == done  # nothing was written twice
    assert not unfinished.exists()
    facts = bank.facts(THIRD)
    assert facts["starts"] == 2
    assert "started 2 times" in (bank.nights / THIRD / "report/night.html").read_text()
    assert facts["stages"][0]["seconds"] > 0  # what the first run said of encoding is not lost
    assert bank.current()["date"] == THIRD


def test_a_night_killed_between_its_report_and_its_release_is_released_by_the_next_run(bank: Bank) -> None:
    assert run_process(bank, "flipkd.nightly.folders:sync", SECOND) == -signal.SIGKILL  # after the rename
    assert (bank.nights / SECOND).exists()
    assert bank.current()["date"] == FIRST
    bank.run(SECOND)
    assert bank.current()["date"] == SECOND


class KilledError(BaseException):
    """Stands for the end of the process: no handler of flipkd's catches it."""


@pytest.mark.parametrize(
    "point", ["stages.score", "night.count_scores", "night.publish_folder", "night.Nights.settle", "night.Nights.point"]
)
def test_a_night_that_stops_anywhere_goes_on_from_there(
    bank: Bank, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(f"flipkd.nightly.{point}", stop)
        with pytest.raises(KilledError):
            bank.run(SECOND)
    assert bank.current()["date"] == FIRST
    bank.run(SECOND)
    assert bank.facts(SECOND)["encoded"]["encode left"]["encoded_texts"] == CHANGED
    assert len(contents(bank.nights / SECOND / "scores")) == 10
    assert bank.current()["date"] == SECOND
    before = snapshot(bank.nights)
    bank.run(SECOND)
    assert snapshot(bank.nights) == before


def test_a_night_killed_between_a_store_and_its_manifest_goes_on(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    original = encode_module.write_json

    def stop(root: Location, name: str, values: Any) -> None:
        if name == "_manifest.json":
            raise KilledError
        original(root, name, values)

    with monkeypatch.context() as patch:
        patch.setattr(encode_module, "write_json", stop)
        with pytest.raises(KilledError):
            bank.run(SECOND)
    assert (bank.nights / "_unfinished" / SECOND / "stores/left/store.json").exists()
    bank.run(SECOND)
    assert bank.facts(SECOND)["skipped_files"] == 0
    assert bank.facts(SECOND)["encoded"]["encode left"]["encoded_texts"] == CHANGED  # counted from what is committed
    assert bank.current()["date"] == SECOND


def test_input_that_changes_in_mid_night_is_refused(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr("flipkd.nightly.night.count_scores", stop)
        with pytest.raises(KilledError):
            bank.run(SECOND)
    bank.pairs(SECOND, seed=2)
    assert "input that has changed since" in bank.run(SECOND, code=1).output
    bank.run(SECOND, "--overwrite")
    assert bank.current()["date"] == SECOND


def test_two_jobs_at_once_are_refused(bank: Bank) -> None:
    with locked(open_location(bank.nights)):
        assert "another job is working on" in bank.run(SECOND, code=1).output
        assert "another job is working on" in bank.run(FIRST, code=1).output
    bank.run(SECOND)


def test_gold_pairs_with_missing_labels(bank: Bank) -> None:
    table = gold_table()
    path = bank.folder / "gold.parquet"
    none = table.set_column(2, "label", pa.nulls(GOLD, pa.int8()))
    pq.write_table(none, path)
    evaluate = {"labels": "gold.parquet", "bootstrap": 10}
    result = bank.run(SECOND, code=1, evaluate=evaluate)
    assert "every label in column 'label' is null" in result.output
    unfinished = bank.nights / "_unfinished" / SECOND / "scores"
    scored = snapshot(unfinished)
    assert bank.current()["date"] == FIRST

    some = pa.array([None if row < 10 else 1 - row % 2 for row in range(GOLD)], pa.int8())
    pq.write_table(table.set_column(2, "label", some), path)
    gates = {"min_gold_pairs": GOLD - 10, "min_metric": {"roc_auc": 0.7}}
    bank.run(SECOND, evaluate=evaluate, gates=gates)
    facts = bank.facts(SECOND)
    assert facts["evaluation"]["labelled"]["pairs"] == GOLD - 10
    assert facts["evaluation"]["labels"]["labels"]["unlabelled"] == 10
    assert {gate["name"] for gate in facts["gates"]} >= {"min_gold_pairs", "min_metric roc_auc"}
    kept = snapshot(bank.nights / SECOND / "scores")
    outputs = [name for name in scored if name.endswith(".parquet") and "/" not in name]
    assert len(outputs) == 10
    assert all(kept[name] == scored[name] for name in outputs)  # nothing was scored again
    assert (bank.nights / SECOND / "evaluation/report.html").exists()


def test_a_file_that_cannot_be_read_is_skipped_and_holds_the_night_back(bank: Bank) -> None:
    path = bank.folder / "pairs" / SECOND / "1.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    assert "1.parquet" in bank.run(SECOND, code=1).output
    bank.run(SECOND, code=3, run={"on_bad_shard": "skip"})
    facts = bank.facts(SECOND, "_held")
    assert facts["skipped_files"] == 1
    assert [gate["name"] for gate in facts["gates"] if gate["verdict"] == "tripped"] == ["max_skipped_files"]
    bank.run(SECOND, "--overwrite", run={"on_bad_shard": "skip"}, gates={"max_skipped_files": 1})
    assert bank.facts(SECOND)["pairs"]["rows_in"] == 150


def test_a_file_that_only_the_listing_of_texts_cannot_read_is_counted_too(bank: Bank) -> None:
    left, right = bank.texts
    bank.pairs(SECOND, {"left_text": left[:60], "right_text": right[:60]})
    path = bank.folder / "pairs" / SECOND / "1.parquet"
    data = bytearray(path.read_bytes())
    data[4:60] = b"\xff" * 56  # a page; the footer is whole
    path.write_bytes(data)
    bank.run(
        SECOND,
        code=3,
        score={"records": None, "right_records": None},
        run={"on_bad_shard": "skip"},
        gates=NO_PSI,
    )
    assert bank.facts(SECOND, "_held")["skipped_files"] == 1
    assert bank.facts(SECOND, "_held")["pairs"]["rows_in"] == 30


def test_inline_pairs_and_pairs_with_a_store_of_their_own(bank: Bank) -> None:
    left, right = bank.texts
    for side in ("left", "right"):
        shutil.copytree(bank.nights / FIRST / "stores" / side, bank.folder / side)
    bank.pairs(SECOND, {"left_text": left[:60], "right_text": right[:60]})
    bank.run(SECOND, score={"records": None, "right_records": None}, gates=NO_PSI)
    facts = bank.facts(SECOND)
    assert facts["records"] == {}
    assert [stage["name"] for stage in facts["stages"]] == ["texts", "encode", "score", "compare"]
    bank.pairs(THIRD)
    bare = {"records": None, "right_records": None, "cache": None, "encoder": None}
    bank.run(THIRD, score={**bare, "store": "left", "right_store": "right"}, gates=NO_PSI)
    assert [stage["name"] for stage in bank.facts(THIRD)["stages"]] == ["score", "compare"]
    assert pq.read_table(bank.nights / THIRD / "scores").equals(pq.read_table(bank.nights / FIRST / "scores"))


def test_the_cascade_is_a_stage_and_its_copy_is_what_consumers_get(bank: Bank, base_dir: Path) -> None:
    # The LLM reads texts, so the pairs hold them.
    left, right = bank.texts
    rows = np.arange(300) % RECORDS
    columns = {"left_text": [left[row] for row in rows], "right_text": [right[row % 7] for row in rows]}
    bank.pairs(SECOND, columns)
    (bank.folder / "prompt.txt").write_text("{left} and {right}: the same? Answer:")
    llm = {"folder": str(base_dir), "prompt_file": "prompt.txt", "labels": ["yes", "no"]}
    (bank.folder / "calibration.json").write_text(json.dumps({"slope": 10.0, "intercept": -5.0}))
    score = {"calibration": "calibration.json", "records": None, "right_records": None}
    bank.run(SECOND, score=score, rescore={"llm": llm, "budget": "5%"}, gates=NO_PSI)
    facts = bank.facts(SECOND)
    assert bank.current()["scores"] == f"{SECOND}/rescored"
    assert [stage["name"] for stage in facts["stages"]] == ["texts", "encode", "score", "rescore", "compare"]
    assert facts["rescored"]["counts"]["rescored"] == 15
    assert facts["reasons"] == {}  # pairs that were not asked have a score all the same
    found = pq.read_table(bank.nights / SECOND / "rescored")
    assert found.num_rows - found.column("llm_probability").null_count == 15
    assert facts["match"]["matches"] == sum(found.column("match").to_pylist())
    assert "answered by the LLM" in (bank.nights / SECOND / "report/night.html").read_text()


def test_the_right_table_may_have_columns_of_its_own(bank: Bank, base_dir: Path, tmp_path: Path) -> None:
    """Both stages read it by them; ``{date}`` is a column in its template."""
    other = pa.table(
        {"ref": np.arange(len(bank.texts[1])), "name": bank.texts[1], "date": ["1999"] * len(bank.texts[1])}
    )
    pq.write_table(other, bank.folder / "sanctions/0.parquet")
    own: dict[str, Any] = {"right_id_column": "ref", "right_template": "{name} of {date}"}
    (bank.folder / "prompt.txt").write_text("{left} and {right}: the same? Answer:")
    (bank.folder / "calibration.json").write_text(json.dumps({"slope": 10.0, "intercept": -5.0}))
    llm = {"folder": str(base_dir), "prompt_file": "prompt.txt", "labels": ["yes", "no"]}
    score_section = {"calibration": "calibration.json", "id_column": "id", "text_column": "text", **own}
    bank.run(SECOND, score=score_section, rescore={"llm": llm, "budget": "5"}, gates=NO_PSI)
    facts = bank.facts(SECOND)
    assert facts["records"]["right"] == {"records": RECORDS + 1, "new": 0, "new_share": 0.0}
    assert facts["encoded"]["encode right"]["encoded_texts"] > 0  # their texts are others than last night's
    assert facts["rescored"]["counts"]["rescored"] == 5
    scored = pq.read_table(bank.nights / SECOND / "scores")
    plain = scored_without_a_night(bank, tmp_path / "plain", **own)
    assert scored.column("score").equals(plain.column("score"))
    bank.pairs(THIRD)
    bank.customers(THIRD, bank.texts[0])
    told = bank.run(THIRD, code=2, score={**score_section, "right_id_column": "id"}).stderr
    assert "--right-id-column is right_id_column of score" in told


def test_a_stage_that_is_taken_out_of_the_file_in_mid_night_is_not_forgotten(
    bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr("flipkd.nightly.night.count_scores", stop)
        with pytest.raises(KilledError):
            bank.run(SECOND, evaluate={"labels": "gold.parquet", "bootstrap": 5})
    assert "holds evaluation; put the section back" in bank.run(SECOND, code=1).output


@pytest.mark.slow
def test_ray_gives_the_same_night(bank: Bank, tmp_path: Path) -> None:
    bank.run(SECOND)
    expected = contents(bank.nights / SECOND / "scores")
    command = [sys.executable, str(Path(ROOT) / "jobs/nightly.py"), str(bank.write()), "--date", SECOND]
    command += ["--ray", "local", "--overwrite", "--no-progress"]
    environment = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert contents(bank.nights / SECOND / "scores") == expected


def test_as_json(bank: Bank) -> None:
    found = json.loads(bank.run(SECOND, "--json", gates={"max_pairs_change": 0.5}).output)
    assert (found["date"], found["released"], found["current"]) == (SECOND, True, SECOND)
    assert [gate["name"] for gate in found["gates"]] == ["max_skipped_files", "max_score_psi", "max_pairs_change"]
    assert Path(found["report"]).exists()


def test_mistakes_are_found_before_the_work_and_named_as_keys(bank: Bank) -> None:
    bank.pairs(SECOND)
    bank.customers(SECOND, bank.texts[0])
    told = bank.run(SECOND, code=2, evaluate={"labels": "gold.parquet", "key": ["left_id", "ref"]}).stderr
    assert "gold.parquet has no column 'ref'" in told
    assert "--key is key of evaluate" in told
    assert not (bank.nights / "_unfinished" / SECOND / "stores").exists()
    told = bank.run(SECOND, code=2, score={"id_column": "number"}).stderr
    assert "has no column 'number'" in told
    assert "--id-column is id_column of score or rescore" in told
    llm = {"folder": "llm", "labels": [" yes", " no"], "prompt_file": "prompt.txt"}
    rescore = {"llm": llm, "band": [0, 1], "records": f"{bank.nights.name}/records"}
    told = bank.run(SECOND, code=2, rescore=rescore).stderr
    assert "rescore: records" in told
    assert "lie in one another" in told


def test_status_of_nights_and_of_one(bank: Bank) -> None:
    def said(folder: Path) -> dict[str, Any]:
        result = CliRunner().invoke(main, ["status", str(folder), "--json"])
        assert result.exit_code == 0, result.output
        found: dict[str, Any] = json.loads(result.stdout)
        return found

    bank.pairs(SECOND)
    bank.customers(SECOND, bank.texts[0])
    bank.run(SECOND, code=3, gates={"max_pairs_change": 0.0, "min_match_rate": 0.999})
    bank.run(THIRD, code=1)  # its records are not there
    found = said(bank.nights)
    assert (found["kind"], found["current"], found["running"]) == ("nights", FIRST, False)
    assert [(night["date"], night["state"]) for night in found["nights"]] == [
        (FIRST, "released"), (SECOND, "held"), (THIRD, "unfinished")
    ]  # fmt: skip
    assert found["nights"][1]["tripped"] == ["min_match_rate"]
    assert said(bank.nights / FIRST)["state"] == "released"
    assert said(bank.nights / "_held" / SECOND)["report"].endswith(f"_held/{SECOND}/report/night.html")
    assert said(bank.nights / "_unfinished" / THIRD)["stages"] == []
    assert said(bank.nights / FIRST / "scores")["kind"] == "score"
    for folder in (bank.nights, bank.nights / FIRST):
        watched = CliRunner().invoke(main, ["status", "--watch", str(folder)])
        assert watched.exit_code == 2
        assert "--watch follows one job, not nights" in watched.stderr
