"""What lies in a store folder, and its header. See flipkd/vectors/store.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flipkd.data.json_files import check_fields, parse_object
from flipkd.errors import ConfigError, InputError
from flipkd.vectors.id_types import KINDS
from flipkd.vectors.index import index_files
from flipkd.vectors.rows import STORAGE, check_dtype

FORMAT_VERSION = 1
HEADER_FILE = "store.json"
STORE_FILES = ("vectors.bin", "status.bin", "ids.bin", "offsets.bin", "slots.bin")  # some stores have no ids of bytes
SEALING_FOLDER = ".sealing"  # where a store is made

STATUS_MISSING_TEXT = 1  # null or empty text: the vector is zero
STATUS_TRUNCATED = 2  # the text was longer than the encoder's max length
STATUS_INVALID_TEXT = 4  # not valid UTF-8: the vector is zero
STATUS_NULL_ID = 8  # the row is not indexed

AGAIN = "run `flipkd-batch encode` again"

_COUNTS = ("missing_text", "truncated", "invalid_text", "null_ids", "duplicate_records")
_MOST = 2**48  # rows, bytes: beyond any file


class DamagedStoreError(InputError):
    """A store that is not what was written."""


def is_sealed(path: str | Path) -> bool:
    """Whether `path` holds a finished store."""
    return (Path(path) / HEADER_FILE).is_file()


def read_header(folder: Path) -> dict[str, Any]:
    """Read and check store.json.

    Raises:
        DamagedStoreError: names it.
        InputError: there is none, one of another format, or one that cannot be read now.
    """
    path = folder / HEADER_FILE
    try:
        header = parse_object(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{folder} is not a finished store: it has no {HEADER_FILE}; {AGAIN}") from None
    except (OSError, ValueError) as error:
        kind = InputError if isinstance(error, OSError) else DamagedStoreError
        raise kind(f"{path} cannot be read ({error}); {AGAIN}") from error
    version = header.get("format_version")
    if version != FORMAT_VERSION:
        if isinstance(version, int):
            raise InputError(f"{path} is of format {version}, this flipkd reads format {FORMAT_VERSION}; {AGAIN}")
        raise DamagedStoreError(f"{path} is damaged (it has no format_version); {AGAIN}")
    try:
        check_fields(header, dtype=str, id_kind=str, id_type=str, fingerprint=str, counts=dict)
        check_fields(header, rows=int, dim=int, id_bytes=int)
        check_fields(header["counts"], **dict.fromkeys(_COUNTS, int))
        check_dtype(header["dtype"])
        if header["id_kind"] not in KINDS or header["dim"] == 0:
            raise ValueError("id_kind or dim")
        if not all(0 <= header[name] < _MOST for name in ("rows", "dim", "id_bytes")):
            raise ValueError("rows, dim or id_bytes")
    except (ValueError, ConfigError) as error:
        raise DamagedStoreError(f"{path} is damaged ({error}); {AGAIN}") from error
    return header


def check_files(folder: Path, header: dict[str, Any]) -> None:
    """Look whether the files that a header tells of are there, in their sizes.

    Raises:
        DamagedStoreError: one is not there, or of another size.
        InputError: one cannot be looked at now.
    """
    for name, size_bytes in store_files(header).items():
        try:
            actual_bytes = (folder / name).stat().st_size
        except OSError as error:
            kind = DamagedStoreError if isinstance(error, FileNotFoundError) else InputError
            raise kind(f"{folder / name} is missing or unreadable ({error.strerror}); {AGAIN}") from error
        if actual_bytes != size_bytes:
            told = f"not the {size_bytes} that {HEADER_FILE} tells of"
            raise DamagedStoreError(f"{folder / name} has {actual_bytes} bytes, {told}; {AGAIN}")


def store_files(header: dict[str, Any]) -> dict[str, int]:
    """The file names that a header tells of, and their sizes in bytes."""
    rows = header["rows"]
    vectors_bytes = rows * header["dim"] * STORAGE[header["dtype"]].itemsize
    return {"vectors.bin": vectors_bytes, "status.bin": rows} | index_files(header["id_kind"], rows, header["id_bytes"])
