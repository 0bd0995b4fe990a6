"""A mistake in the options, or one that footers show, deletes nothing, encodes nothing, and is what is told."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from flipkd.cli import main
from flipkd.config import EncoderOptions, ScoreConfig
from flipkd.errors import ConfigError
from flipkd.models.llm_options import LlmOptions
from flipkd.run.rescore_config import RescoreConfig
from tests.run.conftest import World

MakePairs = Callable[..., Path]
NAN = float("nan")


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, [*arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stderr


def everything(folder: Path) -> dict[str, str]:
    """Digest of every file but the lock."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "lock")
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def place(world: World, llm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs, and a finished output of each command: none of the tests here may change a byte of them."""
    folder = tmp_path_factory.mktemp("finished")
    base = 10**15
    ids = {"left_id": [base, base + 1, base + 2], "right_id": [base + 3, base + 4, base + 5]}
    texts = {"left_text": ["a cat", "a dog", "rain"], "right_text": ["cats", "dogs", "snow"]}
    for name in ("pairs", "texts", "records", "two", "mixed", "cut"):
        (folder / name).mkdir()
    pq.write_table(pa.table({**ids, "label": [1, 0, 1]}), folder / "pairs/a.parquet")
    pq.write_table(pa.table({**ids, "label": [0, 1, 1]}), folder / "pairs/b.parquet")
    pq.write_table(pa.table(texts), folder / "texts/a.parquet")
    # What is wrong stands in the second file.
    pq.write_table(pa.table({**ids, "label": [1, 0, 1]}), folder / "two/a.parquet")
    pq.write_table(pa.table({"left_id": [base], "other": [base]}), folder / "two/b.parquet")
    pq.write_table(pa.table(ids), folder / "cut/a.parquet")
    (folder / "cut/b.parquet").write_bytes((folder / "cut/a.parquet").read_bytes()[:-20])
    record = {"id": [base + row for row in range(6)], "text": ["cat", "dog", "rain", "cats", "dogs", "snow"]}
    pq.write_table(pa.table(record), folder / "records/a.parquet")
    pq.write_table(pa.table(record), folder / "mixed/a.parquet")
    pq.write_table(pa.table({**record, "id": list("abcdef")}), folder / "mixed/b.parquet")
    (folder / "calibration.json").write_text('{"slope": 8.0, "intercept": -4.0}')
    (folder / "word.json").write_text('"word"')
    (folder / "file").write_text("")
    runs = [
        f"score --store {world.left_store} --pairs {folder}/pairs --output {folder}/score",
        f"score --store {world.left_store} --pairs {folder}/pairs --threshold 0.1 --output {folder}/cascade "
        f"--rescore-llm {llm_dir} --rescore-device cpu --rescore-budget 1 --rescore-records {world.left} "
        "--rescore-threshold 0.5",
        f"rescore --scores {folder}/score --llm {llm_dir} --device cpu --band 0:1 --records {world.left} "
        f"--output {folder}/rescore",
        f"encode --encoder {world.encoder} --records {folder}/records --output {folder}/encode",
        f"teach --teacher {world.encoder} --pairs {folder}/texts --output {folder}/teach",
        f"evaluate --scores {folder}/score --output {folder}/evaluate --bootstrap 10",
    ]
    for line in runs:
        code, told = run(*line.split(), "--no-progress")
        assert code == 0, told
    return folder


SCORE = "--store {store} --pairs {place}/pairs "
CASCADE = SCORE + "--rescore-llm {llm} --rescore-device cpu --rescore-budget 1 --rescore-records {left} "
RESCORE = "--scores {place}/score --llm {llm} --records {left} --device cpu --band 0:1 "
ENCODE = "--encoder {encoder} --records {place}/records "
TEACH = "--teacher {encoder} --pairs {place}/texts "
BY_RECORDS = "--encoder {encoder} --pairs {place}/pairs --records {place}/records "


@pytest.mark.parametrize(
    ("command", "options", "told"),
    [
        ("score", SCORE + "--columns left_id,scor", "no column 'scor'; .*--columns also knows score, "),
        ("score", SCORE + "--columns match", "needs --threshold"),
        ("score", SCORE + "--calibration none.json", "--calibration none.json: there is no such file"),
        ("score", SCORE + "--calibration {place}/pairs", "--calibration .*pairs: the file cannot be read: Is a dir"),
        ("score", SCORE + "--calibration {place}/word.json", "expected a JSON object"),
        ("score", SCORE + "--top-k 0", "--top-k must be at least 1"),
        ("score", SCORE + "--top-k many", "'many' is not a valid integer"),
        ("score", SCORE + "--right-column typo", "no column 'typo'; .*--right-column"),
        ("score", SCORE + "--right-store {place}/none", "holds no vector store"),
        ("score", SCORE + "--right-store {place}/encode", "384 numbers in float32.*384 numbers in int8"),
        ("score", "--store {store} --pairs {place}/none", "none does not exist"),
        ("score", "--store {store} --pairs {place}/two", "two has no column 'right_id'"),
        ("score", "--store {store} --pairs {place}/cut", r"cannot read b\.parquet"),
        ("score", SCORE + "--threshold 1.7", "--threshold must be from -1 to 1, not 1.7"),
        ("score", SCORE + "--threshold nan", "--threshold must be a number"),
        ("score", SCORE + "--threshold 90 --calibration {place}/calibration.json", "from 0 to 1, not 90: .*probab"),
        ("score", SCORE + "--min-score 7", "--min-score must be from -1 to 1, not 7"),
        ("score", BY_RECORDS + "--cache {place}/file", "--cache .*file is a file"),
        ("score", BY_RECORDS + "--max-length 4096", "--max-length 4096 is more than the 512 positions"),
        ("score", BY_RECORDS + "--max-tokens 0", "--max-tokens must be at least 1"),
        ("score", BY_RECORDS + "--device tpu", "--device must be one of cpu, cuda, auto"),
        ("score", BY_RECORDS + "--columns typo", "no column 'typo'"),
        ("score", BY_RECORDS + "--right-records {place}/mixed", "the ids in a.parquet are int64, those in b.parquet"),
        ("cascade", CASCADE + "--threshold 0.1 --rescore-threshold 90", "second stage.*from 0 to 1, not 90"),
        ("cascade", CASCADE + "--threshold 0.1", "match was decided by the score"),
        ("cascade", CASCADE + "--threshold 0.1 --columns typo", "no column 'typo'"),
        ("cascade", CASCADE + "--rescore-combine none.json", "--combine none.json: there is no such file"),
        ("rescore", RESCORE + "--threshold 1.5", "--threshold must be from 0 to 1, not 1.5"),
        ("rescore", RESCORE + "--combine none.json", "--combine none.json: there is no such file"),
        ("rescore", RESCORE + "--prompt-file none.txt --labels a,b", "--prompt-file none.txt: there is no such file"),
        ("rescore", RESCORE + "--left-column typo", "no column 'typo'"),
        ("rescore", RESCORE + "--id-column typo", "no column 'typo'; .*--id-column"),
        ("rescore", RESCORE + "--fit-labels typo", "no column 'typo'"),
        ("rescore", RESCORE + "--engine vllm", "vLLM cannot be imported"),
        ("rescore", RESCORE.replace("{left}", "{place}/mixed"), "the ids in a.parquet are int64, those in b.parquet"),
        ("rescore", "--scores {place}/score --llm {llm} --band 40:60 --records {left}", "--band 40:60 holds no"),
        ("encode", ENCODE + "--id-column typo", "no column 'typo'; .*--id-column"),
        ("encode", ENCODE + "--template {{typo}}", "no column 'typo'; .*--template"),
        ("encode", ENCODE + "--template {{typo", "--template '.typo' does not parse"),
        ("encode", ENCODE + "--cache {place}/file", "--cache .*file is a file"),
        ("encode", ENCODE + "--max-length 4096", "--max-length 4096 is more than the 512"),
        ("encode", "--encoder {encoder} --records {place}/mixed", "the ids in a.parquet are int64, those in b.parquet"),
        ("teach", TEACH + "--left-text typo", "no column 'typo'; .*--left-text"),
        ("teach", TEACH + "--label-column typo", "no label column 'typo'"),
        ("teach", TEACH + "--max-length 4096", "--max-length 4096 is more than the 512"),
        ("teach", TEACH + "--right-id-column typo", "--right-id-column needs --right-records"),
        ("teach", "--teacher {encoder} --pairs {place}/pairs --records {place}/mixed", "those in b.parquet bytes"),
        ("teach", "--teacher {encoder} --pairs {place}/two --records {left}", "b.parquet of .*no column 'right_id'"),
        ("evaluate", "--scores {place}/score --score-column typo", "no column 'typo'"),
        ("score", SCORE + "--template {{name}}", "--template says how --records are read, and there are none"),
        ("score", SCORE + "--left-text left", "--left-text names texts in the pairs, and these hold ids"),
        ("score", SCORE + "--cache {place}/texts", "--cache is for texts that are encoded"),
        ("score", SCORE + "--dtype bf16", "--dtype is for texts that are encoded"),
        ("score", SCORE + "--encoder-dtype bf16", "--encoder-dtype needs --encoder"),
        ("score", SCORE + "--device cpu", "--device needs --encoder"),
        ("score", SCORE + "--max-tokens 9", "--max-tokens needs --encoder"),
        ("score", SCORE + "--trust-remote-code", "--trust-remote-code needs --encoder"),
        ("score", SCORE + "--right-store {store} --right-id-column key", "--right-id-column says how --right-rec"),
        ("score", SCORE + "--min-workers 3 --workers 2", "--min-workers 3 is more than --workers 2"),
        ("cascade", CASCADE + "--max-length 9", "--max-length needs --encoder"),
        ("score", "--encoder {encoder} --pairs {place}/texts --id-column key", "--id-column says how --records"),
        ("score", "--encoder {encoder} --pairs {place}/texts --left-column key", "--left-column names ids, and"),
        ("score", BY_RECORDS + "--right-text right", "--right-text names texts in the pairs"),
        ("teach", TEACH + "--template {{name}}", "--template says how --records are read"),
        ("rescore", "--scores {place}/score --llm {llm} --band 0:1 --text-column name", "--text-column says"),
        ("evaluate", "--scores {place}/score --slice typo", "no column 'typo'"),
        ("evaluate", "--scores {place}/score --labels {place}/pairs --key typo", "no column 'typo'"),
        ("evaluate", "--scores {place}/score --precision 7", "--precision must be"),
        ("score", SCORE + "--pairs {place}/two", "Error: --pairs stands 2 times and takes one value; name one"),
        ("score", SCORE + "--columns score --columns=left_id", "--columns stands 2 times .*; join them with commas"),
        ("cascade", CASCADE + "--rescore-budget 2 --rescore-budget 3", "--rescore-budget stands 3 times"),
        ("evaluate", "--scores {place}/score --scores {place}/cascade", "--scores stands 2 times"),
    ],
)  # fmt: skip
def test_a_mistake_deletes_nothing_and_is_told_before_whose_the_folder_is(
    world: World, llm_dir: Path, place: Path, command: str, options: str, told: str
) -> None:
    """A finished output was deleted by --overwrite before --columns was looked at."""
    line = options.format(
        place=place, store=world.left_store, left=world.left, encoder=world.encoder, llm=llm_dir
    ).split()
    before = everything(place)
    name = "score" if command == "cascade" else command
    for overwrite in (["--overwrite"], []):
        code, stderr = run(name, *line, "--output", str(place / command), "--no-progress", *overwrite)
        assert code in (1, 2)
        assert re.search(told, stderr), stderr
        assert everything(place) == before


def test_an_export_says_what_is_wrong_with_its_template_first(place: Path, tmp_path: Path) -> None:
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder/modules.json").write_text("[]")
    code, stderr = run("export", "--run", str(tmp_path / "none"), "--output", str(tmp_path / "encoder"),
                       "--template", "{", "--overwrite")  # fmt: skip
    assert code == 2
    assert "--template '{' does not parse" in stderr
    assert everything(tmp_path) == {"encoder/modules.json": hashlib.sha256(b"[]").hexdigest()}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"threshold": 1.01}, "--threshold must be from -1 to 1"),
        ({"threshold": -1.01}, "--threshold must be from -1 to 1"),
        ({"threshold": NAN}, "--threshold must be a number, not NaN"),
        ({"threshold": NAN, "calibration": "c.json"}, "--threshold must be a number, not NaN"),
        ({"threshold": -0.1, "calibration": "c.json"}, "--threshold must be from 0 to 1.*probability"),
        ({"min_score": 1.01}, "--min-score must be from -1 to 1.*cosine"),
        ({"min_score": NAN, "calibration": "c.json"}, "--min-score must be a number, not NaN"),
    ],
)
def test_ranges_of_scores(options: dict[str, float], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        ScoreConfig("pairs", "out", store="store", **options)  # type: ignore[arg-type]


def test_what_lies_in_the_range_is_taken() -> None:
    for threshold in (-1, 0, 1):
        assert ScoreConfig("pairs", "out", store="store", threshold=threshold, min_score=-1).threshold == threshold
    for threshold in (0, 1):
        assert ScoreConfig("pairs", "out", store="store", threshold=threshold, calibration="c.json")
    llm = LlmOptions("llm")
    for band in ((0.4, 2.0), (float("-inf"), float("inf")), (-0.2, 0.2)):
        assert RescoreConfig(llm, "scores", "out", band=band, threshold=1.0).band == band
    for bad, told in ((1.01, "from 0 to 1"), (-0.01, "from 0 to 1"), (NAN, "NaN")):
        with pytest.raises(ConfigError, match=f"--threshold must be .*{told}"):
            RescoreConfig(llm, "scores", "out", band=(0.0, 1.0), threshold=bad)


def test_negative_ids_beside_uint64_are_refused_before_anything_is_encoded(
    place: Path, world: World, tmp_path: Path
) -> None:
    """All was encoded, and then a part in a hidden folder was named."""
    records, store = tmp_path / "records", tmp_path / "store"
    records.mkdir()
    pq.write_table(pa.table({"key": pa.array([2**64 - 1, 1], pa.uint64()), "text": ["x", "y"]}), records / "a.parquet")
    signed = pa.array([5, -3], pa.int16()).dictionary_encode()
    pq.write_table(pa.table({"key": signed, "text": ["z", "w"]}), records / "b.parquet")
    options = ("--encoder", world.encoder, "--records", str(records), "--id-column", "key")
    code, told = run("encode", *options, "--output", str(store))
    assert code == 1
    assert re.search(rf"column 'key' has negative ids in b\.parquet of {records}, and is .*uint64 in a\.parquet", told)
    assert not store.exists()
    positive = pa.array([5, None], pa.int16()).dictionary_encode()
    pq.write_table(pa.table({"key": positive, "text": ["z", "w"]}), records / "b.parquet")
    assert run("encode", *options, "--output", str(store))[0] == 0


def test_nothing_is_encoded_before_all_footers_were_read(place: Path, world: World, tmp_path: Path) -> None:
    """Both tables were encoded first."""
    arguments = f"score --encoder {world.encoder} --records {place}/records --right-records {world.right}".split()
    for options in (
        f"--pairs {place}/pairs --columns typo",
        f"--pairs {place}/two",
        f"--pairs {place}/cut",
        f"--pairs {place}/none",
        f"--pairs {place}/pairs --right-id-column typo",
    ):
        code, stderr = run(*arguments, *options.split(), "--output", str(tmp_path / "out"), "--cache",
                           str(tmp_path / "cache"))  # fmt: skip
        assert code in (1, 2), stderr
        assert not any(tmp_path.iterdir())


def test_a_cut_file_is_skipped_where_that_is_asked_for(place: Path, world: World, tmp_path: Path) -> None:
    arguments = f"score --store {world.left_store} --pairs {place}/cut --output {tmp_path}/out --json".split()
    done = CliRunner().invoke(main, [*arguments, "--on-bad-shard", "skip"])
    assert done.exit_code == 3
    manifest = json.loads(done.stdout)
    assert manifest["rows_in"] == 3
    assert [file["name"] for file in manifest["skipped_shards"]] == ["b.parquet"]


def test_every_file_of_a_cascade_has_what_the_llm_reads(
    place: Path, world: World, llm_dir: Path, tmp_path: Path
) -> None:
    """The texts of the second file were missed after all pairs had been scored."""
    (tmp_path / "pairs").mkdir()
    texts = pa.table({"left_text": ["a cat"], "right_text": ["cats"], "a": ["a cat"], "b": ["cats"]})
    pq.write_table(texts, tmp_path / "pairs/a.parquet")
    pq.write_table(texts.drop_columns(["b"]).append_column("llm_probability", pa.array([0.5])),
                   tmp_path / "pairs/b.parquet")  # fmt: skip
    line = f"score --encoder {world.encoder} --pairs {tmp_path}/pairs --output {tmp_path}/out --threshold 0.1 "
    line += f"--rescore-llm {llm_dir} --rescore-device cpu --rescore-budget 1 --rescore-threshold 0.5"
    code, stderr = run(*line.split())
    assert code == 2
    assert re.search(r"second stage.*b\.parquet.*'llm_probability' already", stderr), stderr
    assert not (tmp_path / "out").exists()


def test_pairs_that_have_a_column_of_the_name_of_any_that_score_writes(
    place: Path, world: World, tmp_path: Path
) -> None:
    """A column ``match`` of the pairs ended in an assertion where no --threshold was given."""
    pairs = pq.read_table(place / "pairs/a.parquet")
    pq.write_table(pairs.append_column("match", pa.array([True] * 3)), tmp_path / "pairs.parquet")
    line = f"score --store {world.left_store} --pairs {tmp_path}/pairs.parquet --output {tmp_path}/out"
    code, stderr = run(*line.split())
    assert code == 2
    assert "a column 'match' already" in stderr


def test_forgotten_right_records_are_named_as_the_job_names_them(place: Path, world: World, tmp_path: Path) -> None:
    """It said --right-records where a store was given."""
    pairs = pa.table({"left_id": [10**15, 10**15 + 1], "right_id": [1, 2]})
    pq.write_table(pairs, tmp_path / "pairs.parquet")
    stores = ["--store", world.left_store]
    tables = ["--encoder", world.encoder, "--records", world.left]
    for number, (options, told) in enumerate(
        [
            (stores, "was --right-store forgotten"),
            ([*stores, "--right-store", world.right_store], "were left and right swapped"),
            (tables, "was --right-records forgotten"),
            ([*tables, "--right-records", world.right], "were left and right swapped"),
        ]
    ):
        output = str(tmp_path / str(number))
        code, stderr = run("score", *options, "--pairs", str(tmp_path / "pairs.parquet"), "--output", output)
        assert code == 0, stderr
        assert f"warning: 2 of 2 pairs name a record that is not in the tables; {told}" in stderr


def test_options_of_an_encoder_are_looked_at_when_they_are_made() -> None:
    for options, told in (
        ({"dtype": "int4"}, "--encoder-dtype"),
        ({"device": "tpu"}, "--device must be one of"),
        ({"max_length": 0}, "--max-length must be at least 1"),
        ({"max_tokens": 0}, "--max-tokens must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=told):
            EncoderOptions("encoder", **options)  # type: ignore[arg-type]
