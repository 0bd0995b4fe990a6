"""``score --rescore-...``: both stages in one job give what two jobs give, wherever they are broken off."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from flipkd.cli import main
from flipkd.cli.batch import score as score_command
from flipkd.cli.rescore import rescore as rescore_command
from flipkd.config import EncoderOptions, RunOptions, ScoreConfig
from flipkd.errors import ConfigError, FlipkdError, OutputError
from flipkd.models.folder import FLIPKD_FILE
from flipkd.models.llm_options import LlmOptions
from flipkd.run.cascade import score_and_rescore
from flipkd.run.cascade_cost import dry_run
from flipkd.run.rescore import rescore
from flipkd.run.rescore_config import RescoreConfig
from flipkd.run.score import score
from flipkd.run.status import status
from tests.run.conftest import World
from tests.run.test_kill import contents

MakePairs = Callable[..., Path]


def first(world: World, pairs: Path, output: Path, **settings: Any) -> ScoreConfig:
    """Pairs of ids, vectors ready; a threshold of the score stands for the center of what is uncertain."""
    stores = {"store": world.left_store, "right_store": world.right_store}
    usual: dict[str, Any] = {**stores, "threshold": 0.5, "rows_per_unit": 1}
    return ScoreConfig(pairs=str(pairs), output=str(output), **{**usual, **settings})


def second(world: World, llm: Path, **settings: Any) -> RescoreConfig:
    if "band" not in settings:
        settings.setdefault("budget", "20%")
    tables = {"records": world.left, "right_records": world.right}
    usual = {**tables, "threshold": 0.5, "rows_per_unit": 7}
    return RescoreConfig(LlmOptions(str(llm), device="cpu"), "", "", **{**usual, **settings})


def rows(folder: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob("*.parquet"))])


def inline(world: World, pairs: Path, folder: Path) -> Path:
    """The same pairs with their texts."""
    folder.mkdir()
    for path in sorted(pairs.glob("*.parquet")):
        table = pq.read_table(path)
        for name, texts in zip(("left", "right"), world.texts, strict=True):
            places = table.column(f"{name}_id").to_numpy() - 10**15
            table = table.append_column(f"{name}_text", pa.array([texts[place] for place in places]))
        pq.write_table(table.drop_columns(["left_id", "right_id"]), folder / path.name)
    return folder


@pytest.mark.parametrize(
    ("form", "chosen"),
    [
        ("ids", {"budget": "20%"}),
        ("recorded", {"budget": "20%"}),
        ("texts", {"band": (0.05, 0.25)}),
        ("store", {"budget": "20%"}),
    ],
)
def test_one_job_gives_what_two_give(
    world: World, make_pairs: MakePairs, llm_dir: Path, tmp_path: Path, form: str, chosen: dict[str, Any]
) -> None:
    pairs = make_pairs(files=2)
    one, two = first(world, pairs, tmp_path / "out"), second(world, llm_dir, **chosen)
    encoder = EncoderOptions(world.encoder)
    tables: dict[str, Any] = {"records": world.left, "right_records": world.right}
    template = None
    if form == "recorded":  # by export, in the encoder's folder; the second stage reads the same texts
        template = "Record: {text}"
        shutil.copytree(world.encoder, tmp_path / "encoder")
        (tmp_path / "encoder" / FLIPKD_FILE).write_text(json.dumps({"template": template}))
        encoder = EncoderOptions(str(tmp_path / "encoder"))
    if form in ("ids", "recorded"):  # the record tables of the first stage are those of the second
        one = replace(one, encoder=encoder, store=None, right_store=None, **tables)
        two = replace(two, records=None, right_records=None)
    elif form == "texts":
        texts, tables = inline(world, pairs, tmp_path / "texts"), {"records": None, "right_records": None}
        one = replace(one, pairs=str(texts), encoder=encoder, store=None, right_store=None)
        two = replace(two, **tables)
    manifest = score_and_rescore(one, two)

    score(replace(one, output=str(tmp_path / "scores")))
    rescore(replace(two, scores=str(tmp_path / "scores"), output=str(tmp_path / "two"), template=template, **tables))
    found, wanted = rows(tmp_path / "out"), rows(tmp_path / "two")
    assert found.equals(wanted)
    asked = 60 - found.column("llm_probability").null_count
    assert asked == 12 if "budget" in chosen else 5 < asked < 55
    assert manifest["counts"]["rescored"] == asked
    encoded = ["encode_left", "encode_right"]
    before = {"ids": encoded, "recorded": encoded, "texts": ["texts", "encode"], "store": []}[form]
    assert list(manifest["stages"]) == [*before, "score"]
    assert manifest["stages"]["score"]["rows_in"] == manifest["rows_in"] == 60
    assert manifest["complete"]
    # The scores are gone, and so is every vector.
    assert {path.name for path in (tmp_path / "out" / ".flipkd").iterdir()} == {"cascade.json", "lock", "plan.json"}

    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")}
    assert score_and_rescore(one, two) == manifest
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")} == times
    assert status(str(tmp_path / "out"))["state"] == "finished"


def test_scores_can_be_kept_and_another_llm_asked_without_scoring_again(
    world: World, make_pairs: MakePairs, llm_dir: Path, tmp_path: Path
) -> None:
    one, scores = first(world, make_pairs(files=1), tmp_path / "out"), str(tmp_path / "scores")
    score_and_rescore(one, second(world, llm_dir), scores)
    kept = contents(tmp_path / "scores")
    assert kept
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "scores").glob("*.parquet")}
    more = second(world, llm_dir, budget="50%")
    manifest = score_and_rescore(replace(one, output=str(tmp_path / "more")), more, scores)
    assert contents(tmp_path / "scores") == kept
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "scores").glob("*.parquet")} == times
    assert manifest["counts"]["rescored"] == 15
    with pytest.raises(ConfigError, match=r"--output .* and --rescore-scores"):
        score_and_rescore(one, second(world, llm_dir), str(tmp_path / "out" / "scores"))


@pytest.mark.parametrize(
    ("settings", "stage", "message"),
    [
        ({}, {"combine": "gone.json"}, "--combine gone.json"),
        ({}, {"fit_labels": "gone"}, "part-000.parquet of the scores to come has no column 'gone'"),
        ({"columns": ("n", "score")}, {}, "has no column 'left_id'.*--columns"),
        ({"threshold": None}, {}, "--budget.*no column probability and no threshold"),
        ({}, {"threshold": None}, "match was decided by the score"),
        ({}, {"records": "gone.parquet"}, "gone.parquet does not exist"),
        ({"columns": ("left_id", "right_id", "reason")}, {}, "no column 'score'"),
        ({"pairs": "OUT/pairs"}, {}, "lie in one another"),
    ],
)
def test_what_the_second_stage_refuses_is_refused_before_the_first(
    world: World,
    make_pairs: MakePairs,
    llm_dir: Path,
    tmp_path: Path,
    settings: dict[str, Any],
    stage: dict[str, Any],
    message: str,
) -> None:
    output, settings = tmp_path / "out", dict(settings)
    if "pairs" in settings:
        output.mkdir()
        settings["pairs"] = str(make_pairs(files=1).rename(output / "pairs"))
    one = replace(first(world, output if settings.get("pairs") else make_pairs(files=1), output), **settings)
    with pytest.raises(FlipkdError, match=message):
        score_and_rescore(one, second(world, llm_dir, **stage))
    assert not (output / ".flipkd").exists()


def test_a_store_needs_the_records_of_the_llm(
    world: World, make_pairs: MakePairs, llm_dir: Path, tmp_path: Path
) -> None:
    one = ScoreConfig(str(make_pairs(files=1)), str(tmp_path / "out"), store=world.left_store, threshold=0.5)
    with pytest.raises(ConfigError, match=r"no column 'left_text'.*--rescore-records"):
        score_and_rescore(one, second(world, llm_dir, records=None, right_records=None))


def test_another_runs_folder_is_refused_before_anything_is_scored(
    world: World, make_pairs: MakePairs, llm_dir: Path, tmp_path: Path
) -> None:
    one = first(world, make_pairs(files=1), tmp_path / "out")
    score_and_rescore(one, second(world, llm_dir))
    before = contents(tmp_path / "out")
    for changed in (second(world, llm_dir, budget="21%"), second(world, llm_dir, rows_per_unit=6)):
        with pytest.raises(OutputError, match="another run"):
            score_and_rescore(one, changed)
    with pytest.raises(OutputError, match="another run"):
        score(one)
    assert contents(tmp_path / "out") == before
    assert not (tmp_path / "out" / ".flipkd" / "scores").exists()
    again = second(world, llm_dir, budget="21%", run=RunOptions(overwrite=True))
    assert score_and_rescore(one, again)["complete"]
    assert contents(tmp_path / "out").keys().isdisjoint(before)


def command(world: World, pairs: Path, llm: Path, output: Path) -> list[str]:
    return ["score", "--pairs", str(pairs), "--output", str(output), "--store", world.left_store,
            "--right-store", world.right_store, "--threshold", "0.5", "--rows-per-unit", "1",
            "--rescore-llm", str(llm), "--rescore-budget", "50%", "--rescore-threshold", "0.5",
            "--rescore-records", world.left, "--rescore-right-records", world.right,
            "--rescore-rows-per-unit", "7", "--rescore-device", "cpu", "--no-progress"]  # fmt: skip


@pytest.mark.parametrize("stage", ["score", "rescore"])
def test_a_job_that_is_killed_in_either_stage_goes_on(
    world: World, make_pairs: MakePairs, llm_dir: Path, tmp_path: Path, stage: str
) -> None:
    pairs = make_pairs(files=3)
    arguments = command(world, pairs, llm_dir, tmp_path / "undisturbed")
    done = CliRunner().invoke(main, [*arguments, "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    expected, whole = contents(tmp_path / "undisturbed"), json.loads(done.stdout)

    output = tmp_path / "out"
    faults = {"score": ["tests.run.faults", "0", "kill:part-002"], "rescore": ["tests.run.llm_faults", "part-002"]}[
        stage
    ]
    died = subprocess.run(
        [sys.executable, "-m", *faults, *command(world, pairs, llm_dir, output), "--workers", "1"],
        check=False,
        timeout=120,
    )
    assert died.returncode == -9
    scores = output / ".flipkd" / "scores"
    half = {path: path.stat().st_mtime_ns for path in [*scores.glob("*.parquet"), *output.glob("*.parquet")]}
    made = contents(output)
    assert all(expected[name] == digest for name, digest in made.items())
    state = status(str(output))
    if stage == "score":
        assert (len(half), len(made)) == (6, 0)
        assert (state["state"], state["stage"], state["units_done"]) == ("unfinished", "score", 6)
    else:
        assert 0 < len(made) < len(expected)
        assert (state["state"], state["kind"], state["units_done"]) == ("unfinished", "rescore", len(made))
    done = CliRunner().invoke(
        main, [*command(world, pairs, llm_dir, output), "--rescore-scores", str(scores), "--json"]
    )
    assert done.exit_code == 2  # hidden scores cannot be asked for by name
    done = CliRunner().invoke(main, [*command(world, pairs, llm_dir, output), "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    assert contents(output) == expected
    for path, moment in half.items():  # what was there was not made again
        assert not path.exists() or path.stat().st_mtime_ns == moment
    manifest = json.loads(done.stdout)
    assert manifest["units_resumed"] == len(made)
    for name in ("rows_in", "rows_out", "units", "reasons", "counts"):
        assert manifest[name] == whole[name]
    if stage == "rescore":  # told by the run that scored
        assert manifest["stages"]["score"]["seconds"].keys() == whole["stages"]["score"]["seconds"].keys() != set()
    assert not scores.exists()


def test_a_bad_file_ends_as_partial_and_is_taken_up_once_it_is_mended(
    world: World, make_pairs: MakePairs, llm_dir: Path, tmp_path: Path
) -> None:
    pairs = make_pairs(files=2)
    good = (pairs / "part-001.parquet").read_bytes()
    (pairs / "part-001.parquet").write_bytes(good[:-100])
    arguments = command(world, pairs, llm_dir, tmp_path / "out")
    arguments[arguments.index("--rescore-budget") : arguments.index("--rescore-budget") + 2] = [
        "--rescore-band", "0:0.5",
    ]  # fmt: skip
    refused = CliRunner().invoke(main, arguments)
    assert (refused.exit_code, "part-001.parquet" in refused.output) == (1, True)
    done = CliRunner().invoke(main, [*arguments, "--on-bad-shard", "skip", "--json"])
    assert done.exit_code == 3, done.output
    assert "1 files or units were skipped" in done.stderr
    manifest = json.loads(done.stdout)
    assert [each["name"] for each in manifest["stages"]["score"]["skipped_shards"]] == ["part-001.parquet"]
    assert rows(tmp_path / "out").num_rows == 30
    (pairs / "part-001.parquet").write_bytes(good)
    before = contents(tmp_path / "out")
    done = CliRunner().invoke(main, [*arguments, "--on-bad-shard", "skip", "--json"])
    assert done.exit_code == 1, done.output  # another input is another run
    done = CliRunner().invoke(main, [*arguments, "--overwrite", "--json"])
    assert done.exit_code == 0, done.output
    assert rows(tmp_path / "out").num_rows == 60
    assert before.items() <= contents(tmp_path / "out").items()


@pytest.mark.parametrize("form", ["ids", "texts"])
def test_a_dry_run_tells_the_cost_of_every_stage(
    world: World, make_pairs: MakePairs, llm_dir: Path, tmp_path: Path, form: str
) -> None:
    pairs = make_pairs(files=20, rows=100)
    if form == "ids":
        arguments = command(world, pairs, llm_dir, tmp_path / "out")
        stores = arguments.index("--store")
        arguments[stores : stores + 4] = [
            "--encoder", world.encoder, "--records", world.left, "--right-records", world.right, "--dry-run", "--json",
        ]  # fmt: skip
        done = CliRunner().invoke(main, arguments, catch_exceptions=False)
        assert done.exit_code == 0
        found = json.loads(done.stdout)
    else:
        texts = inline(world, pairs, tmp_path / "texts")
        one = ScoreConfig(str(texts), str(tmp_path / "out"), encoder=EncoderOptions(world.encoder))
        none = {"records": None, "right_records": None}
        found = dry_run(one, second(world, llm_dir, band=(0.0, 2.0), threshold=None, **none))
    stages = {stage["kind"]: stage for stage in found["stages"]}
    names = {"ids": ["encode_left", "encode_right"], "texts": ["texts", "encode"]}[form]
    assert list(stages) == [*names, "score", "rescore"]
    assert found["pairs"] == 2000
    assert 100 < found["sample_pairs"] <= 256  # some units have one row
    assert sum(stage["distinct_texts"] for stage in stages.values() if "distinct_texts" in stage) == (
        pytest.approx(120, abs=6)
    )
    asked = stages["rescore"]
    assert asked["pairs"] == 1000 if form == "ids" else 1500 < asked["pairs"] <= 2000  # few cosines are negative
    assert 20 < asked["tokens"] / asked["pairs"] < 80
    for stage in stages.values():
        (rate,) = (value for name, value in stage.items() if name.endswith("_per_second"))
        count = stage.get("distinct_texts", stage.get("pairs"))
        assert stage["seconds"] == pytest.approx(count / rate + stage.get("load_seconds", 0.0), rel=0.05, abs=0.2)
    assert found["seconds"] == pytest.approx(sum(stage["seconds"] for stage in stages.values()), abs=0.1)
    assert stages["score"]["pairs_per_second"] > 5 * asked["pairs_per_second"]
    assert not (tmp_path / "out").exists()


def test_every_option_of_the_stage_is_that_of_rescore(world: World, llm_dir: Path) -> None:
    """One list of options; what neither command shares is the job's own, or that of the scores."""
    own = {parameter.name: parameter for parameter in rescore_command.params}
    derived = {
        parameter.name.removeprefix("rescore_"): parameter
        for parameter in score_command.params
        if parameter.name is not None and parameter.name.startswith("rescore_") and parameter.name != "rescore_scores"
    }
    shared = {parameter.name for parameter in score_command.params}
    assert own.keys() - derived.keys() - shared == {"scores"}
    for name, parameter in derived.items():
        assert name is not None
        for key in ("type", "default", "is_flag", "help", "callback"):
            assert getattr(parameter, key) == getattr(own[name], key)
    arguments = ["score", "--pairs", "x", "--output", "y", "--encoder", world.encoder]
    for wrong in (["--rescore-band", "0.2:0.4"], ["--no-rescore-share-prefixes"], ["--rescore-scores", "z"]):
        done = CliRunner().invoke(main, [*arguments, *wrong])
        assert (done.exit_code, "needs --rescore-llm" in done.output) == (2, True)
    done = CliRunner().invoke(main, [*arguments, "--rescore-llm", str(llm_dir)])
    assert (done.exit_code, "either --band" in done.output) == (2, True)


def test_a_configuration_file_sets_the_stage(
    world: World, make_pairs: MakePairs, llm_dir: Path, tmp_path: Path
) -> None:
    arguments = command(world, make_pairs(files=1), llm_dir, tmp_path / "out")
    place = arguments.index("--rescore-llm")
    (tmp_path / "job.yaml").write_text(
        f"rescore-llm: {llm_dir}\nrescore-band: 0:2\nrescore-threshold: 0.5\nrescore-device: cpu\n"
        f"rescore-records: {world.left}\nrescore-right-records: {world.right}\n"
    )
    done = CliRunner().invoke(main, [*arguments[:place], "--config", str(tmp_path / "job.yaml"), "--json"])
    assert done.exit_code == 0, done.output
    scores = rows(tmp_path / "out").column("score").to_numpy()
    assert json.loads(done.stdout)["counts"]["rescored"] == int(np.count_nonzero(scores >= 0)) > 0


@pytest.mark.slow
def test_on_ray_both_stages_have_workers_of_their_own(
    world: World, make_pairs: MakePairs, llm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flipkd.run import cluster

    pairs, sizes = make_pairs(files=2), []
    run_cluster = cluster.run_cluster

    def watched(make_worker: Any, units: Any, output: Any, run: RunOptions, **rest: Any) -> Any:
        sizes.append((rest["may_use_gpu"], run.workers, run.threads, run.gpus))
        return run_cluster(make_worker, units, output, run, **rest)

    monkeypatch.setattr(cluster, "run_cluster", watched)
    arguments = command(world, pairs, llm_dir, tmp_path / "ray")
    ray = ["--ray", "local", "--workers", "2", "--threads", "1", "--rescore-workers", "1", "--rescore-threads", "2",
           "--rescore-gpus", "0", "--json"]  # fmt: skip
    done = CliRunner().invoke(main, [*arguments, *ray], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert sizes == [(False, 2, 1, None), (False, 1, 2, 0.0)]  # the LLM is on the CPU
    local = CliRunner().invoke(main, command(world, pairs, llm_dir, tmp_path / "process"), catch_exceptions=False)
    assert local.exit_code == 0
    assert contents(tmp_path / "ray") == contents(tmp_path / "process")


def test_a_store_in_the_place_of_the_output_is_refused(
    world: World, make_pairs: MakePairs, llm_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(world.left_store, tmp_path / "out")
    over = RunOptions(overwrite=True)
    one = replace(first(world, make_pairs(), tmp_path / "out"), run=over)
    with pytest.raises(OutputError, match="out holds a vector store, not scores; choose another folder"):
        score_and_rescore(one, replace(second(world, llm_dir), run=over))
    assert (tmp_path / "out/store.json").exists()
