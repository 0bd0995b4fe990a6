"""Labels of another table: joined by ids of any type, with every row accounted for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flipkd.errors import ConfigError, InputError
from flipkd.report.config import EvaluateConfig
from flipkd.report.evaluate import evaluate
from flipkd.report.pairs import slice_values
from tests.report.conftest import MakeScores, score_table


def run(scores: Path, folder: Path, labels: pa.Table, **options: Any) -> dict[str, Any]:
    path = folder / f"labels-{len(list(folder.glob('labels-*')))}.parquet"
    pq.write_table(labels, path)
    options = {"bootstrap": 20, **options}
    return evaluate(EvaluateConfig(scores=str(scores), labels=str(path), output=str(path.with_suffix("")), **options))


def bare_scores(make_scores: MakeScores, **columns: Any) -> Path:
    table = score_table().drop_columns(["label"])
    for name, values in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, values)
    return make_scores(table)


def test_the_join_gives_what_labels_beside_the_scores_give(make_scores: MakeScores, tmp_path: Path) -> None:
    table = score_table()
    inside = evaluate(
        EvaluateConfig(scores=str(make_scores(table, name="inside")), output=str(tmp_path / "r"), bootstrap=20)
    )
    shuffled = table.select(["left_id", "right_id", "label"]).take(np.random.default_rng(0).permutation(600))
    joined = run(bare_scores(make_scores), tmp_path, shuffled)
    for name in ("metrics", "rows", "labelled", "recall_ceiling", "thresholds", "calibration"):
        assert joined[name] == inside[name]
    assert joined["labels"]["unscored"] == inside["labels"]["unscored"]
    assert joined["labels"]["labels"] == {
        "rows": 600, "unlabelled": 0, "null_key": 0, "duplicates": 0, "conflicts": 0, "pairs": 600
    }  # fmt: skip


def test_duplicates_conflicts_and_strangers_are_counted(make_scores: MakeScores, tmp_path: Path) -> None:
    scores = bare_scores(make_scores)
    rows = [(n, 10_000 + n, n % 2) for n in range(40)]
    rows += [(0, 10_000, 0), (0, 10_000, 0)]  # the same again
    rows += [(1, 10_001, 0)]  # contradicts
    rows += [(10_002, 2, 0), (2, 10_003, 1)]  # swapped; not a candidate
    rows += [(None, 10_004, 1), (5, None, 1), (50, 10_050, None)]
    left, right, label = (list(values) for values in zip(*rows, strict=True))
    found = run(scores, tmp_path, pa.table({"left_id": left, "right_id": right, "label": label}))
    assert found["labels"]["labels"] == {
        "rows": 48, "unlabelled": 1, "null_key": 2, "duplicates": 2, "conflicts": 2, "pairs": 41
    }  # fmt: skip
    assert (found["labels"]["unmatched"], found["labels"]["unmatched_matches"]) == (2, 1)
    assert found["labelled"]["pairs"] == 39  # 40, less the one that contradicts itself
    assert any("contradict" in warning for warning in found["warnings"])
    assert "2 labelled pairs (1 matches) are not among the scores" in (tmp_path / "labels-0/report.html").read_text()


def test_a_pair_that_stands_twice_in_the_scores_counts_once(make_scores: MakeScores, tmp_path: Path) -> None:
    table = score_table().drop_columns(["label"])
    scores = make_scores(pa.concat_tables([table, table.slice(0, 30)]), files=2)
    labels = score_table().select(["left_id", "right_id", "label"])
    found = run(scores, tmp_path, labels)
    assert found["labels"]["repeated"] == 30
    assert found["labelled"]["pairs"] == 588


@pytest.mark.parametrize("kind", ["int32", "uint64", "string", "large_string", "dictionary", "binary"])
def test_ids_of_any_type_are_joined_by_value(make_scores: MakeScores, tmp_path: Path, kind: str) -> None:
    numbers = np.arange(600)
    texts = pa.array([f"r{number}" for number in numbers])
    forms = {
        "int32": pa.array(numbers, pa.int32()),
        "uint64": pa.array(numbers, pa.uint64()),
        "string": texts,
        "large_string": texts.cast(pa.large_string()),
        "dictionary": texts.dictionary_encode(),
        "binary": texts.cast(pa.binary()),
    }
    is_text = kind not in ("int32", "uint64")
    scores = bare_scores(make_scores, left_id=texts if is_text else pa.array(numbers, pa.int64()))
    labels = pa.table({"left_id": forms[kind], "label": np.arange(600) % 2})
    found = run(scores, tmp_path, labels, key=("left_id",))
    assert found["labelled"]["pairs"] == 588
    assert found["labels"]["unmatched"] == 0


def test_large_and_negative_integers_never_meet(make_scores: MakeScores, tmp_path: Path) -> None:
    ids = pa.array([2**63 + 7, *range(1, 600)], pa.uint64())
    scores = bare_scores(make_scores, left_id=ids)
    labels = pa.table({"left_id": pa.array([-(2**63) + 7, 1, 2, 3], pa.int64()), "label": [1, 0, 1, 0]})
    found = run(scores, tmp_path, labels, key=("left_id",))
    assert (found["labelled"]["pairs"], found["labels"]["unmatched"]) == (3, 1)


def test_weights_of_a_column(make_scores: MakeScores, tmp_path: Path) -> None:
    labels = score_table().select(["left_id", "right_id", "label"])
    plain = run(bare_scores(make_scores), tmp_path, labels)
    scores = tmp_path / "scores"
    weighted = run(
        scores,
        tmp_path,
        labels.append_column("w", pa.array(np.where(np.arange(600) < 300, 1.0, 0.0))),
        weight_column="w",
    )
    first = run(scores, tmp_path, labels.slice(0, 300))
    assert weighted["metrics"]["roc_auc"]["value"] == pytest.approx(first["metrics"]["roc_auc"]["value"])
    assert weighted["metrics"]["roc_auc"]["value"] != plain["metrics"]["roc_auc"]["value"]
    assert weighted["metrics"]["best_f1"]["value"] == pytest.approx(first["metrics"]["best_f1"]["value"])


def test_weights_that_leave_nothing_to_tell_apart_are_what_is_told(make_scores: MakeScores, tmp_path: Path) -> None:
    """It said that all labelled pairs are matches; weights of 1e300 ended in an error of another library."""
    table = score_table()
    label = np.asarray(table["label"]).astype(np.float64)
    for name, weights, told in (
        ("none", 0 * label, "All weights are 0: "),
        ("matches", label, "All pairs that do not match have the weight 0: "),
        ("others", 1 - label, "All labelled matches have the weight 0: "),
    ):
        scores = make_scores(table.append_column("w", pa.array(weights)), name=name)
        facts = evaluate(EvaluateConfig(str(scores), str(tmp_path / f"{name}-report"), weight_column="w"))
        assert facts["warnings"][0] == f"{told}nothing can be told apart, so there are no metrics."
    scores = make_scores(table.append_column("w", pa.array(np.where(label > 0, 1e300, 1e-300))), name="extreme")
    with pytest.raises(InputError, match="weight column 'w' is neither 0 nor from 1e-30 to"):
        evaluate(EvaluateConfig(str(scores), str(tmp_path / "extreme-report"), weight_column="w"))


def test_what_has_lost_the_strata_of_a_sample_is_warned_of(
    make_scores: MakeScores, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = score_table()
    weight = pa.array(np.linspace(1, 9, table.num_rows))
    labels = table.select(["left_id", "right_id", "label"]).append_column("sample_weight", weight)
    pq.write_table(labels, tmp_path / "labels.parquet")
    config = EvaluateConfig(
        str(make_scores(table.drop_columns(["label"]))), str(tmp_path / "report"), str(tmp_path / "labels.parquet")
    )
    evaluate(config)
    assert "has a column sample_weight, and is not read as a sample: each pair counts as one" in caplog.text
    caplog.clear()
    evaluate(replace(config, output=str(tmp_path / "weighted"), weight_column="sample_weight"))
    assert not caplog.text


def test_bytes_that_are_text_are_one_slice_whatever_stands_beside_them() -> None:
    """In a batch with one value that is none, all values were written as hexadecimal."""
    values = pa.chunked_array([pa.array([b"DE", b"\xff", None, b"DE"])])
    assert slice_values(values).to_pylist() == ["DE", "ff", None, "DE"]
    assert slice_values(values.slice(0, 1)).to_pylist() == ["DE"]


def test_a_bad_weight_is_named_by_its_row_among_all_scores(make_scores: MakeScores, tmp_path: Path) -> None:
    table = score_table(rows=20)
    label = pa.array([None] * 10 + table.column("label").to_pylist()[10:], pa.int8())
    weight = np.ones(20)
    weight[15] = np.nan
    place = table.schema.get_field_index("label")
    scores = make_scores(table.set_column(place, "label", label).append_column("w", pa.array(weight)))
    with pytest.raises(InputError, match="not finite in row 15"):
        evaluate(EvaluateConfig(scores=str(scores), output=str(tmp_path / "report"), weight_column="w"))


BASE = {"left_id": [1, 2], "right_id": [10_001, 10_002], "label": [0, 1]}


@pytest.mark.parametrize(
    ("columns", "options", "error", "message"),
    [
        ({"left_id": [1, 2]}, {}, ConfigError, "no column 'right_id'"),
        (BASE, {"label_column": "truth"}, ConfigError, "no column 'truth'"),
        (BASE, {"key": ("id",)}, ConfigError, "no column 'id'"),
        (BASE, {"key": ("label",)}, ConfigError, "column twice"),
        (BASE, {"weight_column": "w"}, ConfigError, "no column 'w'"),
        ({**BASE, "w": ["1", "2"]}, {"weight_column": "w"}, ConfigError, "weights are numbers"),
        ({**BASE, "w": [1.0, -1.0]}, {"weight_column": "w"}, InputError, "negative or not finite in row 1"),
        ({**BASE, "w": [1.0, None]}, {"weight_column": "w"}, InputError, "null, negative"),
        ({**BASE, "label": [0, 2]}, {}, InputError, "neither 0 nor 1 in row 1"),
        ({**BASE, "label": [[0], [1]]}, {}, ConfigError, "label column 'label' has type list"),
        ({**BASE, "label": [None, None]}, {}, InputError, "every label in column 'label' is null"),
        ({**BASE, "left_id": ["1", "2"]}, {}, ConfigError, "key column 'left_id' has type int64"),
        ({**BASE, "left_id": [1.0, 2.0]}, {}, ConfigError, "cannot be an id"),
        ({**BASE, "left_id": [901, 902]}, {}, InputError, "none of the 2 labelled pairs"),
        ({**BASE, "left_id": [49, 99], "right_id": [10_049, 10_099]}, {}, InputError, "none of the 2 .* has a score"),
    ],
)
def test_what_cannot_be_used_is_a_clear_error(
    make_scores: MakeScores, tmp_path: Path, columns: dict[str, Any], options: dict[str, Any], error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        run(bare_scores(make_scores), tmp_path, pa.table(columns), **options)
    assert not list(tmp_path.glob("labels-0"))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "labels",
    [pa.array([0.0, 1.0]), pa.array([False, True]), pa.array(["0", "1"]), pa.array(["0", "1"]).dictionary_encode()],
)
def test_labels_of_any_type(make_scores: MakeScores, tmp_path: Path, labels: pa.Array) -> None:
    found = run(bare_scores(make_scores), tmp_path, pa.table({**BASE, "label": labels}))
    assert found["labelled"]["matches"] == 1
