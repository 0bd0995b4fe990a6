"""``evaluate`` as a user meets it: labels beside the scores, the report, what is refused, and what never gets out."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from sklearn.metrics import average_precision_score, roc_auc_score

from flipkd.cli import main
from flipkd.data.calibration import read_calibration
from flipkd.data.find import find_shards
from flipkd.data.folders import is_whole
from flipkd.data.location import open_location
from flipkd.data.shards import ShardReader
from flipkd.errors import ConfigError, InputError, OutputError
from flipkd.report.config import EvaluateConfig
from flipkd.report.evaluate import evaluate
from flipkd.report.scan import count_rows
from tests.report.conftest import MakeScores, score_table


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["evaluate", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def evaluated(scores: Path, output: Path, **options: Any) -> dict[str, Any]:
    return evaluate(EvaluateConfig(scores=str(scores), output=str(output), **{"bootstrap": 30, **options}))


class _Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br", "use", "path"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("use", "path"):
            assert self.open.pop() == tag


def test_the_command_writes_a_report(make_scores: MakeScores, tmp_path: Path) -> None:
    scores, output = make_scores(), tmp_path / "report"
    options = ["--scores", str(scores), "--output", str(output), "--bootstrap", "50", "--slice", "country"]
    code, out, err = run(*options, "--precision", "0.8", "--cost-ratio", "5")
    assert code == 0, err
    assert out.startswith("evaluate: 588 labelled pairs, ")
    assert "score for precision 0.8 (cautious): " in out
    assert "probability of least cost at 5 to 1: " in out
    assert sorted(path.name for path in output.iterdir()) == [
        "_files.json", "calibration.json", "metrics.json", "report.html"
    ]  # fmt: skip
    assert is_whole(output)
    assert output.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in output.iterdir()} == {0o600}
    facts = json.loads((output / "metrics.json").read_text())
    scored = pq.read_table(scores).to_pandas().dropna(subset=["score"])
    assert facts["metrics"]["roc_auc"]["value"] == pytest.approx(roc_auc_score(scored.label, scored.score))
    expected = average_precision_score(scored.label, scored.score)
    assert facts["metrics"]["average_precision"]["value"] == pytest.approx(expected)
    for row in facts["thresholds"]["score"]["table"]:
        taken = scored[scored.score >= row["threshold"]]
        assert row["precision"] == pytest.approx(taken.label.mean())
        assert row["recall"] == pytest.approx(taken.label.sum() / scored.label.sum())
        assert row["recall"] >= row["for_recall"] - 1e-9
        assert abs(row["pairs_in_run"] - len(taken)) <= 2
    assert facts["metrics"]["best_f1"]["threshold"] == facts["thresholds"]["score"]["best_f1"]["threshold"]
    wanted = facts["thresholds"]["score"]["precision"]
    assert wanted["estimate"]["precision"] >= 0.8
    assert wanted["cautious"]["precision_lower_bound"] >= 0.8
    assert wanted["cautious"]["recall"] <= wanted["estimate"]["recall"]
    assert read_calibration(str(output / "calibration.json")).encoder_fingerprint is None
    code, out, _ = run(*options, "--precision", "0.8", "--cost-ratio", "5", "--json")
    assert code == 0
    assert json.loads(out) == facts


def test_a_calibration_of_probabilities_is_none_of_scores(make_scores: MakeScores, tmp_path: Path) -> None:
    table = score_table()
    halves = pc.multiply(pc.add(table.column("score"), 1), 0.5)
    scores = make_scores(table.append_column("probability", halves))
    for column in ("score", "probability"):
        evaluated(scores, tmp_path / column, score_column=column)
    read_calibration(str(tmp_path / "score/calibration.json"))
    with pytest.raises(ConfigError, match="was fitted to another column than score"):
        read_calibration(str(tmp_path / "probability/calibration.json"))


def test_the_report_is_one_well_formed_file_without_scripts(make_scores: MakeScores, tmp_path: Path) -> None:
    evaluated(make_scores(), tmp_path / "report", slices=("country",), precision=0.9)
    text = (tmp_path / "report/report.html").read_text()
    page = _Page(text)
    assert page.open == []
    assert page.tags.count("svg") == 3
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    loaded = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert all(value is not None and value.startswith("#") for value in loaded)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {value for value in loaded if value is not None} <= {f"#{name}" for name in ids}
    assert not re.search(r"#0[1-4]0[1-4]0[1-4]", text)  # every stand-in colour is replaced
    assert len(text) < 200_000


def test_names_and_values_of_columns_are_escaped(make_scores: MakeScores, tmp_path: Path) -> None:
    table = score_table()
    evil = "<script>alert('1')</script>"
    table = table.rename_columns([evil if name == "country" else name for name in table.schema.names])
    values = np.where(np.arange(600) % 2 == 0, '"><img src=x onerror=alert(1)>', "a&b $x_1$")
    table = table.set_column(table.schema.get_field_index(evil), evil, pa.array(values))
    evaluated(make_scores(table), tmp_path / "report", slices=(evil,))
    text = (tmp_path / "report/report.html").read_text()
    assert html.escape(evil) in text
    assert html.escape('"><img src=x onerror=alert(1)>') in text
    assert "a&amp;b $x_1$" in text
    assert not {"script", "img"} & set(_Page(text).tags)


def test_no_word_of_a_record_gets_out(make_scores: MakeScores, tmp_path: Path) -> None:
    table = score_table()
    canary = [f"canary{row}" for row in range(600)]
    table = table.set_column(0, "left_id", pa.array(canary))
    table = table.append_column("left_text", pa.array([f"canary text {row}" for row in range(600)]))
    table = table.set_column(table.schema.get_field_index("reason"), "reason", pa.array(canary))
    rare = ["DE" if row % 3 else f"canary{row}" for row in range(600)]
    table = table.append_column("rare", pa.array(rare))
    scores = make_scores(table)
    code, out, err = run(
        "--scores", str(scores), "--output", str(tmp_path / "r"), "--bootstrap", "20", "--slice", "rare",
        "--log-level", "debug",
    )  # fmt: skip
    assert code == 0
    written = "".join(path.read_text() for path in (tmp_path / "r").iterdir())
    assert "canary" not in written + out + err
    assert "196 rare values" in written  # of the rows with a score
    evaluated(scores, tmp_path / "shown", show_examples=3)
    shown = (tmp_path / "shown/report.html").read_text()
    assert len(set(re.findall(r"canary text \d+", shown))) == 6
    assert "canary" not in (tmp_path / "shown/metrics.json").read_text()
    labels = pa.table({"left_id": [*canary[:50], "canary!"], "label": [row % 2 for row in range(50)] + [7]})
    pq.write_table(labels, tmp_path / "labels.parquet")
    with pytest.raises(InputError) as raised:
        evaluated(scores, tmp_path / "none", labels=str(tmp_path / "labels.parquet"), key=("left_id",))
    assert "canary" not in str(raised.value)


def test_examples_are_the_worst_errors(make_scores: MakeScores, tmp_path: Path) -> None:
    table = score_table()
    scores = make_scores(table)
    evaluated(scores, tmp_path / "r", show_examples=2)
    found = table.to_pandas().dropna(subset=["score"]).sort_values("score")
    text = (tmp_path / "r/report.html").read_text()
    text = text[text.index("Worst false matches") :]
    worst = [*found[found.label == 0].left_id.tail(2), *found[found.label == 1].left_id.head(2)]
    assert all(f'<td class="text">{left}</td>' in text for left in worst)
    assert text.count("<tr>") == 2 + 4


def test_slices_with_null_rare_values_and_one_class(make_scores: MakeScores, tmp_path: Path) -> None:
    table = score_table()
    label = np.asarray(table.column("label"))
    kind = np.where(label & (np.arange(600) % 2), "only", np.where(np.arange(600) < 7, "few", "many"))
    values = pa.array(kind, mask=np.arange(600) % 10 == 3)
    table = table.append_column("kind", values).append_column("number", pa.array(np.arange(600) % 2))
    found = evaluated(make_scores(table), tmp_path / "r", slices=("kind", "number"))["slices"]
    rows = {row["value"] if "values" not in row else "rare": row for row in found["kind"]}
    assert set(rows) == {"many", "only", None, "rare"}
    assert rows["only"]["note"] == "only matches"
    assert rows["only"]["metrics"] is None
    assert rows["rare"]["values"] == 1
    assert sum(row["pairs"] for row in found["kind"]) == 588
    scored = table.to_pandas().dropna(subset=["score"])
    many = scored[scored.kind == "many"]
    assert rows["many"]["metrics"]["roc_auc"]["value"] == pytest.approx(roc_auc_score(many.label, many.score))
    assert [row["value"] for row in found["number"]] == ["0", "1"]
    text = (tmp_path / "r/report.html").read_text()
    assert "only matches" in text
    assert "(null)" in text
    with pytest.raises(ConfigError, match="is a column of ids"):
        evaluated(make_scores(name="other"), tmp_path / "x", slices=("left_id",))
    with pytest.raises(ConfigError, match=r"no column 'nothing'.*--slice name columns"):
        evaluated(tmp_path / "other", tmp_path / "x", slices=("nothing",))


@pytest.mark.parametrize("kind", [0, 1])
def test_labels_of_one_class_give_a_report_that_says_so(make_scores: MakeScores, tmp_path: Path, kind: int) -> None:
    table = score_table()
    table = table.set_column(table.schema.get_field_index("label"), "label", pa.array(np.full(600, kind)))
    found = evaluated(make_scores(table), tmp_path / "r", slices=("country",))
    assert found["metrics"] is found["calibration"] is None
    assert "nothing can be told apart" in found["warnings"][0]
    assert not (tmp_path / "r/calibration.json").exists()
    assert "nothing can be told apart" in (tmp_path / "r/report.html").read_text()


def test_rows_without_a_score_are_counted_and_bound_the_recall(make_scores: MakeScores, tmp_path: Path) -> None:
    table = score_table()
    score = np.asarray(table.column("score").fill_null(0.0)).copy()
    score[[0, 1]] = [np.nan, np.inf]
    broken = pa.array(score, mask=np.arange(600) % 50 == 49)
    label = np.asarray(table.column("label")).copy()
    label[49], label[99], label[0] = 1, 0, 1
    for name, values in (("score", broken), ("label", pa.array(label))):
        table = table.set_column(table.schema.get_field_index(name), name, values)
    found = evaluated(make_scores(table), tmp_path / "r")
    assert found["rows"] == {"rows": 600, "scored": 586, "unscored": {"missing_record": 12, "not_finite": 2}}
    unscored = found["labels"]["unscored"]
    assert unscored["missing_record"][0] == 12
    missed = sum(matches for _, matches in unscored.values())
    assert found["recall_ceiling"] == pytest.approx(1 - missed / label.sum())
    assert found["labelled"]["matches"] == label.sum() - missed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_column": "truth"}, "no label column 'truth'.*--sample"),
        ({"score_column": "points"}, "no column 'points'"),
        ({"score_column": "country"}, "is no score"),
        ({"label_column": "country"}, "neither 0 nor 1 in row 0"),
        ({"precision": 1.5}, "--precision"),
        ({"cost_ratio": 0.0}, "--cost-ratio"),
        ({"sample": 0}, "--sample"),
        ({"key": ()}, "--key"),
        ({"sample": 5, "labels": "x.parquet"}, "without --sample"),
        ({"labels": "nowhere.parquet"}, "does not exist"),
    ],
)
def test_clear_errors(make_scores: MakeScores, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, InputError), match=message):
        evaluated(make_scores(), tmp_path / "r", **options)
    assert not (tmp_path / "r").exists()


def test_no_labels_at_all(make_scores: MakeScores, tmp_path: Path) -> None:
    table = score_table()
    table = table.set_column(table.schema.get_field_index("label"), "label", pa.nulls(600))
    with pytest.raises(InputError, match="every label"):
        evaluated(make_scores(table), tmp_path / "r")
    empty = make_scores(score_table().slice(0, 0).drop_columns(["label"]), files=1, name="empty")
    with pytest.raises(InputError, match="no row with a score"):
        evaluated(empty, tmp_path / "s.parquet", sample=5)


def test_what_is_there_already(make_scores: MakeScores, tmp_path: Path) -> None:
    scores, output = make_scores(), tmp_path / "r"
    facts = evaluated(scores, output)
    before = (output / "report.html").stat().st_mtime_ns
    assert evaluated(scores, output) == facts
    assert (output / "report.html").stat().st_mtime_ns == before
    with pytest.raises(OutputError, match="another report"):
        evaluated(scores, output, precision=0.9)
    evaluated(scores, output, precision=0.9, overwrite=True)
    (output / "report.html").write_text("damaged")
    evaluated(scores, output, precision=0.9)  # the same evaluation mends it
    assert is_whole(output)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("x")
    with pytest.raises(OutputError, match="not a report"):
        evaluated(scores, tmp_path / "mine", overwrite=True)
    with pytest.raises(ConfigError, match="lie in one another"):
        evaluated(scores, scores / "report")
    with pytest.raises(ConfigError, match="local disk"):
        evaluate(EvaluateConfig(scores=str(scores), output="memory://r"))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_damaged_and_odd_shards(make_scores: MakeScores, tmp_path: Path) -> None:
    scores = make_scores()
    shuffled = score_table(rows=40, seed=1).select(["reason", "score", "label", "country", "right_id", "left_id"])
    pq.write_table(shuffled, scores / "z.parquet")
    pq.write_table(shuffled.slice(0, 0), scores / "zz.parquet")
    (scores / "_SUCCESS").write_bytes(b"")
    assert evaluated(scores, tmp_path / "r")["rows"]["rows"] == 640
    whole = (scores / "part-1.parquet").read_bytes()
    (scores / "part-1.parquet").write_bytes(whole[:-100])
    with pytest.raises(InputError, match=r"part-1\.parquet"):
        evaluated(scores, tmp_path / "x")


def test_options_from_a_file(make_scores: MakeScores, tmp_path: Path) -> None:
    config = tmp_path / "evaluate.yaml"
    config.write_text(f"scores: {make_scores()}\nslice: [country, label]\nbootstrap: 20\n")
    config.write_text(config.read_text().replace("slice:", "slices:"))
    code, out, err = run("--config", str(config), "--output", str(tmp_path / "r"), "--json")
    assert code == 0, err
    assert list(json.loads(out)["slices"]) == ["country", "label"]


def test_memory_does_not_grow_with_unlabelled_rows(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from flipkd.cli import main; main(sys.argv[1:], standalone_mode=False);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    peaks = []
    for rows in (500_000, 8_000_000):
        folder = tmp_path / f"scores-{rows}"
        folder.mkdir()
        part = rows // 8
        score = pa.array(np.repeat(np.linspace(0, 1, 100, dtype=np.float32), part // 100))
        label = np.arange(part) % (part // 40)
        table = pa.table({"score": score, "label": pa.array(label % 2, mask=label > 1)})
        for file in range(8):
            pq.write_table(table, folder / f"{file}.parquet")
        arguments = ["evaluate", "--scores", str(folder), "--output", str(tmp_path / f"r{rows}"), "--bootstrap", "5"]
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.splitlines()[-1]))
    assert peaks[1] - peaks[0] < 60, peaks  # 8 M rows held as they come would be 80 MB and more


def test_the_command_line_stays_light() -> None:
    code = "import sys, flipkd, flipkd.cli; print([n for n in ('torch', 'sklearn', 'matplotlib') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_footers_are_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        pq.write_table(pa.table({"score": [0.5] * number}), tmp_path / f"{number}.parquet")
    together, init = threading.Barrier(4, timeout=10), ShardReader.__init__

    def waits(self: ShardReader, *arguments: Any) -> None:
        together.wait()  # breaks where one is read after another
        init(self, *arguments)

    monkeypatch.setattr(ShardReader, "__init__", waits)
    location = open_location(tmp_path)
    assert count_rows(location, find_shards(location)) == 6
