"""Two record tables whose ids, or texts, stand in columns of different names."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from flipkd.cli import main
from flipkd.config import EncodeConfig, EncoderOptions, ScoreConfig, TeachConfig
from flipkd.errors import ConfigError
from flipkd.models.encoder import load_encoder
from flipkd.models.folder import FLIPKD_FILE
from flipkd.models.llm_options import LlmOptions
from flipkd.record_sides import RecordSide
from flipkd.run.cascade import score_and_rescore
from flipkd.run.cascade_cost import dry_run
from flipkd.run.encode import encoder_fingerprint
from flipkd.run.plan_score import plan_score
from flipkd.run.plan_teach import plan_teach
from flipkd.run.rescore import rescore
from flipkd.run.rescore_config import RescoreConfig
from flipkd.run.score import score
from flipkd.run.teach import teach
from flipkd.run.units import fingerprint
from tests.run.conftest import World
from tests.run.test_score import read_scores

NAMES = ["Ann", "Bob", "Cy"]
PAYERS = ["A. Nash", "B. Obi", "C. Yu"]
TOWNS = ["Rome", "Oslo", "Bern"]
LEFT = [f"{name}" for name in NAMES]
RIGHT = [f"{payer}, {town}" for payer, town in zip(PAYERS, TOWNS, strict=True)]
PAIRS = [(0, 0), (0, 1), (2, 1), (1, 2)]
SIDES: dict[str, Any] = {
    "id_column": "customer",
    "text_column": "name",
    "right_id_column": "account",
    "right_template": "{payer}, {town}",
}
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in SIDES.items()]


@pytest.fixture
def tables(tmp_path: Path) -> dict[str, str]:
    """Customers with integers as ids, accounts with strings."""
    pq.write_table(pa.table({"customer": [1, 2, 3], "name": NAMES}), tmp_path / "crm.parquet")
    pq.write_table(pa.table({"account": list("xyz"), "payer": PAYERS, "town": TOWNS}), tmp_path / "billing.parquet")
    left, right = zip(*PAIRS, strict=True)
    pairs = pa.table({"left_id": [1 + row for row in left], "right_id": ["xyz"[row] for row in right]})
    pq.write_table(pairs, tmp_path / "pairs.parquet")
    return {"records": str(tmp_path / "crm.parquet"), "right_records": str(tmp_path / "billing.parquet")}


@pytest.fixture
def job(world: World, tables: dict[str, str], tmp_path: Path) -> ScoreConfig:
    return ScoreConfig(
        str(tmp_path / "pairs.parquet"),
        str(tmp_path / "out"),
        encoder=EncoderOptions(world.encoder),
        dtype="float32",
        threshold=0.5,
        **tables,
        **SIDES,
    )


def cosines(encoder: str, left: list[str], right: list[str]) -> np.ndarray:
    vectors = [load_encoder(encoder).encode(side) for side in (left, right)]
    return np.array([vectors[0][one] @ vectors[1][other] for one, other in PAIRS])


def run(command: str, *options: str) -> Result:
    return CliRunner().invoke(main, [command, *options, "--no-progress"])


def flags(tables: dict[str, str]) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in tables.items()] + FLAGS


def test_score_reads_each_table_by_its_own_columns(job: ScoreConfig, world: World) -> None:
    score(job)
    found = read_scores(job.output)
    assert found.column("reason").null_count == len(PAIRS)
    np.testing.assert_allclose(found.column("score").to_numpy(), cosines(world.encoder, LEFT, RIGHT), atol=1e-5)


@pytest.mark.parametrize("form", ["flags", "yaml"])
def test_score_by_flags_and_by_a_file_is_the_same_run(
    job: ScoreConfig, tables: dict[str, str], world: World, tmp_path: Path, form: str
) -> None:
    score(job)
    options = [*flags(tables), "--threshold=0.5"]
    if form == "yaml":
        values = {**tables, **SIDES, "threshold": 0.5}
        (tmp_path / "job.yaml").write_text(json.dumps({key.replace("_", "-"): value for key, value in values.items()}))
        options = [f"--config={tmp_path}/job.yaml"]
    done = run("score", "--encoder", world.encoder, "--pairs", job.pairs, "--output", job.output, "--dtype=float32",
               "--json", *options)  # fmt: skip
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["units_resumed"] == 1


def test_teach_joins_each_side_by_its_own_columns(
    job: ScoreConfig, tables: dict[str, str], world: World, tmp_path: Path
) -> None:
    teach(TeachConfig(EncoderOptions(world.encoder), job.pairs, str(tmp_path / "taught"), **tables, **SIDES))
    found = read_scores(tmp_path / "taught")
    assert found.column("left_text").to_pylist() == [LEFT[one] for one, _ in PAIRS]
    assert found.column("right_text").to_pylist() == [RIGHT[other] for _, other in PAIRS]
    options = ["--teacher", world.encoder, "--pairs", job.pairs, "--output", str(tmp_path / "taught"), "--json"]
    done = run("teach", *options, *flags(tables))
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["units_resumed"] == 1


def test_rescore_and_the_cascade_show_the_llm_both_texts(
    job: ScoreConfig, tables: dict[str, str], llm_dir: Path, tmp_path: Path
) -> None:
    pq.write_table(
        pa.table({"left_text": [LEFT[one] for one, _ in PAIRS], "right_text": [RIGHT[other] for _, other in PAIRS]}),
        tmp_path / "texts.parquet",
    )
    inline = ScoreConfig(str(tmp_path / "texts.parquet"), str(tmp_path / "inline"), encoder=job.encoder, threshold=0.5)
    llm = LlmOptions(str(llm_dir), device="cpu")
    stage = RescoreConfig(llm, "", "", band=(-1.0, 1.0), threshold=0.5)
    score_and_rescore(inline, stage)
    wanted = read_scores(tmp_path / "inline").column("llm_probability").to_numpy()
    assert wanted.std() > 0.01

    score_and_rescore(job, stage)
    np.testing.assert_allclose(read_scores(job.output).column("llm_probability").to_numpy(), wanted, atol=1e-5)
    score(replace(job, output=str(tmp_path / "scores")))
    options = ["--scores", str(tmp_path / "scores"), "--llm", str(llm_dir), "--device=cpu", "--band=-1:1",
               "--threshold=0.5", "--output", str(tmp_path / "two"), *flags(tables)]  # fmt: skip
    done = run("rescore", *options)
    assert done.exit_code == 0, done.output
    assert read_scores(tmp_path / "two").equals(read_scores(job.output))

    estimate = dry_run(replace(job, output=str(tmp_path / "dry")), stage)
    assert estimate["stages"][-1]["pairs"] == len(PAIRS)


def test_stores_and_the_records_that_the_llm_reads(
    job: ScoreConfig, tables: dict[str, str], world: World, llm_dir: Path, tmp_path: Path
) -> None:
    """The columns are those of ``score``, though it reads no record table."""
    stores = {"store": str(tmp_path / "left"), "right_store": str(tmp_path / "right")}
    encode = ["--encoder", world.encoder, "--dtype=float32"]
    assert run("encode", *encode, "--records", tables["records"], "--output", stores["store"],
               "--id-column=customer", "--text-column=name").exit_code == 0  # fmt: skip
    assert run("encode", *encode, "--records", tables["right_records"], "--output", stores["right_store"],
               "--id-column=account", "--template", SIDES["right_template"]).exit_code == 0  # fmt: skip
    options = [f"--{name.replace('_', '-')}={value}" for name, value in stores.items()]
    options += [f"--rescore-{name.replace('_', '-')}={value}" for name, value in tables.items()]
    options += ["--rescore-llm", str(llm_dir), "--rescore-device=cpu", "--rescore-band=-1:1"]
    done = run("score", "--pairs", job.pairs, "--output", str(tmp_path / "by-store"), *options, *FLAGS)
    assert done.exit_code == 0, done.output
    stage = RescoreConfig(LlmOptions(str(llm_dir), device="cpu"), "", "", band=(-1.0, 1.0))
    score_and_rescore(replace(job, threshold=None), stage)
    assert read_scores(tmp_path / "by-store").equals(read_scores(job.output))


def test_the_recorded_template_is_that_of_the_sides_that_name_none(
    job: ScoreConfig, world: World, llm_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(world.encoder, tmp_path / "encoder")
    (tmp_path / "encoder" / FLIPKD_FILE).write_text(json.dumps({"format": 1, "template": "Mx {name}"}))
    recorded = replace(job, encoder=EncoderOptions(str(tmp_path / "encoder")), text_column=None)
    stage = RescoreConfig(LlmOptions(str(llm_dir), device="cpu"), "", "", band=(-1.0, 1.0), threshold=0.5)
    score_and_rescore(recorded, stage)
    found = read_scores(job.output)
    left = [f"Mx {name}" for name in NAMES]
    np.testing.assert_allclose(found.column("score").to_numpy(), cosines(world.encoder, left, RIGHT), atol=1e-5)
    assert dry_run(replace(recorded, output=str(tmp_path / "dry")), stage)["pairs"] == len(PAIRS)
    # Without an own one the right side has the recorded one too, and its table has no such column.
    with pytest.raises(ConfigError, match=r"billing.*no column 'name'.*flipkd\.json.*--right-template or --right-text"):
        plan_score(replace(recorded, right_template=None))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"right_id_column": "key"}, "billing.*no column 'key'.*--right-id-column"),
        ({"right_id_column": None}, "billing.*no column 'customer'.*--right-id-column"),
        ({"id_column": "key"}, "crm.*no column 'key'.*with --id-column"),
        ({"right_template": "{key}"}, "billing.*no column 'key'.*--right-text-column, or several with --right-temp"),
        ({"right_template": None, "right_text_column": "key"}, "billing.*no column 'key'.*--right-text-column"),
        ({"right_template": None}, "billing.*no column 'name'.*--right-text-column"),
        ({"text_column": "key"}, "crm.*no column 'key'.* with --text-column, or several with --template"),
        ({"right_template": "{key"}, "--right-template '{key' does not parse"),
        ({"template": "{key", "text_column": "text"}, "--template '{key' does not parse"),
    ],
)
@pytest.mark.parametrize("command", ["score", "teach"])
def test_the_message_names_the_option_of_the_side(
    job: ScoreConfig, tables: dict[str, str], world: World, changed: dict[str, Any], told: str, command: str
) -> None:
    options = {**SIDES, **changed}
    teacher = TeachConfig(EncoderOptions(world.encoder), job.pairs, job.output, **tables, **options)
    plan = partial(plan_teach, teacher) if command == "teach" else partial(plan_score, replace(job, **changed))
    with pytest.raises(ConfigError) as caught:
        plan()
    assert re.search(told, str(caught.value)), caught.value


def test_the_right_sides_options_need_a_right_side() -> None:
    for name in ("right_id_column", "right_text_column", "right_template"):
        told = f"--{name.replace('_', '-')} needs --right-records"
        own: dict[str, Any] = {name: "{x}"}
        with pytest.raises(ConfigError, match=told):
            ScoreConfig("pairs", "out", encoder=EncoderOptions("encoder"), records="records", **own)
        with pytest.raises(ConfigError, match=told):
            ScoreConfig("pairs", "out", encoder=EncoderOptions("encoder"), **own)
        with pytest.raises(ConfigError, match=told):
            TeachConfig(EncoderOptions("teacher"), "pairs", "out", records="records", **own)
        with pytest.raises(ConfigError, match=told):
            RescoreConfig(LlmOptions("llm"), "scores", "out", band=(0.0, 1.0), records="records", **own)


def test_sides() -> None:
    one = ScoreConfig("pairs", "out", encoder=EncoderOptions("encoder"), records="l", template="{a}")
    left = RecordSide("l", "id", None, "{a}", is_right=False)
    assert one.record_sides == (left,)
    two = replace(one, right_records="r")
    assert two.record_sides == (left, RecordSide("r", "id", None, "{a}", is_right=True))
    assert replace(two, right_text_column="b").record_sides[1].text_template == "{b}"
    assert replace(two, right_id_column="key").record_sides[1] == RecordSide("r", "key", None, "{a}", is_right=True)
    assert replace(one, records=None).record_sides == ()


def test_what_names_no_right_columns_is_the_run_that_it_was(
    world: World, make_pairs: Callable[..., Path], tmp_path: Path
) -> None:
    """The formulas of before there was an option for the right side: finished outputs and stores are still used."""
    tables: dict[str, Any] = {"records": world.left, "right_records": world.right}
    options, pairs = EncoderOptions(world.encoder), str(make_pairs(files=1))
    planned = plan_score(ScoreConfig(pairs, str(tmp_path / "out"), encoder=options, **tables))
    encode = fingerprint(
        {
            "kind": "encode", "format": 1, "encoder": encoder_fingerprint(options), "template": "{text}",
            "id_column": "id", "dtype": "int8", "rows_per_unit": 50_000,
        }
    )  # fmt: skip
    assert [one.run_fingerprint for one in planned.encodes] == [encode, encode]
    stores = [
        fingerprint({"run": encode, "units": [unit.fingerprint for unit in one.plan.units]}) for one in planned.encodes
    ]
    assert [one.fingerprint for one in planned.encodes] == stores
    assert planned.job.fingerprint == fingerprint(
        {
            "kind": "score", "format": 1, "source": {"stores": stores}, "pair_columns": ("left_id", "right_id"),
            "columns": None, "calibration": None, "threshold": None, "min_score": None, "top_k": None,
            "rows_per_unit": 4_000_000,
        }
    )  # fmt: skip
    taught = plan_teach(TeachConfig(options, pairs, str(tmp_path / "taught"), **tables))
    records = [
        {
            "id_column": "id",
            "template": "{text}",
            "shards": [
                (path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(Path(table).iterdir())
            ],
        }
        for table in tables.values()
    ]
    assert taught.run_fingerprint == fingerprint(
        {
            "kind": "teach", "format": 1, "teacher": taught.teacher.footer(),
            "pair_columns": ("left_id", "right_id"), "records": records, "rows_per_unit": 20_000,
        }
    )  # fmt: skip


def test_rescore_alone_can_be_resumed(job: ScoreConfig, tables: dict[str, str], llm_dir: Path, tmp_path: Path) -> None:
    score(job)
    config = RescoreConfig(
        LlmOptions(str(llm_dir), device="cpu"), job.output, str(tmp_path / "two"), band=(-1.0, 1.0), threshold=0.5,
        **tables, **SIDES,
    )  # fmt: skip
    assert rescore(config)["units_resumed"] == 0
    assert rescore(config)["units_resumed"] == 1


@pytest.mark.parametrize("right", ["", "right_"])
def test_a_template_beside_a_text_column_is_refused(right: str) -> None:
    """One of the two would be ignored without a word."""
    both = {f"{right}template": "{a} {b}", f"{right}text_column": "name"}
    told = rf"--{right.replace('_', '-')}template and --{right.replace('_', '-')}text-column both say"
    with pytest.raises(ConfigError, match=told):
        ScoreConfig("pairs", "out", encoder=EncoderOptions("e"), records="left", right_records="right", **both)
    if not right:
        with pytest.raises(ConfigError, match=told):
            EncodeConfig(EncoderOptions("e"), "records", "out", **both)
