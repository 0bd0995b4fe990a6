"""The YAML file: what is refused, and where paths lead."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from flipkd.config import EncoderOptions, ScoreConfig
from flipkd.errors import ConfigError
from flipkd.models.llm_options import LlmOptions
from flipkd.nightly.build import build
from flipkd.nightly.config import PATHS, GateLimits, NightConfig, read_config
from flipkd.report.config import EvaluateConfig
from flipkd.run.rescore_config import RescoreConfig
from jobs.nightly import nightly
from tests.nightly.conftest import SECOND

EXAMPLE = Path(__file__).parents[2] / "jobs" / "nightly.yaml"
SCORE = {"pairs": "pairs/{date}", "encoder": "encoder", "records": "records"}


def write(folder: Path, **values: Any) -> str:
    path = folder / "nightly.yaml"
    path.write_text(yaml.safe_dump({"output": "nights", "score": SCORE, **values}))
    return str(path)


def test_the_example_is_whole_and_names_every_gate() -> None:
    config = read_config(str(EXAMPLE), SECOND)
    assert config.score.threshold == 0.9
    assert config.evaluate is not None
    text = EXAMPLE.read_text()
    assert all(f"\n  {field.name}: " in text for field in fields(GateLimits))
    values = yaml.safe_load(text)
    assert set(values["gates"]["max_reason_share"]) == {"missing_record", "invalid_text"}
    comments = [line[2:] for line in text.splitlines() if line.startswith(("# rescore:", "#   "))]
    rescore = yaml.safe_load("\n".join(comments))["rescore"]  # what stands as a comment holds too
    assert build(RescoreConfig, rescore, "rescore", {RescoreConfig: {"scores": "a", "output": "b"}}).budget == "1%"


def test_names_of_paths_are_names_of_options() -> None:
    classes = (NightConfig, ScoreConfig, RescoreConfig, EvaluateConfig, EncoderOptions, LlmOptions)
    known = {field.name for one in classes for field in fields(one)}
    assert set(PATHS) <= known


def test_the_date_stands_in_every_value_but_the_template(tmp_path: Path) -> None:
    score = {**SCORE, "template": "{name} | {date}", "left_column": "id_{date}", "columns": ["score", "n_{date}"]}
    config = read_config(write(tmp_path, score=score, output="nights-{date}"), SECOND)
    assert config.score.pairs == str(tmp_path / "pairs" / SECOND)
    assert config.score.template == "{name} | {date}"
    assert config.score.left_column == f"id_{SECOND}"
    assert config.score.columns == ("score", f"n_{SECOND}")
    assert config.output == str(tmp_path / f"nights-{SECOND}")


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("pairs", "BASE/pairs"),
        ("./a/../pairs", "BASE/pairs"),
        ("/data/pairs", "/data/pairs"),
        ("s3://bucket/{date}", f"s3://bucket/{SECOND}"),
        ("..pairs", "BASE/..pairs"),
    ],
)
def test_relative_paths_lie_beside_the_file(
    tmp_path: Path, value: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "config"
    base.mkdir()
    monkeypatch.chdir(tmp_path)
    write(base, score={**SCORE, "pairs": value})
    config = read_config("config/nightly.yaml", SECOND)
    assert config.score.pairs == found.replace("BASE", str(base))


@pytest.mark.parametrize("value", ["../pairs", "a/../../pairs", "{date}/../../x", "..", "~/pairs", "$HOME/pairs", ""])
@pytest.mark.parametrize("key", ["pairs", "output"])
def test_a_path_that_leads_elsewhere_is_refused(tmp_path: Path, key: str, value: str) -> None:
    changed = {"output": value} if key == "output" else {"score": {**SCORE, "pairs": value}}
    with pytest.raises(ConfigError, match=rf"{key}: .*(leads out of|write a path in full)"):
        read_config(write(tmp_path, **changed), SECOND)


def test_an_encoder_is_a_folder_beside_the_file_or_a_name_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, work = tmp_path / "base", tmp_path / "work"
    (base / "models/own").mkdir(parents=True)
    (work / "models/other").mkdir(parents=True)
    monkeypatch.chdir(work)

    def encoder(name: Any) -> str:
        found = read_config(write(base, score={**SCORE, "encoder": name}), SECOND).score.encoder
        assert found is not None
        return found.folder

    assert encoder("models/own") == str(base / "models/own")
    assert encoder({"folder": "models/own", "dtype": "bf16"}) == str(base / "models/own")
    assert encoder("owner/name") == "owner/name"
    assert encoder("missing") == str(base / "missing")
    with pytest.raises(ConfigError, match="but in the working folder"):
        encoder("models/other")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gate": {}}, r"unknown key 'gate'; known keys are evaluate, gates, keep, output, psi_bins, rescore, score"),
        ({"score": {**SCORE, "treshold": 1}}, r"score: unknown key 'treshold'; known keys are .*threshold"),
        ({"score": {**SCORE, "output": "x"}}, r"unknown key 'output'"),
        ({"score": {**SCORE, "encoder": {"dtype": "bf16"}}}, r"score, encoder: folder is missing"),
        ({"score": {**SCORE, "encoder": {"folder": "x", "dtype": "fp4"}}}, r"dtype: must be one of float32, bf16"),
        ({"score": {**SCORE, "threshold": "0.5"}}, r"score, threshold: must be a number, not '0.5'"),
        ({"score": {**SCORE, "threshold": True}}, r"threshold: must be a number"),
        ({"score": {**SCORE, "top_k": 1.5}}, r"top_k: must be a whole number"),
        ({"score": {**SCORE, "top_k": 0}}, r"score: --top-k must be at least 1"),
        ({"score": {**SCORE, "columns": 3}}, r"columns: expected a list"),
        ({"score": {**SCORE, "pairs": "pairs/{datum}"}}, r"pairs: 'pairs/\{datum\}' holds \{datum\}; only \{date\} is"),
        ({"score": {**SCORE, "left_column": 3}}, r"left_column: must be text, not 3; put it into quotes"),
        ({"score": {"encoder": "encoder"}}, r"score: pairs is missing"),
        ({"score": None}, r"score: pairs is missing"),
        ({"score": ["pairs"]}, r"score: expected keys and their values"),
        ({"output": None}, r"output is missing"),
        ({"output": "memory://nights"}, r"nights need a local or shared folder"),
        ({"keep": 0}, r"keep must be at least 1"),
        ({"psi_bins": 1}, r"psi_bins must be from 2"),
        ({"run": {"overwrite": True}}, r"run: unknown key 'overwrite'"),
        ({"run": {"threads": 0}}, r"run: --threads must be at least 1"),
        ({"rescore": {"llm": "run"}}, r"rescore: say which pairs the LLM is asked"),
        ({"rescore": {"llm": "run", "band": [0.1]}}, r"band: expected a list of 2"),
        ({"evaluate": {"sample": 5}}, r"evaluate: unknown key 'sample'"),
        ({"gates": {"max_score_psi": -1}}, r"gates: max_score_psi must be a number of at least 0"),
        ({"gates": {"max_score_psi": float("nan")}}, r"max_score_psi must be a number"),
        ({"gates": {"max_reason_share": {"lost": 0.1}}}, r"max_reason_share has no 'lost'; known are missing_id"),
        ({"gates": {"min_metric": {"auc": 0.1}}}, r"min_metric has no 'auc'; known are roc_auc"),
        ({"gates": {"min_metric": {"roc_auc": 0.1}}}, r"min_metric roc_auc needs a section evaluate"),
        ({"gates": {"max_match_rate": 0.1}}, r"max_match_rate needs the column match"),
        ({"gates": {"max_probability_psi": 0.1}}, r"max_probability_psi needs the column probability"),
        ({"score": {**SCORE, "columns": ["n"]}}, r"max_score_psi needs the column score"),
        (
            {"score": {"pairs": "pairs", "encoder": "encoder"}, "gates": {"max_new_record_share": 0.1}},
            r"max_new_record_share needs score: records",
        ),
    ],
)
def test_bad_values_are_named(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(write(tmp_path, **values), SECOND)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output: a\noutput: b\n", r"n.yaml: line 2 is not YAML that is read: the key 'output' stands twice"),
        ("output: a\npsi-bins: 5\npsi_bins: 6\nscore: {pairs: p}\n", "psi_bins stands twice"),
        ("output: [a\n", "is not YAML"),
        ("- output\n", "expected keys and their values"),
        ("", "expected keys and their values"),
        ("output: !!python/object/apply:os.system ['true']\n", "is not YAML"),
        ("output: &a x\nscore: {pairs: *a}\n", r"n.yaml: line 2 is not YAML that is read: aliases \(\*name\)"),
        ("score: " + "[" * 100_000, r"n.yaml: line 1 is not YAML that is read: it is nested too deeply"),
        ("score: " + "{a: " * 100_000, r"n.yaml: line 1 is not YAML that is read: it is nested too deeply"),
        ("#" * (1 << 20) + "\n", r"n.yaml: has more than 1048576 bytes"),
        ("output: 2026-13-01\n", r"n.yaml: is not YAML that is read: month must be in 1..12"),
        ("output: !!int ''\n", r"n.yaml: is not YAML that is read: a value is not of the type"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "n.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config(str(tmp_path / "n.yaml"), SECOND)
    with pytest.raises(ConfigError, match="cannot read"):
        read_config(str(tmp_path / "absent.yaml"), SECOND)


@pytest.mark.parametrize(
    "date", ["2026-13-01", "2026-02-30", "20261125", "2026-W48-3", "today", "2026-1-2", "", "../x"]
)
def test_a_date_that_is_none_is_wrong_usage(tmp_path: Path, date: str) -> None:
    result = CliRunner().invoke(nightly, [write(tmp_path), "--date", date])
    assert result.exit_code == 2
    assert "write it as YYYY-MM-DD" in result.output
    assert not (tmp_path / "nights").exists()


def test_the_cascade_reads_records_and_columns_as_score_does(tmp_path: Path) -> None:
    score = {**SCORE, "right_records": "others", "template": "{a} {b}", "left_column": "l", "rows_per_unit": 7}
    rescore = {"llm": {"folder": "run", "labels": [" yes", " no"], "prompt_file": "p.txt"}, "band": [0, 1]}
    config = read_config(write(tmp_path, score=score, rescore={**rescore, "right_records": None}), SECOND, ray="auto")
    assert config.rescore is not None
    assert config.rescore.records == config.score.records == str(tmp_path / "records")
    assert config.rescore.right_records is None
    assert (config.rescore.template, config.rescore.left_column) == ("{a} {b}", "l")
    assert config.rescore.rows_per_unit == 20_000
    assert config.rescore.band == (0.0, 1.0)
    assert config.rescore.llm.labels == (" yes", " no")
    assert config.rescore.llm.prompt_file == str(tmp_path / "p.txt")
    assert config.rescore.scores == config.score.output
    assert config.rescore.run.ray == config.score.run.ray == "auto"


@pytest.mark.parametrize("labels", [[" yes", " no"], " yes, no"])
def test_labels_of_an_llm_are_words_and_those_of_a_report_a_path(tmp_path: Path, labels: Any) -> None:
    """ " yes, no" became a file named so, and the night asked for its name."""
    rescore = {"llm": {"folder": "run", "labels": labels, "prompt_file": "p.txt"}, "band": [0, 1]}
    evaluate = {"labels": "gold/labels"}
    config = read_config(write(tmp_path, rescore=rescore, evaluate=evaluate), SECOND)
    assert config.rescore is not None
    assert config.rescore.llm.labels == (" yes", " no")
    assert config.evaluate is not None
    assert config.evaluate.labels == str(tmp_path / "gold" / "labels")


def test_gold_pairs_have_the_columns_of_the_candidates(tmp_path: Path) -> None:
    def key(**evaluate: Any) -> tuple[str, ...]:
        score = {**SCORE, "left_column": "cust_no", "right_column": "ref"}
        found = read_config(write(tmp_path, score=score, evaluate={"labels": "gold.parquet", **evaluate}), SECOND)
        assert found.evaluate is not None
        return found.evaluate.key

    assert key() == ("cust_no", "ref")
    assert key(key="a, b") == key(key=["a", "b"]) == ("a", "b")
