"""Private folders, and folders that are published whole or not at all."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from flipkd.data.commit import make_private_folder
from flipkd.data.folders import SEAL, is_whole, publish_folder, remove_published, remove_unpublished
from flipkd.errors import InputError, OutputError


def test_parents_that_are_made_are_private_too(tmp_path: Path) -> None:
    make_private_folder(str(tmp_path / "a" / "b" / "c"))
    assert {oct((tmp_path / name).stat().st_mode)[-3:] for name in ("a", "a/b", "a/b/c")} == {"700"}


def test_a_folder_is_published_whole(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "inner").mkdir()
        (folder / "inner" / "weights").write_bytes(b"12345")
        (folder / "facts").write_text("{}")

    publish_folder(tmp_path / "target", write)
    assert is_whole(tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    publish_folder(tmp_path / "target", lambda folder: (folder / "other").touch())  # replaced, not merged
    assert sorted(path.name for path in (tmp_path / "target").iterdir()) == [SEAL, "other"]


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []

    def flush(path: str) -> None:
        assert (tmp_path / "target").exists() is (Path(path) == tmp_path)
        flushed.append(path)

    def write(folder: Path) -> None:
        (folder / "inner").mkdir()
        (folder / "inner/weights").write_bytes(b"12345")

    monkeypatch.setattr("flipkd.data.folders.sync", flush)
    publish_folder(tmp_path / "target", write)
    (hidden,) = {path for path in map(Path, flushed) if path.parent == tmp_path}
    names = {path.relative_to(hidden).as_posix() for path in map(Path, flushed) if path not in (tmp_path, hidden)}
    assert names == {"inner", "inner/weights", SEAL}
    assert flushed[-1] == str(tmp_path)


def test_a_file_of_elsewhere_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """It was told as: cannot write the folder, no such file."""
    missing = tmp_path / "base/weights"
    with pytest.raises(InputError, match=f"^cannot read {missing}: No such file or directory; mend it and run again$"):
        publish_folder(tmp_path / "target", lambda folder: shutil.copy(missing, folder / "weights") and None)
    with pytest.raises(OutputError, match=f"^cannot write {tmp_path}/target: No such file or directory"):
        publish_folder(tmp_path / "target", lambda folder: (folder / "no/weights").touch())
    with pytest.raises(OutputError, match=f"^cannot write {tmp_path}/target: No space left on device"):
        publish_folder(tmp_path / "target", full)
    assert not list(tmp_path.iterdir())


def full(folder: Path) -> None:
    raise OSError(errno.ENOSPC, "")


@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "no seal"])
def test_damage_shows(tmp_path: Path, damage: str) -> None:
    publish_folder(tmp_path / "target", lambda folder: (folder / "weights").write_bytes(b"12345") and None)
    path = tmp_path / "target" / "weights"
    if damage == "no seal":
        (tmp_path / "target" / SEAL).unlink()
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"1234" if damage == "cut" else b"12346")
    assert not is_whole(tmp_path / "target")


def test_what_cannot_be_read_now_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_folder(tmp_path / "target", lambda folder: (folder / "weights").write_bytes(b"12345") and None)

    def unreadable(path: Path) -> str:
        raise OSError(errno.EMFILE, "")

    with monkeypatch.context() as patch:
        patch.setattr("flipkd.data.folders._digest", unreadable)
        with pytest.raises(InputError, match=f"cannot read {tmp_path}/target: Too many open files; run again"):
            is_whole(tmp_path / "target")
    assert is_whole(tmp_path / "target")


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    publish_folder(tmp_path / "target", lambda folder: (folder / "old").touch())

    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish_folder(tmp_path / "target", fail)
    assert is_whole(tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    hidden = tmp_path / f".target.{'0' * 32}.tmp"
    hidden.mkdir()
    (hidden / "half").touch()
    (tmp_path / ".other").mkdir()
    remove_unpublished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".other"]


def test_a_folder_that_is_deleted_in_part_has_no_name_that_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "step-1"
    publish_folder(target, lambda folder: (folder / "file").write_bytes(b"1") and None)
    monkeypatch.setattr("flipkd.data.folders.shutil.rmtree", lambda *_, **__: None)  # killed before it does anything
    remove_published(target)
    assert not target.exists()
    monkeypatch.undo()
    remove_unpublished(tmp_path)
    assert not list(tmp_path.iterdir())
