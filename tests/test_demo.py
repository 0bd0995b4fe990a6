from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flipkd.demo import demo_tables, run_demo
from flipkd.errors import OutputError

Rows = list[tuple[str, str, str]]


def test_pairs_are_each_code_with_itself_and_its_neighbours() -> None:
    left, right, pairs = demo_tables([("001", "a long", "a"), ("002", "b long", "b"), ("003", "c long", "c")])
    assert left.to_pydict() == {"id": ["001", "002", "003"], "text": ["a long", "b long", "c long"]}
    assert right["text"].to_pylist() == ["a", "b", "c"]
    rows = list(zip(*(pairs[name].to_pylist() for name in ("left_id", "right_id", "label")), strict=True))
    assert rows == [
        ("001", "001", 1),
        ("001", "002", 0),
        ("002", "002", 1),
        ("002", "001", 0),
        ("002", "003", 0),
        ("003", "003", 1),
        ("003", "002", 0),
    ]


def test_quick_demo_scores_every_pair_and_finds_its_work_done_the_second_time(
    tmp_path: Path, minilm_dir: Path, icd9: Rows, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "demo"
    result = run_demo(output, quick=True)
    printed = capsys.readouterr().out
    assert (result["codes"], result["pairs"], result["positives"], result["unscored"]) == (600, 1798, 600, 0)
    assert 0.55 < result["auc"]["minilm_int8"] < 0.95
    assert 0.55 < result["auc"]["token_set_ratio"] < 0.95
    assert f"{result['auc']['minilm_int8']:.3f}" in printed
    assert str(output / "scores") in printed
    assert icd9[0][1] not in printed  # no record's text on the screen

    scores = pq.read_table(output / "scores")
    assert scores.schema.field("left_id").type == pa.string()
    assert scores.schema.field("score").type == pa.float32()
    assert scores.num_rows == 1798
    assert len(list((output / "pairs").glob("*.parquet"))) == len(list((output / "scores").glob("*.parquet"))) == 4

    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.parquet")}
    again = run_demo(output, quick=True, echo=None)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.parquet")} == before
    assert again["auc"] == result["auc"]
    assert capsys.readouterr().out == ""


def test_an_output_that_is_a_file_is_named(tmp_path: Path, icd9: Rows, minilm_dir: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        run_demo(tmp_path / "file" / "demo", quick=True, echo=None)
