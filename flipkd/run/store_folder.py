"""Whose the folder is in which a vector store is to be made."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from flipkd.errors import InputError, OutputError
from flipkd.run.manifest import MANIFEST, WORK_FOLDER
from flipkd.vectors.layout import STORE_FILES, is_sealed, read_header


def has_rest(folder: Path) -> bool:
    """Whether a deletion or a sealing that was broken off has left files, in a folder that flipkd has worked in."""
    return (folder / WORK_FOLDER).is_dir() and any((folder / name).exists() for name in STORE_FILES)


def check_free(folder: Path) -> None:
    """Refuses a folder in which flipkd has never worked and that has files of the names of a store's.

    Raises:
        OutputError: names one.
    """
    if (folder / WORK_FOLDER).is_dir() or is_sealed(folder):
        return
    for name in (*STORE_FILES, MANIFEST):
        if os.path.lexists(folder / name):
            raise OutputError(f"{folder / name} is there already and is not a store's; choose another --output")


def sealed_header(folder: Path, overwrite: bool) -> dict[str, Any] | None:
    """Header of the store that is there; None where there is none, or a damaged one that may be replaced.

    Raises:
        InputError: it is damaged, and may not be replaced.
    """
    try:
        return read_header(folder) if is_sealed(folder) else None
    except InputError:
        if not overwrite:
            raise
        return None
