"""Write files so that a reader sees all of one or nothing, and nobody else reads them.

A *commit* is the rename of a hidden temporary file to its final name; on an object store it is the one PUT that closes
an upload. Local files are flushed to the disk first, and have mode 0600 in folders of mode 0700.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import posixpath
import re
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from flipkd.data.json_files import check_fields, parse_object
from flipkd.data.location import Location, reason
from flipkd.errors import InputError, OutputError

TEMPORARY_SUFFIX = ".tmp"
# What only flipkd's own temporary files and folders are called: others are never deleted.
TEMPORARY_NAME = re.compile(rf"\.(?P<target>.+)\.[0-9a-f]{{32}}{re.escape(TEMPORARY_SUFFIX)}")
_UPLOAD_BYTES = 8 << 20


class ShardWriter:
    """Writes one output shard under a hidden temporary name and publishes it on ``commit``.

    Used as a context manager: leaving it without ``commit`` removes the temporary file. For an object store the file is
    made on the local disk and uploaded whole, since a broken-off stream would be published as it is.

    Args:
        root: the output folder.
        name: final name below it.
        schema: Arrow schema of the rows.
        metadata: key-value pairs for the Parquet footer.
        options: further keyword arguments of ``pyarrow.parquet.ParquetWriter``.
    """

    def __init__(
        self, root: Location, name: str, schema: pa.Schema, metadata: dict[str, str], options: dict[str, Any]
    ) -> None:
        self._final = root.child(name)
        folder, base = posixpath.split(self._final.path)
        self._path = posixpath.join(folder, f".{base}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
        self._unnamed: IO[bytes] | None = None
        try:
            with writing(self._final.uri):
                if root.is_local:
                    make_private_folder(folder)
                    os.close(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
                else:
                    # Without a name, or a killed process would leave records in the local disk's temporary folder.
                    self._unnamed = TemporaryFile()  # noqa: SIM115 (closed with the writer)
                    self._path = f"/dev/fd/{self._unnamed.fileno()}"
                self._sink = pa.OSFile(self._path, "wb")
                # Checksums: whoever reads the file sees a bit that has turned over since.
                self._writer = pq.ParquetWriter(self._sink, schema, write_page_checksum=True, **options)
                self._writer.add_key_value_metadata(metadata)
        except BaseException:
            self._remove()
            raise

    def write(self, table: pa.Table, row_group_rows: int | None = None) -> None:
        """Appends rows; each call starts a new row group (or several of at most ``row_group_rows``)."""
        with writing(self._final.uri):
            self._writer.write_table(table, row_group_size=row_group_rows)

    def add_metadata(self, metadata: dict[str, str]) -> None:
        """Adds key-value pairs to the footer."""
        self._writer.add_key_value_metadata(metadata)

    def commit(self) -> None:
        """Flushes to the disk and renames, or uploads; after this the shard is there, whole."""
        with writing(self._final.uri):
            self._writer.close()
            self._sink.close()
            if self._final.is_local:
                sync(self._path)
                os.replace(self._path, self._final.path)
                sync(os.path.dirname(self._final.path))
            else:
                _upload(self._path, self._final)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError, pa.ArrowException):
            self._writer.close()
            self._sink.close()
        self._remove()

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            if self._final.is_local:
                os.unlink(self._path)
            elif self._unnamed is not None:
                self._unnamed.close()


def open_remote(target: Location) -> pa.NativeFile:
    """A stream into a file that is not on a local disk; its folder is made where there are such (sftp, hdfs)."""
    try:
        return target.filesystem.open_output_stream(target.path)
    except FileNotFoundError:
        target.filesystem.create_dir(posixpath.dirname(target.path), recursive=True)
        return target.filesystem.open_output_stream(target.path)


def _upload(path: str, target: Location) -> None:
    """Copies a local file to an object store; a copy that breaks off is deleted."""
    try:
        with pa.OSFile(path) as source, open_remote(target) as sink:
            while block := source.read(_UPLOAD_BYTES):
                sink.write(block)
    except BaseException:
        with contextlib.suppress(OSError):
            target.filesystem.delete_file(target.path)
        raise


_NEEDS_ROOM = "free some space and run again, finished units are kept"
# For errors that are the same again when the job runs again.
_WAYS_OUT = {
    errno.ENOSPC: _NEEDS_ROOM,
    errno.EDQUOT: _NEEDS_ROOM,
    errno.EFBIG: "files may not be that large here; raise the limit (ulimit -f), or choose another disk",
    errno.ENAMETOOLONG: "give the input files shorter names: outputs are named after them",
    errno.ENOTDIR: "a file stands where a folder should be; choose another",
    errno.EISDIR: "a folder stands where a file should be; choose another",
    errno.EROFS: "the disk cannot be written to; choose another",
    errno.EACCES: "you may not write there; choose another, or change its permissions",
    errno.EPERM: "you may not write there; choose another, or change its permissions",
}


@contextlib.contextmanager
def writing(target: str) -> Iterator[None]:
    """Turns errors of the operating system while writing ``target`` into an OutputError that names it."""
    try:
        yield
    except OSError as error:
        hint = _WAYS_OUT.get(error.errno or 0, "run again")
        raise OutputError(f"cannot write {target}: {reason(error)}; {hint}") from error


def make_private_folder(path: str) -> None:
    """Makes a local folder and its parents; new ones get mode 0700."""
    folder = Path(path)
    for parent in reversed(folder.parents):  # mkdir's own mode is for the last folder alone
        if not parent.exists():
            parent.mkdir(mode=0o700, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)


def sync(path: str) -> None:
    """Waits until a local file or folder is on the disk, so that a power cut cannot empty a committed name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(root: Location, name: str, values: Mapping[str, Any]) -> None:
    """Writes a JSON file in one step (hidden temporary file and rename on a local disk, one PUT elsewhere)."""
    target = root.child(name)
    data = (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()
    if root.is_local:
        write_private_file(target.path, data)
        return
    with writing(target.uri), open_remote(target) as sink:
        sink.write(data)


def write_private_file(path: str, data: bytes) -> None:
    """Writes a local file of mode 0600 under a hidden name, flushes it and renames it."""
    with writing(path):
        make_private_folder(os.path.dirname(path))
    _write_file(path, data, 0o600)


def write_public_file(path: str, data: bytes) -> None:
    """The same for a file that everybody may read, whatever the umask; nothing of a record may be in it."""
    _write_file(path, data, 0o644)


def _write_file(path: str, data: bytes, mode: int) -> None:
    with writing(path):
        folder, base = os.path.split(path)
        temporary = os.path.join(folder, f".{base}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as sink:
                os.fchmod(descriptor, mode)
                sink.write(data)
                sink.flush()
                os.fsync(descriptor)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        sync(folder)


def read_json(root: Location, name: str, **kinds: type | tuple[type, ...]) -> dict[str, Any] | None:
    """Reads a JSON file of flipkd's; None when it is not there.

    Args:
        root: folder.
        name: of the file.
        kinds: fields that it must have, and their types.

    Raises:
        InputError: it cannot be read, or is not a JSON object with these fields.
    """
    target = root.child(name)
    try:
        with root.filesystem.open_input_stream(target.path) as source:
            values = parse_object(source.read())
        check_fields(values, **kinds)
        return values
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(f"cannot read {target.uri}: {reason(error)}") from error
    except ValueError as error:
        raise InputError(f"cannot read {target.uri}: {reason(error)}; remove it and run again") from error
