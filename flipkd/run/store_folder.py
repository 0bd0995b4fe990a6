"""Whose the folder is in which a vector store is to be made."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from flipkd.errors import InputError, OutputError
from flipkd.run.manifest import MANIFEST, WORK_FOLDER
from flipkd.vectors.layout import STORE_FILES, DamagedStoreError, check_files, is_sealed, read_header

logger = logging.getLogger(__name__)


def has_rest(folder: Path) -> bool:
    """Whether a deletion or a sealing that was broken off has left files, in a folder that flipkd has worked in."""
    return (folder / WORK_FOLDER).is_dir() and any((folder / name).exists() for name in STORE_FILES)


def check_free(folder: Path, overwrite: bool) -> None:
    """Refuses a folder in which flipkd has never worked and that has files of the names of a store's.

    Raises:
        OutputError: names one.
        InputError: a store's header is there, and cannot be read.
    """
    if (folder / WORK_FOLDER).is_dir():
        return
    if is_sealed(folder):
        if not overwrite:
            read_header(folder)
        return
    for name in (*STORE_FILES, MANIFEST):
        if os.path.lexists(folder / name):
            raise OutputError(f"{folder / name} is there already and is not a store's; choose another --output")


def sealed_header(folder: Path, overwrite: bool) -> dict[str, Any] | None:
    """Header of the finished store; None where there is none, or one that is damaged and has to be made again.

    Raises:
        InputError: it is of another format, and may not be replaced.
    """
    if not is_sealed(folder):
        return None
    try:
        header = read_header(folder)
        check_files(folder, header)
    except DamagedStoreError as error:
        logger.warning("the store is made again: %s", error)
        return None
    except InputError:
        if not overwrite:
            raise
        return None
    return header
