"""Which Arrow types can be record ids, how they are kept, and which can be compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pyarrow as pa
import pyarrow.compute as pc

from flipkd.data.records import is_bytes_like
from flipkd.errors import ColumnError, InputError

# By value as int64, by value as uint64, by their bytes, and the type of a column that holds nothing but nulls.
TYPES = {"int64": pa.int64(), "uint64": pa.uint64(), "bytes": pa.large_binary(), "null": pa.null()}
KINDS = tuple(TYPES)


def id_kind(id_type: pa.DataType) -> str | None:
    """How ids of an Arrow type are kept: one of KINDS, or None for a type that cannot be an id."""
    while True:
        if pa.types.is_dictionary(id_type):
            id_type = id_type.value_type
        elif isinstance(id_type, pa.BaseExtensionType):
            id_type = id_type.storage_type
        else:
            break
    if pa.types.is_null(id_type):
        return "null"
    if pa.types.is_integer(id_type):
        return "uint64" if id_type == pa.uint64() else "int64"
    if is_bytes_like(id_type):
        return "bytes"
    return None


def check_id_type(id_type: pa.DataType, column: str) -> str:
    """Return id_kind(id_type), or raise ColumnError naming the column, its type and the way out."""
    kind = id_kind(id_type)
    if kind is not None:
        return kind
    hint = "ids must be integers, strings or binary"
    if pa.types.is_floating(id_type):
        hint += (
            "; cast the column to int64 (pandas makes float out of integers with nulls: use its Int64 type, and note "
            "that float64 has already merged ids above 2**53)"
        )
    raise ColumnError(f"column {column!r} is of type {id_type}, which cannot be an id: {hint}")


def common_kind(kinds: Mapping[str, str], column: str) -> str:
    """The one kind that the ids of all files of a table are kept as.

    Args:
        kinds: per kind a file that has it.
        column: of the ids, for the message.

    Raises:
        InputError: some are integers and others strings; names both files.
    """
    if mixed := mixed_kinds(kinds):
        one, other = mixed
        raise InputError(
            f"the ids in {kinds[one]} are {one}, those in {kinds[other]} {other}; cast the column {column!r} of one"
        )
    return widest_kind(kinds)


def mixed_kinds(kinds: Iterable[str]) -> tuple[str, str] | None:
    """The first two of the kinds, where some are strings and others integers, which are never equal; else None."""
    known = [kind for kind in kinds if kind != "null"]
    return (known[0], known[1]) if "bytes" in known and len(known) > 1 else None


def widest_kind(kinds: Iterable[str]) -> str:
    """The one kind that holds the ids of all the given ones, which do not mix."""
    known = [kind for kind in kinds if kind != "null"]
    return "uint64" if "uint64" in known else next(iter(known), "null")


def check_ids_fit(id_type: pa.DataType, column: str, kind: str, theirs: str | None = None) -> None:
    """Refuses ids that cannot be ids of the records.

    Args:
        id_type: of the column.
        column: its name, for the message.
        kind: of the records' ids.
        theirs: what the records' ids are, for the message.

    Raises:
        ColumnError: names the column and the way out.
    """
    if mixed_kinds(dict.fromkeys([check_id_type(id_type, column), kind])):
        theirs = theirs or ("strings or binaries" if kind == "bytes" else "integers")
        raise ColumnError(
            f"column {column!r} is of type {id_type}, but the records' ids are {theirs}; cast one of them so that both "
            "are integers or both are strings"
        )


def as_kind(ids: pa.Array | pa.ChunkedArray, kind: str, source: str | None = None) -> pa.Array:
    """[N] ids in the one type of a kind that they fit.

    Args:
        ids: [N] of any type that can be an id.
        kind: the records'.
        source: names the place of the records' own ids, none of which may be lost. Without it an integer outside the
            kind's range becomes null: no record has it.

    Raises:
        InputError: an integer of ``source`` is outside the kind's range.
    """
    if isinstance(ids, pa.ChunkedArray):  # each alone: 32-bit offsets may not reach over all of them
        return pa.concat_arrays([as_kind(chunk, kind, source) for chunk in ids.chunks] or [pa.nulls(0, TYPES[kind])])
    if kind == "null":
        return pa.nulls(len(ids))
    ids = decoded(ids)
    outside = None
    if kind == "uint64" and pa.types.is_signed_integer(ids.type):
        outside = pc.less(ids, 0)
    elif kind == "int64" and ids.type == pa.uint64():
        outside = pc.greater(ids, pa.scalar(2**63 - 1, pa.uint64()))  # else Arrow would compare both as int64
    if outside is not None and pc.any(outside).as_py():
        if source is not None:
            raise InputError(f"{source} has negative ids, others have uint64 ids; cast the id columns to one type")
        ids = pc.if_else(outside, pa.scalar(None, ids.type), ids)
    return ids.cast(TYPES[kind])


def decoded(ids: pa.Array) -> pa.Array:
    """Take dictionaries off too; see ``plain``."""
    ids = plain(ids)
    return plain(ids.dictionary_decode()) if pa.types.is_dictionary(ids.type) else ids


def plain(ids: pa.Array) -> pa.Array:
    """Take extension types (such as arrow.uuid) and views off: an integer, null, string or binary array."""
    while isinstance(ids, pa.ExtensionArray):
        ids = ids.storage
    if pa.types.is_string_view(ids.type) or pa.types.is_binary_view(ids.type):
        return ids.cast(pa.large_binary())
    return ids
