"""Publish a local folder whole or not at all, and tell a whole one from a damaged one."""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from flipkd.data.commit import TEMPORARY_SUFFIX, make_private_folder, sync, writing

SEAL = "_files.json"


def publish_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Has ``write`` fill a hidden folder beside ``target``, seals and flushes it, and renames it to ``target``.

    The seal holds the size and SHA-256 of each file. An older folder of that name is replaced: between two renames
    there is none, so what reads it must live with either.

    Raises:
        OutputError: the disk is full, or not writable; nothing is left behind.
    """
    hidden = target.parent / f".{target.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}"
    old = target.parent / f".{target.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}"
    with writing(str(target)):
        try:
            make_private_folder(str(hidden))
            write(hidden)
            files = sorted(path for path in hidden.rglob("*") if path.is_file())
            seal = {path.relative_to(hidden).as_posix(): [path.stat().st_size, _digest(path)] for path in files}
            (hidden / SEAL).write_text(json.dumps(seal, indent=1))
            for path in [*files, hidden / SEAL]:
                path.chmod(0o600)
                sync(str(path))
            if target.exists():
                target.rename(old)
            try:
                hidden.rename(target)
            except OSError:
                if old.exists():
                    old.rename(target)
                raise
            sync(str(target.parent))
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def is_whole(folder: Path) -> bool:
    """Whether the folder holds what was published: every file, with its size and digest."""
    try:
        seal = json.loads((folder / SEAL).read_text())
        same = all((folder / name).stat().st_size == size for name, (size, _) in seal.items())
        return same and all(_digest(folder / name) == digest for name, (_, digest) in seal.items())
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def remove_published(folder: Path) -> None:
    """Deletes a published folder; one that is deleted in part by a killed process does not look like one any more."""
    hidden = folder.parent / f".{folder.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}"
    with writing(str(folder)):
        folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def remove_unpublished(parent: Path, name: str = "") -> None:
    """Deletes hidden folders that a killed process left in ``parent``; of the target ``name`` alone, if it is given."""
    prefix = f".{name}." if name else "."
    if parent.is_dir():
        for path in parent.iterdir():
            if path.is_dir() and path.name.startswith(prefix) and path.name.endswith(TEMPORARY_SUFFIX):
                shutil.rmtree(path, ignore_errors=True)


def _digest(path: Path) -> str:
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
