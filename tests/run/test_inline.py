"""``score`` on inline texts: distinct texts are encoded once over all units, and every row keeps its own outcome."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flipkd.config import EncoderOptions, RunOptions, ScoreConfig
from flipkd.errors import ConfigError, InputError
from flipkd.models import folder as folder_module
from flipkd.models.encoder import load_encoder
from flipkd.models.folder import folder_fingerprint
from flipkd.run.manifest import UnitReport
from flipkd.run.score import dry_run, score
from flipkd.run.texts import TextsWorker
from flipkd.run.units import WorkUnit
from tests.run.conftest import RECORDS, World
from tests.run.test_score import read_scores
from tests.small_models import make_encoder


def inline(tmp_path: Path, encoder: str, files: Sequence[pa.Table], **options: Any) -> ScoreConfig:
    (tmp_path / "pairs").mkdir(exist_ok=True)
    for number, table in enumerate(files):
        pq.write_table(table, tmp_path / f"pairs/{number:03d}.parquet")
    options.setdefault("dtype", "float32")
    return ScoreConfig(
        pairs=str(tmp_path / "pairs"), output=str(tmp_path / "out"), encoder=EncoderOptions(encoder), **options
    )


def texts(left: Sequence[Any], right: Sequence[Any], kind: pa.DataType | None = None) -> pa.Table:
    return pa.table({"left_text": pa.array(left, kind), "right_text": pa.array(right, kind)})


def test_distinct_texts_are_encoded_once_over_all_units(world: World, tmp_path: Path) -> None:
    left, right = world.texts
    files = [texts(left[:20], right[:20]), texts(left[10:30], right[10:30]), texts(left[:30], right[:30])]
    manifest = score(inline(tmp_path, world.encoder, files, rows_per_unit=10))
    assert manifest["stages"]["encode"]["counts"]["distinct_texts"] == len({*left[:30], *right[:30]})
    found = read_scores(tmp_path / "out")
    rows = [*range(20), *range(10, 30), *range(30)]
    np.testing.assert_allclose(found.column("score").to_numpy(), [world.cosine(row, row) for row in rows], atol=1e-5)
    assert found.column("left_text").to_pylist() == [left[row] for row in rows]
    assert sorted(os.listdir(tmp_path / "out/.flipkd")) == ["lock", "plan.json"]  # no text is left behind


def test_the_encoder_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large one takes seconds, in every worker that does so too."""
    hashed: list[str | Path] = []

    def counting(folder: str | Path, max_length: int | None = None) -> str:
        hashed.append(folder)
        return folder_fingerprint(folder, max_length)

    monkeypatch.setattr(folder_module, "folder_fingerprint", counting)
    encoder = str(make_encoder(tmp_path / "encoder", 0))
    score(inline(tmp_path, encoder, [texts(["a", "b"], ["a", "c"])]))
    assert hashed == [encoder]


@pytest.mark.parametrize("null_first", [True, False])
def test_null_and_empty_are_missing_and_never_match(world: World, tmp_path: Path, null_first: bool) -> None:
    """dedupe#460, mteb#1043."""
    rows = [(None, "x"), ("", ""), (" ", "x"), ("x", None), ("x", "x")]
    rows = rows if null_first else rows[::-1]
    manifest = score(inline(tmp_path, world.encoder, [texts(*zip(*rows, strict=True))], threshold=0.5))
    found = read_scores(tmp_path / "out").to_pylist()
    for (left, right), row in zip(rows, found, strict=True):
        if (left, right) == ("x", "x"):
            assert row["score"] == pytest.approx(1.0, abs=1e-5)
        else:
            assert (row["score"], row["match"], row["reason"]) == (None, None, "missing_text")
    assert manifest["reasons"] == {"missing_text": 4}


def test_all_texts_missing_is_a_result_too(world: World, tmp_path: Path) -> None:
    manifest = score(inline(tmp_path, world.encoder, [texts([None, ""], [None, " "], pa.string())]))
    assert manifest["reasons"] == {"missing_text": 2}
    assert read_scores(tmp_path / "out").column("score").null_count == 2


def test_bytes_that_are_not_utf8_spare_the_shard(world: World, tmp_path: Path) -> None:
    """arrow#29635."""
    raw = pa.array([b"a cat", b"he\xffllo", None], pa.binary())
    broken = pa.Array.from_buffers(pa.string(), 3, raw.buffers(), 1)
    table = pa.table({"left_text": broken, "right_text": ["a cat", "a cat", "a cat"]})
    manifest = score(inline(tmp_path, world.encoder, [table]))
    found = read_scores(tmp_path / "out")
    assert found.column("reason").to_pylist() == [None, "invalid_text", "missing_text"]
    assert found.column("left_text").cast(pa.binary()).to_pylist() == raw.to_pylist()
    assert manifest["reasons"] == {"invalid_text": 1, "missing_text": 1}


@pytest.mark.parametrize("name", ["Nguyễn Văn Ân", "مُحَمَّد", "😀 李小龙", "Café"])
def test_normal_forms_and_white_space_agree_and_the_raw_text_stays(world: World, tmp_path: Path, name: str) -> None:
    """transformers#5738; a leading space: sentence-transformers#782."""
    composed, decomposed = (unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
    score(inline(tmp_path, world.encoder, [texts([composed, composed], [decomposed, f" {composed}\n"])]))
    found = read_scores(tmp_path / "out")
    assert found.column("right_text").to_pylist() == [decomposed, f" {composed}\n"]
    np.testing.assert_allclose(found.column("score").to_numpy(), [1.0, 1.0], atol=1e-5)


def test_three_layouts_of_text_score_the_same(world: World, tmp_path: Path) -> None:
    """arrow#47177, ray#33279."""
    left, right = world.texts[0][:8], world.texts[1][:8]
    files = [
        texts(left, right, pa.string()),
        texts(left, right, pa.large_string()),
        pa.table({"left_text": pa.array(left).dictionary_encode(), "right_text": pa.array(right).dictionary_encode()}),
    ]
    score(inline(tmp_path, world.encoder, files, columns=("score",)))
    scores = read_scores(tmp_path / "out").column("score").to_pylist()
    assert scores[:8] == scores[8:16] == scores[16:]


def test_a_swapped_pair_scores_the_same(world: World, tmp_path: Path) -> None:
    """sentence-transformers#799."""
    left, right = world.texts[0][:8], world.texts[1][:8]
    score(inline(tmp_path, world.encoder, [texts([*left, *right], [*right, *left])], columns=("score",)))
    scores = read_scores(tmp_path / "out").column("score").to_pylist()
    assert scores[:8] == scores[8:]


def test_long_texts_are_cut_each_on_its_own_and_it_is_visible(world: World, tmp_path: Path) -> None:
    """sentence-transformers#574, #929, #4060: 600 and 600 tokens that differ after the cut, 5 and 2,400."""
    short, long = "pain in the left knee", "word " * 600
    rows = [(long + "end", long + "other"), (short, long * 4), (short, short), (long, short)]
    manifest = score(inline(tmp_path, world.encoder, [texts(*zip(*rows, strict=True))]))
    found = read_scores(tmp_path / "out")
    assert found.column("truncated").to_pylist() == [True, True, False, True]
    assert found.column("score").null_count == 0
    assert found.column("score").to_pylist()[2] == pytest.approx(1.0, abs=1e-5)
    assert manifest["counts"]["truncated"] == 3
    # Both sides are kept: the short one still tells a difference.
    assert found.column("score").to_pylist()[3] < 0.9


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_scores_do_not_depend_on_batches_units_and_order(world: World, tmp_path: Path, batch: int) -> None:
    """sentence-transformers#3197, sentence-transformers#2312: one pair more than a batch, shuffled.

    Every row is there, within 1e-5, and no decision flips but where the score lies that near to the threshold.
    """
    tolerance, threshold = 1e-5, 0.5
    rows = [(row % RECORDS, row * 7 % RECORDS) for row in np.random.default_rng(batch).permutation(batch + 1)]
    table = texts([world.texts[0][left] for left, _ in rows], [world.texts[1][right] for _, right in rows])
    task = inline(tmp_path, world.encoder, [table], columns=("score", "match"), threshold=threshold)
    pq.write_table(table, tmp_path / "pairs/000.parquet", row_group_size=batch)
    encoder = EncoderOptions(world.encoder, max_tokens=16 * batch)
    manifest = score(replace(task, encoder=encoder, rows_per_unit=batch))
    assert (manifest["rows_out"], manifest["units"]) == (batch + 1, 2)
    found = read_scores(tmp_path / "out")
    expected = np.array([world.cosine(left, right) for left, right in rows])
    np.testing.assert_allclose(found.column("score").to_numpy(), expected, atol=tolerance)
    flips = np.flatnonzero(np.array(found.column("match").to_pylist()) != (expected >= threshold))
    assert (np.abs(expected[flips] - threshold) <= tolerance).all()


def test_an_encoder_and_a_length_never_share_vectors(world: World, tmp_path: Path) -> None:
    """AutoIntent PR#337."""
    table = texts(["pain in the left knee after a fall"], ["pain in the right hand after a burn"])
    results = set()
    for number, options in enumerate((EncoderOptions(world.encoder), EncoderOptions(world.encoder, max_length=4))):
        task = inline(tmp_path, world.encoder, [table], columns=("score",), cache=str(tmp_path / "cache"))
        score(replace(task, encoder=options, output=str(tmp_path / f"out{number}")))
        results.add(read_scores(tmp_path / f"out{number}").column("score").to_pylist()[0])
    assert len(results) == 2


def test_a_killed_encode_stage_is_resumed(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = world.texts
    task = inline(tmp_path, world.encoder, [texts(left, right)], columns=("score",))
    score(replace(task, output=str(tmp_path / "undisturbed")))
    import flipkd.run.inline as stage

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage, "encode_planned", killed)
        with pytest.raises(KeyboardInterrupt):
            score(task)
    assert os.listdir(tmp_path / "out/.flipkd") != ["lock"]
    score(task)
    assert read_scores(tmp_path / "out").equals(read_scores(tmp_path / "undisturbed"))


@pytest.mark.parametrize("top_k", [None, 1])
def test_a_unit_whose_texts_could_not_be_listed_is_not_scored_by_halves(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, top_k: int | None
) -> None:
    left, right = world.texts
    run = RunOptions(on_bad_shard="skip")
    tables = [texts(left[:9], right[:9]), texts(left[9:15], right[9:15])]
    task = inline(tmp_path, world.encoder, tables, run=run, top_k=top_k)
    call = TextsWorker.__call__

    def fails_once(self: TextsWorker, unit: WorkUnit) -> UnitReport:
        if unit.shard.name == "001.parquet":
            raise InputError("the network went away")
        return call(self, unit)

    with monkeypatch.context() as patch:
        patch.setattr(TextsWorker, "__call__", fails_once)
        manifest = score(task)
    assert (manifest["units"], manifest["reasons"], manifest["complete"]) == (1, {}, False)
    assert [failure["error"] for failure in manifest["skipped_units"]] == ["the network went away"]
    manifest = score(task)
    assert manifest["skipped_units"] == []
    assert (manifest["units"], manifest["reasons"], manifest["complete"]) == (2, {}, True)


def test_a_column_that_is_no_text_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="column 'left_text' has type double"):
        score(inline(tmp_path, world.encoder, [texts([1.0], [2.0])]))
    task = inline(tmp_path, world.encoder, [texts(["a"], ["b"])], left_text="nothing")
    with pytest.raises(ConfigError, match="no column 'nothing'"):
        score(task)
    assert dry_run(replace(task, left_text="left_text"))["rows"] == 1


def test_a_dry_run_estimates_the_distinct_texts(world: World, tmp_path: Path) -> None:
    draws = np.random.default_rng(0).integers(0, 300, (2, 400))
    left, right = ([f"text {number}" for number in side] for side in draws)
    task = inline(tmp_path, world.encoder, [texts(left, right)] * 5)
    (_, encode_stage) = dry_run(task)["stages"]
    assert encode_stage["distinct_texts_estimate"] == pytest.approx(300, rel=0.15)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_more_than_two_gib_of_text_in_one_row_group(world: World, tmp_path: Path) -> None:
    """ray#47448."""
    import psutil

    words = [f"{number} " + "long text " * 3300 for number in range(40)]  # 33 kB each, 70,000 rows: 2.3 GB
    indices = pa.array(np.arange(70_000, dtype=np.int32) % 40)
    column = pa.DictionaryArray.from_arrays(indices, pa.array(words, pa.large_string()))
    (tmp_path / "pairs").mkdir()
    table = pa.table({"left_text": column, "right_text": column})
    plain = pa.schema([("left_text", pa.large_string()), ("right_text", pa.large_string())])
    # Stored as plain text for the reader, though a Parquet dictionary keeps the file small.
    with pq.ParquetWriter(tmp_path / "pairs/a.parquet", plain) as writer:
        writer.write_table(table.cast(plain), row_group_size=70_000)
    assert pq.read_metadata(tmp_path / "pairs/a.parquet").num_row_groups == 1
    del table, column
    task = ScoreConfig(
        pairs=str(tmp_path / "pairs"),
        output=str(tmp_path / "out"),
        encoder=EncoderOptions(world.encoder, max_length=32),
        columns=("score", "truncated"),
        run=RunOptions(workers=1),
    )
    before = psutil.Process().memory_info().rss
    manifest = score(task)
    assert manifest["rows_out"] == 70_000
    found = read_scores(tmp_path / "out")
    assert found.column("score").null_count == 0
    assert all(found.column("truncated").to_pylist())
    assert psutil.Process().memory_info().rss - before < 8e9


def test_the_worlds_vectors_are_real(world: World) -> None:
    assert load_encoder(world.encoder).dim == 384


def test_narrow_decimals_are_texts_too(world: World, tmp_path: Path) -> None:
    """Arrow cannot make a dictionary of decimal32 and decimal64."""
    for kind in (pa.decimal32(5, 2), pa.decimal64(12, 2)):
        numbers = pa.array(["1.50", "12.00", None]).cast(kind)
        folder = tmp_path / str(kind.bit_width)
        folder.mkdir()
        score(inline(folder, world.encoder, [pa.table({"left_text": numbers, "right_text": ["1.50", "x", "y"]})]))
        found = read_scores(folder / "out").to_pylist()
        assert found[0]["score"] == pytest.approx(1.0, abs=1e-5)
        assert found[2]["reason"] == "missing_text"


@pytest.mark.parametrize("cached", [False, True])
def test_texts_of_a_broken_off_run_go_when_another_takes_its_place(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    """Of the same output with other options: its work folder has another name."""
    left, right = world.texts
    cache = str(tmp_path / "cache") if cached else None
    task = inline(tmp_path, world.encoder, [texts(left[:9], right[:9])], cache=cache)
    work = tmp_path / ("cache" if cached else "out/.flipkd")

    def broken(*_: Any, **__: Any) -> None:
        raise InputError("the power went away")

    with monkeypatch.context() as patch:
        patch.setattr("flipkd.run.inline.encode_planned", broken)
        for config in (task, replace(task, output=str(tmp_path / "other"))):
            with pytest.raises(InputError, match="power"):
                score(config)
    assert list(work.glob("work-*/texts/*.parquet"))
    somebody_elses = work / "work-in-progress-0123abcd"
    somebody_elses.mkdir()
    score(replace(task, threshold=0.5))
    left = [folder for folder in work.glob("work-*") if folder != somebody_elses]
    assert len(left) == (1 if cached else 0)  # that of the other output, whose job may be alive
    assert somebody_elses.exists()


def test_an_empty_name_is_not_the_current_folder(world: World, tmp_path: Path) -> None:
    task = inline(tmp_path, world.encoder, [texts(["a"], ["b"])])
    with pytest.raises(ConfigError, match="has an empty name"):
        score(replace(task, output=""))
