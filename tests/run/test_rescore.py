"""The cascade, with a small decoder of random weights: what is asked, what is written, and what happens midway."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from flipkd.cli import main
from flipkd.config import RunOptions
from flipkd.data.find import find_shards
from flipkd.data.location import open_location
from flipkd.errors import ConfigError, InputError, OutputError
from flipkd.models.llm import load_llm
from flipkd.models.llm_options import LlmOptions
from flipkd.run.combination import Combination, fit_combination, read_combination
from flipkd.run.plan_rescore import plan_rescore
from flipkd.run.rescore import rescore
from flipkd.run.rescore_config import RescoreConfig, budget_rows
from flipkd.run.rescore_cost import dry_run
from flipkd.run.select import Nearest, ScoreColumn, select_nearest
from flipkd.run.units import WorkUnit, plan_units
from tests.run.test_kill import contents
from tests.small_models import make_base

ROWS = 40
MakeScores = Callable[..., Path]


@pytest.fixture
def make_scores(tmp_path: Path, icd9: list[tuple[str, str, str]]) -> MakeScores:
    """make_scores(files=2) -> a folder like score's output: ids, texts, label, score, probability, match, reason."""

    def make(files: int = 2, seed: int = 0, drop: tuple[str, ...] = (), threshold: float | None = 0.5) -> Path:
        generator = np.random.default_rng(seed)
        folder = tmp_path / "scores"
        folder.mkdir()
        for file in range(files):
            rows = [icd9[place] for place in generator.integers(0, len(icd9), ROWS)]
            unscored = np.arange(ROWS) == 7
            probability = generator.random(ROWS).astype(np.float32).round(2)  # rounded, so that some are equal
            table = pa.table(
                {
                    "left_id": pa.array(np.arange(ROWS) + file * ROWS, pa.int64()),
                    "left_text": [long for _, long, _ in rows],
                    "right_text": pa.array([short for _, _, short in rows]).dictionary_encode(),
                    "label": pa.array(generator.integers(0, 2, ROWS), pa.int8()),
                    "score": pa.array(probability * 2 - 1, pa.float32(), mask=unscored),
                    "probability": pa.array(probability, pa.float32(), mask=unscored),
                    "match": pa.array(probability >= 0.5, mask=unscored),
                    "reason": pa.array(np.where(unscored, "missing_text", None).tolist(), pa.string()),
                }
            )
            pq.write_table(table.drop_columns(list(drop)), folder / f"part-{file}.parquet", row_group_size=15)
        (folder / "_manifest.json").write_text(json.dumps({"threshold": threshold}))
        return folder

    return make


def config(scores: Path, llm: Path, output: Path, **settings: Any) -> RescoreConfig:
    if "budget" not in settings:
        settings.setdefault("band", (0.3, 0.7))
    settings.setdefault("rows_per_unit", 11)
    return RescoreConfig(LlmOptions(str(llm), device="cpu"), str(scores), str(output), **settings)


def read(folder: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob("*.parquet"))])


def test_the_llm_answers_inside_the_band_and_nothing_else_changes(
    make_scores: MakeScores, llm_dir: Path, tmp_path: Path
) -> None:
    scores, output = make_scores(), tmp_path / "out"
    manifest = rescore(config(scores, llm_dir, output))
    before, after = read(scores), read(output)
    assert after.schema.names == [*before.schema.names, "llm_probability", "rescore_reason"]
    for name in ("left_id", "left_text", "right_text", "label", "score", "reason"):
        assert after.column(name).to_pylist() == before.column(name).to_pylist()
        assert after.schema.field(name).type == before.schema.field(name).type
    probability = before.column("probability").to_pylist()
    asked = [value is not None and np.float32(0.3) <= value <= np.float32(0.7) for value in probability]
    assert 10 < sum(asked) < 2 * ROWS - 10
    llm = load_llm(LlmOptions(str(llm_dir), device="cpu"), threads=1)
    texts = [before.column(name).to_pylist() for name in ("left_text", "right_text")]
    wanted = llm.score_pairs(*texts).probabilities
    assert wanted.std() > 0.05
    for row, is_asked in enumerate(asked):
        found = {name: after.column(name)[row].as_py() for name in after.schema.names}
        if is_asked:
            assert found["llm_probability"] == pytest.approx(wanted[row], abs=1e-5)
            assert found["probability"] == found["llm_probability"]
            assert found["match"] == (found["probability"] >= 0.5)
            assert found["rescore_reason"] is None
        else:
            assert found["llm_probability"] is None
            assert found["probability"] == probability[row]
            assert found["match"] == before.column("match")[row].as_py()
            assert found["rescore_reason"] == ("not_scored" if probability[row] is None else "not_selected")
    assert manifest["complete"]
    assert manifest["counts"]["rescored"] == sum(asked)
    assert manifest["reasons"] == {"not_scored": 2, "not_selected": 2 * ROWS - 2 - sum(asked)}
    assert {path.stat().st_mode & 0o777 for path in output.glob("*.parquet")} == {0o600}


@pytest.mark.parametrize(("budget", "wanted"), [("0%", 0), ("10%", 7), ("13", 13), ("100%", 78), ("1000", 78)])
def test_a_budget_is_met_exactly_by_the_most_uncertain_first_ones(
    make_scores: MakeScores, llm_dir: Path, tmp_path: Path, budget: str, wanted: int
) -> None:
    scores = make_scores(threshold=0.6)
    manifest = rescore(config(scores, llm_dir, tmp_path / "out", budget=budget))
    assert manifest["selection"]["pairs"] == wanted
    assert manifest["selection"]["center"] == 0.6
    probability = read(scores).column("probability").to_numpy()
    distance = np.abs(probability.astype(np.float64) - 0.6).astype(np.float32)
    order = np.argsort(np.where(np.isnan(distance), np.inf, distance), kind="stable")
    asked = read(tmp_path / "out").column("llm_probability").to_numpy()
    assert np.flatnonzero(~np.isnan(asked)).tolist() == sorted(order[:wanted].tolist())


@settings(max_examples=25)
@given(
    values=st.lists(st.one_of(st.none(), st.floats(0, 1, width=32), st.sampled_from([0.25, 0.75])), max_size=40),
    wanted=st.integers(0, 45),
    unit_rows=st.integers(1, 9),
)
def test_selection_is_a_stable_sort(
    tmp_path_factory: pytest.TempPathFactory, values: list[float | None], wanted: int, unit_rows: int
) -> None:
    folder = tmp_path_factory.mktemp("selection")
    pq.write_table(pa.table({"p": pa.array(values, pa.float32())}), folder / "a.parquet", row_group_size=7)
    location = open_location(folder)
    plan = plan_units(location, find_shards(location), unit_rows, "", split_row_groups=True)
    column = ScoreColumn(location, "p", False)
    nearest, pairs, scored = select_nearest(column, plan.units, 0.5, lambda rows: min(rows, wanted), 2)
    chosen = [nearest.chosen(np.concatenate([*column.values(unit), np.empty(0)]), unit.output) for unit in plan.units]
    known = [place for place, value in enumerate(values) if value is not None]
    order = sorted(known, key=lambda place: float(np.float32(abs(float(values[place]) - 0.5))))  # type: ignore[arg-type]
    assert (pairs, scored) == (min(wanted, len(known)), len(known))
    assert np.flatnonzero(np.concatenate(chosen)).tolist() == sorted(order[:wanted])
    assert isinstance(nearest, Nearest)


class FickleColumn(ScoreColumn):
    """Values of units that break off: by the unit's output, at which reading and after how many batches."""

    breaks: dict[str, tuple[int, int]]
    readings: Counter[str]

    def values(self, unit: WorkUnit) -> Iterator[Any]:
        reading, batches = self.breaks.get(unit.output, (99, 0))
        self.readings[unit.output] += 1
        for place, values in enumerate([*super().values(unit), None]):
            if self.readings[unit.output] > reading and place == batches:
                raise InputError("it breaks off")
            if values is not None:
                yield values


@settings(max_examples=40)
@given(
    values=st.lists(st.sampled_from([0.1, 0.25, 0.4999, 0.5, 0.75]), min_size=8, max_size=40),
    wanted=st.integers(1, 30),
    breaks=st.dictionaries(st.integers(0, 4), st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=3),
)
def test_units_that_cannot_be_read_to_their_end_are_left_out_whole(
    tmp_path_factory: pytest.TempPathFactory, values: list[float], wanted: int, breaks: dict[int, tuple[int, int]]
) -> None:
    """The pairs before the break were counted, and a unit that was lost between two passes was an IndexError."""
    folder = tmp_path_factory.mktemp("selection")
    pq.write_table(pa.table({"p": pa.array(values, pa.float32())}), folder / "a.parquet", row_group_size=8)
    location = open_location(folder)
    units = plan_units(location, find_shards(location), 8, "", split_row_groups=True).units
    column = FickleColumn(location, "p", True)
    outputs = {units[number].output: told for number, told in breaks.items() if number < len(units)}
    vars(column).update(breaks=outputs, readings=Counter())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flipkd.run.select._BATCH_ROWS", 4)
        nearest, pairs, scored = select_nearest(column, units, 0.5, lambda rows: min(rows, wanted), 2)
    assert nearest.left_out <= outputs.keys()
    whole = ScoreColumn(location, "p", True)
    found, left = [], []
    for unit in units:
        own = np.concatenate([*whole.values(unit)])
        if unit.output in nearest.left_out:
            with pytest.raises(InputError, match="is left out"):
                nearest.chosen(own, unit.output)
            continue
        found.append(nearest.chosen(own, unit.output))
        left.append(own)
    known = np.concatenate([*left, np.empty(0)])
    assert (pairs, scored) == (min(wanted, len(known)), len(known))
    order = np.argsort(np.abs(known.astype(np.float32) - np.float32(0.5)), kind="stable")
    assert np.flatnonzero(np.concatenate([*found, np.empty(0, bool)])).tolist() == sorted(order[:pairs].tolist())


def test_a_unit_that_was_not_counted_is_taken_up_later(
    make_scores: MakeScores, llm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores, read_values = make_scores(), ScoreColumn.values
    task = config(scores, llm_dir, tmp_path / "out", budget="10%", run=RunOptions(on_bad_shard="skip"))

    def unreadable(self: ScoreColumn, unit: WorkUnit) -> Iterator[Any]:
        if unit.shard.name == "part-1.parquet":
            raise InputError("part-1.parquet is away")
        return read_values(self, unit)

    with monkeypatch.context() as patch:
        patch.setattr(ScoreColumn, "values", unreadable)
        assert dry_run(replace(task, output=str(tmp_path / "dry")))["pairs_to_rescore"] == 3
        manifest = rescore(task)
    assert not manifest["complete"]
    assert manifest["counts"]["rescored"] == manifest["selection"]["pairs"] == 3
    assert {"is left out" in skipped["error"] for skipped in manifest["skipped_units"]} == {True}
    manifest = rescore(task)
    assert manifest["complete"]
    assert manifest["counts"]["rescored"] == 7


def test_budgets_are_exact_and_checked() -> None:
    assert budget_rows("29%", 100) == 29  # in floating point it is 28.999999999999996
    assert budget_rows("0.1%", 12345) == 12
    for wrong in ("", "%", "1.5", "-1", "101%", "-1%", "nan%", "1/0%", "one"):
        with pytest.raises(ConfigError, match="--budget"):
            budget_rows(wrong, 10)


def test_a_combination_is_fitted_written_and_used(make_scores: MakeScores, llm_dir: Path, tmp_path: Path) -> None:
    scores = make_scores(files=3)
    rescore(config(scores, llm_dir, tmp_path / "first", fit_labels="label"))
    combination = read_combination(str(tmp_path / "first" / "_combination.json"))
    manifest = rescore(
        config(scores, llm_dir, tmp_path / "second", combine=str(tmp_path / "first" / "_combination.json"))
    )
    found = read(tmp_path / "second")
    llm, score, probability = (
        found.column(name).to_numpy().astype(np.float64) for name in ("llm_probability", "score", "probability")
    )
    asked = ~np.isnan(llm)
    bounded = np.clip(llm[asked], 1e-6, 1 - 1e-6)
    odds = np.log(bounded / (1 - bounded)) * combination.llm_logit + score[asked] * combination.score
    np.testing.assert_allclose(probability[asked], 1 / (1 + np.exp(-odds - combination.intercept)), atol=1e-6)
    assert found.column("match").to_numpy(zero_copy_only=False)[asked].tolist() == (probability[asked] >= 0.5).tolist()
    assert manifest["complete"]


def test_a_fit_finds_what_made_the_labels() -> None:
    generator = np.random.default_rng(0)
    answers, scores = generator.random(20_000), generator.random(20_000) * 2 - 1
    true = Combination(0.8, 3.0, -0.5)
    labels = (generator.random(20_000) < true.probability(answers, scores)).astype(np.float64)
    found = fit_combination(answers, scores, labels)
    assert (found.llm_logit, found.score, found.intercept) == pytest.approx((0.8, 3.0, -0.5), abs=0.1)
    with pytest.raises(InputError, match="not both labels"):
        fit_combination(answers, scores, np.ones(20_000))


def test_texts_come_from_record_tables(
    make_scores: MakeScores, llm_dir: Path, tmp_path: Path, icd9: list[tuple[str, str, str]]
) -> None:
    """The same answers as for inline texts; a pair whose record or text is missing says so."""
    scores, output = make_scores(), tmp_path / "out"
    inline = read(scores)
    folder = tmp_path / "ids"
    folder.mkdir()
    ids = inline.drop_columns(["left_text", "right_text"]).append_column("right_id", inline.column("left_id"))
    pq.write_table(ids, folder / "part.parquet")
    for name in ("left", "right"):
        texts = inline.column(f"{name}_text").to_pylist()
        kept = [row for row in range(2 * ROWS) if row != 3 or name == "left"]
        table = {"id": list(kept), "text": [None if row == 5 else texts[row] for row in kept]}
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
    tables = {"records": str(tmp_path / "left.parquet"), "right_records": str(tmp_path / "right.parquet")}
    rescore(config(folder, llm_dir, output, band=(0.0, 1.0), threshold=0.5, **tables))
    rescore(config(scores, llm_dir, tmp_path / "inline", band=(0.0, 1.0)))
    found, wanted = read(output), read(tmp_path / "inline")
    assert found.schema.names == [*ids.schema.names, "llm_probability", "rescore_reason"]
    reasons = found.column("rescore_reason").to_pylist()
    assert [(row, reason) for row, reason in enumerate(reasons) if reason] == [
        (3, "missing_record"),
        (5, "missing_text"),
        (7, "not_scored"),
        (ROWS + 7, "not_scored"),
    ]
    for row in range(2 * ROWS):
        if reasons[row] is None:
            assert found.column("llm_probability")[row].as_py() == pytest.approx(
                wanted.column("llm_probability")[row].as_py(), abs=1e-5
            )
    assert found.column("probability")[3].as_py() == ids.column("probability")[3].as_py()


def test_a_plan_opens_each_file_once(
    make_scores: MakeScores, llm_dir: Path, tmp_path: Path, opened: Counter[str]
) -> None:
    planned = plan_rescore(config(make_scores(files=3), llm_dir, tmp_path / "out", band=(0.2, 0.8)))
    assert planned.threshold == 0.5
    assert list(opened.values()) == [1, 1, 1]


def test_an_empty_text_is_a_reason(make_scores: MakeScores, llm_dir: Path, tmp_path: Path) -> None:
    scores = make_scores(files=1)
    table = read(scores)
    texts = [" " if row == 2 else text for row, text in enumerate(table.column("left_text").to_pylist())]
    table = table.set_column(1, "left_text", pa.array(texts))
    pq.write_table(table, scores / "part-0.parquet")
    rescore(config(scores, llm_dir, tmp_path / "out", band=(0.0, 1.0)))
    found = read(tmp_path / "out").slice(2, 1).to_pylist()[0]
    assert (found["llm_probability"], found["rescore_reason"]) == (None, "missing_text")
    assert found["probability"] == table.column("probability")[2].as_py()


def test_scores_without_a_probability(make_scores: MakeScores, llm_dir: Path, tmp_path: Path) -> None:
    scores = make_scores(drop=("probability",))
    with pytest.raises(ConfigError, match=r"match was decided by the score.*--threshold"):
        rescore(config(scores, llm_dir, tmp_path / "out", band=(-0.2, 0.2)))
    rescore(config(scores, llm_dir, tmp_path / "out", band=(-0.2, 0.2), threshold=0.5))
    found = read(tmp_path / "out")
    assert found.column("probability").to_pylist() == found.column("llm_probability").to_pylist()
    assert 0 < found.column("probability").null_count < 2 * ROWS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"left_text": "gone"}, "no column 'gone'.*--records"),
        ({"fit_labels": "gone"}, "no column 'gone'"),
        ({"combine": "gone.json"}, "--combine gone.json"),
        ({"band": None}, "either --band"),
        ({"band": (0.7, 0.3)}, "--band 0.7:0.3"),
        ({"band": (0.1, 0.2), "budget": "1%"}, "either --band"),
        ({"left_text": "score"}, "no plain text form"),
    ],
)
def test_what_cannot_be_used_is_refused_before_any_work(
    make_scores: MakeScores, llm_dir: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    scores = make_scores()
    with pytest.raises(ConfigError, match=message):
        rescore(config(scores, llm_dir, tmp_path / "out", **settings))
    assert not (tmp_path / "out").exists()


def test_a_threshold_that_nobody_knows_is_asked_for(make_scores: MakeScores, llm_dir: Path, tmp_path: Path) -> None:
    scores = make_scores(threshold=None)
    with pytest.raises(ConfigError, match="--threshold"):
        rescore(config(scores, llm_dir, tmp_path / "out"))
    rescore(config(scores, llm_dir, tmp_path / "out", threshold=0.5))
    with pytest.raises(ConfigError, match="already"):
        rescore(config(tmp_path / "out", llm_dir, tmp_path / "again", threshold=0.5))


def test_another_runs_output_is_refused(make_scores: MakeScores, llm_dir: Path, tmp_path: Path) -> None:
    scores = make_scores()
    rescore(config(scores, llm_dir, tmp_path / "out"))
    again = rescore(config(scores, llm_dir, tmp_path / "out"))
    assert again["units_resumed"] == again["units"] == 8
    with pytest.raises(OutputError, match="another run"):
        rescore(config(scores, llm_dir, tmp_path / "out", band=(0.3, 0.71)))


def test_a_bad_shard_can_be_skipped(make_scores: MakeScores, llm_dir: Path, tmp_path: Path) -> None:
    scores = make_scores()
    (scores / "part-9.parquet").write_bytes(b"not Parquet")
    with pytest.raises(InputError, match=r"part-9\.parquet"):
        rescore(config(scores, llm_dir, tmp_path / "out", budget="10%"))
    run = RunOptions(on_bad_shard="skip")
    manifest = rescore(config(scores, llm_dir, tmp_path / "out", budget="10%", run=run))
    assert not manifest["complete"]
    assert manifest["counts"]["rescored"] == 7


def test_a_dry_run_tells_pairs_tokens_and_time(make_scores: MakeScores, llm_dir: Path, tmp_path: Path) -> None:
    scores = make_scores()
    found = dry_run(config(scores, llm_dir, tmp_path / "out", budget="10%"))
    assert (found["pairs"], found["pairs_to_rescore"], found["sample_pairs"]) == (2 * ROWS, 7, 7)
    assert 7 * 20 < found["tokens"] < 7 * 200
    assert found["seconds"] > 0
    assert not (tmp_path / "out").exists()


def options(scores: Path, llm: Path, output: Path) -> list[str]:
    return ["rescore", "--scores", str(scores), "--llm", str(llm), "--output", str(output), "--budget", "50%",
            "--rows-per-unit", "5", "--device", "cpu", "--no-progress"]  # fmt: skip


def test_the_command_and_its_errors(make_scores: MakeScores, llm_dir: Path, tmp_path: Path) -> None:
    scores = make_scores()
    arguments = options(scores, llm_dir, tmp_path / "out")
    done = CliRunner().invoke(main, [*arguments, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["counts"]["rescored"] == 39
    assert "llm_probability" in read(tmp_path / "out").schema.names
    state = CliRunner().invoke(main, ["status", str(tmp_path / "out"), "--json"])
    assert json.loads(state.stdout)["state"] == "finished"
    for wrong, message in (
        (["--band", "0.2:0.4"], "either --band"),
        (["--labels", "yes"], "write two words"),
        (["--labels", "yes,no"], "give --prompt-file"),
        (["--engine", "vllm"], "vLLM cannot be imported"),
    ):
        output = str(tmp_path / "other")
        done = CliRunner().invoke(main, [*options(scores, llm_dir, Path(output)), *wrong])
        assert done.exit_code == 2, done.output
        assert message in done.output


def test_a_killed_engine_is_taken_up_again_to_the_same_bytes(
    make_scores: MakeScores, llm_dir: Path, tmp_path: Path
) -> None:
    scores = make_scores(files=4)
    arguments = options(scores, llm_dir, tmp_path / "undisturbed")
    assert CliRunner().invoke(main, arguments, catch_exceptions=False).exit_code == 0
    expected = contents(tmp_path / "undisturbed")
    output = tmp_path / "out"
    faults = [sys.executable, "-m", "tests.run.llm_faults", "part-2"]
    died = subprocess.run([*faults, *options(scores, llm_dir, output)], check=False, timeout=120)
    assert died.returncode == -9
    half = contents(output)
    assert 0 < len(half) < len(expected)
    assert all(expected[name] == digest for name, digest in half.items())
    times = {name: (output / name).stat().st_mtime_ns for name in half}
    time.sleep(0.01)
    assert CliRunner().invoke(main, options(scores, llm_dir, output), catch_exceptions=False).exit_code == 0
    assert contents(output) == expected
    assert {name: (output / name).stat().st_mtime_ns for name in half} == times  # nothing was written twice


@pytest.mark.slow
def test_ray_gives_the_same_files(make_scores: MakeScores, llm_dir: Path, tmp_path: Path) -> None:
    scores = make_scores()
    rescore(config(scores, llm_dir, tmp_path / "process", budget="50%"))
    rescore(config(scores, llm_dir, tmp_path / "ray", budget="50%", run=RunOptions(ray="local", workers=1)))
    assert contents(tmp_path / "ray") == contents(tmp_path / "process")


def test_pairs_without_a_finite_answer_end_the_job_and_are_named_by_row(
    make_scores: MakeScores, llm_dir: Path, minilm_dir: Path, tmp_path: Path
) -> None:
    """What was finished stays; with the pairs mended, the same command goes on."""
    broken = make_base(tmp_path / "broken", minilm_dir, seed=3, initializer_range=0.5)
    model = transformers.AutoModelForCausalLM.from_pretrained(str(broken))
    knee = transformers.AutoTokenizer.from_pretrained(str(broken)).convert_tokens_to_ids("knee")
    model.get_input_embeddings().weight.data[knee] = torch.nan
    model.save_pretrained(str(broken))
    scores = make_scores(files=1)
    table = read(scores)
    texts = ["knee" if row in (15, 20) else "hip" for row in range(ROWS)]
    # A row that has no text, and one that has no score, stand before: the rows that are named are the file's.
    texts[12] = ""
    pq.write_table(table.set_column(1, "left_text", pa.array(texts)), scores / "part-0.parquet", row_group_size=40)
    arguments = options(scores, broken, tmp_path / "out")
    for name, value in (("--budget", "100%"), ("--rows-per-unit", "11")):
        arguments[arguments.index(name) + 1] = value
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1
    assert "for 2 pairs of part-0.parquet" in done.output
    assert "(rows 15, 20, counted from 0)" in done.output
    assert "knee" not in done.output
    assert len(contents(tmp_path / "out")) == 1  # rows 0 to 10
    for path in (tmp_path / "out").glob("*.parquet"):
        assert np.isfinite(pq.read_table(path)["llm_probability"].drop_null().to_numpy()).all()


def test_texts_that_are_too_long_are_cut_answered_and_counted(
    make_scores: MakeScores, llm_dir: Path, tmp_path: Path
) -> None:
    scores = make_scores(files=1)
    table = read(scores)
    texts = ["knee " * 3000 if row in (1, 2) else text for row, text in enumerate(table["left_text"].to_pylist())]
    pq.write_table(table.set_column(1, "left_text", pa.array(texts)), scores / "part-0.parquet")
    manifest = rescore(config(scores, llm_dir, tmp_path / "out", band=(0.0, 1.0)))
    found = read(tmp_path / "out")
    assert manifest["counts"]["truncated"] == 2
    assert found.column("llm_probability").null_count == 1  # that of the pair without a score
    assert found.column("left_text").to_pylist() == texts
