"""From a batch of pairs to row numbers of the vector store, with a reason where a pair cannot be scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flipkd.data.records import Texts, as_text, normalise, text_digests
from flipkd.data.shards import ShardReader
from flipkd.vectors.id_types import check_ids_fit
from flipkd.vectors.layout import STATUS_INVALID_TEXT, STATUS_MISSING_TEXT, STATUS_TRUNCATED

if TYPE_CHECKING:
    from flipkd.vectors.store import VectorStore

# Why a pair has no score; the code is the position. A pair with several reasons gives the first. The last two are for
# ``rescore`` alone: a pair that has no score to begin with, and one that is far from the threshold.
REASONS: tuple[str | None, ...] = (
    None,
    "missing_id",
    "missing_record",
    "invalid_text",
    "missing_text",
    "not_scored",
    "not_selected",
)
_MISSING_ID, _MISSING_RECORD, _INVALID_TEXT, _MISSING_TEXT = 1, 2, 3, 4
NOT_SCORED, NOT_SELECTED = 5, 6

# What to do about pairs that lack the columns that are looked for.
IDS_MISSING = "name the columns of ids with --left-column and --right-column"
TEXTS_MISSING = (
    "name the columns of texts with --left-text and --right-text, or give --records (to score, or --store) for pairs "
    "of ids"
)

Rows = npt.NDArray[np.int32] | npt.NDArray[np.int64]


@dataclass(frozen=True)
class PairRows:
    """A batch of pairs, resolved.

    Args:
        left: [P] row of the left record, -1 where the pair cannot be scored.
        right: [P] row of the right record, -1 where the pair cannot be scored.
        reason: [P] uint8 position in ``REASONS``, or None when every pair can be scored.
        truncated: [P] bool, or None when no text was cut.
    """

    left: Rows
    right: Rows
    reason: npt.NDArray[np.uint8] | None
    truncated: npt.NDArray[np.bool_] | None


def check_pair_columns(reader: ShardReader, columns: Sequence[str], id_kinds: Sequence[str]) -> None:
    """Looks at the columns that name the two sides of pairs, so that what cannot be used fails before any work.

    Args:
        reader: of one file of pairs.
        columns: the left and the right one.
        id_kinds: how the ids of the left and the right records are compared, or of both; none for texts.

    Raises:
        ConfigError: a column is missing, or there twice.
        ColumnError: it is of a type that cannot be used.
    """
    reader.check_columns(columns, IDS_MISSING if id_kinds else TEXTS_MISSING)
    for place, column in enumerate(columns):
        kind = reader.column_type(column)
        if id_kinds:
            check_ids_fit(kind, column, id_kinds[min(place, len(id_kinds) - 1)])
        else:
            as_text(pa.array([], kind), column)


def resolve_ids(
    left_ids: pa.ChunkedArray,
    right_ids: pa.ChunkedArray,
    left_store: VectorStore,
    right_store: VectorStore,
    names: tuple[str, str],
    threads: int,
) -> PairRows:
    """Looks the ids of [P] pairs up in the stores' indices.

    Raises:
        ConfigError: the type of an id column does not fit the store's.
    """
    left = left_store.index.look_up(left_ids, column=names[0], threads=threads)
    right = right_store.index.look_up(right_ids, column=names[1], threads=threads)
    null_ids = None
    if left_ids.null_count or right_ids.null_count:
        null_ids = np.asarray(left_ids.is_null()) | np.asarray(right_ids.is_null())
    return _with_reasons(left, right, left_store, right_store, null_ids)


def resolve_texts(
    left_texts: pa.ChunkedArray,
    right_texts: pa.ChunkedArray,
    store: VectorStore,
    digest_key: bytes,
    names: tuple[str, str],
    threads: int,
) -> PairRows:
    """Looks the inline texts of [P] pairs up in a store whose ids are the texts' digests.

    Raises:
        ConfigError: a column has no plain text form.
    """
    rows, reasons = [], []
    for column, name in ((left_texts, names[0]), (right_texts, names[1])):
        texts, indices = distinct_texts(column, name)
        found = store.index.look_up(text_digests(texts.values, digest_key), column=name, threads=threads)
        rows.append(found[indices])
        reasons.append(text_reasons(texts)[indices])
    reason = first_reasons(*reasons)
    return _with_reasons(rows[0], rows[1], store, store, None, reason if reason.any() else None)


def text_reasons(texts: Texts) -> npt.NDArray[np.uint8]:
    """[N] position in ``REASONS`` for each text: why it cannot be scored, or 0."""
    reasons = np.zeros(len(texts.values), np.uint8)
    reasons[np.asarray(texts.values.is_null())] = _MISSING_TEXT
    reasons[texts.invalid] = _INVALID_TEXT
    return reasons


def id_reasons(ids: pa.ChunkedArray, found: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """[N] position in ``REASONS`` for each id: null, or of no record; else 0."""
    reasons = np.where(found, 0, _MISSING_RECORD).astype(np.uint8)
    reasons[np.asarray(ids.is_null())] = _MISSING_ID
    return reasons


def first_reasons(left: npt.NDArray[np.uint8], right: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """[P] reason of a pair from those of its two sides: the one that stands first in ``REASONS``."""
    # The smaller code goes first; 0 (no reason) must not.
    reasons = np.where(left == 0, right, left)
    both = (left != 0) & (right != 0)
    reasons[both] = np.minimum(left[both], right[both])
    return reasons


def distinct_texts(column: pa.ChunkedArray, name: str) -> tuple[Texts, npt.NDArray[np.int32]]:
    """The distinct texts of a column, normalised, and for each of its N rows the place among them.

    Two raw texts with one normal form stand twice; their digests agree.
    """
    if pa.types.is_decimal(column.type) and column.type.bit_width < 128:  # Arrow cannot encode the narrow ones
        column = column.cast(pa.decimal128(column.type.precision, column.type.scale))
    encoded = column.combine_chunks().dictionary_encode() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.unify_dictionaries().combine_chunks()
    if not pa.types.is_dictionary(encoded.type):
        encoded = encoded.dictionary_encode()
    elif len(encoded.dictionary) > len(encoded):  # of a whole row group, of which this batch is a small part
        encoded = encoded.dictionary_decode().dictionary_encode()
    # One more entry, null, for the rows that are null: then every row has a place.
    dictionary = pa.concat_arrays([encoded.dictionary, pa.nulls(1, encoded.dictionary.type)])
    values, invalid = as_text(dictionary, name)
    indices = encoded.indices.fill_null(len(dictionary) - 1) if encoded.null_count else encoded.indices
    return Texts(normalise(values), invalid), np.asarray(indices).astype(np.int32, copy=False)


def _with_reasons(
    left: Rows,
    right: Rows,
    left_store: VectorStore,
    right_store: VectorStore,
    null_ids: npt.NDArray[np.bool_] | None,
    reason: npt.NDArray[np.uint8] | None = None,
) -> PairRows:
    absent = None
    if left.size and (left.min() < 0 or right.min() < 0):
        absent = (left < 0) | (right < 0)
    status = None
    if _has_status(left_store) or _has_status(right_store):
        status = _status(left_store, left) | _status(right_store, right)
    if absent is not None or reason is not None or null_ids is not None or status is not None:
        codes = np.zeros(len(left), np.uint8)
        # Weakest first: a later line overrides an earlier one.
        if status is not None:
            codes[(status & STATUS_MISSING_TEXT) != 0] = _MISSING_TEXT
            codes[(status & STATUS_INVALID_TEXT) != 0] = _INVALID_TEXT
        if absent is not None:
            codes[absent] = _MISSING_RECORD
        if reason is not None:
            codes = np.where(reason != 0, reason, codes)
        if null_ids is not None:
            codes[null_ids] = _MISSING_ID
        unscored = codes != 0
        if unscored.any():
            left, right = left.copy(), right.copy()
            left[unscored] = -1
            right[unscored] = -1
            reason = codes
        else:
            reason = None
    truncated = None
    if status is not None:
        cut = (status & STATUS_TRUNCATED) != 0
        truncated = cut if cut.any() else None
    return PairRows(left, right, reason, truncated)


def _has_status(store: VectorStore) -> bool:
    """Whether any record of the store is marked: where none is, the status bytes need not be gathered."""
    counts = store.header["counts"]
    return any(counts[name] for name in ("missing_text", "invalid_text", "truncated"))


def _status(store: VectorStore, rows: Rows) -> npt.NDArray[np.uint8]:
    """[P] status bytes; 0 for row -1."""
    if not len(store):
        return np.zeros(len(rows), np.uint8)
    status = store.status[np.maximum(rows, 0)]
    status[rows < 0] = 0
    return status
