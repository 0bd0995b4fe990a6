"""Publish a local folder whole or not at all, tell a whole one from a damaged one, and what is not ours in it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from flipkd.data.commit import TEMPORARY_NAME, TEMPORARY_SUFFIX, make_private_folder, sync, writing
from flipkd.data.json_files import parse_object
from flipkd.data.location import reason
from flipkd.errors import InputError, OutputError

SEAL = "_files.json"


def publish_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Has ``write`` fill a hidden folder beside ``target``, seals and flushes it, and renames it to ``target``.

    The seal holds the size and SHA-256 of each file. An older folder of that name is replaced: between two renames
    there is none, so what reads it must live with either. Files have mode 0600 and folders 0700; until that is so they
    stand in a hidden folder of mode 0700, whatever the umask.

    Args:
        target: the folder; where it is a symbolic link, the folder that it points to.
        write: fills the folder that it is given.

    Raises:
        OutputError: the disk is full, or not writable; nothing is left behind.
        InputError: ``write`` could not read a file of elsewhere; likewise.
    """
    target = Path(os.path.realpath(target))
    hidden = target.parent / f".{target.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}"
    old = target.parent / f".{target.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}"
    with writing(str(target)):
        try:
            make_private_folder(str(hidden))
            _fill(hidden, write)
            files = _files(hidden)
            seal = {name: [path.stat().st_size, _digest(path)] for name, path in files.items()}
            (hidden / SEAL).write_text(json.dumps(seal, indent=1))
            folders = [hidden]
            for path in hidden.rglob("*"):
                path.chmod(0o700 if path.is_dir() else 0o600)
                if path.is_dir() and not path.is_symlink():
                    folders.append(path)
            for path in [*files.values(), hidden / SEAL, *folders]:
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


def _fill(hidden: Path, write: Callable[[Path], None]) -> None:
    """Has ``write`` fill the folder; an error at a file of elsewhere is one of reading."""
    try:
        write(hidden)
    except OSError as error:
        name = error.filename
        if name is None or hidden in (Path(os.fsdecode(name)), *Path(os.fsdecode(name)).parents):
            raise
        raise InputError(f"cannot read {os.fsdecode(name)}: {reason(error)}; mend it and run again") from error


def is_whole(folder: Path) -> bool:
    """Whether the folder holds what was published: every file, with its size and digest.

    A name in the seal that is none of the folder's own files (``../x``, a link) is never looked at.

    Raises:
        InputError: a file cannot be read now, which is no damage: what is not whole may be deleted.
    """
    try:
        seal, files = parse_object((folder / SEAL).read_bytes()), _files(folder)
        if not seal.keys() <= files.keys():
            return False
        same = all(files[name].stat().st_size == size for name, (size, _) in seal.items())
        return same and all(_digest(files[name]) == digest for name, (_, digest) in seal.items())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, TypeError):
        return False
    except OSError as error:
        raise InputError(f"cannot read {folder}: {reason(error)}; run again") from error


def check_replaceable(target: Path, what: str) -> None:
    """Refuses to replace a folder that holds anything else than what was published there.

    Args:
        target: the folder.
        what: what it ought to be, for the message.

    Raises:
        OutputError: names one such file.
    """
    try:
        own = parse_object((target / SEAL).read_bytes()).keys() | {SEAL}
    except (OSError, ValueError):
        own = set()
    present = (path for path in sorted(target.rglob("*")) if path.is_symlink() or not path.is_dir())
    foreign = next((name for path in present if (name := path.relative_to(target).as_posix()) not in own), None)
    if foreign is not None:
        raise OutputError(
            f"{target} is not {what} that flipkd wrote, or holds more (such as {foreign}); move that away, or choose "
            "another --output"
        )


def remove_published(folder: Path) -> None:
    """Deletes a published folder; one that is deleted in part by a killed process does not look like one any more."""
    hidden = folder.parent / f".{folder.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}"
    with writing(str(folder)):
        folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def remove_unpublished(parent: Path, name: str = "") -> None:
    """Deletes hidden folders that a killed process left in ``parent``; of the target ``name`` alone, if it is given."""
    if parent.is_dir():
        for path in parent.iterdir():
            found = TEMPORARY_NAME.fullmatch(path.name)
            if found is not None and name in ("", found["target"]) and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)


def _files(folder: Path) -> dict[str, Path]:
    """The folder's own files by name; no links, and nothing behind one."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink())
    return {path.relative_to(folder).as_posix(): path for path in paths}


def _digest(path: Path) -> str:
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
