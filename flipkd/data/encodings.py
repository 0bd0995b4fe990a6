"""How the columns of an output are encoded in Parquet."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

_MOST_DELTA_BITS = 40
_DICTIONARY_BYTES = 8 << 20
_LOOKED_AT_ROWS = 1 << 16


def write_options(first: pa.Table) -> dict[str, Any]:
    """How scores are written: chosen by measurement for speed at a sane size.

    Integers as differences (delta encoding) where they span less than 40 bits: record ids do not repeat enough for a
    dictionary, and wider ones do not shrink. Scores hardly compress at all. Statistics would put ids into footers.
    Another column has a dictionary where its first values repeat, so that it does not grow on its way through. What the
    input's footer says of its dictionaries is not asked: Arrow ends the process where that part of one is damaged.

    Args:
        first: the first rows of the file.
    """
    encodings, codecs, words, kept = {}, {}, [], []
    nested = [field for field in first.schema if pa.types.is_nested(field.type)]
    for field, column in zip(first.schema, first.columns, strict=True):
        codecs[field.name] = "lz4"
        # A column `a.b` has the name of the `b` in a column `a`, whose type may know no such encoding.
        is_unclear = any(field.name.startswith(f"{other.name}.") for other in nested)
        if field.name == "reason" or pa.types.is_dictionary(field.type) or pa.types.is_boolean(field.type):
            words.append(field.name)
        elif pa.types.is_integer(field.type):
            if _bits(column) < _MOST_DELTA_BITS and not is_unclear:
                encodings[field.name] = "DELTA_BINARY_PACKED"
        elif pa.types.is_nested(field.type):
            kept += _leaves(field.name, field.type)
        elif _repeats(column):
            kept.append(field.name)
        elif pa.types.is_floating(field.type):
            codecs[field.name] = "none"
    return {
        "compression": "lz4" if nested else codecs,
        "use_dictionary": words + kept or False,
        "column_encoding": encodings or None,
        "write_statistics": False,
        # A row group of ours may hold several of the input, each with a dictionary of its own.
        **({"dictionary_pagesize_limit": _DICTIONARY_BYTES} if kept else {}),
    }


def _repeats(column: pa.ChunkedArray) -> bool:
    """Whether a dictionary makes the first values half as large, or less."""
    some = column.slice(0, _LOOKED_AT_ROWS)
    try:
        distinct = len(pc.unique(some))
    except pa.ArrowNotImplementedError:  # a type whose values Arrow cannot compare is written as it is
        return False
    width = some.nbytes / max(len(some), 1)
    return distinct > 0 and 2 * (distinct * width + len(some) * distinct.bit_length() / 8) <= some.nbytes


def _leaves(path: str, kind: pa.DataType) -> list[str]:
    """Parquet's names of what stands in a nested column."""
    if pa.types.is_struct(kind):
        return [leaf for child in kind for leaf in _leaves(f"{path}.{child.name}", child.type)]
    if pa.types.is_map(kind):
        return [
            *_leaves(f"{path}.key_value.key", kind.key_type),
            *_leaves(f"{path}.key_value.value", kind.item_type),
        ]
    return _leaves(f"{path}.list.element", kind.value_type) if pa.types.is_nested(kind) else [path]


def _bits(column: pa.ChunkedArray) -> int:
    bounds = pc.min_max(column)
    low, high = bounds["min"].as_py(), bounds["max"].as_py()
    return 0 if low is None else (high - low).bit_length()
