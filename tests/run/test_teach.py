"""``teach``: pairs in, the same pairs with teacher scores out, and a bi-encoder's vectors beside them."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

import flipkd
from flipkd.cli import main
from flipkd.config import EncoderOptions, RunOptions, TeachConfig
from flipkd.data.find import find_shards
from flipkd.data.location import open_location
from flipkd.data.records import text_digests
from flipkd.data.teacher_scores import TEACHER_VECTORS, TeacherFacts, read_teacher_facts
from flipkd.errors import ConfigError, ConflictingRecordsError, InputError, ModelError, OutputError
from flipkd.run import teach as teach_module
from flipkd.run.manifest import UnitReport
from flipkd.run.plan_teach import plan_teach
from flipkd.run.status import status
from flipkd.run.teach import teach
from flipkd.run.texts import TextsWorker
from flipkd.run.units import WorkUnit
from flipkd.vectors.store import VectorStore
from tests.run.conftest import RECORDS, World, record_id
from tests.run.test_kill import contents
from tests.run.test_score import read_scores

MakePairs = Callable[..., Path]


def save_cross_encoder(folder: Path, minilm_dir: Path, activation: str = "Sigmoid") -> str:
    """A small BERT with a random head and MiniLM's tokenizer, saved by sentence-transformers."""
    tokenizer = AutoTokenizer.from_pretrained(minilm_dir)
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64, initializer_range=0.3, num_labels=1,
    )  # fmt: skip
    plain = folder.with_name(f"{folder.name}-plain")
    BertForSequenceClassification(config).eval().save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    CrossEncoder(str(plain), device="cpu", activation_fn=getattr(torch.nn, activation)()).save_pretrained(str(folder))
    return str(folder)


@pytest.fixture(scope="session")
def cross_encoder(minilm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_cross_encoder(tmp_path_factory.mktemp("cross") / "model", minilm_dir)


def inline(tmp_path: Path, teacher: str, files: Sequence[pa.Table], **options: Any) -> TeachConfig:
    (tmp_path / "pairs").mkdir(exist_ok=True)
    for number, table in enumerate(files):
        pq.write_table(table, tmp_path / f"pairs/{number:03d}.parquet")
    return TeachConfig(EncoderOptions(teacher), str(tmp_path / "pairs"), str(tmp_path / "out"), **options)


def texts(left: Sequence[Any], right: Sequence[Any], **columns: Any) -> pa.Table:
    return pa.table({"left_text": pa.array(left, pa.string()), "right_text": pa.array(right, pa.string()), **columns})


def facts_of(folder: Path | str) -> TeacherFacts | None:
    location = open_location(folder)
    return read_teacher_facts(location, find_shards(location))


def same(found: pa.Table, table: pa.Table) -> bool:
    """Whether the columns of ``table`` are in ``found`` as they are; a NaN is equal to itself here."""
    kept = found.select(table.schema.names)
    return bool(kept.schema.equals(table.schema)) and str(kept.to_pylist()) == str(table.to_pylist())


def id_pairs(world: World, pairs: Path, output: Path, **options: Any) -> TeachConfig:
    return TeachConfig(
        EncoderOptions(world.encoder), str(pairs), str(output), records=world.left, right_records=world.right, **options
    )


def test_a_bi_encoder_scores_with_its_cosines_and_leaves_its_vectors(world: World, tmp_path: Path) -> None:
    left, right = world.texts
    files = [texts(left[:20], right[:20]), texts([*left[10:30], left[0]], [*right[10:30], f" {right[1]}\n"])]
    manifest = teach(inline(tmp_path, world.encoder, files, rows_per_unit=8))
    found = read_scores(tmp_path / "out")
    assert found.schema.names == ["left_text", "right_text", "teacher_score", "reason", "truncated"]
    assert found.schema.field("teacher_score").type == pa.float32()
    assert found.column("right_text").to_pylist()[-1] == f" {right[1]}\n"  # the input stays as it is
    peer = SentenceTransformer(world.encoder, device="cpu")
    rows = [(row, row) for row in [*range(20), *range(10, 30)]] + [(0, 1)]
    vectors = [peer.encode(side, normalize_embeddings=True) for side in (left, right)]
    expected = [float(vectors[0][first] @ vectors[1][second]) for first, second in rows]
    np.testing.assert_allclose(found.column("teacher_score").to_numpy(), expected, atol=1e-5)

    store = VectorStore.open(tmp_path / "out" / TEACHER_VECTORS)
    distinct = sorted({*left[:30], *right[:30]})
    assert len(store) == len(distinct) == manifest["stages"]["encode"]["counts"]["distinct_texts"]
    key = bytes.fromhex(manifest["fingerprint"])
    places = store.index.look_up(text_digests(pa.array(distinct, pa.large_string()), key))
    assert store.rows.dtype == "float32"
    np.testing.assert_allclose(store.rows.values[places], peer.encode(distinct, normalize_embeddings=True), atol=1e-5)
    assert sorted(os.listdir(tmp_path / "out/.flipkd")) == ["lock", "plan.json"]  # no text is left behind
    assert stat.S_IMODE(os.stat(tmp_path / "out" / TEACHER_VECTORS).st_mode) == 0o700

    facts = facts_of(tmp_path / "out")
    assert facts is not None
    assert (facts.scale, facts.kind, facts.activation) == ("cosine", "bi-encoder", None)
    assert facts.text_columns == ("left_text", "right_text")
    assert facts.label_column is None
    assert manifest["teacher"]["fingerprint"] == facts.fingerprint
    assert manifest["complete"]
    footer = pq.read_metadata(next(iter((tmp_path / "out").glob("*.parquet")))).metadata
    assert json.loads(footer[b"flipkd.teacher"])["scale"] == "cosine"


def test_a_cross_encoder_scores_as_sentence_transformers_does(world: World, cross_encoder: str, tmp_path: Path) -> None:
    left, right = world.texts
    rows = [(0, 0), (1, 1), (0, 2), (1, 1), (2, 0), (0, 0)]
    swapped = [(right[second], left[first]) for first, second in rows[:2]]
    pairs = [(left[first], right[second]) for first, second in rows] + swapped + [("short", "long text " * 90)]
    table = texts(*zip(*pairs, strict=True))
    manifest = teach(inline(tmp_path, cross_encoder, [table]))
    found = read_scores(tmp_path / "out")
    scores = found.column("teacher_score").to_numpy()
    expected = CrossEncoder(cross_encoder, device="cpu").predict(pairs)
    np.testing.assert_allclose(scores, expected, atol=2e-6)
    assert scores[0] == scores[5]
    assert abs(scores[0] - scores[6]) > 1e-4  # the order of a pair matters
    assert found.column("truncated").to_pylist() == [False] * 8 + [True]
    assert manifest["counts"] == {"distinct_pairs": 7, "truncated": 1}
    assert (manifest["teacher"]["scale"], manifest["teacher"]["activation"]) == ("probability", "Sigmoid")
    assert manifest["stages"] == {}
    assert not (tmp_path / "out" / TEACHER_VECTORS).exists()


def test_a_swapped_pair_of_a_bi_encoder_scores_the_same(world: World, tmp_path: Path) -> None:
    """sentence-transformers#799."""
    left, right = world.texts[0][:8], world.texts[1][:8]
    teach(inline(tmp_path, world.encoder, [texts([*left, *right], [*right, *left])]))
    scores = read_scores(tmp_path / "out").column("teacher_score").to_pylist()
    assert scores[:8] == scores[8:]


@pytest.mark.parametrize("kind", ["bi-encoder", "cross-encoder"])
@pytest.mark.parametrize("null_first", [True, False])
def test_missing_texts_have_a_reason_and_no_score(
    world: World, cross_encoder: str, tmp_path: Path, kind: str, null_first: bool
) -> None:
    """dedupe#460, mteb#1043, for a teacher."""
    rows = [(None, "x"), ("", ""), (" ", "x"), ("x", None), ("x", "x")]
    rows = rows if null_first else rows[::-1]
    raw = pa.array([b"he\xffllo", b"x"], pa.binary())
    broken = pa.table({"left_text": pa.Array.from_buffers(pa.string(), 2, raw.buffers()), "right_text": ["x", "x"]})
    teacher = world.encoder if kind == "bi-encoder" else cross_encoder
    manifest = teach(inline(tmp_path, teacher, [texts(*zip(*rows, strict=True)), broken]))
    found = read_scores(tmp_path / "out")
    reasons = [None if pair == ("x", "x") else "missing_text" for pair in rows] + ["invalid_text", None]
    assert found.column("reason").to_pylist() == reasons
    scores = found.column("teacher_score").to_pylist()
    assert [score is None for score in scores] == [reason is not None for reason in reasons]
    assert manifest["reasons"] == {"invalid_text": 1, "missing_text": 4}
    assert manifest["rows_out"] == 7


@pytest.mark.parametrize("kind", ["bi-encoder", "cross-encoder"])
def test_a_teacher_sees_one_form_of_a_name_and_the_raw_text_stays(
    world: World, cross_encoder: str, tmp_path: Path, kind: str
) -> None:
    """The rule of scoring holds for teachers: transformers#5738; a leading space: sentence-transformers#782."""
    names = ["Nguyễn Văn Ân", "مُحَمَّد", "😀 李小龙", "Café"]
    forms = [f" {unicodedata.normalize(form, name)}\n" for name in names for form in ("NFC", "NFD")] + names
    teach(inline(tmp_path, world.encoder if kind == "bi-encoder" else cross_encoder, [texts(forms, ["Ann"] * 12)]))
    found = read_scores(tmp_path / "out")
    assert found.column("left_text").to_pylist() == forms
    scores = found.column("teacher_score").to_pylist()
    assert scores[0:8:2] == scores[1:8:2] == scores[8:]
    assert len(set(scores)) == 4


@pytest.mark.parametrize("kind", ["bi-encoder", "cross-encoder"])
def test_nothing_to_score_is_a_result_too(world: World, cross_encoder: str, tmp_path: Path, kind: str) -> None:
    teacher = world.encoder if kind == "bi-encoder" else cross_encoder
    manifest = teach(inline(tmp_path, teacher, [texts([None, ""], [None, " "]), texts([], [])]))
    assert manifest["reasons"] == {"missing_text": 2}
    assert manifest["units"] == 2
    assert read_scores(tmp_path / "out").column("teacher_score").null_count == 2
    assert facts_of(tmp_path / "out") is not None


LABELS = (
    pa.array([1, 0, None], pa.int64()),
    pa.array([1.0, 0.0, float("nan")], pa.float64()),
    pa.array([True, False, None]),
    pa.array(["1", "0", None]),
    pa.array(["1", "0", "1"]).dictionary_encode(),
    pa.array([None] * 3, pa.null()),
    pa.array([1, 0, None], pa.decimal128(3, 1)),
)


def test_labels_and_other_columns_pass_through_type_and_all(world: World, tmp_path: Path) -> None:
    """transformers#27707: labels stay as they are."""
    other = {
        "when": pa.array([1, None, 3], pa.timestamp("us", tz="UTC")),
        "tags": pa.array([["a", None], None, []], pa.list_(pa.string())),
        "score": pa.array([0.5, None, 1.0]),
    }
    tables = [texts(["a cat", "rain", "x"], ["a dog", "rain", "y"], label=labels, **other) for labels in LABELS]
    manifest = teach(inline(tmp_path, world.encoder, tables))
    assert manifest["label_column"] == manifest["teacher"]["label_column"] == "label"
    made = sorted((tmp_path / "out").glob("*.parquet"))
    for path, table in zip(made, tables, strict=True):
        assert same(pq.read_table(path), table)
    # The same for pairs of ids, whose texts take the way over another file.
    ids = {"left_id": pa.array([record_id(0)] * 3), "right_id": pa.array([record_id(1), None, record_id(99)])}
    tables = [pa.table({**ids, "label": labels, **other}) for labels in LABELS]
    (tmp_path / "ids").mkdir()
    for number, table in enumerate(tables):
        pq.write_table(table, tmp_path / f"ids/{number}.parquet")
    teach(id_pairs(world, tmp_path / "ids", tmp_path / "ids-out"))
    for path, table in zip(sorted((tmp_path / "ids-out").glob("*.parquet")), tables, strict=True):
        found = pq.read_table(path)
        assert same(found, table)
        assert found.column("reason").to_pylist() == [None, "missing_id", "missing_record"]


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (pa.array([0, 1, 2]), InputError, r"001\.parquet .*'label' is neither 0 nor 1 in row 2"),
        (pa.array([0.0, 0.5, 1.0]), InputError, "'label' is neither 0 nor 1 in row 1"),
        (pa.array(["1", "yes", "0"]), InputError, "'label' is neither 0 nor 1 in row 1"),
        (pa.array([[1], [0], [1]]), ConfigError, "'label' has type list"),
    ],
)
def test_labels_that_are_none_end_the_job_before_it_starts(
    world: World, tmp_path: Path, labels: pa.Array, error: type[Exception], message: str
) -> None:
    """transformers#27707."""
    good = texts(["a"] * 3, ["b"] * 3, label=pa.array([1, 0, 1]))
    task = inline(tmp_path, world.encoder, [good, good.set_column(2, "label", labels)])
    with pytest.raises(error, match=message):
        teach(task)
    assert not (tmp_path / "out").exists()


def test_a_label_column_of_another_name_or_in_some_files_only(world: World, tmp_path: Path) -> None:
    table = texts(["a"], ["b"], same=pa.array([1]))
    task = inline(tmp_path, world.encoder, [table])
    assert teach(replace(task, label_column="same"))["label_column"] == "same"
    with pytest.raises(ConfigError, match="no label column 'nothing'"):
        teach(replace(task, label_column="nothing"))
    task = inline(tmp_path, world.encoder, [table, texts(["a"], ["b"])], label_column="same")
    with pytest.raises(InputError, match=r"000\.parquet has a label column 'same' and 001\.parquet has none"):
        teach(task)


def test_a_plan_opens_each_file_once(world: World, tmp_path: Path, opened: Counter[str]) -> None:
    left, right = world.texts
    labels = pa.array([1, 0] * 5, pa.int8())
    planned = plan_teach(inline(tmp_path, world.encoder, [texts(left[:10], right[:10], label=labels)] * 3))
    assert planned.teacher.label_column == "label"
    assert opened == {f"{number:03d}.parquet": 1 for number in range(3)}


def test_a_wrong_label_is_no_bad_file(world: World, tmp_path: Path) -> None:
    skip = RunOptions(on_bad_shard="skip")
    table = texts(["a", "b"], ["c", "d"], label=pa.array([1, 2], pa.int8()))
    with pytest.raises(InputError, match="'label' is neither 0 nor 1 in row 1"):
        plan_teach(inline(tmp_path, world.encoder, [table], run=skip))


@pytest.mark.parametrize("kind", ["bi-encoder", "cross-encoder"])
def test_pairs_of_ids_score_as_their_texts_do(
    world: World, cross_encoder: str, make_pairs: MakePairs, tmp_path: Path, kind: str
) -> None:
    pairs = make_pairs(files=2, name="id-pairs")
    task = id_pairs(world, pairs, tmp_path / "ids", rows_per_unit=12)
    if kind == "cross-encoder":
        task = replace(task, teacher=EncoderOptions(cross_encoder))
    manifest = teach(task)
    found = read_scores(tmp_path / "ids")
    assert found.schema.names == [
        "left_id", "right_id", "n", "left_text", "right_text", "teacher_score", "reason", "truncated",
    ]  # fmt: skip
    assert found.column("n").to_pylist() == list(range(60))  # input order
    rows = [[value - record_id(0) for value in found.column(name).to_pylist()] for name in ("left_id", "right_id")]
    for side, name in enumerate(("left_text", "right_text")):
        assert found.schema.field(name).type == pa.large_string()
        assert found.column(name).to_pylist() == [world.texts[side][row] for row in rows[side]]
    assert manifest["stages"]["join"]["rows_in"] == 60
    inline_task = inline(tmp_path, task.teacher.folder, [found.select(["left_text", "right_text"])])
    teach(inline_task)
    np.testing.assert_allclose(
        read_scores(tmp_path / "out").column("teacher_score").to_numpy(),
        found.column("teacher_score").to_numpy(),
        atol=1e-6,
    )
    if kind == "bi-encoder":
        expected = [world.cosine(first, second) for first, second in zip(*rows, strict=True)]
        np.testing.assert_allclose(found.column("teacher_score").to_numpy(), expected, atol=1e-5)


def test_reasons_of_pairs_of_ids(world: World, tmp_path: Path) -> None:
    """mimic-code#20, for a teacher."""
    records = {"name": ["caf\u00e9", "", None, "b\0", "a dog"], "id": ["k0", "k1", "k2", None, "k4"]}
    (tmp_path / "records").mkdir()
    pq.write_table(pa.table(records), tmp_path / "records/a.parquet")
    # The same record twice, with one normal form, is one record.
    again = pa.table({"name": ["cafe\u0301"], "id": pa.array([b"k0"], pa.binary())})
    pq.write_table(again, tmp_path / "records/b.parquet")
    left = pa.array(["k0", "k1", "k2", None, "k9", None]).dictionary_encode()
    table = pa.table({"a": left, "b": ["k4", "k4", "k0", "k0", "k4", "k9"]})
    (tmp_path / "pairs").mkdir()
    pq.write_table(table, tmp_path / "pairs/a.parquet")
    task = TeachConfig(
        EncoderOptions(world.encoder), str(tmp_path / "pairs"), str(tmp_path / "out"),
        left_column="a", right_column="b", records=str(tmp_path / "records"), template="The {name}.",
    )  # fmt: skip
    teach(task)
    found = read_scores(tmp_path / "out")
    missing = ["missing_text", "missing_text", "missing_id", "missing_record", "missing_id"]
    assert found.column("reason").to_pylist() == [None, *missing]
    assert found.column("left_text").to_pylist() == ["The caf\u00e9.", None, None, None, None, None]
    assert found.column("teacher_score").null_count == 5
    assert found.select(["a", "b"]).equals(table)


def test_conflicting_records_are_refused_by_place(world: World, tmp_path: Path) -> None:
    """splink#70, matchbox#370."""
    (tmp_path / "records").mkdir()
    pq.write_table(pa.table({"id": [1, 2, 1], "text": ["a", "b", "a"]}), tmp_path / "records/a.parquet")
    pq.write_table(pa.table({"id": [3, 2], "text": ["a", "secret"]}), tmp_path / "records/b.parquet")
    (tmp_path / "pairs").mkdir()
    pq.write_table(pa.table({"left_id": [1], "right_id": [2]}), tmp_path / "pairs/a.parquet")
    task = TeachConfig(
        EncoderOptions(world.encoder), str(tmp_path / "pairs"), str(tmp_path / "out"), records=str(tmp_path / "records")
    )
    with pytest.raises(ConflictingRecordsError, match=r"a\.parquet, row 1 and b\.parquet, row 1") as caught:
        teach(task)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("kind", [pa.uint64(), pa.int8(), pa.int64(), pa.float64(), pa.string()], ids=str)
def test_types_of_ids(world: World, tmp_path: Path, kind: pa.DataType) -> None:
    (tmp_path / "records").mkdir()
    big = 2**64 - 1
    pq.write_table(
        pa.table({"id": pa.array([1, big], pa.uint64()), "text": ["a", "b"]}), tmp_path / "records/a.parquet"
    )
    (tmp_path / "pairs").mkdir()
    ids = pa.array([1, big, 3], kind) if kind == pa.uint64() else pa.array([1, -1, 3]).cast(kind)
    pq.write_table(pa.table({"left_id": ids, "right_id": ids}), tmp_path / "pairs/a.parquet")
    task = TeachConfig(
        EncoderOptions(world.encoder), str(tmp_path / "pairs"), str(tmp_path / "out"), records=str(tmp_path / "records")
    )
    if kind in (pa.float64(), pa.string()):
        with pytest.raises(ConfigError, match="column 'left_id' is of type"):
            teach(task)
        return
    teach(task)
    second = None if kind == pa.uint64() else "missing_record"  # -1 is not 2**64 - 1
    assert read_scores(tmp_path / "out").column("reason").to_pylist() == [None, second, "missing_record"]


def test_ids_beyond_those_of_the_records_are_of_no_record(world: World, tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    pq.write_table(pa.table({"id": [1, 2], "text": ["a", "b"]}), tmp_path / "records/a.parquet")
    (tmp_path / "pairs").mkdir()
    ids = pa.array([1, 2**64 - 5], pa.uint64())
    pq.write_table(pa.table({"left_id": ids, "right_id": ids}), tmp_path / "pairs/a.parquet")
    teach(
        TeachConfig(
            EncoderOptions(world.encoder),
            str(tmp_path / "pairs"),
            str(tmp_path / "out"),
            records=str(tmp_path / "records"),
        )
    )
    assert read_scores(tmp_path / "out").column("reason").to_pylist() == [None, "missing_record"]


@pytest.mark.parametrize("kind", ["bi-encoder", "cross-encoder", "ids"])
def test_resume_gives_the_same_bytes(
    world: World, cross_encoder: str, make_pairs: MakePairs, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "ids":
        task = id_pairs(world, make_pairs(files=2), tmp_path / "out", rows_per_unit=10)
    else:
        teacher = world.encoder if kind == "bi-encoder" else cross_encoder
        tables = [texts(side[:25], other[:25]) for side, other in (world.texts, world.texts[::-1])]
        task = inline(tmp_path, teacher, tables, rows_per_unit=10)
    teach(task)
    expected = contents(tmp_path / "out")
    assert len([name for name in expected if name.endswith(".parquet")]) == 6
    victim = sorted((tmp_path / "out").glob("*.parquet"))[1]
    victim.unlink()
    assert status(str(tmp_path / "out"))["units_done"] == 5
    with monkeypatch.context() as patch:
        patch.setattr(teach_module, "encode_inline", None)  # the vectors are there: nothing is encoded again
        manifest = teach(task)
    assert (manifest["units"], manifest["units_resumed"]) == (6, 5)
    assert contents(tmp_path / "out") == expected
    assert teach(task)["units_resumed"] == 6
    assert status(str(tmp_path / "out"))["state"] == "finished"
    if kind != "cross-encoder":
        shutil.rmtree(tmp_path / "out" / TEACHER_VECTORS)
        teach(task)
        assert contents(tmp_path / "out").keys() == expected.keys()


def test_a_killed_stage_is_resumed(
    world: World, make_pairs: MakePairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = make_pairs(files=2)
    teach(id_pairs(world, pairs, tmp_path / "undisturbed"))
    from flipkd.run import inline

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    replace_file = os.replace

    def killed_at_the_end(source: str, target: str) -> None:
        if str(target).endswith(TEACHER_VECTORS):
            raise KeyboardInterrupt
        replace_file(source, target)

    task = id_pairs(world, pairs, tmp_path / "out")
    faults = [
        (inline, "merge_texts", killed),
        (inline, "encode_planned", killed),
        (os, "replace", killed_at_the_end),
    ]
    for module, name, fault in faults:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fault)
            with pytest.raises(KeyboardInterrupt):
                teach(task)
        assert status(str(tmp_path / "out"))["state"] == "unfinished"
        assert not (tmp_path / "out" / TEACHER_VECTORS).exists()
    teach(task)
    assert read_scores(tmp_path / "out").equals(read_scores(tmp_path / "undisturbed"))
    assert sorted(os.listdir(tmp_path / "out/.flipkd")) == ["lock", "plan.json"]


def test_new_pairs_and_another_teacher(world: World, cross_encoder: str, tmp_path: Path) -> None:
    left, right = world.texts
    teach(inline(tmp_path, world.encoder, [texts(left[:9], right[:9])]))
    task = inline(tmp_path, world.encoder, [])
    pq.write_table(texts(left[5:20], right[5:20]), tmp_path / "pairs/more.parquet")
    manifest = teach(task)
    assert manifest["units_resumed"] == 1
    assert len(VectorStore.open(tmp_path / "out" / TEACHER_VECTORS)) == 40
    other = replace(task, teacher=EncoderOptions(cross_encoder))
    with pytest.raises(OutputError, match="another run"):
        teach(other)
    teach(replace(other, run=RunOptions(overwrite=True)))
    assert not (tmp_path / "out" / TEACHER_VECTORS).exists()
    facts = facts_of(tmp_path / "out")
    assert facts is not None
    assert facts.kind == "cross-encoder"
    (tmp_path / "out" / TEACHER_VECTORS).mkdir()
    with pytest.raises(OutputError, match="is not a folder of teacher vectors"):
        teach(replace(other, run=RunOptions(overwrite=True)))


@pytest.mark.parametrize("kind", ["scale", "teacher", "none"])
def test_mixed_teacher_scores_are_refused(
    world: World, cross_encoder: str, minilm_dir: Path, tmp_path: Path, kind: str
) -> None:
    """sentence-transformers#1004, sentence-transformers#1058."""
    table = texts(["a cat", "rain"], ["a dog", "snow"])
    task = inline(tmp_path, cross_encoder, [table])
    teach(task)
    if kind == "none":
        pq.write_table(table, tmp_path / "out/z.parquet")
        expected = r"z\.parquet no teacher scores"
    else:
        if kind == "scale":
            other = EncoderOptions(save_cross_encoder(tmp_path / "identity", minilm_dir, "Identity"))
            expected = "has the scale probability of a cross-encoder .* the scale logit of a cross-encoder"
        else:
            other = EncoderOptions(cross_encoder, max_length=9)
            expected = "mixes teacher scores"
        teach(replace(task, teacher=other, output=str(tmp_path / "other")))
        (made,) = (tmp_path / "other").glob("*.parquet")
        shutil.copy(made, tmp_path / "out/z.parquet")
    with pytest.raises(InputError, match=expected):
        facts_of(tmp_path / "out")
    assert facts_of(tmp_path / "pairs") is None


def test_what_cannot_be_used_is_refused_early(world: World, make_pairs: MakePairs, tmp_path: Path) -> None:
    task = inline(tmp_path, world.encoder, [texts(["a"], ["b"], teacher_score=pa.array([1.0]))])
    with pytest.raises(ConfigError, match="has a column 'teacher_score' already"):
        teach(task)
    ids = pa.table({"left_id": [1], "right_id": [1], "left_text": ["x"]})
    (tmp_path / "ids").mkdir()
    pq.write_table(ids, tmp_path / "ids/a.parquet")
    with pytest.raises(ConfigError, match="has a column 'left_text' already"):
        teach(id_pairs(world, tmp_path / "ids", tmp_path / "out"))
    named = id_pairs(world, tmp_path / "ids", tmp_path / "named", left_text="l", right_text="r")
    assert teach(named)["teacher"]["text_columns"] == ("l", "r")
    task = inline(tmp_path, world.encoder, [texts(["a"], ["b"])])
    with pytest.raises(ConfigError, match="has no column 'nothing'"):
        teach(replace(task, left_text="nothing"))
    pq.write_table(pa.table({"left_text": [1.0], "right_text": ["a"]}), tmp_path / "pairs/000.parquet")
    with pytest.raises(ConfigError, match="column 'left_text' has type double"):
        teach(task)
    with pytest.raises(ConfigError, match="must be a local folder"):
        teach(replace(task, output="memory://flipkd-teach/out"))
    with pytest.raises(ModelError, match="no such folder"):
        teach(replace(task, teacher=EncoderOptions(str(tmp_path / "none"))))
    with pytest.raises(ConfigError, match="needs --records"):
        replace(task, right_records=world.right)
    with pytest.raises(ConfigError, match="lie in one another"):
        teach(replace(task, output=str(tmp_path / "pairs/out")))
    assert not (tmp_path / "out").exists()


def test_a_bad_file_is_skipped_and_mended(world: World, tmp_path: Path) -> None:
    left, right = world.texts
    task = inline(tmp_path, world.encoder, [texts(left[:9], right[:9]), texts(left[9:15], right[9:15])])
    good = (tmp_path / "pairs/001.parquet").read_bytes()
    # The footer is whole, and the rows are not.
    (tmp_path / "pairs/001.parquet").write_bytes(good[:4] + bytes(len(good) // 2 - 4) + good[len(good) // 2 :])
    (tmp_path / "pairs/002.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError):
        teach(task)
    skipping = replace(task, run=RunOptions(on_bad_shard="skip"))
    manifest = teach(skipping)
    assert not manifest["complete"]
    assert [shard["name"] for shard in manifest["skipped_shards"]] == ["002.parquet"]
    assert manifest["rows_out"] == 9
    (tmp_path / "pairs/001.parquet").write_bytes(good)
    (tmp_path / "pairs/002.parquet").unlink()
    manifest = teach(task)
    assert (manifest["units_resumed"], manifest["complete"]) == (1, True)
    assert read_scores(tmp_path / "out").column("reason").null_count == 15


def test_a_unit_that_a_stage_skipped_is_not_scored_by_halves(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, right = world.texts
    task = inline(tmp_path, world.encoder, [texts(left[:9], right[:9]), texts(left[9:15], right[9:15])])
    skipping = replace(task, run=RunOptions(on_bad_shard="skip"))
    call = TextsWorker.__call__

    def fails_once(self: TextsWorker, unit: WorkUnit) -> UnitReport:
        if unit.shard.name == "001.parquet":
            raise InputError("the network went away")
        return call(self, unit)

    with monkeypatch.context() as patch:
        patch.setattr(TextsWorker, "__call__", fails_once)
        manifest = teach(skipping)
    assert (manifest["units"], manifest["complete"]) == (1, False)
    manifest = teach(skipping)
    assert (manifest["units"], manifest["units_resumed"], manifest["complete"]) == (2, 1, True)
    assert read_scores(tmp_path / "out").column("reason").null_count == 15


def test_a_cross_encoder_on_an_object_store(
    cross_encoder: str, world: World, make_pairs: MakePairs, tmp_path: Path
) -> None:
    import fsspec

    remote = fsspec.filesystem("memory")
    pairs = make_pairs(files=2)
    remote.put(str(pairs), "/flipkd-teach/pairs", recursive=True)
    try:
        here = replace(id_pairs(world, pairs, tmp_path / "out"), teacher=EncoderOptions(cross_encoder))
        teach(here)
        there = replace(here, pairs="memory://flipkd-teach/pairs", output="memory://flipkd-teach/out")
        assert teach(there)["rows_out"] == 60
        root = open_location(there.output)
        tables = []
        for shard in find_shards(root):
            with root.filesystem.open_input_file(shard.path) as source:
                tables.append(pq.read_table(source))
        assert pa.concat_tables(tables).equals(read_scores(tmp_path / "out"))
    finally:
        remote.rm("/flipkd-teach", recursive=True)


def test_the_command_and_its_job(world: World, cross_encoder: str, tmp_path: Path) -> None:
    inline(tmp_path, cross_encoder, [texts(["a cat", None], ["a dog", "x"], label=pa.array([1, 0]))])
    options = ["--teacher", cross_encoder, "--pairs", str(tmp_path / "pairs"), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(main, ["teach", *options, "--no-progress"])
    assert result.exit_code == 0, result.output
    assert "teach: 2 rows in, 2 out, 1 missing_text" in result.output
    result = CliRunner().invoke(main, ["status", str(tmp_path / "out"), "--json"])
    assert json.loads(result.output)["state"] == "finished"
    assert flipkd.teach is teach
    assert flipkd.TeachConfig is TeachConfig
    import jobs.precompute_teacher as job

    assert job.__doc__ is not None
    for word in ("left_text", "teacher_score", "cosine", "ray job submit"):
        assert word in job.__doc__


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bi-encoder", "cross-encoder"])
def test_ray_local_gives_the_same_bytes(
    world: World, cross_encoder: str, make_pairs: MakePairs, tmp_path: Path, kind: str
) -> None:
    teacher = world.encoder if kind == "bi-encoder" else cross_encoder
    pairs = make_pairs(files=3)
    task = replace(id_pairs(world, pairs, tmp_path / "here", rows_per_unit=20), teacher=EncoderOptions(teacher))
    teach(task)
    run = [
        sys.executable, "-m", "flipkd.cli", "teach", "--teacher", teacher, "--pairs", str(pairs),
        "--output", str(tmp_path / "there"), "--records", world.left, "--right-records", world.right,
        "--rows-per-unit", "20", "--ray", "local", "--no-progress",
    ]  # fmt: skip
    done = subprocess.run(run, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr

    def outputs(folder: Path) -> dict[str, str]:
        # The store's header names its own stages' files, whose times differ.
        found = contents(folder)
        return {name: digest for name, digest in found.items() if not name.endswith(".json")}

    assert outputs(tmp_path / "there") == outputs(tmp_path / "here")
    assert len(outputs(tmp_path / "here")) >= 6
    assert RECORDS == 60
