"""How ``jobs/nightly.py`` ends: its exit code, what it says on stderr, and whose its files are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from flipkd.logs import current_options
from flipkd.nightly import night
from tests.nightly.conftest import FIRST, SECOND, Bank
from tests.test_logs import objects

QUOTED = "zanzibar marmalade quokka"


def broken(*_: Any, **__: Any) -> None:
    raise KeyError(f"no such key: {QUOTED}")


def test_an_unexpected_error_shows_its_place_alone(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(night, "count_scores", broken)
    told = bank.run(SECOND, code=1)
    assert "Error: this should not happen, please report it: builtins.KeyError in nightly/night.py:" in told.stderr
    assert QUOTED not in told.output
    assert "Traceback" not in told.output
    (error,) = objects(bank.run(SECOND, "--log-format", "json", code=1).stderr)
    assert (error["level"], error["logger"]) == ("error", "flipkd.command")
    assert QUOTED not in json.dumps(error)


def test_a_json_log_is_json_line_by_line(bank: Bank) -> None:
    told = bank.run(SECOND, "--log-format", "json", "--log-level", "info", code=3, gates={"max_score_psi": 0.0})
    found = objects(told.stderr)
    assert {"night: encode left", "night: score"} <= {one["message"] for one in found}
    (gate,) = [one["message"] for one in found if one["logger"] == "flipkd.command"]
    assert gate.startswith("gate max_score_psi: ")
    assert current_options() is None
    (error,) = objects(bank.run(FIRST, "--log-format", "json", "--accept", "", code=2).stderr)
    assert error["message"].startswith("Error: --accept needs a reason")


def test_files_that_libraries_make_are_private_from_their_first_moment(
    bank: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touch(*_: Any, **__: Any) -> None:
        (tmp_path / "made").touch()
        raise KeyError

    monkeypatch.setattr(night, "count_scores", touch)
    previous = os.umask(0)
    try:
        bank.run(SECOND, code=1)
        assert os.umask(0) == 0  # a command leaves the process as it was
    finally:
        os.umask(previous)
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o600
