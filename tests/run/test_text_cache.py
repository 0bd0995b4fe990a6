"""``--cache`` and ``--forget``: the second night encodes what has changed, and gives the bytes of one without cache."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from flipkd.cli import main
from flipkd.config import EncodeConfig, EncoderOptions, ScoreConfig, TeachConfig
from flipkd.errors import ConfigError, OutputError
from flipkd.models import encoder as encoder_module
from flipkd.run import cached_encoder
from flipkd.run import score as score_job
from flipkd.run.encode import encode
from flipkd.run.forget import forget
from flipkd.run.kept_stores import in_use, remove_older
from flipkd.run.plan_score import plan_score
from flipkd.run.score import score
from flipkd.run.teach import teach
from flipkd.vectors.store import STATUS_TRUNCATED, VectorStore
from tests.run.conftest import RECORDS, World, record_id
from tests.run.test_kill import contents

MakePairs = Callable[..., Path]


def write_records(folder: Path, texts: Sequence[str], files: int = 3, skip: Sequence[int] = ()) -> str:
    folder.mkdir(exist_ok=True)
    kept = [row for row in range(len(texts)) if row not in skip]
    ids, texts = [record_id(row) for row in kept], [texts[row] for row in kept]
    for number in range(files):
        part = slice(number * len(texts) // files, (number + 1) * len(texts) // files)
        pq.write_table(pa.table({"id": ids[part], "text": texts[part]}), folder / f"{number}.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def encoder(minilm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """MiniLM's first block alone: the cache does not know one model from another, and five blocks take their time."""
    folder = tmp_path_factory.mktemp("cut") / "encoder"
    shutil.copytree(minilm_dir, folder)
    weights = load_file(folder / "model.safetensors")
    first = {name: value for name, value in weights.items() if not re.search(r"layer\.[1-5]\.", name)}
    assert len(weights) - len(first) == 5 * 16
    save_file(first, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    return str(folder)


def make_task(world: World, encoder: str, folder: Path) -> EncodeConfig:
    """Records of three files, to a store, with a cache."""
    records = write_records(folder / "records", world.texts[0])
    return EncodeConfig(
        EncoderOptions(encoder), records, str(folder / "store"), cache=str(folder / "cache"), rows_per_unit=15
    )


@pytest.fixture
def task(world: World, encoder: str, tmp_path: Path) -> EncodeConfig:
    return make_task(world, encoder, tmp_path)


def counts(manifest: dict[str, Any]) -> tuple[int, int]:
    found = manifest["counts"]
    return found.get("encoded_texts", 0), found.get("cached_texts", 0)


def same_stores(one: str, other: str) -> bool:
    """Byte by byte, ``store.json`` too."""
    names = sorted(path.name for path in Path(one).iterdir() if path.is_file() and path.name != "_manifest.json")
    assert len(names) == 5
    return all(Path(one, name).read_bytes() == Path(other, name).read_bytes() for name in names)


@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_the_second_night_encodes_what_has_changed_and_gives_the_same_bytes(
    world: World, task: EncodeConfig, tmp_path: Path, dtype: Any
) -> None:
    task = replace(task, dtype=dtype)
    if dtype == "int8":  # the default, with a whole real model
        task = replace(task, encoder=EncoderOptions(world.encoder))
    plain = replace(task, cache=None, output=str(tmp_path / "plain"))
    assert counts(encode(plain)) == (RECORDS, 0)
    first = encode(task)
    assert counts(first) == (RECORDS, 0)
    assert first["cache"]["texts"] == RECORDS
    assert first["cache"]["segments"] == 1
    assert same_stores(task.output, plain.output)

    changed = [*world.texts[0], "a new record"]
    changed[7] = "a changed record"
    write_records(tmp_path / "records", changed[::-1])  # in another order and other units too
    second = replace(task, output=str(tmp_path / "second"))
    assert counts(encode(second)) == (2, RECORDS - 1)
    encode(replace(plain, output=str(tmp_path / "second-plain")))
    assert same_stores(second.output, str(tmp_path / "second-plain"))


def test_a_night_without_changes_loads_no_model(
    task: EncodeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(task)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(encoder_module, "load_encoder", refuse)
    assert counts(encode(replace(task, output=str(tmp_path / "again")))) == (0, RECORDS)
    assert same_stores(task.output, str(tmp_path / "again"))


def test_a_cache_that_cannot_be_compacted_is_a_warning(
    task: EncodeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OutputError("cannot write the cache: No space left on device")

    monkeypatch.setattr("flipkd.run.encode.tidy", full)
    assert encode(task)["complete"]
    assert "No space left on device" in caplog.text
    assert VectorStore.open(task.output).header["rows"] == RECORDS


def test_missing_invalid_and_truncated_texts_keep_their_marks(task: EncodeConfig, tmp_path: Path) -> None:
    texts: list[Any] = [b"short", b"a long text " * 30, None, b" ", b"he\xffllo", b"short "]
    pq.write_table(pa.table({"id": range(6), "text": pa.array(texts, pa.binary())}), tmp_path / "marks.parquet")
    task = replace(task, records=str(tmp_path / "marks.parquet"), encoder=replace(task.encoder, max_length=16))
    plain = replace(task, cache=None, output=str(tmp_path / "plain"))
    encode(plain)
    assert counts(encode(task)) == (2, 0)  # of the two short ones one
    again = replace(task, output=str(tmp_path / "again"))
    manifest = encode(again)
    assert counts(manifest) == (0, 2)
    assert manifest["counts"]["truncated"] == 1
    assert manifest["reasons"] == {"invalid_text": 1, "missing_text": 2}
    assert VectorStore.open(again.output).status[1] == STATUS_TRUNCATED
    for output in (task.output, again.output):
        assert same_stores(output, plain.output)


def copy_encoder(source: str, folder: Path, file: str, **values: Any) -> str:
    shutil.copytree(source, folder)
    path = folder / file
    told = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**told, **values}))
    return str(folder)


def test_a_changed_template_length_dtype_or_encoder_is_a_miss(encoder: str, task: EncodeConfig, tmp_path: Path) -> None:
    """One text under two models, templates or lengths has a vector for each: AutoIntent PR#337."""
    encode(task)
    shorter = EncoderOptions(encoder, max_length=20)
    prompts = {"prompts": {"document": "passage: "}, "default_prompt_name": "document"}
    prompted = copy_encoder(encoder, tmp_path / "prompted", "config_sentence_transformers.json", **prompts)
    other = copy_encoder(encoder, tmp_path / "other", "1_Pooling/config.json", pooling_mode="max")
    changes: dict[str, dict[str, Any]] = {
        "template": {"template": "Record: {text}"},
        "length": {"encoder": shorter},
        "arithmetic": {"encoder": EncoderOptions(encoder, dtype="bf16")},
        "dtype": {"dtype": "bf16"},
        "prompt": {"encoder": EncoderOptions(prompted)},
        "pooling": {"encoder": EncoderOptions(other)},
    }
    for name, change in changes.items():
        output = str(tmp_path / f"{name}-store")
        assert counts(encode(replace(task, output=output, **change))) == (RECORDS, 0), name
        if name in ("length", "prompt"):
            plain = replace(task, output=f"{output}-plain", cache=None, **change)
            encode(plain)
            assert same_stores(output, plain.output), name
    # A template that makes the same text is no other text, and all those entries still stand side by side.
    same = replace(task, output=str(tmp_path / "same"), template="{text}")
    assert counts(encode(same)) == (0, RECORDS)
    assert counts(encode(replace(task, output=str(tmp_path / "short"), encoder=shorter))) == (0, RECORDS)


def test_score_keeps_stores_and_texts_beside_each_other(
    world: World, encoder: str, make_pairs: MakePairs, tmp_path: Path
) -> None:
    records = write_records(tmp_path / "records", world.texts[0])
    config = ScoreConfig(
        pairs=str(make_pairs()), output=str(tmp_path / "one"), encoder=EncoderOptions(encoder), records=records,
        cache=str(tmp_path / "cache"),
    )  # fmt: skip
    assert counts(score(config)["stages"]["encode_left"]) == (RECORDS, 0)
    write_records(tmp_path / "records", [*world.texts[0][:-1], "a changed record"])
    night = replace(config, output=str(tmp_path / "two"))
    assert counts(score(night)["stages"]["encode_left"]) == (1, RECORDS - 1)
    score(replace(config, output=str(tmp_path / "plain"), cache=None))
    assert contents(tmp_path / "two") == contents(tmp_path / "plain")
    assert sorted(name[:6] for name in os.listdir(tmp_path / "cache")) == ["store-", "texts"]


def kept_stores(cache: Path) -> set[str]:
    return {path.name for path in cache.glob("store-*")}


def test_the_store_of_an_earlier_night_goes_unless_a_job_uses_it(
    world: World, encoder: str, make_pairs: MakePairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, cache = write_records(tmp_path / "records", world.texts[0]), tmp_path / "cache"
    pairs = str(make_pairs())
    config = ScoreConfig(pairs, str(tmp_path / "1"), encoder=EncoderOptions(encoder), records=records, cache=str(cache))
    other = write_records(tmp_path / "other", world.texts[0])
    score(replace(config, output=str(tmp_path / "other-out"), records=other))
    others = kept_stores(cache)
    score(config)
    first = kept_stores(cache) - others
    score(replace(config, output=str(tmp_path / "same-records")))  # of the first night still
    assert kept_stores(cache) == others | first

    write_records(tmp_path / "records", [*world.texts[0][:-1], "a changed record"])
    planned = plan_score(replace(config, output=str(tmp_path / "2")))
    write_records(tmp_path / "records", [*world.texts[0][:-1], "changed again"])
    with in_use(planned.encodes):  # a job that has begun, and is slow
        slow = {Path(planned.encodes[0].config.output).name}
        score(replace(config, output=str(tmp_path / "3")))
        third = kept_stores(cache) - others - slow
        assert len(third) == 1
        assert third != first
        remove_older(planned.encodes)  # at its end it leaves what is newer
        assert kept_stores(cache) == others | slow | third

    # Killed after its manifest, before it deletes: the same call does it.
    with monkeypatch.context() as patch:
        patch.setattr(score_job, "remove_older", lambda plans: None)
        write_records(tmp_path / "records", world.texts[0][1:])
        last = replace(config, output=str(tmp_path / "4"))
        score(last)
    assert others | slow | third < kept_stores(cache)
    score(last)
    assert kept_stores(cache) & (slow | third) == set()
    assert others < kept_stores(cache)

    ids = tmp_path / "ids.txt"
    ids.write_text(f"{record_id(5)}\n")
    told = forget(EncodeConfig(EncoderOptions(encoder), records, str(tmp_path / "none"), cache=str(cache)), str(ids))
    assert told["deleted_stores"] == 2  # of the last night, and of the other records
    score(replace(last, output=str(tmp_path / "5")))


def test_a_store_that_cannot_be_deleted_is_a_warning(
    world: World, encoder: str, make_pairs: MakePairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    records = write_records(tmp_path / "records", world.texts[0])
    config = ScoreConfig(
        str(make_pairs()), str(tmp_path / "1"), encoder=EncoderOptions(encoder), records=records,
        cache=str(tmp_path / "cache"),
    )  # fmt: skip
    score(config)
    write_records(tmp_path / "records", world.texts[0][1:])

    def refuse(_: object) -> None:
        raise OutputError("cannot write the store: Permission denied; you may not write there")

    monkeypatch.setattr("flipkd.run.kept_stores.remove_store", refuse)
    assert score(replace(config, output=str(tmp_path / "2")))["rows_out"]
    assert "was not deleted: cannot write the store: Permission denied" in caplog.text
    assert len(kept_stores(tmp_path / "cache")) == 2


def test_inline_texts_and_a_teacher_use_the_same_cache(world: World, encoder: str, tmp_path: Path) -> None:
    left, right = world.texts
    pq.write_table(pa.table({"left_text": left[:20], "right_text": right[:20]}), tmp_path / "pairs.parquet")
    options = EncoderOptions(encoder)
    cache = str(tmp_path / "cache")
    config = ScoreConfig(
        pairs=str(tmp_path / "pairs.parquet"), output=str(tmp_path / "one"), encoder=options, cache=cache,
        dtype="float32",
    )  # fmt: skip
    distinct = len({*left[:20], *right[:20]})
    first = score(config)
    assert counts(first["stages"]["encode"]) == (distinct, 0)
    assert first["stages"]["encode"]["cache"]["texts"] == distinct
    assert os.listdir(cache) == ["texts"]  # the work of the run is gone
    records = write_records(tmp_path / "records", left[10:30])
    encoded = EncodeConfig(options, records, str(tmp_path / "store"), dtype="float32", cache=cache)
    assert counts(encode(encoded)) == (len(set(left[20:30]) - {*left[:20], *right[:20]}), len(
        set(left[10:30]) & {*left[:20], *right[:20]}))  # fmt: skip
    lesson = TeachConfig(options, str(tmp_path / "pairs.parquet"), str(tmp_path / "taught"), cache=cache)
    assert counts(teach(lesson)["stages"]["encode"]) == (0, distinct)
    teach(replace(lesson, output=str(tmp_path / "taught-plain"), cache=None))
    taught, plain = contents(tmp_path / "taught"), contents(tmp_path / "taught-plain")
    differing = {name for name in taught if taught[name] != plain.get(name)}
    # Those two tell when the lists of texts were written.
    assert {Path(name).name for name in differing} <= {"_manifest.json", "store.json"}


def command(task: EncodeConfig, output: Path, *options: str) -> list[str]:
    return [
        sys.executable, "-m", "flipkd.cli", "encode", "--encoder", task.encoder.folder, "--records", task.records,
        "--output", str(output), "--cache", str(task.cache), "--no-progress", "--json", *options,
    ]  # fmt: skip


ENCODE = """
import os, signal, sys
from flipkd.config import EncodeConfig, EncoderOptions
from flipkd.run import encode, encode_unit
encoder, records, output, cache, units = sys.argv[1:]
original = encode_unit.EncodeWorker.__call__
done = []
def call(self, unit):
    if len(done) == int(units):
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(unit)
    return original(self, unit)
encode_unit.EncodeWorker.__call__ = call
encode.encode(EncodeConfig(EncoderOptions(encoder), records, output, cache=cache, rows_per_unit=15))
"""


@pytest.fixture(scope="module")
def killed(world: World, encoder: str, tmp_path_factory: pytest.TempPathFactory) -> EncodeConfig:
    """A job that was killed when two units of its store were committed."""
    task = make_task(world, encoder, tmp_path_factory.mktemp("killed"))
    arguments = [encoder, task.records, task.output, str(task.cache), "2"]
    assert subprocess.run([sys.executable, "-c", ENCODE, *arguments], check=False).returncode == -signal.SIGKILL
    return task


def copied(task: EncodeConfig, folder: Path) -> EncodeConfig:
    """The same job in another folder; the files keep their times, by which a resumed job knows its input."""
    shutil.copytree(Path(task.output).parent, folder, dirs_exist_ok=True)
    places = {name: str(folder / Path(getattr(task, name)).name) for name in ("records", "output", "cache")}
    return replace(task, **places)


def test_a_killed_job_has_cached_what_it_committed(killed: EncodeConfig, tmp_path: Path) -> None:
    task = copied(killed, tmp_path)
    # Two of the six units (15 and 5 records a file) are committed. Resumed, they are not even looked up ...
    resumed = encode(task)
    assert resumed["units_resumed"] == 2
    assert counts(resumed) == (RECORDS, 0)
    # ... and a job with another output takes all from the cache.
    encode(replace(task, cache=None, output=str(tmp_path / "plain")))
    assert counts(encode(replace(task, output=str(tmp_path / "cached")))) == (0, RECORDS)
    assert same_stores(str(tmp_path / "cached"), task.output)
    assert same_stores(str(tmp_path / "plain"), task.output)


def test_two_jobs_at_once_share_a_cache_that_holds_no_text(world: World, task: EncodeConfig, tmp_path: Path) -> None:
    write_records(tmp_path / "records", [*world.texts[0][:-1], "canary Jane Roe 8c1f"])
    jobs = [
        subprocess.Popen(command(task, tmp_path / name, "--log-level", "debug"), stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True)
        for name in ("one", "two")
    ]  # fmt: skip
    for job in jobs:
        out, err = job.communicate(timeout=120)
        assert job.returncode == 0, err
        assert sum(counts(json.loads(out))) == RECORDS
        assert "canary" not in out + err
    assert same_stores(str(tmp_path / "one"), str(tmp_path / "two"))
    assert counts(encode(task)) == (0, RECORDS)
    for path in (tmp_path / "cache").rglob("*"):
        assert not path.is_file() or b"canary" not in path.read_bytes()
        assert path.stat().st_mode & 0o077 == 0


def test_options(task: EncodeConfig, tmp_path: Path) -> None:
    arguments = command(task, tmp_path / "out")[3:]
    limited = CliRunner().invoke(main, [*arguments, "--cache-limit", "10kB"])
    assert limited.exit_code == 0, limited.output
    cache = json.loads(limited.stdout)["cache"]
    assert 0 < cache["texts"] < RECORDS
    assert cache["bytes"] <= 10_000
    assert cache["dropped_texts"] == RECORDS - cache["texts"]
    again = CliRunner().invoke(main, [*[one for one in arguments if one != "--json"], "--cache-limit", "5000b"])
    assert again.exit_code == 0, again.output
    assert "nothing was left to do" in again.stdout  # it was the rate of the run before
    segments = [path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert sum(segments) <= 5000
    for size in ("ten", "10XB", "-1", "10", "0", "B"):
        assert CliRunner().invoke(main, [*arguments, "--cache-limit", size]).exit_code == 2
    with pytest.raises(ConfigError, match="--cache-limit needs --cache"):
        replace(task, cache=None, cache_limit_bytes=10)
    with pytest.raises(ConfigError, match="name a local folder"):
        encode(replace(task, cache="memory://cache", output=str(tmp_path / "remote")))
    help_text = CliRunner().invoke(main, ["score", "--help"]).output
    assert "--cache-limit" in help_text


class TestForget:
    def bytes_of(self, stores: Sequence[str], row: int) -> list[bytes]:
        return [VectorStore.open(store).rows.values[row].tobytes() for store in stores]

    def holding(self, folder: Path, needles: Sequence[bytes]) -> list[Path]:
        files = [path for path in folder.rglob("*") if path.is_file()]
        return [path for path in files if any(needle in path.read_bytes() for needle in needles)]

    @pytest.mark.parametrize("form", ["text", "parquet"])
    def test_the_vectors_are_in_no_file(
        self, world: World, task: EncodeConfig, make_pairs: MakePairs, tmp_path: Path, form: str
    ) -> None:
        bf16 = replace(task, dtype="bf16", output=str(tmp_path / "cache/made/store"))
        encode(task)
        encode(bf16)
        score(
            ScoreConfig(str(make_pairs()), str(tmp_path / "scores"), encoder=task.encoder, records=task.records,
                        cache=task.cache)
        )  # fmt: skip
        gone = [4, 30]
        needles = [data for row in gone for data in self.bytes_of([task.output, bf16.output], row)]
        shutil.rmtree(bf16.output)
        assert len(self.holding(tmp_path, needles)) == 4  # two stores and two segments
        ids = tmp_path / f"ids.{form}"
        if form == "text":
            ids.write_text("".join(f"{record_id(row)}\n" for row in gone))
        else:
            pq.write_table(pa.table({"id": [record_id(row) for row in gone]}), ids)
        arguments = [*command(task, Path(task.output))[3:], "--forget", str(ids)]
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout) == {
            "ids": 2, "ids_not_found": 0, "texts": 2, "deleted_vectors": 4, "deleted_stores": 2
        }  # fmt: skip
        assert self.holding(tmp_path, needles) == []
        # What is left serves the next night; the records still in the table are encoded again.
        write_records(tmp_path / "records", world.texts[0], skip=gone)
        again = encode(task)
        assert counts(again) == (0, RECORDS - 2)
        assert CliRunner().invoke(main, arguments).exit_code == 3  # not in the table any more

    def test_stores_without_the_records_stay(self, world: World, task: EncodeConfig, tmp_path: Path) -> None:
        encode(task)
        before = contents(Path(task.output))
        others = write_records(tmp_path / "others", world.texts[1])
        (tmp_path / "ids").write_text("7\nno such id\n")
        done = CliRunner().invoke(main, [*command(replace(task, records=others), Path(task.output))[3:], "--forget",
                                         str(tmp_path / "ids")])  # fmt: skip
        assert done.exit_code == 3
        assert json.loads(done.stdout) == {
            "ids": 2, "ids_not_found": 2, "texts": 0, "deleted_vectors": 0, "deleted_stores": 0
        }  # fmt: skip
        assert contents(Path(task.output)) == before

    def test_an_unfinished_store_goes_too(self, killed: EncodeConfig, tmp_path: Path) -> None:
        task = copied(killed, tmp_path)
        assert list(Path(task.output).rglob("*.parquet"))
        (tmp_path / "ids").write_text(f"{record_id(0)}\n")
        done = CliRunner().invoke(main, [*command(task, Path(task.output))[3:], "--forget", str(tmp_path / "ids")])
        assert json.loads(done.stdout) == {
            "ids": 1, "ids_not_found": 0, "texts": 1, "deleted_vectors": 1, "deleted_stores": 1
        }  # fmt: skip
        assert not list(Path(task.output).rglob("*.parquet"))

    def test_string_ids_and_templates(self, task: EncodeConfig, tmp_path: Path) -> None:
        table = pa.table({"key": ["a", "b", "007"], "name": ["Ann", "Bob", "Cy"], "city": ["Rome", "Oslo", None]})
        pq.write_table(table, tmp_path / "people.parquet")
        people = replace(
            task, records=str(tmp_path / "people.parquet"), id_column="key", template="{name} | {city}", dtype="float32"
        )
        encode(people)
        needles = self.bytes_of([people.output], 2)
        pq.write_table(pa.table({"anything": ["007"]}), tmp_path / "ids.parquet")
        facts = forget(people, str(tmp_path / "ids.parquet"))
        assert facts == {"ids": 1, "ids_not_found": 0, "texts": 1, "deleted_vectors": 1, "deleted_stores": 1}
        assert self.holding(tmp_path, needles) == []
        assert counts(encode(people)) == (1, 2)

    def test_ids_that_are_numbers_are_compared_as_such(self, task: EncodeConfig, tmp_path: Path) -> None:
        """The store compared numbers, the records texts: 01 was told to be missing, and its vector stayed."""
        encode(task)
        (tmp_path / "ids").write_text(f"0{record_id(1)}\n{record_id(1)}\n {record_id(2)} \r\n+{record_id(3)}\n")
        facts = forget(task, str(tmp_path / "ids"))
        assert facts == {"ids": 3, "ids_not_found": 0, "texts": 3, "deleted_vectors": 3, "deleted_stores": 1}

    def test_a_deletion_that_deletes_nothing_does_not_end_well(self, task: EncodeConfig, tmp_path: Path) -> None:
        encode(task)
        before = contents(tmp_path / "cache")
        ids = tmp_path / "ids"
        ids.write_text(f"{record_id(0)}\n")

        def run(*options: str) -> tuple[int, str]:
            done = CliRunner().invoke(main, [*command(task, tmp_path / "none")[3:], "--forget", str(ids), *options])
            return done.exit_code, done.stderr

        code, told = run("--template", "another: {text}")
        assert (code, len(told.splitlines())) == (3, 1)
        assert re.search(r"the cache holds no vector of these records' texts; .*--template", told)
        ids.write_text(" \n\n")
        code, told = run()
        assert (code, told) == (1, f"Error: --forget {ids} holds no id\n")
        with pytest.raises(ConfigError, match=r"--cache .*elsewhere does not exist, so nothing was forgotten"):
            forget(replace(task, cache=str(tmp_path / "elsewhere")), str(ids))
        assert not (tmp_path / "elsewhere").exists()
        assert contents(tmp_path / "cache") == before


def test_a_cache_of_many_segments_is_merged_on_the_way(
    task: EncodeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cached_encoder, "_MANY_SEGMENTS", 3)
    merged = []
    original = cached_encoder.compact_if_free
    monkeypatch.setattr(
        cached_encoder, "compact_if_free", lambda cache: (merged.append(cache.segment_count), original(cache))
    )
    encode(replace(task, rows_per_unit=5))
    assert merged
    assert max(merged) <= 5
    assert counts(encode(replace(task, output=str(tmp_path / "again")))) == (0, RECORDS)


def test_jobs_that_share_a_cache_do_not_touch_each_other(world: World, tmp_path: Path) -> None:
    """The same pairs into two outputs, and other pairs of the same records, all at once."""
    for name, rows in (("a", range(12)), ("b", range(6, 18))):
        (tmp_path / name).mkdir()
        ids = [record_id(row) for row in rows]
        pq.write_table(pa.table({"left_id": ids, "right_id": ids[::-1]}), tmp_path / name / "0.parquet")
    (tmp_path / "inline").mkdir()
    texts = [f"text {number % 40}" for number in range(200)]
    pq.write_table(pa.table({"left_text": texts, "right_text": texts[::-1]}), tmp_path / "inline/0.parquet")
    common = ["--encoder", world.encoder, "--cache", str(tmp_path / "cache"), "--rows-per-unit", "20"]
    jobs = [
        *(["--pairs", str(tmp_path / "inline"), "--output", str(tmp_path / f"out-{number}")] for number in range(2)),
        *(
            ["--pairs", str(tmp_path / name), "--records", world.left, "--output", str(tmp_path / f"out-{name}")]
            for name in "ab"
        ),
    ]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "flipkd.cli", "score", *common, *job], stderr=subprocess.PIPE, text=True
        )
        for job in jobs
    ]
    told = [process.communicate(timeout=300)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0, 0], told
    assert [name for name in os.listdir(tmp_path / "cache") if name.startswith("work-")] == []


@pytest.mark.parametrize("place", ["out", "out/cache", "pairs/cache"])
def test_a_cache_in_an_output_or_an_input_is_refused(world: World, tmp_path: Path, place: str) -> None:
    (tmp_path / "pairs").mkdir()
    pq.write_table(pa.table({"left_text": ["a"], "right_text": ["b"]}), tmp_path / "pairs/0.parquet")
    task = ScoreConfig(
        pairs=str(tmp_path / "pairs"), output=str(tmp_path / "out"), encoder=EncoderOptions(world.encoder),
        cache=str(tmp_path / place),
    )  # fmt: skip
    with pytest.raises(ConfigError, match=rf"--cache .*{place} lies in --(output|pairs) .*; choose another --cache"):
        score(task)
