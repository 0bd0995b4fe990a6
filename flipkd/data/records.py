"""The text of a record: template, normalisation, and the rows that have none.

One rule for teacher, student and batch: Unicode NFC, then white space stripped at both ends; nothing else. A null or
empty text is *missing*; a text whose bytes are not UTF-8 is *invalid* and is never scored. The input itself is passed
through unchanged.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from flipkd.data.template import template_fields, template_parts
from flipkd.errors import ColumnError

DIGEST_BYTES = 16


@dataclass(frozen=True)
class Texts:
    """Normalised texts of a batch of records.

    Args:
        values: [N] large_string; null where the text is missing or invalid.
        invalid: [N] bool; True where the bytes were not UTF-8.
    """

    values: pa.LargeStringArray
    invalid: npt.NDArray[np.bool_]


def render_texts(table: pa.Table, template: str) -> Texts:
    """Fills the template for every row and normalises.

    A null field is written as nothing; a row in which every field is null or blank has no text.

    Args:
        table: the columns that the template names, [N] rows.
        template: see ``flipkd.data.template.template_fields``; ``{text}`` alone is the plain text column.
    """
    fields = template_fields(template)
    columns, invalid = {}, np.zeros(table.num_rows, np.bool_)
    for field in fields:
        columns[field], bad = as_text(table.column(field), field)
        invalid |= bad
    pieces: list[pa.Array | pa.Scalar] = []
    for literal, name in template_parts(template):
        if literal:
            pieces.append(pa.scalar(literal, pa.large_string()))
        if name is not None:
            pieces.append(pc.fill_null(columns[name], ""))
    blank = None
    for field in fields:
        empty = pc.equal(pc.fill_null(pc.utf8_trim_whitespace(columns[field]), ""), "")
        blank = empty if blank is None else pc.and_(blank, empty)
    separator = pa.scalar("", pa.large_string())
    rendered = pieces[0] if len(pieces) == 1 else pc.binary_join_element_wise(*pieces, separator)
    rendered = pc.if_else(pc.or_(blank, pa.array(invalid)), pa.scalar(None, pa.large_string()), rendered)
    return Texts(normalise(rendered), invalid)


def normalise(texts: pa.Array) -> pa.Array:
    """NFC, then strip; what is empty afterwards is null. [N] large_string in and out."""
    stripped = pc.utf8_trim_whitespace(pc.utf8_normalize(texts, form="NFC"))
    return pc.if_else(pc.equal(stripped, ""), pa.scalar(None, pa.large_string()), stripped)


def as_text(column: pa.ChunkedArray | pa.Array, name: str) -> tuple[pa.LargeStringArray, npt.NDArray[np.bool_]]:
    """A column as large_string, and where its bytes are not UTF-8 (those values come back null).

    Strings, binaries, dictionaries of them, integers, booleans, dates and decimals have one plain text form. Floats
    do not (1.0 or 1?) and nested types have none.

    Raises:
        ColumnError: names the column and its type.
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # more than 2 GiB of text: combine_chunks keeps several chunks
        array = pa.concat_arrays([as_large(chunk) for chunk in array.chunks])
    if pa.types.is_dictionary(array.type):
        values, bad = as_text(array.dictionary, name)
        indices = array.indices.cast(pa.int64())
        taken = np.asarray(pc.fill_null(indices, 0))
        invalid = bad[taken] & np.asarray(indices.is_valid()) if len(bad) else np.zeros(len(array), np.bool_)
        return values.take(indices), invalid
    kind = array.type
    none_invalid = np.zeros(len(array), np.bool_)
    if pa.types.is_null(kind):
        return pa.nulls(len(array), pa.large_string()), none_invalid
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_date(kind) or pa.types.is_decimal(kind):
        return array.cast(pa.large_string()), none_invalid
    if not is_bytes_like(kind):
        raise ColumnError(f"column {name!r} has type {kind}, which has no plain text form; cast it to string")
    raw = as_large(array)
    try:
        checked = raw.cast(pa.large_string()) if pa.types.is_large_binary(raw.type) else raw
        checked.validate(full=True)
        return checked, none_invalid
    except pa.ArrowInvalid:
        return _decode_one_by_one(raw.cast(pa.large_binary()))


def as_large(array: pa.Array) -> pa.Array:
    """Any string or binary array as large_string or large_binary (no copy of the bytes where Arrow can avoid it)."""
    kind = array.type
    if pa.types.is_large_string(kind) or pa.types.is_large_binary(kind):
        return array
    if pa.types.is_string(kind) or pa.types.is_string_view(kind):
        # Through binary: the cast must not trip over bytes that are not UTF-8.
        return array.cast(pa.large_string(), safe=False)
    return array.cast(pa.large_binary())


def is_bytes_like(kind: pa.DataType) -> bool:
    """Whether the type is a string or binary type of any layout."""
    return any(
        test(kind)
        for test in (
            pa.types.is_string,
            pa.types.is_large_string,
            pa.types.is_string_view,
            pa.types.is_binary,
            pa.types.is_large_binary,
            pa.types.is_binary_view,
            pa.types.is_fixed_size_binary,
        )
    )


def _decode_one_by_one(raw: pa.LargeBinaryArray) -> tuple[pa.LargeStringArray, npt.NDArray[np.bool_]]:
    """The slow way, for a batch that holds a value that is not UTF-8."""
    values: list[str | None] = []
    invalid = np.zeros(len(raw), np.bool_)
    for position, item in enumerate(raw.to_pylist()):
        try:
            values.append(None if item is None else item.decode("utf-8"))
        except UnicodeDecodeError:
            values.append(None)
            invalid[position] = True
    return pa.array(values, pa.large_string()), invalid


def text_digests(texts: pa.LargeStringArray, key: bytes) -> pa.FixedSizeBinaryArray:
    """[N] 16-byte BLAKE2b digests of the texts under ``key`` (null stays null)."""
    return pa.array(keyed_digests(texts, key), pa.binary(DIGEST_BYTES))


def keyed_digests(texts: pa.LargeStringArray, key: bytes, salt: bytes = b"") -> list[bytes | None]:
    """[N] 16-byte BLAKE2b digests of the texts under ``key`` and ``salt`` (at most 16 bytes); None for null."""
    # A copy of the keyed state: half a second for a million texts, where a new hash for each takes 0.8 s.
    start = hashlib.blake2b(digest_size=DIGEST_BYTES, key=key, salt=salt).copy
    digests: list[bytes | None] = []
    for item in texts.cast(pa.large_binary()).to_pylist():
        if item is None:
            digests.append(None)
            continue
        state = start()
        state.update(item)
        digests.append(state.digest())
    return digests
