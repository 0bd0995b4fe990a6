"""Filesystems of fsspec for pyarrow, which tell when a file has changed."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import pyarrow.fs as pafs

# How filesystems call the time of the last change; pyarrow knows the first name alone. An object of a store is never
# changed but made anew.
_NAMES = ("mtime", "LastModified", "last_modified", "updated", "modified", "modifiedTime", "created")


class Handler(pafs.FSSpecHandler):  # type: ignore[misc]
    """pyarrow's own, with ``mtime`` on filesystems that call it otherwise, such as those of Azure and in memory."""

    @staticmethod
    def _create_file_info(path: str, info: Mapping[str, Any]) -> pafs.FileInfo:
        made: pafs.FileInfo = pafs.FSSpecHandler._create_file_info(path, {**info, "mtime": changed_at(info)})
        return made


def changed_at(info: Mapping[str, Any]) -> datetime | float | None:
    """When a file has changed: a moment or seconds since 1970; None where its filesystem does not tell.

    Args:
        info: what fsspec's ``info`` says of it.
    """
    for name in _NAMES:
        value = info.get(name)
        if isinstance(value, str):
            try:
                value = datetime.fromisoformat(value)
            except ValueError:
                continue
        if isinstance(value, datetime):
            return value
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    return None
