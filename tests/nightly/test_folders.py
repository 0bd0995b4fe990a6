"""Which nights are kept, and that nothing else is touched."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from flipkd.nightly import folders
from flipkd.nightly.folders import Nights
from tests.nightly.conftest import FIRST, SECOND, THIRD, Bank


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".flipkd")


def test_the_last_nights_are_kept_and_strangers_are_left_alone(bank: Bank, tmp_path: Path) -> None:
    # Folders that look like nights: a stranger's, a copy without its report's seal, a link, one that is unfinished.
    nights = bank.nights
    (nights / "2026-01-01").mkdir()
    (nights / "2026-01-01/keep.txt").write_text("mine")
    shutil.copytree(nights / FIRST, nights / "2026-01-02")  # its report is of another date
    shutil.copytree(nights / FIRST, tmp_path / "2026-01-03")
    (nights / "2026-01-03").symlink_to(tmp_path / "2026-01-03")
    (nights / ".2026-01-04.tmp").mkdir()
    (nights / "_unfinished/2026-01-05").mkdir(parents=True)
    strangers = {"2026-01-01", "2026-01-02", "2026-01-03", ".2026-01-04.tmp", "_unfinished", "current.json"}
    bank.forge("2026-11-22")
    bank.forge("2026-11-23")
    bank.run(SECOND, keep=2)
    assert set(names(nights)) == {FIRST, SECOND, *strangers}
    assert (nights / "2026-01-01/keep.txt").read_text() == "mine"
    assert names(nights / "_unfinished") == ["2026-01-05"]
    bank.run(SECOND, keep=1)  # a rerun keeps fewer
    assert set(names(nights)) == {SECOND, *strangers}


def test_a_folder_of_tonights_name_that_is_not_ours_is_refused(bank: Bank) -> None:
    (bank.nights / SECOND).mkdir()
    assert "is no whole night of flipkd" in bank.run(SECOND, code=1).output
    assert "is no whole night of flipkd" in bank.run(SECOND, "--overwrite", code=1).output
    (bank.nights / SECOND).rmdir()
    mine = bank.nights / "_unfinished" / SECOND / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert "flipkd did not write" in bank.run(SECOND, code=1).output
    assert "flipkd did not write" in bank.run(SECOND, "--overwrite", code=1).output
    assert mine.read_text() == "mine"


def test_the_night_compared_with_outlives_the_comparison(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    original = folders.Nights.settle

    def settle(self: Nights, folder: Path, is_good: bool) -> Path:
        seen.append((bank.nights / FIRST / "stores/left/store.json").exists() and (folder / "report").exists())
        return original(self, folder, is_good)

    monkeypatch.setattr(folders.Nights, "settle", settle)
    bank.run(SECOND, keep=1)
    assert seen == [True]
    assert bank.facts(SECOND)["last_night"] == FIRST
    assert not (bank.nights / FIRST).exists()


def test_held_nights_are_kept_beside_the_released_and_never_push_them_out(bank: Bank) -> None:
    for date in (SECOND, THIRD, "2026-11-27"):
        bank.forge(date, "_held")
    bank.run(FIRST, keep=2)
    assert names(bank.nights / "_held") == [THIRD, "2026-11-27"]
    assert bank.current()["date"] == FIRST
    assert (bank.nights / FIRST / "stores").exists()  # still what the next night is compared with
    assert (bank.nights / "_held/2026-11-27/stores").exists()  # likewise, once somebody accepts it


def test_vector_stores_are_kept_of_the_two_newest_nights_of_each_kind(bank: Bank) -> None:
    """Disk is bounded however many nights are kept; a held night that is older than a released one needs none."""
    for day in (20, 22, 23):
        bank.forge(f"2026-11-{day}")
    for day in (21, 25, 26, 27):
        bank.forge(f"2026-11-{day}", "_held")
    bank.run(FIRST)
    found = {str(path.parent.relative_to(bank.nights)) for path in bank.nights.rglob("stores")}
    assert found == {"2026-11-23", FIRST, "_held/2026-11-26", "_held/2026-11-27"}


def test_a_released_night_that_is_run_again_is_compared_as_it_was(bank: Bank) -> None:
    gates = {"max_score_psi": None, "max_new_record_share": 0.05}
    bank.run(SECOND, gates=gates)
    expected = bank.facts(SECOND)["records"]
    for _ in range(2):
        bank.run(SECOND, "--overwrite", gates=gates)
        assert bank.facts(SECOND)["records"] == expected
    assert bank.facts(SECOND)["last_night"] == FIRST
    assert expected["left"]["new"] == 0


def test_an_earlier_night_run_late_is_compared_with_those_before_it_and_not_the_current_one(bank: Bank) -> None:
    bank.forge(THIRD)
    shutil.rmtree(bank.nights / FIRST / "stores")  # of the newest nights alone they are kept
    bank.run(SECOND)
    assert bank.facts(SECOND)["last_night"] == FIRST
    assert bank.current()["date"] == THIRD
    assert bank.facts(SECOND)["records"]["left"]["new"] is None
    assert "are not counted" in (bank.nights / SECOND / "report/night.html").read_text()


def test_running_the_current_night_again_points_back_first(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    bank.forge("2026-11-23")
    assert bank.current()["date"] == FIRST
    seen: list[str] = []
    original = folders.remove_published

    def remove(folder: Path) -> None:
        seen.append(bank.current()["date"])
        original(folder)

    with monkeypatch.context() as patch:
        patch.setattr(folders, "remove_published", remove)
        bank.run(FIRST, "--overwrite")
    assert seen[0] == "2026-11-23"
    assert bank.current()["date"] == FIRST
    (bank.nights / "2026-11-23/report/night.json").unlink()  # a damaged night is no night
    bank.run(FIRST, "--overwrite")
    assert bank.facts(FIRST)["last_night"] is None


def test_a_removal_that_was_killed_is_finished_by_the_next_run(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    bank.forge("2026-11-23")
    with monkeypatch.context() as patch:
        patch.setattr("flipkd.data.folders.shutil.rmtree", lambda *_, **__: None)  # nothing but the rename
        bank.run(FIRST, keep=1)
    hidden = [name for name in names(bank.nights) if name.startswith(".2026-11-23.")]
    assert len(hidden) == 1
    assert not (bank.nights / "2026-11-23").exists()
    bank.run(FIRST, keep=1)
    assert names(bank.nights) == [FIRST, "_unfinished", "current.json"]
    assert names(bank.nights / "_unfinished") == []
