"""Logs: every line of a JSON log is an object, in a job that warns; and nothing of a record is in it."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from flipkd.cli import main
from flipkd.logs import LogOptions, adopt_handlers, current_options, log_as_worker, logging_to_stderr

CANARY_TEXT, CANARY_ID = "zanzibar marmalade quokka", "canary-4711-id"
# `flipkd-batch` with a worker that warns as libraries do, and one file that cannot be read: a job that has much to say.
NOISY = """
import logging, sys, warnings
from flipkd.cli import main
from flipkd.errors import InputError
from flipkd.run import encode

class NoisyWorker(encode.EncodeWorker):
    def __call__(self, unit):
        warnings.warn("a library is unhappy", RuntimeWarning)
        logging.getLogger("library").warning("two\\nlines", extra={"text": "CANARY"})
        try:
            raise ValueError("cannot parse CANARY")
        except ValueError:
            logging.getLogger("library").exception("it failed")
        if unit.shard.name.startswith("1"):
            raise InputError(unit.shard.name + ": cannot be read")
        return super().__call__(unit)

encode.EncodeWorker = NoisyWorker
main(sys.argv[1:])
""".replace("CANARY", CANARY_TEXT)


@pytest.fixture
def noisy(tmp_path: Path, minilm_dir: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """noisy("--log-format", "json") -> a finished encode of two files, one of which is skipped."""
    (tmp_path / "records").mkdir()
    for file in range(2):
        table = pa.table({"id": [f"{CANARY_ID}-{file}"], "text": [CANARY_TEXT]})
        pq.write_table(table, tmp_path / f"records/{file}.parquet")
    arguments = [
        "encode", "--encoder", str(minilm_dir), "--records", str(tmp_path / "records"), "--output",
        str(tmp_path / "store"), "--on-bad-shard", "skip",
    ]  # fmt: skip

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "always", "-c", NOISY, *arguments, *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    return run


def objects(text: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in text.splitlines()]
    now = datetime.now(UTC)
    for one in found:
        assert {"time", "level", "logger", "message", "process"} <= set(one)
        told = datetime.fromisoformat(one["time"])
        assert told.utcoffset() == timedelta(0)
        assert now - timedelta(minutes=5) < told <= now
        assert one["level"] in ("debug", "info", "warning", "error")
    return found


def test_a_json_log_is_json_line_by_line(noisy: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = noisy("--log-format", "json")
    assert done.returncode == 3
    found = objects(done.stderr)
    by_logger: dict[str, list[dict[str, Any]]] = {}
    for one in found:
        by_logger.setdefault(one["logger"], []).append(one)
    warned = [one["message"] for one in by_logger["py.warnings"]]
    assert sum("RuntimeWarning: a library is unhappy" in message for message in warned) == 2
    two_lines, failed = by_logger["library"][:2]
    assert two_lines["message"] == "two\nlines"
    assert "text" not in two_lines  # what a library hangs on its records may be anything
    assert failed["exception"][-1] == "ValueError"
    assert "<string>" in failed["exception"][0]
    (skipped,) = by_logger["flipkd.run.job"]
    assert "1.parquet: cannot be read" in skipped["message"]
    progress, last = by_logger["flipkd.command"]
    assert (progress["stage"], progress["done"], progress["total"], progress["unit"]) == ("encode", 1, 2, "records")
    assert (last["level"], last["message"].startswith("partial: 1 files or units")) == ("warning", True)
    for canary in (CANARY_TEXT, CANARY_ID):
        assert canary not in done.stderr + done.stdout


def test_a_text_log_takes_the_same_records(noisy: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = noisy("--log-format", "text", "--no-progress")
    assert done.returncode == 3
    assert done.stderr.count("WARNING py.warnings: ") == 2
    assert "WARNING library: two" in done.stderr
    assert "ERROR library: it failed\n" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("partial: 1 files or units")
    for canary in (CANARY_TEXT, CANARY_ID):
        assert canary not in done.stderr + done.stdout


def test_an_error_is_an_object_too_and_the_format_may_stand_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text("log-format: json\nlog-level: error\n")
    options = ["--config", str(tmp_path / "options.yaml"), "--store", str(tmp_path / "none"), "--pairs", str(tmp_path)]
    done = CliRunner().invoke(main, ["score", *options, "--output", str(tmp_path / "out")])
    assert done.exit_code == 2
    (error,) = objects(done.stderr)
    assert (error["level"], error["logger"]) == ("error", "flipkd.command")
    assert error["message"].startswith("Error: ")
    assert current_options() is None  # a command leaves the process as it was


def test_what_was_set_up_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    root = logging.getLogger()
    before = (root.level, list(root.handlers), warnings.showwarning)
    with logging_to_stderr(LogOptions("info", "json")):
        assert current_options() == LogOptions("info", "json")
        logging.getLogger("flipkd.test").info("seen")
        logging.getLogger("flipkd.test").debug("not seen")
    logging.getLogger("flipkd.test").error("not here")
    assert (root.level, list(root.handlers), warnings.showwarning) == before
    assert [one["message"] for one in objects(sys.stderr.getvalue())] == ["seen"]  # type: ignore[attr-defined]


def test_a_worker_logs_once_whatever_its_cluster_has_set_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    theirs, ours, root = io.StringIO(), io.StringIO(), logging.getLogger()
    kept = logging.FileHandler(tmp_path / "theirs.log")
    monkeypatch.setattr(root, "handlers", [logging.StreamHandler(theirs), kept])
    monkeypatch.setattr(root, "level", root.level)
    monkeypatch.setattr("flipkd.logs._current", None)
    monkeypatch.setattr(sys, "stderr", ours)
    log_as_worker(LogOptions("warning", "json"))
    logging.captureWarnings(False)
    logging.getLogger("library").warning("it says")
    kept.close()
    assert theirs.getvalue() == ""
    assert [one["message"] for one in objects(ours.getvalue())] == ["it says"]
    assert (tmp_path / "theirs.log").read_text() == "it says\n"


def test_a_librarys_own_handlers_become_json(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    library = logging.getLogger("library.with.handlers")

    class Plain(logging.StreamHandler):  # type: ignore[type-arg]
        """As Ray's in a worker: it takes no notice of its formatter."""

        def emit(self, record: logging.LogRecord) -> None:
            self.stream.write(record.getMessage() + "\n")

    handler = Plain(stream)
    handler.addFilter(lambda record: record.getMessage() != "hidden")
    monkeypatch.setattr(library, "handlers", [handler])
    monkeypatch.setattr(library, "propagate", False)
    for form in ("text", "json"):
        with logging_to_stderr(LogOptions("warning", form)):  # type: ignore[arg-type]
            for _ in range(2):  # it may be called again
                adopt_handlers("library.with.handlers")
            library.warning("it says")
            library.warning("hidden")
    plain, structured = stream.getvalue().splitlines()
    assert plain == "it says"
    assert objects(structured)[0]["logger"] == "library.with.handlers"
