"""What lies in a store folder, and its header. See flipkd/vectors/store.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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


def is_sealed(path: str | Path) -> bool:
    """Whether `path` holds a finished store."""
    return (Path(path) / HEADER_FILE).is_file()


def read_header(folder: Path) -> dict[str, Any]:
    """Read and check store.json. Raises InputError naming it."""
    path = folder / HEADER_FILE
    try:
        header = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{folder} is not a finished store: it has no {HEADER_FILE}; {AGAIN}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); {AGAIN}") from error
    if not isinstance(header, dict) or header.get("format_version") != FORMAT_VERSION:
        version = header.get("format_version") if isinstance(header, dict) else None
        raise InputError(f"{path} is of format {version}, this flipkd reads format {FORMAT_VERSION}; {AGAIN}")
    try:
        check_dtype(header["dtype"])
        counts = [header[name] for name in ("rows", "dim", "id_bytes")]
        if header["id_kind"] not in KINDS or header["dim"] == 0:
            raise ValueError("id_kind or dim")
        if not all(isinstance(count, int) and count >= 0 for count in counts):
            raise ValueError("rows, dim or id_bytes")
        str(header["id_type"]), str(header["fingerprint"])
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise InputError(f"{path} is damaged ({error!r}); {AGAIN}") from error
    return header


def store_files(header: dict[str, Any]) -> dict[str, int]:
    """The file names that a header tells of, and their sizes in bytes."""
    rows = header["rows"]
    vectors_bytes = rows * header["dim"] * STORAGE[header["dtype"]].itemsize
    return {"vectors.bin": vectors_bytes, "status.bin": rows} | index_files(header["id_kind"], rows, header["id_bytes"])
