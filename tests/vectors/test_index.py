"""The id index against a Python dict, compiled and in numpy."""

from __future__ import annotations

import ctypes
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flipkd.errors import ConfigError, InputError
from flipkd.kernels.native import native
from flipkd.vectors import index as index_module
from flipkd.vectors import index_reference as reference
from flipkd.vectors.id_types import check_id_type, id_kind
from flipkd.vectors.index import IdIndex, bucket_count, build_index, index_files
from tests.guarded import guarded

INTEGERS = (pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())
NULL_ID = 8


@pytest.fixture(params=["native", "numpy"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with the compiled library and without it."""
    if request.param == "numpy":
        monkeypatch.setattr(index_module, "native", lambda: None)
    elif native() is None:
        pytest.skip("flipkd was installed without its compiled library")
    return str(request.param)


def build(folder: Path, kind: str, values: list[Any]) -> tuple[IdIndex, list[list[int]]]:
    """Write and build an index of `values` (None: a null id). Returns it and its duplicates."""
    folder.mkdir(parents=True, exist_ok=True)
    status = np.array([NULL_ID if value is None else 0 for value in values], np.uint8)
    if kind == "bytes":
        ids = [b"" if value is None else value for value in values]
        np.cumsum([0, *map(len, ids)], dtype=np.uint64).tofile(folder / "offsets.bin")
        (folder / "ids.bin").write_bytes(b"".join(ids))
    else:
        np.array([0 if value is None else value for value in values], kind).tofile(folder / "ids.bin")
    id_bytes = (folder / "ids.bin").stat().st_size
    for name, size_bytes in index_files(kind, len(values), id_bytes).items():
        if name == "slots.bin":
            (folder / name).write_bytes(bytes(size_bytes))
        assert (folder / name).stat().st_size == size_bytes
    duplicates = [pair for block in build_index(folder, kind, status, NULL_ID) for pair in block.tolist()]
    index = IdIndex.open(folder, kind, "string" if kind == "bytes" else kind, len(values))
    return replace(
        index, ids=guarded(index.ids), table=guarded(index.table), offsets=guarded(index.offsets)
    ), duplicates


def closed(array: pa.Array) -> pa.Array:
    """The same, its buffers where a read past them ends the test run."""
    if pa.types.is_dictionary(array.type) or pa.types.is_binary_view(array.type):
        return array
    buffers = [None if b is None else pa.py_buffer(guarded(np.frombuffer(b, np.uint8))) for b in array.buffers()]
    return pa.Array.from_buffers(array.type, len(array), buffers, offset=array.offset)


def rows_of(values: list[Any]) -> tuple[dict[Any, int], list[list[int]]]:
    """What the index should answer, and the duplicates it should find."""
    rows: dict[Any, int] = {}
    duplicates = []
    for row, value in enumerate(values):
        if value is not None and rows.setdefault(value, row) != row:
            duplicates.append([rows[value], row])
    return rows, duplicates


@contextmanager
def no_more_threads() -> Iterator[None]:
    """Within, a new thread asks for a stack larger than the address space, so none can be started."""
    libc = ctypes.CDLL(None)
    usual, huge = (ctypes.create_string_buffer(256) for _ in range(2))  # a pthread_attr_t has 56 bytes
    for attributes in (usual, huge):
        assert libc.pthread_getattr_default_np(attributes) == 0
    assert libc.pthread_attr_setstacksize(huge, ctypes.c_size_t(1 << 56)) == 0
    assert libc.pthread_setattr_default_np(huge) == 0
    try:
        yield
    finally:
        assert libc.pthread_setattr_default_np(usual) == 0


fresh = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@st.composite
def integer_case(draw: st.DrawFn) -> tuple[str, list[int | None], pa.DataType, list[int | None]]:
    kind = draw(st.sampled_from(["int64", "uint64"]))
    low, high = (-(2**63), 2**63 - 1) if kind == "int64" else (0, 2**64 - 1)
    near = st.integers(max(low, -20), 20)
    edges = st.sampled_from([low, high, 2**53, 2**53 + 1, 2**63 - 1])
    values = draw(st.lists(st.none() | near | edges | st.integers(low, high), max_size=60))
    asked = draw(st.sampled_from(INTEGERS))
    width = asked.bit_width
    asked_low, asked_high = (-(2 ** (width - 1)), 2 ** (width - 1) - 1)
    if not pa.types.is_signed_integer(asked):
        asked_low, asked_high = 0, 2**width - 1
    known = [v for v in values if v is not None and asked_low <= v <= asked_high]
    anything = st.none() | st.integers(asked_low, asked_high) | st.integers(max(-20, asked_low), 20)
    if known:
        anything = st.sampled_from(known) | anything
    return kind, values, asked, draw(st.lists(anything, max_size=80))


class TestLookUp:
    @fresh
    @given(case=integer_case(), cut=st.integers(0, 5))
    def test_integers_of_any_width(self, backend: str, tmp_path_factory: Any, case: Any, cut: int) -> None:
        kind, values, asked, queries = case
        index, duplicates = build(tmp_path_factory.mktemp("index"), kind, values)
        rows, expected_duplicates = rows_of(values)
        assert duplicates == expected_duplicates
        found = index.look_up(closed(pa.array(queries, asked).slice(cut)))
        assert found.dtype == np.int32
        assert found.tolist() == [-1 if q is None else rows.get(q, -1) for q in queries[cut:]]

    @fresh
    @given(
        values=st.lists(st.none() | st.binary(max_size=3) | st.binary(max_size=40), max_size=60),
        others=st.lists(st.none() | st.binary(max_size=3), max_size=20),
        form=st.sampled_from(["binary", "large_binary", "binary_view", "dictionary"]),
        seed=st.integers(0, 1000),
        cut=st.integers(0, 5),
    )
    def test_bytes_in_any_form(
        self, backend: str, tmp_path_factory: Any, values: Any, others: Any, form: str, seed: int, cut: int
    ) -> None:
        index, duplicates = build(tmp_path_factory.mktemp("index"), "bytes", values)
        rows, expected_duplicates = rows_of(values)
        assert duplicates == expected_duplicates
        queries = values + values[:7] + others
        random.Random(seed).shuffle(queries)
        array = pa.array(queries, pa.binary())
        array = array.dictionary_encode() if form == "dictionary" else array.cast(getattr(pa, form)())
        array = closed(array)
        expected = [-1 if q is None else rows.get(q, -1) for q in queries]
        assert index.look_up(array.slice(cut)).tolist() == expected[cut:]
        chunked = pa.chunked_array([array.slice(0, cut), array.slice(cut)])
        assert index.look_up(chunked, column="left_id").tolist() == expected

    @pytest.mark.parametrize("string_type", [pa.string(), pa.large_string(), pa.string_view()], ids=str)
    def test_strings(self, backend: str, tmp_path: Path, string_type: pa.DataType) -> None:
        values = ["Zürich", "", "a", "a\0", "a\0b", "東京", "x" * 70_000, "x" * 70_001]
        index, _ = build(tmp_path, "bytes", [value.encode() for value in values])
        queries = [*reversed(values), "x" * 69_999, "a\0\0", None]
        assert index.look_up(pa.array(queries, string_type)).tolist() == [7, 6, 5, 4, 3, 2, 1, 0, -1, -1, -1]

    def test_fixed_size_binary_and_uuid(self, backend: str, tmp_path: Path) -> None:
        values = [bytes([n]) * 16 for n in range(50)]
        index, _ = build(tmp_path, "bytes", values)
        array = pa.array([values[7], None, values[3], b"\xff" * 16, values[3]], pa.binary(16))
        assert index.look_up(array).tolist() == [7, -1, 3, -1, 3]
        assert index.look_up(array.slice(2)).tolist() == [3, -1, 3]
        if hasattr(pa, "uuid"):
            assert index.look_up(pa.ExtensionArray.from_storage(pa.uuid(), array)).tolist() == [7, -1, 3, -1, 3]

    def test_ids_that_differ_after_a_nul(self, backend: str, tmp_path: Path) -> None:
        """ray PR#35638, duckdb PR#1942."""
        index, duplicates = build(tmp_path, "bytes", [b"id\0a", b"id\0b", b"id", b"id\0"])
        assert duplicates == []
        assert index.look_up(pa.array([b"id\0b", b"id", b"id\0", b"id\0a"])).tolist() == [1, 2, 3, 0]

    @pytest.mark.parametrize("length", [*range(1, 20), 70_000])
    def test_equal_hashes_are_not_enough(self, backend: str, tmp_path: Path, length: int) -> None:
        # Two ids of one hash are hard to find, so the stored id is changed under its slot: one byte, each in turn.
        key = bytes(range(1, length + 1)) if length < 256 else b"k" * length
        index, _ = build(tmp_path, "bytes", [key])
        assert index.look_up(pa.array([key])).tolist() == [0]
        for place in range(length) if length < 256 else (0, length // 2, length - 1):
            ids = np.array(index.ids)
            ids[place] ^= 0x80
            other = IdIndex(Path("store"), "bytes", "string", 1, index.table, ids, index.offsets)
            assert other.look_up(pa.array([key])).tolist() == [-1]

    def test_a_null_between_equal_keys(self, backend: str, tmp_path: Path) -> None:
        # Under the null lies the same value: it must be taken neither for the key nor for "as before".
        index, _ = build(tmp_path, "int64", [5, 6])
        validity = pa.py_buffer(bytes([0b10101]))
        array = pa.Array.from_buffers(pa.int64(), 5, [validity, pa.py_buffer(np.full(5, 6, np.int64))])
        assert index.look_up(array).tolist() == [1, -1, 1, -1, 1]

    def test_dictionary_of_integers_with_nulls(self, backend: str, tmp_path: Path) -> None:
        index, _ = build(tmp_path, "int64", [10, 20, 30])
        array = pa.DictionaryArray.from_arrays(pa.array([0, None, 2, 1], pa.int8()), pa.array([30, None, 99]))
        assert index.look_up(array).tolist() == [2, -1, -1, -1]
        assert index.look_up(array.slice(1, 2)).tolist() == [-1, -1]

    @pytest.mark.parametrize("kind", ["int64", "uint64", "bytes"])
    def test_empty(self, backend: str, tmp_path: Path, kind: str) -> None:
        index, _ = build(tmp_path / "none", kind, [])
        values = pa.array([b"a", None]) if kind == "bytes" else pa.array([1, None])
        assert index.look_up(values).tolist() == [-1, -1]
        index, _ = build(tmp_path / "some", kind, [b"a"] if kind == "bytes" else [1])
        assert index.look_up(values[:0]).tolist() == []
        assert index.look_up(pa.chunked_array([], values.type)).tolist() == []
        assert index.look_up(pa.nulls(3)).tolist() == [-1, -1, -1]

    def test_only_null_ids_in_the_store(self, backend: str) -> None:
        index = IdIndex.open(Path("unused"), "null", "null", 3)
        assert index.look_up(pa.array([1, None])).tolist() == [-1, -1]
        assert index.look_up(pa.array(["a"])).tolist() == [-1]

    def test_more_than_two_thousand_million_rows_answer_in_int64(self, tmp_path: Path) -> None:
        index, _ = build(tmp_path, "int64", [3, 4])
        wide = IdIndex(Path("store"), "int64", "int64", 2**31, index.table, index.ids, index.offsets)
        found = wide.look_up(pa.array([4, 5]))
        assert found.dtype == np.int64
        assert found.tolist() == [1, -1]

    def test_a_full_table_ends_a_search(self, backend: str, tmp_path: Path) -> None:
        # Not what build_index makes, but what a damaged file may hold.
        index, _ = build(tmp_path, "int64", [3, 4])
        table = np.array(index.table)
        table["row"][:] = 1
        table["key"][:] = 77
        full = IdIndex(Path("store"), "int64", "int64", 2, table, index.ids, index.offsets)
        assert full.look_up(pa.array([5])).tolist() == [-1]

    @pytest.mark.parametrize("kept", [3, 2**31, 2**31 + 1, 2**32 - 1])
    def test_a_row_that_is_not_there_is_damage(self, backend: str, tmp_path: Path, kept: int) -> None:
        index, _ = build(tmp_path, "int64", [3, 4])
        table = np.array(index.table)
        table["row"][table["row"] != 0] = kept
        damaged = IdIndex(Path("store"), "int64", "int64", 2, table, index.ids, index.offsets)
        with pytest.raises(InputError, match="the store store is damaged"):
            damaged.look_up(pa.array([3]))


class TestLarge:
    @pytest.mark.parametrize("kind", ["int64", "bytes"])
    def test_native_equals_numpy_and_threads_do_not_matter(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        if native() is None:
            pytest.skip("flipkd was installed without its compiled library")
        rng = np.random.default_rng(3)
        numbers = rng.integers(0, 2**62, 60_000)
        numbers[50_000:] = numbers[:10_000]
        values = [b"cust-%d" % n for n in numbers.tolist()] if kind == "bytes" else numbers.tolist()
        compiled, duplicates = build(tmp_path / "native", kind, values)
        assert duplicates == [[row, 50_000 + row] for row in range(10_000)]
        picks = rng.integers(0, len(values), 200_000)
        picks[100_000:] = np.sort(picks[100_000:])  # half of it grouped
        misses = rng.random(len(picks)) < 0.1
        queries = pa.array([values[p] for p in picks.tolist()], mask=rng.random(len(picks)) < 0.1)
        if kind == "int64":
            queries = pa.array(np.where(misses, -1, numbers[picks]), mask=np.asarray(queries.is_null()))
        one = compiled.look_up(queries, threads=1)
        assert np.array_equal(compiled.look_up(queries, threads=2), one)
        assert np.array_equal(compiled.look_up(queries, threads=7), one)
        expected = np.where(picks >= 50_000, picks - 50_000, picks)
        if kind == "int64":
            expected = np.where(misses, -1, expected)
        assert np.array_equal(one, np.where(np.asarray(queries.is_null()), -1, expected))
        monkeypatch.setattr(index_module, "native", lambda: None)
        assert np.array_equal(compiled.look_up(queries), one)  # numpy reads what C++ wrote
        slow, slow_duplicates = build(tmp_path / "numpy", kind, values)
        assert slow_duplicates == duplicates
        monkeypatch.undo()
        assert np.array_equal(slow.look_up(queries), one)  # and the other way round

    def test_threads_that_cannot_be_started_are_done_without(self, tmp_path: Path) -> None:
        if native() is None:
            pytest.skip("flipkd was installed without its compiled library")
        index, _ = build(tmp_path, "int64", [7, 5])
        queries = pa.array(np.arange(200_000))
        expected = index.look_up(queries, threads=1)
        with no_more_threads():
            found = index.look_up(queries, threads=4)
        assert np.array_equal(found, expected)

    def test_more_duplicates_than_are_handed_out_at_a_time(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(index_module, "_DUPLICATES", 7)
        monkeypatch.setattr(index_module, "_BUILD_ROWS", 50)
        values = [n % 10 for n in range(333)]
        index, duplicates = build(tmp_path, "int64", values)
        assert duplicates == rows_of(values)[1]
        assert index.look_up(pa.array(range(12))).tolist() == [*range(10), -1, -1]

    def test_hash_of_every_length(self) -> None:
        library = native()
        if library is None:
            pytest.skip("flipkd was installed without its compiled library")
        # The home bucket is what the two have to agree on: a wrong hash would only show as a longer search.
        values = [bytes(range(length)) for length in range(64)]
        data, offsets = reference.binary_parts(pa.array(values, pa.large_binary()))
        h = reference.hash_bytes(data, offsets)
        status = np.zeros(1, np.uint8)
        for row, value in enumerate(values):
            table = np.zeros(1, reference.BYTES_BUCKET)
            one = np.array([0, len(value)], np.uint64)
            raw = np.frombuffer(value, np.uint8) if value else np.empty(0, np.uint8)
            found = ctypes.c_int64()
            library.flipkd_index_build_bytes(
                *(index_module._array(a) for a in (raw, one)),
                ctypes.c_uint64(len(value)),
                ctypes.c_uint64(1),
                index_module._array(status),
                ctypes.c_uint8(0),
                ctypes.c_int64(0),
                ctypes.c_int64(1),
                index_module._array(table),
                ctypes.c_uint64(1),
                None,
                ctypes.c_int64(1),
                ctypes.byref(found),
            )
            assert table["slot"]["tag"][0, 0] == h[row] & 0xFFFFFFFF

    def test_another_process_maps_the_same_files(self, tmp_path: Path) -> None:
        build(tmp_path, "bytes", [b"one", b"two", b"three"])
        script = (
            "import pathlib, sys, pyarrow as pa; from flipkd.vectors.index import IdIndex\n"
            "index = IdIndex.open(pathlib.Path(sys.argv[1]), 'bytes', 'string', 3)\n"
            "print(index.look_up(pa.array(['three', 'one', 'four'])).tolist(), index.table.flags.writeable)"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": str(Path(index_module.__file__).parents[2])},
        )
        assert done.stdout.strip() == "[2, 0, -1] False"


class TestTypes:
    @pytest.mark.parametrize("id_type", [pa.float32(), pa.float64()], ids=str)
    def test_floats_are_refused_with_the_way_out(self, id_type: pa.DataType) -> None:
        with pytest.raises(ConfigError, match=r"'left_id' is of type (float|double).*int64.*Int64") as caught:
            check_id_type(id_type, "left_id")
        assert caught.value.exit_code == 2

    @pytest.mark.parametrize(
        "id_type", [pa.bool_(), pa.decimal128(5), pa.timestamp("us"), pa.list_(pa.int64()), pa.struct([])], ids=str
    )
    def test_others_are_refused_by_name(self, id_type: pa.DataType) -> None:
        with pytest.raises(ConfigError) as caught:
            check_id_type(id_type, "key")
        assert "'key'" in str(caught.value)
        assert str(id_type) in str(caught.value)

    def test_integers_against_strings(self, tmp_path: Path) -> None:
        strings, _ = build(tmp_path / "strings", "bytes", [b"1"])
        with pytest.raises(ConfigError, match=r"'left_id' is of type int32.*of type string"):
            strings.look_up(pa.array([1], pa.int32()), column="left_id")
        integers, _ = build(tmp_path / "integers", "int64", [1])
        with pytest.raises(ConfigError, match=r"'right_id' is of type dictionary<.*string.*of type int64"):
            integers.look_up(pa.array(["1"]).dictionary_encode(), column="right_id")

    def test_kinds(self) -> None:
        assert [id_kind(t) for t in INTEGERS] == ["int64"] * 7 + ["uint64"]
        assert id_kind(pa.dictionary(pa.int8(), pa.string())) == "bytes"
        assert id_kind(pa.null()) == "null"

    def test_a_table_always_has_a_free_slot(self) -> None:
        for kind, slots in (("int64", 5), ("bytes", 4)):
            assert all(bucket_count(kind, rows) * slots > rows for rows in range(2000))
