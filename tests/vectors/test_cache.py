"""The text cache: what is put in comes out, and nothing else does, whatever happens to its files and processes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flipkd.errors import ConfigError, InputError, OutputError
from flipkd.vectors import cache_tidy
from flipkd.vectors.cache import TextCache, open_cache, read_key, text_keys
from flipkd.vectors.cache_tidy import compact_if_free, forget_texts, tidy
from flipkd.vectors.mapped import map_file
from flipkd.vectors.rows import STORAGE, VectorRows, quantise
from flipkd.vectors.segment_files import remove_unfinished, segment_paths, write_segment
from flipkd.vectors.segments import Rows, open_segment, to_words

DIM = 12


def texts_of(numbers: Sequence[int]) -> pa.LargeStringArray:
    return pa.array([f"record {number}" for number in numbers], pa.large_string())


def rows_of(numbers: Sequence[int], dtype: str = "int8", dim: int = DIM) -> VectorRows:
    """The same vector for a number in every process."""
    random = [np.random.default_rng(number).standard_normal(dim, np.float32) for number in numbers]
    vectors = np.array(random, np.float32).reshape(len(numbers), dim)
    return quantise(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype)


def status_of(numbers: Sequence[int]) -> np.ndarray:
    return np.array([2 * (number % 2) for number in numbers], np.uint8)


def put(cache: TextCache, numbers: Sequence[int], **options: int) -> None:
    cache.put(cache.keys(texts_of(numbers)), rows_of(numbers, cache.dtype, **options), status_of(numbers))


def check(cache: TextCache, known: Sequence[int], unknown: Sequence[int] = ()) -> None:
    """Looks all of them up, mixed."""
    numbers = np.random.default_rng(0).permutation([*known, *unknown]).astype(int).tolist()
    hits = cache.look_up(cache.keys(texts_of(numbers)))
    expected = [number for number in numbers if number in set(known)]
    assert hits.found.tolist() == [number in set(known) for number in numbers]
    if expected:
        assert hits.rows is not None
        np.testing.assert_array_equal(hits.rows.values[hits.found], rows_of(expected, cache.dtype).values)
        np.testing.assert_array_equal(hits.status[hits.found], status_of(expected))
    else:
        assert hits.rows is None


@pytest.fixture
def cache(tmp_path: Path) -> TextCache:
    return open_cache(tmp_path / "cache/texts", "encoder", "int8")


def files_holding(folder: Path, data: bytes) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and data in path.read_bytes()]


class TestPutAndLookUp:
    @pytest.mark.parametrize("dtype", ["float32", "bf16", "int8"])
    def test_every_dtype_comes_back_to_the_bit(self, tmp_path: Path, dtype: str) -> None:
        cache = open_cache(tmp_path, "encoder", dtype)
        put(cache, range(5))
        put(cache, range(5, 40))
        check(open_cache(tmp_path, "encoder", dtype), range(40), range(100, 120))

    @settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        puts=st.lists(st.lists(st.integers(0, 30), max_size=12), max_size=6),
        asked=st.lists(st.integers(0, 40), max_size=30),
        dim=st.integers(1, 19),
        tidies=st.booleans(),
    )
    def test_like_a_dictionary(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        puts: list[list[int]],
        asked: list[int],
        dim: int,
        tidies: bool,
    ) -> None:
        cache = open_cache(tmp_path_factory.mktemp("cache"), "encoder", "int8")
        for numbers in puts:
            put(cache, numbers, dim=dim)
        if tidies:
            tidy(cache)
        known = {number for numbers in puts for number in numbers}
        hits = cache.look_up(cache.keys(texts_of(asked)))
        assert hits.found.tolist() == [number in known for number in asked]
        found = [number for number in asked if number in known]
        if found:
            assert hits.rows is not None
            np.testing.assert_array_equal(hits.rows.values[hits.found], rows_of(found, dim=dim).values)
            np.testing.assert_array_equal(hits.status[hits.found], status_of(found))

    def test_keys_with_one_first_half_are_told_apart(self, cache: TextCache) -> None:
        keys = np.array([[7, 3], [7, 1], [7, 2], [9, 1]], np.uint64)
        cache.put(keys[:3], rows_of([3, 1, 2]), status_of([3, 1, 2]))
        hits = cache.look_up(keys[[3, 2, 0, 1]])
        assert hits.found.tolist() == [False, True, True, True]
        assert hits.rows is not None
        np.testing.assert_array_equal(hits.rows.values[hits.found], rows_of([2, 3, 1]).values)

    def test_another_encoder_or_dtype_is_a_miss(self, tmp_path: Path) -> None:
        """AutoIntent PR#337."""
        put(open_cache(tmp_path, "encoder", "int8"), range(5))
        check(open_cache(tmp_path, "encoder", "bf16"), [], range(5))
        check(open_cache(tmp_path, "another", "int8"), [], range(5))

    def test_a_segment_that_another_process_adds_is_seen(self, cache: TextCache) -> None:
        check(cache, [], range(3))
        put(open_cache(cache.folder.parent, "encoder", "int8"), range(3))
        check(cache, range(3))

    def test_nothing_is_put_and_nothing_asked(self, cache: TextCache) -> None:
        put(cache, [])
        assert segment_paths(cache.folder) == []
        assert cache.look_up(cache.keys(texts_of([]))).rows is None


class TestPrivacy:
    def test_modes(self, cache: TextCache) -> None:
        put(cache, range(3))
        cache.look_up(cache.keys(texts_of([1])))
        root = cache.folder.parent
        assert len((root / "key").read_bytes()) == 32
        for path in [root, *root.rglob("*")]:
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path.name

    def test_no_text_and_no_plain_hash_of_it_is_kept(self, cache: TextCache) -> None:
        canary = "canary 8c1f: Jane Roe, 12 Elm Street"
        array = pa.array([canary], pa.large_string())
        cache.put(cache.keys(array), rows_of([1]), status_of([1]))
        root = cache.folder.parent
        hashes = [hashlib.new(name, canary.encode()).digest()[:8] for name in ("sha256", "md5", "blake2b", "sha1")]
        hashes.append(hashlib.blake2b(canary.encode(), digest_size=16).digest()[:8])
        for data in (canary.encode(), b"canary", *hashes):
            assert files_holding(root, data) == []
        assert not any("canary" in str(path) for path in root.rglob("*"))

    def test_two_caches_have_two_keys(self, tmp_path: Path) -> None:
        assert read_key(tmp_path / "a") != read_key(tmp_path / "b")
        keys = [text_keys(texts_of([1]), read_key(tmp_path / name), bytes(16)) for name in "ab"]
        assert not np.array_equal(*keys)

    def test_a_damaged_key_is_an_error_with_a_way_out(self, cache: TextCache) -> None:
        root = cache.folder.parent
        (root / "key").write_bytes(b"short")
        with pytest.raises(ConfigError, match="remove the folder"):
            open_cache(root, "encoder", "int8")

    def test_segments_of_a_lost_key_are_not_used_and_deleted(self, cache: TextCache) -> None:
        put(cache, range(3))
        root = cache.folder.parent
        (root / "key").unlink()
        fresh = open_cache(root, "encoder", "int8")
        check(fresh, [], range(3))
        tidy(fresh)
        assert segment_paths(fresh.folder) == []


class TestDamage:
    @pytest.mark.parametrize("place", ["header", "prefix", "rest", "check", "status", "vector"])
    def test_a_changed_byte_is_never_used(self, cache: TextCache, place: str, caplog: pytest.LogCaptureFixture) -> None:
        put(cache, range(40))
        (path,) = segment_paths(cache.folder)
        position = {"header": 20, "prefix": 64 + 8 * 7, "rest": 64 + 8 * 47, "check": 64 + 8 * 87,
                    "status": 64 + 24 * 40 + 3, "vector": 64 + 24 * 40 + 40 + 16 * 9 + 2}[place]  # fmt: skip
        data = bytearray(path.read_bytes())
        data[position] ^= 4
        path.write_bytes(data)
        fresh = open_cache(cache.folder.parent, "encoder", "int8")
        hits = fresh.look_up(fresh.keys(texts_of(range(40))))
        if place in ("prefix", "rest"):  # the key is another text's now: a miss, and all others are right
            assert np.count_nonzero(~hits.found) >= 1
            numbers = np.flatnonzero(hits.found).tolist()
            assert hits.rows is not None
            np.testing.assert_array_equal(hits.rows.values[hits.found], rows_of(numbers).values)
        else:
            assert not hits.found.any()
            assert "is damaged" in caplog.text
            assert "record" not in caplog.text
            assert not path.exists()
        put(fresh, range(40))
        check(fresh, range(40))

    @pytest.mark.parametrize("size", [0, 10, 63, 64, 500, -1])
    def test_a_truncated_segment_is_never_used(
        self, cache: TextCache, size: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        put(cache, range(40))
        (path,) = segment_paths(cache.folder)
        with open(path, "r+b") as file:
            file.truncate(size if size >= 0 else path.stat().st_size - 1)
        check(open_cache(cache.folder.parent, "encoder", "int8"), [], range(40))
        assert "is damaged" in caplog.text

    def test_compaction_leaves_a_damaged_segment_out(self, cache: TextCache, caplog: pytest.LogCaptureFixture) -> None:
        for start in (0, 10, 20):
            put(cache, range(start, start + 10))
        path = next(path for path in segment_paths(cache.folder) if holds(cache, path, 10))
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        assert tidy(cache)["texts"] == 20
        check(cache, [*range(10), *range(20, 30)], range(10, 20))
        assert caplog.text.count("is damaged") == 1

    def test_lost_times_of_use_do_no_harm(self, cache: TextCache) -> None:
        put(cache, range(5))
        check(cache, range(5))
        (used,) = cache.folder.glob("*.used")
        used.write_bytes(b"abc")
        check(cache, range(5))
        used.unlink()
        tidy(cache, limit_bytes=10**9)
        check(cache, range(5))


@contextlib.contextmanager
def few_descriptors(count: int) -> Iterator[None]:
    """This process can open only so many files more."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + count + 2, before[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        for _ in range(count):
            os.close(taken.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for descriptor in taken:
            os.close(descriptor)


class TestFilesThatCannotBeReadNow:
    def test_segments_stay_when_descriptors_run_out(self, cache: TextCache, caplog: pytest.LogCaptureFixture) -> None:
        for start in range(0, 60, 10):
            put(cache, range(start, start + 10))
        before = segment_paths(cache.folder)
        fresh = open_cache(cache.folder.parent, "encoder", "int8")
        with few_descriptors(4):
            hits = fresh.look_up(fresh.keys(texts_of(range(60))))
        assert 0 < np.count_nonzero(hits.found) < 60
        assert caplog.text.count("cannot be read now") == 1
        assert "Too many open files); they stay" in caplog.text
        assert segment_paths(cache.folder) == before
        check(fresh, range(60))

    def test_nor_does_a_compaction_delete_them(self, cache: TextCache, monkeypatch: pytest.MonkeyPatch) -> None:
        for start in (0, 10, 20):
            put(cache, range(start, start + 10))
        path = next(path for path in segment_paths(cache.folder) if holds(cache, path, 10))
        with monkeypatch.context() as patch:
            unreadable(patch, path)
            assert tidy(cache, limit_bytes=10**9)["texts"] == 20
        check(cache, range(30))

    def test_to_forget_is_an_error_then(self, cache: TextCache, monkeypatch: pytest.MonkeyPatch) -> None:
        put(cache, range(10))
        (path,) = segment_paths(cache.folder)
        with monkeypatch.context() as patch:
            unreadable(patch, path)
            with pytest.raises(OutputError, match=f"cannot read {path}: Input/output error; run again"):
                forget_texts(cache.folder.parent, texts_of([5]))
        assert forget_texts(cache.folder.parent, texts_of([5])) == 1


def unreadable(patch: pytest.MonkeyPatch, victim: Path) -> None:
    """The file cannot be mapped, as on a disk that is away."""

    def refusing(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == victim:
            raise InputError("cannot be mapped") from OSError(errno.EIO, "")
        return map_file(path, *arguments, **options)

    patch.setattr("flipkd.vectors.segments.map_file", refusing)


def holds(cache: TextCache, path: Path, number: int) -> bool:
    segment = open_segment(path, cache.kind)
    assert segment is not None
    return bool((segment.find(cache.keys(texts_of([number]))) >= 0).all())


def write_slowly(cache: TextCache, number: int, in_the_middle: Callable[[], None]) -> None:
    """Writes a segment of one vector, and does something while its file is still hidden."""

    def blocks() -> Iterator[Rows]:
        in_the_middle()
        keys = cache.keys(texts_of([number]))
        yield Rows(keys, status_of([number]), to_words(rows_of([number]).values), np.zeros(1, np.uint32))

    cache.folder.mkdir(parents=True, exist_ok=True)
    write_segment(cache.folder, cache.kind, DIM, 1, blocks(), int(time.time()))


WRITER = """
import sys
from flipkd.vectors.cache import open_cache
from flipkd.vectors.cache_tidy import compact_if_free
from tests.vectors.test_cache import put
first, step = map(int, sys.argv[2:])
number = first
while number < first + 40 * step or step < 0:
    cache = open_cache(sys.argv[1], "encoder", "int8")
    put(cache, range(number, number + 25))
    compact_if_free(cache)
    number += abs(step)
    print(number, flush=True)
"""
DYING_WRITER = """
import os, signal, sys
from flipkd.vectors.cache import open_cache
from tests.vectors.test_cache import write_slowly
write_slowly(open_cache(sys.argv[1], "encoder", "int8"), 5, lambda: os.kill(os.getpid(), signal.SIGKILL))
"""


def start(code: str, root: Path, *arguments: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, str(root), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


class TestProcesses:
    def test_two_writers_and_a_reader_at_once(self, tmp_path: Path) -> None:
        # Both make the key, and half of the texts are written by both.
        writers = [start(WRITER, tmp_path / "texts", first, 25) for first in (0, 500)]
        while not (tmp_path / "texts/key").exists():
            time.sleep(0.001)
        cache = open_cache(tmp_path / "texts", "encoder", "int8")
        while any(writer.poll() is None for writer in writers):
            numbers = list(range(0, 1600, 3))
            hits = cache.look_up(cache.keys(texts_of(numbers)))
            found = [number for number, is_found in zip(numbers, hits.found, strict=True) if is_found]
            if hits.rows is not None:
                np.testing.assert_array_equal(hits.rows.values[hits.found], rows_of(found).values)
        assert [writer.wait() for writer in writers] == [0, 0]
        check(cache, range(1500), range(1500, 1600))
        facts = tidy(cache)
        assert 1500 <= facts["texts"] <= 2000  # what both have written may still be there twice
        assert facts["segments"] <= 3
        check(cache, range(1500), range(1500, 1600))

    def test_a_writer_killed_at_any_moment_leaves_a_whole_cache(self, tmp_path: Path) -> None:
        root = tmp_path / "texts"
        for attempt in range(4):
            writer = start(WRITER, root, 1000 * attempt, -25)
            assert writer.stdout is not None
            done = 1000 * attempt
            for _ in range(6 + 3 * attempt):
                done = int(writer.stdout.readline())
            writer.send_signal(signal.SIGKILL)
            writer.wait()
            cache = open_cache(root, "encoder", "int8")
            known = [number for earlier in range(attempt) for number in range(1000 * earlier, 1000 * earlier + 150)]
            hits = cache.look_up(cache.keys(texts_of([*known, *range(1000 * attempt, done)])))
            assert hits.found.all()
            assert hits.rows is not None
            expected = rows_of([*known, *range(1000 * attempt, done)])
            np.testing.assert_array_equal(hits.rows.values[hits.found], expected.values)
        tidy(cache)
        assert [path.name for path in cache.folder.iterdir() if path.name.startswith(".")] == []

    def test_what_a_killed_writer_leaves_is_not_read_and_is_cleaned_up(
        self, cache: TextCache, caplog: pytest.LogCaptureFixture
    ) -> None:
        put(cache, range(3))
        assert start(DYING_WRITER, cache.folder.parent).wait() == -signal.SIGKILL
        assert len(list(cache.folder.glob(".*.tmp"))) == 1
        check(cache, range(3), [5])
        tidy(cache)
        assert list(cache.folder.glob(".*.tmp")) == []
        assert caplog.text == ""

    def test_a_cleaner_leaves_a_live_writer_alone(self, cache: TextCache) -> None:
        put(cache, range(3))
        write_slowly(cache, 7, lambda: tidy(cache) and None)
        check(cache, [*range(3), 7])

    def test_a_cleaner_that_comes_before_the_lock_is_no_error(
        self, cache: TextCache, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It took the new file for a dead writer's; the writer makes another."""
        lock, taken = fcntl.flock, []

        def late(file: Any, kind: int) -> None:
            if not taken:
                taken.extend(cache.folder.glob(".*.tmp"))
                taken[0].unlink()
            lock(file, kind)

        monkeypatch.setattr("flipkd.vectors.segment_files.fcntl.flock", late)
        put(cache, range(3))
        assert len(taken) == 1
        check(cache, range(3))

    def test_a_compaction_waits_for_nobody(self, cache: TextCache) -> None:
        for number in range(4):
            put(cache, [number])
        with cache_tidy.cache_lock(cache.folder.parent):
            compact_if_free(cache)
            assert len(segment_paths(cache.folder)) == 4
            put(cache, [4])  # and nobody for it
            check(cache, range(5))
        compact_if_free(cache)
        assert len(segment_paths(cache.folder)) == 1

    def test_a_cache_that_cannot_be_written_is_a_warning(
        self, cache: TextCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", full)
            put(cache, range(3))
        assert "No space left on device" in caplog.text
        assert list(cache.folder.iterdir()) == []
        check(cache, [], range(3))


class TestTidy:
    def test_many_small_segments_become_one(self, cache: TextCache, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cache_tidy, "_BLOCK_ROWS", 7)
        for start_at in range(0, 200, 10):
            put(cache, range(start_at, start_at + 15))
        assert tidy(cache)["segments"] == 1
        assert len({path.stem for path in cache.folder.iterdir()}) == 1
        check(cache, range(205), range(205, 230))

    def test_a_large_segment_is_left_alone_until_the_small_ones_have_grown(self, cache: TextCache) -> None:
        put(cache, range(300))
        (large,) = segment_paths(cache.folder)
        for night in range(1, 8):
            for part in range(2):
                put(cache, range(1000 * night + 10 * part, 1000 * night + 10 * part + 10))
            tidy(cache)
            assert large.exists()
            assert len(segment_paths(cache.folder)) <= 4
        put(cache, range(10_000, 10_100))
        tidy(cache)
        assert not large.exists()
        check(cache, [*range(300), *range(10_000, 10_100), 3005, 7019])

    def test_full_segments_are_not_merged(self, cache: TextCache, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cache_tidy, "FULL_ROWS", 60)
        for start_at in range(0, 200, 40):
            put(cache, range(start_at, start_at + 40))
        put(cache, range(200, 210))
        put(cache, range(210, 220))
        assert tidy(cache)["segments"] == 6
        check(cache, range(220))

    def test_the_limit_drops_what_was_not_used_for_longest(
        self, cache: TextCache, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = time.time()

        def at(hours: float, action: Callable[[], object]) -> None:
            with monkeypatch.context() as patch:
                patch.setattr(time, "time", lambda: now + 3600 * hours)
                action()

        at(0, lambda: put(cache, range(1000)))
        at(2, lambda: put(cache, range(1000, 1500)))
        at(4, lambda: cache.look_up(cache.keys(texts_of(range(0, 1000, 2)))))
        at(5, lambda: tidy(cache))  # times of use survive it
        size = sum(path.stat().st_size for path in cache.folder.iterdir())
        assert tidy(cache, limit_bytes=size)["dropped_texts"] == 0
        facts = tidy(cache, limit_bytes=size * 3 // 4)
        left = sum(path.stat().st_size for path in cache.folder.iterdir())
        assert size * 0.6 < left <= size * 3 // 4
        assert facts["dropped_texts"] == 1500 - facts["texts"]
        check(cache, [*range(0, 1000, 2), *range(1000, 1500)][:999:2])
        hits = cache.look_up(cache.keys(texts_of(range(1, 1000, 2))))
        assert np.count_nonzero(hits.found) == facts["texts"] - 1000  # of the oldest a part is left
        facts = tidy(cache, limit_bytes=size // 2)
        assert not cache.look_up(cache.keys(texts_of(range(1, 1000, 2)))).found.any()
        check(cache, range(0, 1000, 2))

    def test_the_limit_is_for_all_encoders_together(self, cache: TextCache, monkeypatch: pytest.MonkeyPatch) -> None:
        old = open_cache(cache.folder.parent, "older encoder", "int8")
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: 1.7e9)
            put(old, range(500))
        put(cache, range(100))
        assert tidy(cache, limit_bytes=5_010)["dropped_texts"] == 500
        check(cache, range(100))
        check(old, [], range(500))

    def test_a_failing_disk_is_an_output_error(self, cache: TextCache, monkeypatch: pytest.MonkeyPatch) -> None:
        put(cache, range(10))
        put(cache, range(10, 20))

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", full)
            with pytest.raises(OutputError, match="No space left"):
                tidy(cache)
        check(cache, range(20))


class TestForget:
    def test_the_bytes_are_in_no_file(self, tmp_path: Path) -> None:
        caches = [open_cache(tmp_path, name, dtype) for name in ("one", "two") for dtype in ("int8", "float32")]
        for cache in caches:
            put(cache, range(50))
            put(cache, range(40, 90))
            tidy(cache)
            put(cache, range(30, 35))  # twice
        gone = [3, 32, 45]
        needles = [row.tobytes() for dtype in ("int8", "float32") for row in rows_of(gone, dtype).values]
        keys = [key.tobytes() for cache in caches for key in cache.keys(texts_of(gone))[:, 0]]
        assert all(files_holding(tmp_path, data) for data in [*needles, *keys])
        assert forget_texts(tmp_path, texts_of([*gone, 1234])) == 4 * 4
        assert not any(files_holding(tmp_path, data) for data in [*needles, *keys])
        for cache in caches:
            check(cache, [number for number in range(90) if number not in gone], gone)

    def test_what_a_killed_writer_left_goes_too(self, cache: TextCache) -> None:
        assert start(DYING_WRITER, cache.folder.parent).wait() == -signal.SIGKILL
        forget_texts(cache.folder.parent, texts_of([5]))
        assert list(cache.folder.iterdir()) == []

    def test_a_live_writer_is_waited_for(self, cache: TextCache) -> None:
        forgetting = threading.Thread(target=forget_texts, args=(cache.folder.parent, texts_of([5])))

        def in_the_middle() -> None:
            forgetting.start()
            time.sleep(0.3)
            assert forgetting.is_alive()

        write_slowly(cache, 5, in_the_middle)
        forgetting.join(timeout=20)
        assert not forgetting.is_alive()
        check(cache, [], [5])

    def test_the_last_row_of_a_segment(self, cache: TextCache) -> None:
        put(cache, [1])
        for name in ("not ours", "ab", "cd" * 16):
            (cache.folder.parent / name).mkdir()
        assert forget_texts(cache.folder.parent, texts_of([1])) == 1
        assert segment_paths(cache.folder) == []

    def test_no_cache_yet(self, tmp_path: Path) -> None:
        assert forget_texts(tmp_path / "none", texts_of([1])) == 0
        assert not (tmp_path / "none").exists()


def test_unfinished_files_of_a_live_writer_stay(cache: TextCache) -> None:
    write_slowly(cache, 5, lambda: remove_unfinished(cache.folder))
    check(cache, [5])


def test_storage_of_odd_widths() -> None:
    for dtype, storage in STORAGE.items():
        words = to_words(rows_of([1, 2], dtype, dim=3).values)
        assert words.dtype == np.uint64
        assert words.shape == (2, -(-3 * storage.itemsize // 8))
