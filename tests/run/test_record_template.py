"""Without ``--template`` and ``--text-column`` the records' texts are made as the encoder's ``flipkd.json`` says."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from flipkd.cli import main
from flipkd.config import EncodeConfig, EncoderOptions, ScoreConfig
from flipkd.errors import ModelError
from flipkd.models.encoder import load_encoder
from flipkd.models.folder import FLIPKD_FILE
from flipkd.models.llm_options import LlmOptions
from flipkd.nightly.stages import rescore_stage
from flipkd.run.encode import plan_encode
from flipkd.run.rescore_config import RescoreConfig
from flipkd.vectors.store import VectorStore
from tests.run.conftest import World
from tests.run.test_score import read_scores

TEMPLATE = "{name} | {city}"


@pytest.fixture(scope="module")
def encoder(world: World, tmp_path_factory: pytest.TempPathFactory) -> str:
    """MiniLM with what ``export --template`` leaves in a folder."""
    folder = tmp_path_factory.mktemp("exported") / "encoder"
    shutil.copytree(world.encoder, folder)
    (folder / FLIPKD_FILE).write_text(json.dumps({"format": 1, "template": TEMPLATE}))
    return str(folder)


@pytest.fixture
def people(tmp_path: Path) -> Path:
    table = pa.table(
        {"id": [1, 2, 3], "name": ["Ann", "Bob", "Cy"], "city": ["Rome", "Oslo", None], "text": list("xyz")}
    )
    pq.write_table(table, tmp_path / "people.parquet")
    pq.write_table(pa.table({"left_id": [1, 2], "right_id": [3, 1]}), tmp_path / "pairs.parquet")
    return tmp_path / "people.parquet"


def run(command: str, *options: str) -> Result:
    return CliRunner().invoke(main, [command, *options, "--no-progress", "--json"])


def encode(encoder: str, records: Path, output: Path, *options: str) -> Result:
    return run("encode", "--encoder", encoder, "--records", str(records), "--output", str(output), *options)


def test_encode_makes_the_texts_as_recorded_and_flags_win(encoder: str, people: Path, tmp_path: Path) -> None:
    fingerprints = []
    cases: dict[str, tuple[tuple[str, ...], list[str], str]] = {
        "recorded": ((), ["Ann | Rome", "Bob | Oslo", "Cy |"], TEMPLATE),
        "column": (("--text-column", "text"), ["x", "y", "z"], "{text}"),
        "template": (("--template", "{city}, {name}"), ["Rome, Ann", "Oslo, Bob", ", Cy"], "{city}, {name}"),
    }
    for name, (options, texts, template) in cases.items():
        done = encode(encoder, people, tmp_path / name, "--dtype", "float32", *options)
        assert done.exit_code == 0, done.output
        manifest = json.loads(done.stdout)
        assert manifest["template"] == template
        fingerprints.append(manifest["fingerprint"])
        rows = VectorStore.open(str(tmp_path / name)).rows.values
        np.testing.assert_allclose(rows, load_encoder(encoder).encode(texts), atol=1e-6)
    assert len(set(fingerprints)) == 3
    # Said by the flag or by the file, it is one run.
    done = encode(encoder, people, tmp_path / "recorded", "--dtype", "float32", "--template", TEMPLATE)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["fingerprint"] == fingerprints[0]


def test_score_does_the_same_and_another_template_is_another_run(encoder: str, people: Path, tmp_path: Path) -> None:
    arguments = ["--encoder", encoder, "--records", str(people), "--pairs", str(tmp_path / "pairs.parquet")]
    arguments += ["--dtype", "float32", "--output", str(tmp_path / "out")]
    done = run("score", *arguments)
    assert done.exit_code == 0, done.output
    vectors = load_encoder(encoder).encode(["Ann | Rome", "Bob | Oslo", "Cy |"])
    scores = read_scores(tmp_path / "out").column("score").to_numpy()
    np.testing.assert_allclose(scores, (vectors[[0, 1]] * vectors[[2, 0]]).sum(1), atol=1e-5)
    assert json.loads(run("score", *arguments, "--template", TEMPLATE).stdout)["units_resumed"] == 1
    refused = run("score", *arguments, "--text-column", "text")
    assert refused.exit_code == 1
    assert "files of another run" in refused.stderr


def test_inline_texts_are_taken_as_they_are(encoder: str, world: World, tmp_path: Path) -> None:
    pq.write_table(pa.table({"left_text": ["a cat"], "right_text": ["a dog"]}), tmp_path / "pairs.parquet")
    for name, folder in (("exported", encoder), ("plain", world.encoder)):
        done = run("score", "--encoder", folder, "--pairs", str(tmp_path / "pairs.parquet"), "--output",
                   str(tmp_path / name))  # fmt: skip
        assert done.exit_code == 0, done.output
    assert read_scores(tmp_path / "exported").equals(read_scores(tmp_path / "plain"))


@pytest.mark.parametrize("command", ["encode", "forget"])
def test_records_without_the_fields_are_told_where_the_template_is_from(
    encoder: str, tmp_path: Path, command: str
) -> None:
    records = tmp_path / "records.parquet"
    pq.write_table(pa.table({"id": [1], "text": ["Ann"]}), records)
    (tmp_path / "ids").write_text("1\n")
    options = ("--forget", str(tmp_path / "ids")) if command == "forget" else ()
    done = encode(encoder, records, tmp_path / "store", *options)
    assert done.exit_code == 2
    for part in ("records.parquet", "no column 'name'", TEMPLATE, FLIPKD_FILE, "--template or --text-column"):
        assert part in done.stderr
    # The id column is no part of the template.
    done = encode(encoder, records, tmp_path / "store", *options, "--id-column", "key")
    assert "no column 'key'" in done.stderr
    assert FLIPKD_FILE not in done.stderr
    assert encode(encoder, records, tmp_path / "store", "--text-column", "text").exit_code == 0


def test_forget_finds_the_texts_that_encode_has_made(encoder: str, people: Path, tmp_path: Path) -> None:
    cache = ("--cache", str(tmp_path / "cache"))
    assert encode(encoder, people, tmp_path / "store", *cache).exit_code == 0
    (tmp_path / "ids").write_text("2\n")
    done = encode(encoder, people, tmp_path / "store", *cache, "--forget", str(tmp_path / "ids"))
    assert json.loads(done.stdout)["deleted_vectors"] == 1


@pytest.mark.parametrize("template", [7, "no field", "{name"])
def test_a_recorded_template_that_cannot_be_used_is_named(
    world: World, people: Path, tmp_path: Path, template: Any
) -> None:
    shutil.copytree(world.encoder, tmp_path / "encoder")
    (tmp_path / "encoder" / FLIPKD_FILE).write_text(json.dumps({"template": template}))
    config = EncodeConfig(EncoderOptions(str(tmp_path / "encoder")), str(people), str(tmp_path / "store"))
    with pytest.raises(ModelError, match=r"flipkd\.json: its template cannot be used"):
        plan_encode(config)


def test_the_llm_of_a_night_reads_what_the_encoder_has_read(encoder: str, world: World) -> None:
    """Both by the night's own stages and by ``score --rescore-...``; what the YAML file says comes first."""
    rescore = RescoreConfig(LlmOptions("llm"), "scores", "out", budget="1%", records="people.parquet")
    score = ScoreConfig("pairs", "scores", encoder=EncoderOptions(encoder), records="people.parquet")
    assert rescore_stage(score, rescore).template == TEMPLATE
    assert rescore_stage(replace(score, template="{city}"), rescore).template == "{city}"
    assert rescore_stage(replace(score, text_column="name"), rescore) == rescore
    assert rescore_stage(score, replace(rescore, template="{city}")).template == "{city}"
    assert rescore_stage(score, replace(rescore, text_column="name")).template is None
    plain = replace(score, encoder=EncoderOptions(world.encoder))
    assert rescore_stage(plain, rescore) == rescore
