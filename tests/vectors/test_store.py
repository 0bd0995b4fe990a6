"""Sealing parts into a store, and opening it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flipkd.errors import ConfigError, ConflictingRecordsError, InputError, OutputError
from flipkd.vectors import index as index_module
from flipkd.vectors import mapped as mapped_module
from flipkd.vectors import seal as seal_module
from flipkd.vectors.mapped import HashedFile, map_file
from flipkd.vectors.rows import quantise
from flipkd.vectors.seal import seal_store
from flipkd.vectors.store import VectorStore, is_sealed

DIM = 6
HEADER = {"dtype": "float32", "encoder": "abc", "template": None}


def vectors_of(count: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, DIM), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write_part(
    path: Path,
    ids: pa.Array,
    *,
    texts: Sequence[str] | None = None,
    status: Sequence[int] | None = None,
    dtype: str = "float32",
    source: dict[str, Any] | None = None,
    vectors: np.ndarray | None = None,
    row_group_size: int = 1000,
) -> Path:
    """A part as an encode unit writes it; the texts' first 16 bytes stand for their digests."""
    rows = quantise(vectors_of(len(ids)) if vectors is None else vectors, dtype)
    width = rows.values.dtype.itemsize * DIM
    vector = pa.Array.from_buffers(pa.binary(width), len(ids), [None, pa.py_buffer(rows.values.tobytes())])
    digests = [(texts[i] if texts else str(i)).encode()[:16].ljust(16) for i in range(len(ids))]
    table = pa.table(
        {
            "id": ids,
            "vector": vector,
            "status": pa.array(status or [0] * len(ids), pa.uint8()),
            "text_digest": pa.array(digests, pa.binary(16)),
        }
    )
    about = source or {"path": path.name + ".input", "first_row": 0}
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), "flipkd.source": json.dumps(about)})
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


class TestSeal:
    @pytest.mark.parametrize("dtype", ["float32", "bf16", "int8"])
    def test_rows_status_and_ids_of_several_parts(
        self, tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(seal_module, "_BATCH_ROWS", 2)
        vectors = vectors_of(7)
        vectors[2] = 0
        parts = [
            write_part(
                tmp_path / "a", pa.array([10, 20, 30], pa.int32()), status=[0, 2, 1], dtype=dtype, vectors=vectors[:3]
            ),
            write_part(tmp_path / "b", pa.array([], pa.int64()), dtype=dtype, vectors=vectors[:0]),
            write_part(
                tmp_path / "c", pa.array([-1, None, 2**53 + 1, 5]), dtype=dtype, vectors=vectors[3:], row_group_size=3
            ),
        ]
        header = seal_store(tmp_path / "store", parts, HEADER | {"dtype": dtype})
        store = VectorStore.open(tmp_path / "store")
        assert store.header == header
        assert len(store) == 7
        assert store.rows.dtype == dtype
        assert np.array_equal(store.rows.values, quantise(vectors, dtype).values)
        assert store.status.tolist() == [0, 2, 1, 0, 8, 0, 0]
        assert header["counts"] == {
            "missing_text": 1, "truncated": 1, "invalid_text": 0, "null_ids": 1, "duplicate_records": 0
        }  # fmt: skip
        assert header["encoder"] == "abc"
        asked = pa.array([5, 2**53, 2**53 + 1, 10, None, 0])
        assert store.index.look_up(asked, column="left_id").tolist() == [6, -1, 5, 0, -1, -1]
        assert not store.rows.values.flags.writeable

    @pytest.mark.parametrize(
        "id_type",
        [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()],
        ids=str,
    )
    def test_string_ids(self, tmp_path: Path, id_type: pa.DataType, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(seal_module, "_BATCH_ROWS", 2)
        values = ["a", "a\0b", None, "a\0c", "ü"]
        array = (
            pa.array(values).dictionary_encode() if pa.types.is_dictionary(id_type) else pa.array(values).cast(id_type)
        )
        parts = [write_part(tmp_path / "a", array), write_part(tmp_path / "b", pa.array(["z", "\0"]))]
        header = seal_store(tmp_path / "store", parts, HEADER)
        assert header["id_kind"] == "bytes"
        store = VectorStore.open(tmp_path / "store")
        assert store.index.look_up(pa.array(["\0", "z", "ü", "a\0c", None, "a", "a\0b", ""])).tolist() == [
            6, 5, 4, 3, -1, 0, 1, -1
        ]  # fmt: skip

    def test_ids_of_no_bytes(self, tmp_path: Path) -> None:
        seal_store(tmp_path / "store", [write_part(tmp_path / "a", pa.array([None, ""]))], HEADER)
        assert VectorStore.open(tmp_path / "store").index.look_up(pa.array(["", "a"])).tolist() == [1, -1]

    def test_uuid_ids(self, tmp_path: Path) -> None:
        ids = pa.array([bytes([n]) * 16 for n in range(4)], pa.binary(16))
        array = pa.ExtensionArray.from_storage(pa.uuid(), ids) if hasattr(pa, "uuid") else ids
        seal_store(tmp_path / "store", [write_part(tmp_path / "a", array)], HEADER)
        assert VectorStore.open(tmp_path / "store").index.look_up(array).tolist() == [0, 1, 2, 3]

    def test_unsigned_and_signed_parts(self, tmp_path: Path) -> None:
        parts = [
            write_part(tmp_path / "a", pa.array([2**64 - 1, 3], pa.uint64())),
            write_part(tmp_path / "b", pa.array([7])),
        ]
        seal_store(tmp_path / "store", parts, HEADER)
        index = VectorStore.open(tmp_path / "store").index
        assert index.look_up(pa.array([7, -1, 3])).tolist() == [2, -1, 1]
        assert index.look_up(pa.array([2**64 - 1], pa.uint64())).tolist() == [0]
        negative = write_part(tmp_path / "c", pa.array([-7]))
        with pytest.raises(InputError, match="negative ids"):
            seal_store(tmp_path / "other", [parts[0], negative], HEADER)

    def test_the_two_kinds_of_ids_do_not_mix(self, tmp_path: Path) -> None:
        parts = [write_part(tmp_path / "a", pa.array([1])), write_part(tmp_path / "b", pa.array(["1"]))]
        with pytest.raises(InputError, match=r"a\.input are of type int64.*b\.input of type string"):
            seal_store(tmp_path / "store", parts, HEADER)

    def test_a_part_of_nulls_goes_with_any_other(self, tmp_path: Path) -> None:
        parts = [write_part(tmp_path / "a", pa.nulls(2)), write_part(tmp_path / "b", pa.array(["x"]))]
        seal_store(tmp_path / "store", parts, HEADER)
        assert VectorStore.open(tmp_path / "store").index.look_up(pa.array(["x"])).tolist() == [2]
        seal_store(tmp_path / "nulls", parts[:1], HEADER)
        store = VectorStore.open(tmp_path / "nulls")
        assert store.header["counts"]["null_ids"] == 2
        assert store.index.look_up(pa.array(["x"])).tolist() == [-1]

    @pytest.mark.parametrize("count", [0, 1])
    def test_nothing_at_all(self, tmp_path: Path, count: int) -> None:
        parts = [write_part(tmp_path / "a", pa.array([], pa.string()), vectors=vectors_of(0))] * count
        header = seal_store(tmp_path / "store", parts, HEADER | ({} if count else {"dim": 9}))
        store = VectorStore.open(tmp_path / "store")
        assert (len(store), store.rows.dim) == (0, DIM if count else 9)
        assert store.index.look_up(pa.array(["x", None])).tolist() == [-1, -1]
        assert header["id_kind"] == ("bytes" if count else "null")

    def test_fingerprint_tells_stores_apart(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def sealed(name: str, ids: list[Any], **options: Any) -> str:
            part = write_part(tmp_path / name, pa.array(ids), **options)
            return str(seal_store(tmp_path / (name + "s"), [part], HEADER)["fingerprint"])

        first = sealed("a", [1, 2, 3])
        with monkeypatch.context() as patch:
            patch.setattr(seal_module, "_BATCH_ROWS", 2)
            assert sealed("b", [1, 2, 3]) == first
        others = [
            sealed("c", [1, 2, 4]),
            sealed("d", ["1", "2", "3"]),
            sealed("e", [1, 2, 3], status=[0, 1, 0]),
            sealed("f", [1, 2, 3], vectors=vectors_of(3, 1)),
        ]
        assert len({first, *others}) == 5
        part = write_part(tmp_path / "g", pa.array([1]))
        seal_store(tmp_path / "gs", [part], HEADER | {"fingerprint": "mine"})
        assert VectorStore.open(tmp_path / "gs").fingerprint == "mine"

    def test_files_are_private(self, tmp_path: Path) -> None:
        seal_store(tmp_path / "store", [write_part(tmp_path / "a", pa.array(["x"]))], HEADER)
        assert stat.S_IMODE((tmp_path / "store").stat().st_mode) == 0o700
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "store").iterdir()}
        assert modes == dict.fromkeys(
            ["store.json", "vectors.bin", "status.bin", "ids.bin", "offsets.bin", "slots.bin"], 0o600
        )


class TestDuplicates:
    @pytest.mark.parametrize("compiled", [True, False])
    def test_same_text_is_one_record(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
        if not compiled:
            monkeypatch.setattr(index_module, "native", lambda: None)
        parts = [
            write_part(tmp_path / "a", pa.array([1, 2, 1]), texts=["one", "two", "one"]),
            write_part(tmp_path / "b", pa.array([2, 3, 2]), texts=["two", "three", "two"]),
        ]
        header = seal_store(tmp_path / "store", parts, HEADER)
        assert header["counts"]["duplicate_records"] == 3
        assert VectorStore.open(tmp_path / "store").index.look_up(pa.array([1, 2, 3])).tolist() == [0, 1, 4]

    @pytest.mark.parametrize("compiled", [True, False])
    def test_other_text_is_a_conflict_named_by_place(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool
    ) -> None:
        if not compiled:
            monkeypatch.setattr(index_module, "native", lambda: None)
        ids = pa.array(["secret-1", "secret-2"])
        parts = [
            write_part(tmp_path / "a", ids, texts=["one", "two"], source={"path": "in/x.parquet", "first_row": 100}),
            write_part(tmp_path / "b", ids, texts=["one", "other"], source={"path": "in/y.parquet", "first_row": 40}),
        ]
        with pytest.raises(ConflictingRecordsError) as caught:
            seal_store(tmp_path / "store", parts, HEADER)
        message = str(caught.value)
        assert "in/x.parquet, row 101 and in/y.parquet, row 41" in message
        assert "secret" not in message
        assert not is_sealed(tmp_path / "store")
        with pytest.raises(InputError, match="not a finished store"):
            VectorStore.open(tmp_path / "store")

    def test_null_ids_are_not_duplicates(self, tmp_path: Path) -> None:
        part = write_part(tmp_path / "a", pa.array([None, 0, None]), texts=["a", "b", "c"])
        header = seal_store(tmp_path / "store", [part], HEADER)
        assert (header["counts"]["null_ids"], header["counts"]["duplicate_records"]) == (2, 0)
        assert VectorStore.open(tmp_path / "store").index.look_up(pa.array([0])).tolist() == [1]


class TestCrash:
    @pytest.mark.parametrize("where", ["_write_rows", "_allocate", "_index", "_publish", "replace"])
    def test_a_crash_leaves_it_unsealed_and_it_can_be_done_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
    ) -> None:
        part = write_part(tmp_path / "a", pa.array(["x", "y"]))
        seal_store(tmp_path / "store", [write_part(tmp_path / "old", pa.array([1, 2, 3]))], HEADER)
        old = VectorStore.open(tmp_path / "store")

        def crash(*_: object) -> None:
            raise KeyboardInterrupt

        calls = []

        def crash_on_third(one: Path, other: Path, replace: Any = os.replace) -> None:
            calls.append(other)
            if len(calls) == 3:
                raise KeyboardInterrupt
            replace(one, other)

        with monkeypatch.context() as patched:
            if where == "replace":
                patched.setattr(seal_module.os, "replace", crash_on_third)
            else:
                patched.setattr(seal_module, where, crash)
            with pytest.raises(KeyboardInterrupt):
                seal_store(tmp_path / "store", [part], HEADER)
        assert is_sealed(tmp_path / "store") == (where != "replace")  # untouched before the first rename
        assert old.index.look_up(pa.array([3, 1])).tolist() == [2, 0]  # who had it open keeps it
        seal_store(tmp_path / "store", [part], HEADER)
        assert VectorStore.open(tmp_path / "store").index.look_up(pa.array(["y"])).tolist() == [1]
        assert not (tmp_path / "store" / ".sealing").exists()

    def test_a_full_disk_is_an_output_error(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        part = write_part(tmp_path / "a", pa.array(["x"]))
        with monkeypatch.context() as patched:
            patched.setattr(seal_module.HashedFile, "_flush", full)
            with pytest.raises(OutputError, match="store cannot be written: No space left"):
                seal_store(tmp_path / "store", [part], HEADER)
        assert not is_sealed(tmp_path / "store")


class TestHashedFile:
    def test_pieces_join_up(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(mapped_module, "PIECE_BYTES", 10)
        pieces = [np.arange(n, dtype=np.int16) for n in (0, 1, 30, 2, 5, 4)]
        with HashedFile(tmp_path / "file") as file:
            for piece in pieces:
                file.write(piece)
        whole = np.concatenate(pieces)
        assert (tmp_path / "file").read_bytes() == whole.tobytes()
        assert file.hash.digest() == hashlib.blake2b(whole.tobytes(), digest_size=16).digest()
        mapped = map_file(tmp_path / "file", np.int16)
        assert np.array_equal(mapped, whole)
        assert not mapped.flags.writeable


class TestBadParts:
    def test_truncated(self, tmp_path: Path) -> None:
        part = write_part(tmp_path / "a", pa.array([1]))
        part.write_bytes(part.read_bytes()[:-9])
        with pytest.raises(InputError, match=r"the part .*a cannot be read"):
            seal_store(tmp_path / "store", [part], HEADER)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"the part .*gone cannot be read"):
            seal_store(tmp_path / "store", [tmp_path / "gone"], HEADER)

    def test_of_another_width(self, tmp_path: Path) -> None:
        parts = [write_part(tmp_path / "a", pa.array([1])), write_part(tmp_path / "b", pa.array([2]), dtype="int8")]
        with pytest.raises(InputError, match=r"the part .*b has no column 'vector' of type fixed_size_binary\[24\]"):
            seal_store(tmp_path / "store", parts, HEADER)

    def test_without_ids(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"key": [1]}), tmp_path / "a")
        with pytest.raises(InputError, match="no columns 'id' and 'vector'"):
            seal_store(tmp_path / "store", [tmp_path / "a"], HEADER)

    def test_float_ids(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="cast the column to int64"):
            seal_store(tmp_path / "store", [write_part(tmp_path / "a", pa.array([1.0]))], HEADER)


class TestOpen:
    @pytest.mark.parametrize("name", ["vectors.bin", "status.bin", "ids.bin", "offsets.bin", "slots.bin"])
    def test_truncated_and_missing_files_are_named(self, tmp_path: Path, name: str) -> None:
        seal_store(tmp_path / "store", [write_part(tmp_path / "a", pa.array(["x", "y"]))], HEADER)
        path = tmp_path / "store" / name
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(InputError, match=name + " has .* bytes, not the"):
            VectorStore.open(tmp_path / "store")
        path.unlink()
        with pytest.raises(InputError, match=name + " is missing"):
            VectorStore.open(tmp_path / "store")

    @pytest.mark.parametrize(
        "change",
        [{"format_version": 99}, {"rows": -1}, {"rows": "2"}, {"dtype": "int4"}, {"id_kind": "float"}, {"dim": 0}],
    )
    def test_damaged_header(self, tmp_path: Path, change: dict[str, Any]) -> None:
        header = seal_store(tmp_path / "store", [write_part(tmp_path / "a", pa.array([1]))], HEADER)
        (tmp_path / "store" / "store.json").write_text(json.dumps(header | change))
        with pytest.raises(InputError, match=r"store\.json is"):
            VectorStore.open(tmp_path / "store")

    @pytest.mark.parametrize("text", ["", "{", "[]", "null"])
    def test_header_that_is_none(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "store.json").write_text(text)
        with pytest.raises(InputError, match=r"store\.json"):
            VectorStore.open(tmp_path)

    def test_no_store(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"not a finished store.*encode"):
            VectorStore.open(tmp_path / "nowhere")
        with pytest.raises(ConfigError, match="must be a local folder"):
            VectorStore.open("s3://bucket/store")
