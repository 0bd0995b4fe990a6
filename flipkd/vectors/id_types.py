"""Which Arrow types can be record ids, and how they are kept."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from flipkd.errors import ColumnError, InputError

# By value as int64, by value as uint64, by their bytes, and the type of a column that holds nothing but nulls.
KINDS = ("int64", "uint64", "bytes", "null")


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
    if _is_bytes(id_type):
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
    known = [kind for kind in kinds if kind != "null"]
    if "bytes" in known and len(known) > 1:
        one, other = known[:2]
        raise InputError(
            f"the ids in {kinds[one]} are {one}, those in {kinds[other]} {other}; cast the column {column!r} of one"
        )
    return "uint64" if "uint64" in known else next(iter(known), "null")


def plain(ids: pa.Array) -> pa.Array:
    """Take extension types (such as arrow.uuid) and views off: an integer, null, string or binary array."""
    while isinstance(ids, pa.ExtensionArray):
        ids = ids.storage
    if pa.types.is_string_view(ids.type) or pa.types.is_binary_view(ids.type):
        return ids.cast(pa.large_binary())
    return ids


def _is_bytes(id_type: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(id_type)
        or pa.types.is_large_string(id_type)
        or pa.types.is_string_view(id_type)
        or pa.types.is_binary(id_type)
        or pa.types.is_large_binary(id_type)
        or pa.types.is_binary_view(id_type)
        or pa.types.is_fixed_size_binary(id_type)
    )
