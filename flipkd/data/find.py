"""Which files a table is made of. A *shard* is one of them: a Parquet file."""

from __future__ import annotations

import logging
import os
import posixpath
import re
import urllib.parse
from dataclasses import dataclass
from typing import Any

import pyarrow.fs as pafs

from flipkd.data.location import Location, reason
from flipkd.errors import InputError

logger = logging.getLogger(__name__)

PARQUET_SUFFIXES = (".parquet", ".parq", ".pq")
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
_MAGIC = b"PAR1"
# What the formats whose folders hold deleted and overwritten rows too keep in a table's folder.
_TABLE_FORMATS = {"_delta_log": "Delta", ".hoodie": "Hudi"}
_ICEBERG = re.compile(r"metadata/[^/]+\.metadata\.json")


@dataclass(frozen=True)
class Shard:
    """One Parquet file of a table.

    Args:
        path: path on its filesystem.
        name: path below the table's root, ``/`` between its parts.
        size_bytes: size of the file.
        modified_ns: time of the last change, nanoseconds since 1970 (0 where none is known).
        partitions: hive partition columns from the folder names, values kept as the text they are (``007`` stays
            ``007``); None for hive's null.
    """

    path: str
    name: str
    size_bytes: int
    modified_ns: int
    partitions: tuple[tuple[str, str | None], ...] = ()


def find_shards(location: Location) -> list[Shard]:
    """Lists the Parquet files of a folder (or the one file), sorted by name.

    Names that start with ``_`` or ``.`` (``_SUCCESS``, ``_metadata``, checksums, temporary files) and files of other
    endings are not part of the table.

    Raises:
        InputError: the path does not exist, cannot be looked at, or holds no Parquet file; or it is a table of another
            format, which tells elsewhere which of its files count.
    """
    try:
        info = location.filesystem.get_file_info(location.path)
    except OSError as error:
        raise InputError(f"cannot look at {location.uri}: {reason(error)}") from error
    if info.type == pafs.FileType.NotFound:
        raise InputError(f"{location.uri} does not exist")
    if info.type == pafs.FileType.File:
        if not location.path.lower().endswith(PARQUET_SUFFIXES):
            _check_parquet(location)
        return [_shard(info, posixpath.basename(location.path))]
    shards, others, folders = [], 0, [location.path] if location.is_local else []
    selector = pafs.FileSelector(location.path, recursive=True)
    try:
        found = location.filesystem.get_file_info(selector)
    except OSError as error:
        raise InputError(f"cannot list {location.uri}: {reason(error)}") from error
    root = location.path.rstrip("/") + "/"
    for info in found:
        path = _path(info)
        name = path[len(root) :] if path.startswith(root) else path.lstrip("/")
        _check_format(location, name)
        if any(is_hidden(part) for part in name.split("/")):
            continue
        if info.type == pafs.FileType.Directory:
            if location.is_local:
                folders.append(path)
            continue
        if name.lower().endswith(PARQUET_SUFFIXES):
            if info.type == pafs.FileType.Unknown:
                raise InputError(f"{path} is not a file (but a pipe, a socket or a device); move it away")
            shards.append(_shard(info, name))
        else:
            others += 1
    if others:
        logger.warning("%s: %d files that do not end in .parquet are not read", location.uri, others)
    for folder in folders:
        _check_links(location.path, folder)
    if not shards:
        raise InputError(f"{location.uri} holds no .parquet file")
    if not all(shard.modified_ns for shard in shards) and not location.is_local:
        logger.warning(
            "%s: this filesystem does not tell when files have changed; one that is replaced by another of the same "
            "size is not noticed",
            location.uri,
        )
    return sorted(shards, key=lambda shard: shard.name)


def _check_format(location: Location, name: str) -> None:
    """Refuses a table whose folder holds files that are no part of it (any more).

    Args:
        location: the table's root.
        name: of one of the files and folders below it.

    Raises:
        InputError: names the format.
    """
    found = _TABLE_FORMATS.get(name.partition("/")[0]) or ("Iceberg" if _ICEBERG.fullmatch(name) else None)
    if found is not None:
        raise InputError(
            f"{location.uri} is a table of {found} ({name} is there): its folder holds rows too that were deleted or "
            "overwritten; write the table as it is now to a folder of plain Parquet, and name that"
        )


def _path(info: pafs.FileInfo) -> str:
    try:
        found: str = info.path
    except UnicodeDecodeError as error:
        name = bytes(error.object).decode("utf-8", "backslashreplace")
        raise InputError(f"{name} has a name that is not UTF-8; rename it") from error
    return found


def _check_links(root: str, folder: str) -> None:
    """Refuses links in ``folder``, at or below ``root``, that a listing passes over in silence, or follows for ever.

    Raises:
        InputError: a link to a Parquet file that is not there (an unmounted disk must not look like fewer rows), or to
            a folder that it lies in.
    """
    with os.scandir(folder) as entries:
        links = [entry.path for entry in entries if entry.is_symlink() and not is_hidden(entry.name)]
    if not links:
        return
    below = os.path.relpath(folder, root)
    names = [] if below == "." else below.split(os.sep)
    way_down = [os.path.realpath(os.path.join(root, *names[:count])) for count in range(len(names) + 1)]
    for link in links:
        target = os.path.realpath(link).rstrip("/")
        if not os.path.exists(link):
            if link.lower().endswith(PARQUET_SUFFIXES):
                raise InputError(f"{link} is a link to a file that is not there; mount or fetch it, or remove the link")
        elif any(f"{above}/".startswith(f"{target}/") for above in way_down):
            raise InputError(f"{link} is a link to a folder that it lies in; remove it")


def _check_parquet(location: Location) -> None:
    """Looks whether a file whose name does not say so is Parquet."""
    try:
        with location.filesystem.open_input_file(location.path) as file:
            found = file.read(len(_MAGIC))
    except OSError as error:
        raise InputError(f"cannot read {location.uri}: {reason(error)}") from error
    if found != _MAGIC:
        raise InputError(
            f"{location.uri} is not a Parquet file; of CSV make one with pyarrow.csv.read_csv and "
            "pyarrow.parquet.write_table"
        )


def is_hidden(part: str) -> bool:
    """Whether a name of a file or folder says that it is no data; ``_key=value`` is a hive partition."""
    return part.startswith(".") or (part.startswith("_") and "=" not in part)


def _shard(info: Any, name: str) -> Shard:
    partitions = []
    for part in name.split("/")[:-1]:
        key, separator, value = part.partition("=")
        if separator:
            text = urllib.parse.unquote(value)
            partitions.append((urllib.parse.unquote(key), None if text == _HIVE_NULL else text))
    return Shard(info.path, name, info.size or 0, info.mtime_ns or 0, tuple(partitions))
