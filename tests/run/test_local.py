"""Units that are tried again, in this process and in a worker of Ray's."""

from __future__ import annotations

import errno
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tenacity import wait_none

from flipkd.data.find import Shard
from flipkd.data.location import may_pass, open_location
from flipkd.errors import FlipkdError, InputError, OutputError
from flipkd.run import local
from flipkd.run.cluster import _UnitActor
from flipkd.run.local import attempt
from flipkd.run.manifest import UnitReport
from flipkd.run.units import WorkUnit

Run = Callable[..., UnitReport]
UNIT = WorkUnit(Shard("a", "a.parquet", 1, 0), 0, 1, (0, 1), 0, "a.rows0-1.parquet", "f" * 12)


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(local, "_WAIT", wait_none())
    umask = os.umask(0o077)
    yield
    os.umask(umask)


class Failing:
    """A worker that raises an error some times, then works."""

    def __init__(self, error: Exception, times: int, cause: Exception | None) -> None:
        self.error, self.times, self.cause, self.calls = error, times, cause, 0

    def __call__(self, unit: WorkUnit) -> UnitReport:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error from self.cause
        return UnitReport(unit.output, 1, 1)


def reading(cause: Exception, times: int) -> Failing:
    return Failing(InputError("cannot read a.parquet: it broke off"), times, cause)


def run_here(worker: Failing, skip: bool, max_retries: int, folder: Path) -> UnitReport:
    return attempt(worker, UNIT, skip, None, max_retries)


def run_in_ray_worker(worker: Failing, skip: bool, max_retries: int, folder: Path) -> UnitReport:
    actor = _UnitActor(lambda threads: worker, 1, open_location(folder), max_retries, skip, None)
    (data,) = actor({"unit": [pickle.dumps(UNIT)]})["result"]
    result = pickle.loads(data)
    if isinstance(result, FlipkdError):
        raise result
    assert isinstance(result, UnitReport)
    return result


@pytest.mark.parametrize("run", [run_here, run_in_ray_worker])
class TestTriesAgain:
    def test_a_read_that_broke_off(self, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        worker = reading(OSError(errno.ECONNRESET, "reset"), 3)
        assert run(worker, False, 3, tmp_path).error is None
        assert worker.calls == 4
        assert caplog.text.count("cannot read a.parquet: it broke off; it is tried again in 0 s") == 3

    def test_no_more_often_than_told(self, run: Run, tmp_path: Path) -> None:
        worker = reading(OSError(errno.ECONNRESET, "reset"), 3)
        with pytest.raises(InputError, match="it broke off"):
            run(worker, False, 2, tmp_path)
        assert worker.calls == 3
        worker = reading(OSError(errno.ECONNRESET, "reset"), 3)
        assert "it broke off" in run(worker, True, 2, tmp_path).error

    @pytest.mark.parametrize(
        "worker",
        [
            reading(FileNotFoundError(errno.ENOENT, "gone"), 1),
            reading(OSError("Couldn't deserialize thrift: TProtocolException: Invalid data"), 1),
            Failing(InputError("has changed since it was listed"), 1, None),
            Failing(OutputError("cannot write"), 1, OSError(errno.EIO, "")),
        ],
        ids=["not there", "damaged", "changed", "written"],
    )
    def test_nothing_else(self, run: Run, tmp_path: Path, worker: Failing) -> None:
        worker.calls = 0
        with pytest.raises(FlipkdError):
            run(worker, False, 3, tmp_path)
        assert worker.calls == 1


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (OSError(errno.EIO, ""), True),
        (TimeoutError(), True),
        (OSError("When reading information for key 'k': AWS Error UNKNOWN (HTTP status 503) during HeadObject"), True),
        (
            OSError("When reading information for key 'k': AWS Error NETWORK_CONNECTION during GetObject operation"),
            True,
        ),
        (OSError("When reading information for key 'k': AWS Error ACCESS_DENIED during HeadObject operation"), False),
        (PermissionError(errno.EACCES, ""), False),
        (OSError("could not verify page integrity, CRC checksum verification failed for page_ordinal 0"), False),
        (ValueError("not a number"), False),
    ],
)
def test_which_errors_may_pass(error: Exception, passes: bool) -> None:
    assert may_pass(error) is passes
    wrapped = InputError("cannot read")
    wrapped.__cause__ = error
    assert may_pass(wrapped) is passes
