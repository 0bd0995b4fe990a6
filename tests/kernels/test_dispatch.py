"""Which implementation is chosen, and what is said when one cannot run."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flipkd.errors import KernelError
from flipkd.kernels import dispatch, native
from flipkd.kernels.pair_score import pair_score
from flipkd.vectors.rows import quantise


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing resolved before the test, nothing of the test left after it."""
    monkeypatch.delenv(dispatch.OVERRIDE, raising=False)
    native.native.cache_clear()
    dispatch._resolve.cache_clear()
    yield
    monkeypatch.undo()
    native.native.cache_clear()
    dispatch._resolve.cache_clear()


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An installation without the compiled library."""
    monkeypatch.setattr(native, "__file__", str(tmp_path / "flipkd" / "kernels" / "native.py"))


def score() -> np.ndarray:
    rows, index = quantise(np.eye(3, dtype=np.float32), "int8"), np.arange(3)
    return pair_score(rows, rows, index, index).score


@pytest.mark.usefixtures("no_library")
def test_without_library_the_reference_runs_with_one_warning() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            np.testing.assert_allclose(score(), 1.0)
    messages = [str(w.message) for w in caught if w.category is native.NativeLibraryWarning]
    assert len(messages) == 1
    assert "C++17 compiler" in messages[0]


@pytest.mark.usefixtures("no_library")
@pytest.mark.filterwarnings("ignore::flipkd.kernels.native.NativeLibraryWarning")
def test_asked_for_cpu_does_not_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.OVERRIDE, "cpu")
    with pytest.raises(KernelError, match="reinstall flipkd"):
        score()


def test_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.native() is None:
        pytest.skip("installed without a compiler")
    native.native.cache_clear()
    monkeypatch.setattr(native, "ABI_VERSION", -1)
    with pytest.warns(native.NativeLibraryWarning, match="of another version"):
        assert native.native() is None


def test_file_that_is_no_library_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "__file__", str(tmp_path / "kernels" / "native.py"))
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (tmp_path / f"_native{suffix}").write_bytes(b"not a library")
    with pytest.warns(native.NativeLibraryWarning, match="does not load"):
        assert native.native() is None


def test_unknown_choice_names_the_allowed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.OVERRIDE, "cuda")
    with pytest.raises(KernelError, match="'cuda' is not one of cpu, reference, triton"):
        score()


def test_triton_that_is_not_installed_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(KernelError, match=r"flipkd\[gpu\]"):
        dispatch.pair_score_backend("triton")


def test_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="flipkd.kernels.dispatch"):
        dispatch.pair_score_backend("reference")
        dispatch.pair_score_backend("reference")
    assert len([record for record in caplog.records if "reference" in record.message]) == 1
