"""Where files are: a local path, or a URL of any filesystem that pyarrow or fsspec knows."""

from __future__ import annotations

import os
import posixpath
import re
import urllib.parse
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from flipkd.data.fsspec_files import Handler
from flipkd.errors import ConfigError, InputError
from flipkd.urls import without_secrets

# Native pyarrow filesystems; every other scheme goes through fsspec.
_ARROW_SCHEMES = ("file", "s3", "gs", "gcs", "hdfs")
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_PASSING_S3 = re.compile(r"AWS Error (?!ACCESS_DENIED|NO_SUCH_)")


@dataclass(frozen=True)
class Location:
    """A folder or file on some filesystem.

    Args:
        address: as the user gave it (made absolute when local), so that another process can open it again. A URL may
            hold the key of a bucket.
        path: the path that ``filesystem`` knows.
        filesystem: a pyarrow filesystem.
    """

    address: str
    path: str
    filesystem: pafs.FileSystem

    @property
    def uri(self) -> str:
        """How messages name it: the address without keys and passwords."""
        return self.address if self.is_local else without_secrets(self.address)

    @property
    def is_local(self) -> bool:
        """Whether the files can be mapped and renamed by the operating system."""
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def child(self, name: str) -> Location:
        """The location of ``name`` below this one."""
        # What stands behind the ? of a URL says how to reach the filesystem (s3://bucket/folder?region=...).
        place, mark, query = (self.address, "", "") if self.is_local else self.address.partition("?")
        address = f"{place.rstrip('/')}/{name}{mark}{query}"
        return Location(address, posixpath.join(self.path, name), self.filesystem)

    def naming(self, name: str) -> str:
        """How a message names the file ``name`` of this table; a table of one file is that file."""
        return self.uri if posixpath.basename(self.path) == name else f"{name} of {self.uri}"

    def __reduce__(self) -> tuple[Any, ...]:
        return (open_location, (self.address,))


def open_location(uri: str | os.PathLike[str]) -> Location:
    """Opens a local path or a URI such as ``s3://bucket/folder``.

    Raises:
        ConfigError: the name is empty, the scheme is not known, or its fsspec package is not installed.
        InputError: the place cannot be reached.
    """
    text = os.fspath(uri)
    if not text.strip():  # an unset variable of a shell must not stand for the current folder
        raise ConfigError("a file or folder has an empty name; is a variable not set?")
    scheme = text.split("://", 1)[0].lower() if "://" in text else ""
    if scheme in ("", "file"):
        path = os.path.abspath(urllib.parse.unquote(text[len("file://") :]) if scheme else text)
        return Location(path, path, pafs.LocalFileSystem())
    try:
        if scheme in _ARROW_SCHEMES:
            filesystem, path = pafs.FileSystem.from_uri(text)
            return Location(text, path, filesystem)
        import fsspec

        remote, path = fsspec.core.url_to_fs(text)
        return Location(text, path, pafs.PyFileSystem(Handler(remote)))
    except (ValueError, ImportError, pa.ArrowException) as error:
        told = str(error).replace(text, without_secrets(text))
        raise ConfigError(f"cannot open the location {without_secrets(text)!r}: {told}") from None
    except OSError as error:  # S3 asks the network where a bucket is
        raise InputError(f"cannot open the location {without_secrets(text)!r}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """One line that says why, without what an exception may quote of the data."""
    number = getattr(error, "errno", None)
    return os.strerror(number) if number else str(error).split("\n")[0]


def may_pass(error: BaseException | None) -> bool:
    """Whether an error of reading, or what it came from, is of the kind that another try may not meet.

    A file that is not there or may not be read is not; nor is damage, for which Arrow raises OSError too, but without a
    number. It gives none for most errors of S3 either: those are told by their text.
    """
    while error is not None:
        if isinstance(error, _LASTING):
            return False
        if isinstance(error, OSError):
            known = error.errno is not None or isinstance(error, ConnectionError | TimeoutError)
            if known or _PASSING_S3.search(str(error)):
                return True
        error = error.__cause__
    return False
