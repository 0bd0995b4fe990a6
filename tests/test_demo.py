from __future__ import annotations

import os
import shlex
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from flipkd.cli import main
from flipkd.demo import demo_tables, run_demo
from flipkd.demo import teacher as teacher_module
from flipkd.demo.evaluation import quality
from flipkd.demo.pair_sets import icd9_pairs, pair_set
from flipkd.demo.steps import Steps
from flipkd.demo.tables import write_tables
from flipkd.errors import OutputError

Rows = list[tuple[str, str, str]]


def parquet_times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}


def run_commands(output: Path, monkeypatch: pytest.MonkeyPatch, without: str = "") -> None:
    """Runs the commands of commands.sh in its folder."""
    monkeypatch.chdir(output)
    lines = [line for line in (output / "commands.sh").read_text().splitlines() if line.startswith("flipkd-batch ")]
    assert lines
    for line in lines:
        words = shlex.split(line)[1:]
        if words[0] == without:
            continue
        found = CliRunner().invoke(main, words, catch_exceptions=False)
        assert found.exit_code == 0, (line, found.output)


def test_tables_hold_each_record_once_and_pairs_by_id() -> None:
    pairs = pair_set(
        [
            ("001", "001", "a long", "a", 1, "0"),
            ("001", "002", "a long", "b", 0, "0"),
            ("002", "002", "b long", "b", 1, "0"),
        ]
    )
    left, right, ids = demo_tables(pairs)
    assert left.to_pydict() == {"id": ["001", "002"], "text": ["a long", "b long"]}
    assert right.to_pydict() == {"id": ["001", "002"], "text": ["a", "b"]}
    assert ids.to_pydict() == {
        "left_id": ["001", "001", "002"],
        "right_id": ["001", "002", "002"],
        "label": [1, 0, 1],
    }


def test_the_threshold_is_chosen_on_validation_pairs_alone() -> None:
    found = quality([0, 0, 1, 1], [0.1, 0.4, 0.6, 0.9], [0, 1, 1, 0], [0.5, 0.6, 0.3, 0.7])
    # At 0.6: one of two positives and one of two negatives match.
    assert found.threshold == pytest.approx(0.6)
    assert found.f1 == pytest.approx(0.5)
    assert found.auc == pytest.approx(0.25)
    assert found.ap == pytest.approx((1 / 2 + 2 / 4) / 2)


def test_steps_are_counted_and_their_rest_is_estimated() -> None:
    lines: list[str] = []
    steps = Steps({"first": 30.0, "second": 300.0}, lines.append)
    assert steps.run("first", lambda: 7) == 7
    steps.run("second", lambda: None)
    # The first took no time: its work was there, which says nothing about the machine.
    assert lines == ["[1/2] first, about 6 min to the end", "[2/2] second, about 5 min to the end"]


def test_quick_demo_scores_every_pair_and_finds_its_work_done_the_second_time(
    tmp_path: Path,
    minilm_dir: Path,
    icd9: Rows,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(teacher_module, "_PACKAGES", ("sentence_transformers", "a_package_that_is_not_there"))
    output = tmp_path / "demo"
    result = run_demo(output, quick=True)
    printed = capsys.readouterr().out
    assert not result["whole"]
    assert len([line for line in printed.splitlines() if "a_package_that_is_not_there" in line]) == 1
    assert "pip install -c constraints.txt -e '.[demo]'" in printed
    counts = result["pairs"]
    assert counts["train"] > counts["test"] > counts["validation"] > 500
    assert 0.3 < result["positives"] / counts["test"] < 0.4

    string, model = result["evaluation"]
    for row in (string, model):
        assert 0.55 < row["auc"] < 0.95
        assert f"{row['auc']:.3f}" in printed
        assert 0.33 < row["f1"] < 0.9
        assert row["seconds"] > 0
    assert string["method"].startswith("rapidfuzz")
    assert str(output) in printed
    assert icd9[0][1].lower() not in printed.lower()  # no record's text on the screen

    scores = pq.read_table(output / "scores")
    assert scores.schema.field("left_id").type == pa.string()
    assert scores.schema.field("score").type == pa.float32()
    assert scores.num_rows == counts["test"]
    assert len(list((output / "pairs").glob("*.parquet"))) == len(list((output / "scores").glob("*.parquet"))) == 4
    assert all(path.stat().st_mode & 0o077 == 0 for path in [output, *output.rglob("*")])

    before = parquet_times(output)
    again = run_demo(output, quick=True, echo=None)
    assert parquet_times(output) == before
    assert [row["auc"] for row in again["evaluation"]] == [string["auc"], model["auc"]]
    assert capsys.readouterr().out == ""
    run_commands(output, monkeypatch)
    assert parquet_times(output) == before


def test_an_output_that_is_a_file_is_named(tmp_path: Path, icd9: Rows, minilm_dir: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        run_demo(tmp_path / "file" / "demo", quick=True, echo=None, whole=False)


def test_other_data_in_the_folder_is_refused_and_kept(tmp_path: Path, icd9: Rows) -> None:
    output = tmp_path / "demo"
    splits = icd9_pairs(descriptions=icd9[:400])
    write_tables(output, splits)
    before = parquet_times(output)
    write_tables(output, splits)
    assert parquet_times(output) == before
    with pytest.raises(OutputError, match="other data"):
        write_tables(output, icd9_pairs(descriptions=icd9[:500]))
    pq.write_table(pa.table({"left_id": [1], "right_id": [2]}), output / "pairs" / "own.parquet")
    with pytest.raises(OutputError, match="pairs holds other data"):
        write_tables(output, splits)
    assert parquet_times(output).items() >= before.items()


@pytest.mark.slow
def test_the_whole_story_quick(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "demo"
    result = run_demo(output, quick=True)
    printed = capsys.readouterr().out
    assert "[7/7]" in printed
    string, untuned, teacher, student = (row["auc"] for row in result["evaluation"])
    # What each step is for: the teacher learns the domain, the student learns from the teacher.
    assert teacher > max(string, untuned) + 0.05
    assert student > max(string, untuned) + 0.03
    for name in ("teacher", "teacher_scores/train", "student_run/adapter", "encoder/flipkd.json", "commands.sh"):
        assert (output / name).exists()
    assert all(path.stat().st_mode & 0o077 == 0 for path in [output, *output.rglob("*")])

    before = parquet_times(output) | {
        path: path.stat().st_mtime_ns for path in [*output.rglob("*.safetensors"), output / "encoder" / "flipkd.json"]
    }
    again = run_demo(output, quick=True, echo=None)
    run_commands(output, monkeypatch, without="export")  # which never replaces an encoder unasked
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [row["auc"] for row in again["evaluation"]] == [string, untuned, teacher, student]


def test_the_encoder_of_the_story_is_named_in_the_commands() -> None:
    from flipkd.config import RunOptions
    from flipkd.demo import commands

    output = Path(os.sep, "somewhere", "my demo")
    run = RunOptions()
    lines = commands.command_lines(
        [
            commands.teach_config(output, "train", run),
            commands.train_config(output, Path("/models/base"), 30, run),
            commands.encode_config(output, output / "encoder", output, "left", run),
            commands.score_config(output, output, run),
            commands.validation_config(output, output / "encoder", output, run),
        ],
        output,
    )
    assert lines == [
        "flipkd-batch teach --teacher teacher --pairs labelled/train --output teacher_scores/train",
        "flipkd-batch train --student /models/base --validation teacher_scores/validation --pairs teacher_scores/train "
        "--output student_run --steps 30 --evaluate-every 10 --checkpoint-every 5 --device cpu",
        "flipkd-batch encode --encoder encoder --records records/left --output stores/left",
        "flipkd-batch score --store stores/left --right-store stores/right --pairs pairs --output scores",
        "flipkd-batch score --encoder encoder --pairs labelled/validation --output validation_scores",
    ]
    assert commands.export_line(output) == "flipkd-batch export --run student_run --output encoder"


def test_quality_needs_no_order() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 500)
    scores = labels + random.normal(0, 0.7, 500)
    order = random.permutation(500)
    assert quality(labels, scores, labels[order], scores[order]) == quality(
        labels[order], scores[order], labels, scores
    )
