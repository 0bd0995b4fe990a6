"""Killed processes, locks and full disks: nothing half, nothing twice, the same bytes after a rerun."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flipkd.config import EncodeConfig, EncoderOptions, RunOptions, ScoreConfig
from flipkd.data.location import Location, open_location
from flipkd.errors import OutputError, OutputInUseError
from flipkd.run import local, lock
from flipkd.run.encode import encode
from flipkd.run.lock import check_locks, is_locked, locked
from flipkd.run.manifest import UnitReport
from flipkd.run.score import score
from flipkd.run.score_unit import ScoreWorker
from flipkd.run.units import WorkUnit
from tests.run.conftest import World

MakePairs = Callable[..., Path]


def contents(folder: Path) -> dict[str, str]:
    """Name and digest of every output; hidden names must not be there."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != "_manifest.json" and not name.startswith(".flipkd/"):
            assert not path.name.startswith("."), f"left behind: {name}"
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def command(world: World, pairs: Path, output: Path, *options: str, delay_s: float = 0.0) -> list[str]:
    """``delay_s`` before each unit, so that what is to happen midway does."""
    stores = ["--store", world.left_store, "--right-store", world.right_store]
    return [
        sys.executable, "-m", "tests.run.faults", str(delay_s), "", "score", "--pairs", str(pairs), *stores,
        "--output", str(output), "--rows-per-unit", "1", "--no-progress", *options,
    ]  # fmt: skip


def config(world: World, pairs: Path, output: Path) -> ScoreConfig:
    return ScoreConfig(
        pairs=str(pairs), output=str(output), store=world.left_store, right_store=world.right_store, rows_per_unit=1
    )


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_a_killed_driver_is_taken_up_again_to_the_same_bytes(
    world: World, make_pairs: MakePairs, tmp_path: Path, share: float
) -> None:
    """Daft#3576."""
    pairs = make_pairs(files=60, rows=3000)
    score(config(world, pairs, tmp_path / "undisturbed"))
    expected = contents(tmp_path / "undisturbed")
    output = tmp_path / "out"
    process = subprocess.Popen(command(world, pairs, output, "--workers", "2", delay_s=0.01))
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if output.exists() and len(list(output.glob("*.parquet"))) >= share * len(expected):
                break
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = {path.name: path.stat().st_mtime_ns for path in output.glob("*.parquet")}
    assert 0 < len(done) < len(expected), "the kill came midway"
    for name in done:  # what is visible is whole
        assert hashlib.sha256((output / name).read_bytes()).hexdigest() == expected[name]
    # A kill may fall between opening and renaming a file; leave such a remnant for certain.
    (output / f".x.parquet.{'0' * 32}.tmp").write_bytes(b"half a file")
    subprocess.run(command(world, pairs, output), check=True, timeout=120)
    assert contents(output) == expected
    assert {name: (output / name).stat().st_mtime_ns for name in done} == done  # nothing was written twice


def test_a_second_job_on_a_folder_is_refused(world: World, make_pairs: MakePairs, tmp_path: Path) -> None:
    """ray#55043."""
    pairs = make_pairs()
    with locked(open_location(tmp_path / "out")):
        done = subprocess.run(command(world, pairs, tmp_path / "out"), capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "another job is working on" in done.stderr
        with pytest.raises(OutputInUseError):
            score(config(world, pairs, tmp_path / "out"))
    score(config(world, pairs, tmp_path / "out"))
    assert len(contents(tmp_path / "out")) == 12


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks of object stores in much less than their time."""
    for name, seconds in (("_HEARTBEAT_S", 0.1), ("_UNCHANGED_S", 2.0), ("_LOOK_S", 0.05)):
        monkeypatch.setattr(lock, name, seconds)


@pytest.fixture
def remote(tmp_path: Path) -> Location:
    """A folder that is not known to be local, in real files: fsspec gives all readers of one in memory one position."""
    return open_location(f"local://{tmp_path}/remote")


def lock_file(folder: Location) -> Path:
    return Path(folder.path) / ".flipkd/lock"


@contextlib.contextmanager
def beating(path: Path, clock_s: float) -> Iterator[None]:
    """Another machine's job renews the lock; its clock is off by so much."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.1):
            path.write_text(json.dumps({"holder": "elsewhere", "time": time.time() + clock_s}))

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"holder": "elsewhere", "time": time.time() + clock_s}))
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.mark.usefixtures("quick")
class TestLocksOfObjectStores:
    def test_it_is_refused_while_it_beats(self, remote: Location) -> None:
        """ray#55043, where there are no locks of an operating system."""
        with locked(remote), pytest.raises(OutputInUseError), locked(remote):
            pass
        with locked(remote):  # and free again
            pass

    @pytest.mark.parametrize("clock_s", [-1_000, 0, 1_000])
    def test_a_live_one_is_not_taken_whatever_its_clock_says(self, remote: Location, clock_s: float) -> None:
        with beating(lock_file(remote), clock_s), pytest.raises(OutputInUseError), locked(remote):
            pass

    @pytest.mark.parametrize("clock_s", [-1_000, 0, 1_000])
    def test_a_dead_one_is_taken_whatever_its_clock_said(
        self, remote: Location, clock_s: float, caplog: pytest.LogCaptureFixture
    ) -> None:
        with beating(lock_file(remote), clock_s):
            pass
        with locked(remote) as held:
            held.check()
        assert "lock is there: waiting for up to 2 s to see whether a job renews it" in caplog.text

    def test_who_waits_has_it_after_the_other_job(self, remote: Location, caplog: pytest.LogCaptureFixture) -> None:
        with contextlib.ExitStack() as other:
            other.enter_context(beating(lock_file(remote), 0))
            threading.Timer(2, other.pop_all().close).start()
            with locked(remote, waits=True):
                assert "waiting for another job that works on" in caplog.text

    def test_of_two_jobs_that_start_together_one_is_refused(
        self, remote: Location, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        both, held, looked = threading.Barrier(2), [], lock._content

        def look(target: Location) -> bytes | None:
            found = looked(target)
            if not held and both.n_waiting < 2 and not both.broken:
                with contextlib.suppress(threading.BrokenBarrierError):
                    both.wait(0.2)
            return found

        def work() -> None:
            with contextlib.suppress(OutputInUseError), locked(remote):
                held.append(threading.get_ident())
                time.sleep(1.5)

        monkeypatch.setattr(lock, "_content", look)
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(held) == 1

    def test_a_job_whose_lock_was_taken_over_learns_it_and_leaves_it(
        self, remote: Location, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It stood still for longer than a minute; its end must not let a third one in."""
        with contextlib.ExitStack() as second:
            monkeypatch.setattr(lock, "_HEARTBEAT_S", 1_000)
            with locked(remote) as first:
                first.check()
                monkeypatch.setattr(lock, "_HEARTBEAT_S", 0.2)
                second.enter_context(locked(remote))
                with pytest.raises(OutputInUseError, match="another job has taken over"):
                    first.check()
                with pytest.raises(OutputInUseError):
                    check_locks()
            assert is_locked(remote)
            check_locks()  # the second one's is held
            with pytest.raises(OutputInUseError), locked(remote):
                pass
        assert not is_locked(remote)

    @pytest.mark.parametrize("is_gone", [False, True])
    def test_a_job_that_has_lost_its_lock_ends(
        self, world: World, make_pairs: MakePairs, remote: Location, monkeypatch: pytest.MonkeyPatch, is_gone: bool
    ) -> None:
        """The other job may be at its work, or have finished it."""
        other, call, units = json.dumps({"holder": "elsewhere", "time": time.time()}), ScoreWorker.__call__, []

        def slowly(self: ScoreWorker, unit: WorkUnit) -> UnitReport:
            units.append(unit)
            if len(units) == 2:
                lock_file(remote).unlink() if is_gone else lock_file(remote).write_text(other)
            time.sleep(0.3)
            return call(self, unit)

        monkeypatch.setattr(ScoreWorker, "__call__", slowly)
        task = replace(config(world, make_pairs(), Path()), output=remote.address, run=RunOptions(threads=1))
        with pytest.raises(OutputInUseError, match=r"another job has taken over .*; this one ends"):
            score(task)
        assert 2 <= len(units) < 12
        assert not (Path(remote.path) / "_manifest.json").exists()
        assert lock_file(remote).exists() is not is_gone
        assert is_gone or lock_file(remote).read_text() == other


def test_a_lock_is_renewed_after_a_look_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network was away for a moment; the thread that renews must not end with it."""
    folder, looked, failed = open_location("memory://flipkd-lock/away"), lock._content, []

    def look(target: Location) -> bytes | None:
        if threading.current_thread() is not threading.main_thread() and not failed:
            failed.append(True)
            raise OSError("the network went away")
        return looked(target)

    monkeypatch.setattr(lock, "_HEARTBEAT_S", 0.05)
    monkeypatch.setattr(lock, "_content", look)
    with locked(folder):
        (path,) = fsspec.filesystem("memory").find("/flipkd-lock/away")
        wait_s = time.monotonic() + 20
        while not failed and time.monotonic() < wait_s:
            time.sleep(0.01)

        def renewed() -> float:
            while not (text := fsspec.filesystem("memory").cat(path)):  # it is just being written
                time.sleep(0.001)
            return float(json.loads(text)["time"])

        before = renewed()
        while renewed() == before and time.monotonic() < wait_s:
            time.sleep(0.01)
        assert renewed() > before


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A file system of 1 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield folder  # type: ignore[misc]
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_keeps_what_is_finished(
    world: World, make_pairs: MakePairs, tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ray#25372."""
    pairs = make_pairs(files=20, rows=9000)
    score(config(world, pairs, tmp_path / "undisturbed"))
    expected = contents(tmp_path / "undisturbed")
    monkeypatch.setattr("flipkd.run.job.check_space", lambda *_: None)
    output = small_disk / "out"
    with pytest.raises(OutputError, match=r"No space left on device.*finished units are kept"):
        score(config(world, pairs, output))
    found = contents(output)
    assert 0 < len(found) < len(expected)
    assert all(expected[name] == digest for name, digest in found.items())
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    score(config(world, pairs, output))
    assert contents(output) == expected


def test_a_disk_that_is_too_small_is_told_in_a_unit_that_fits(
    world: World, make_pairs: MakePairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was 0 MB of 0 MB, and encode was advised to use an option of score."""
    free = shutil.disk_usage(tmp_path)._replace(free=1234)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    told = r"out needs about [\d.]+ kB and the disk has 1.234 kB free; free some space, write fewer columns \(--columns"
    with pytest.raises(OutputError, match=told):
        score(config(world, make_pairs(rows=300), tmp_path / "out"))
    with pytest.raises(OutputError, match=r"needs about .* kB .*; free some space, or choose another --output$"):
        encode(EncodeConfig(EncoderOptions(world.encoder), world.left, str(tmp_path / "store")))


def test_a_read_only_output_is_a_clear_error(world: World, make_pairs: MakePairs, tmp_path: Path) -> None:
    """ray#25372."""
    pairs = make_pairs()
    folder = tmp_path / "read-only"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        with pytest.raises(OutputError, match="Read-only file system"):
            score(config(world, pairs, folder / "out"))
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_resume_of_a_large_job_starts_within_seconds(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ray#65685, ray#65891, ray#60002."""
    (tmp_path / "pairs").mkdir()
    ids = np.arange(1_000, dtype=np.int64)
    table = pa.table({"left_id": ids, "right_id": ids})
    for file in range(100):
        pq.write_table(table, tmp_path / f"pairs/{file}.parquet", row_group_size=10)
    task = config(world, tmp_path / "pairs", tmp_path / "out")
    with monkeypatch.context() as patch:  # the disk's flushes are not what is measured
        patch.setattr("flipkd.data.commit.sync", lambda _: None)
        score(task)
    victims = sorted((tmp_path / "out").glob("*.parquet"))
    assert len(victims) == 10_000
    for victim in victims[::100]:
        victim.unlink()
    first: list[float] = []
    original = local.attempt
    started = time.perf_counter()

    def attempt(*arguments: Any) -> UnitReport:
        first.append(time.perf_counter() - started)
        return original(*arguments)

    monkeypatch.setattr("flipkd.run.local.attempt", attempt)
    manifest = score(task)
    assert manifest["units_resumed"] == 9_900
    assert manifest["rows_in"] == 100_000
    assert min(first) < 10
    assert os.path.getsize(tmp_path / "out/.flipkd/plan.json") < 2000  # state does not grow with rows


@pytest.mark.usefixtures("quick")
def test_a_lock_that_is_just_being_written_is_not_free(remote: Location) -> None:
    """On a filesystem with real files (sftp) the holder's object is empty for a moment."""
    lock_file(remote).parent.mkdir(parents=True)
    lock_file(remote).write_bytes(b"")
    writer = threading.Timer(0.1, lock_file(remote).write_text, (json.dumps({"holder": "x", "time": time.time()}),))
    writer.start()
    assert is_locked(remote)
    lock_file(remote).write_bytes(b"")
    writer = threading.Timer(0.1, lock_file(remote).write_text, (json.dumps({"holder": "x", "time": time.time()}),))
    writer.start()
    with pytest.raises(OutputInUseError), locked(remote):
        pass
    writer.join()
