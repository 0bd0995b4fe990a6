"""The id tables of index.cpp in numpy: the same bytes read and written, one bucket probe of a whole block at a time.

Used where flipkd was installed without its compiled library, and by the tests as the reference. index.cpp tells what a
table is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Array = NDArray[Any]

INT_BUCKET = np.dtype([("key", "<u8", (5,)), ("row", "<u4", (5,)), ("unused", "<u4")])
BYTES_BUCKET = np.dtype([("slot", [("tag", "<u4"), ("row", "<u4"), ("place", "<u8")], (4,))])

_BLOCK = 1 << 18  # keys looked up at a time
_LONG_LENGTH = 0xFFFF
_MULTIPLIER = np.uint64(0xFF51AFD7ED558CCD)


def mix(h: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finaliser of MurmurHash3, over uint64."""
    h = h ^ (h >> np.uint64(33))
    h = h * _MULTIPLIER
    h ^= h >> np.uint64(33)
    h *= np.uint64(0xC4CEB9FE1A85EC53)
    h ^= h >> np.uint64(33)
    return h


def home(h: NDArray[np.uint64], buckets: int) -> NDArray[np.int64]:
    """The home bucket of each hash: floor(h * buckets / 2^64)."""
    n = np.uint64(buckets)
    low = ((h & np.uint64(0xFFFFFFFF)) * n) >> np.uint64(32)
    at: NDArray[np.uint64] = ((h >> np.uint64(32)) * n + low) >> np.uint64(32)
    return at.astype(np.int64)


def hash_bytes(data: Array, offsets: Array) -> Array:
    """Hash each of the [n] byte strings data[offsets[i] : offsets[i + 1]]: uint64 [n]."""
    starts = offsets[:-1].astype(np.int64)
    lengths = offsets[1:].astype(np.int64) - starts
    h = lengths.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    last_word = lengths // 8
    active = np.arange(len(lengths))
    word_number = 0
    while len(active):
        position = starts[active] + 8 * word_number
        left = lengths[active] - 8 * word_number
        word = np.zeros(len(active), np.uint64)
        for byte in range(8):
            inside = left > byte
            word[inside] |= data[position[inside] + byte].astype(np.uint64) << np.uint64(8 * byte)
        mixed = (h[active] ^ word) * _MULTIPLIER
        whole = last_word[active] > word_number  # the tail word is finished by mix() instead
        h[active] = np.where(whole, mixed ^ (mixed >> np.uint64(32)), mixed)
        active = active[whole]
        word_number += 1
    return mix(h)


def look_up_ints(keys: Array, present: Array, table: Array) -> Array:
    """Rows (int64, -1 where not found) of uint64 `keys`; those not `present` are not looked for."""
    out = np.full(len(keys), -1, np.int64)
    for start in range(0, len(keys), _BLOCK):
        pending = start + np.flatnonzero(present[start : start + _BLOCK])
        at = home(mix(keys[pending]), len(table))
        for _ in range(len(table)):
            rows = table["row"][at]
            hits = (table["key"][at] == keys[pending, None]) & (rows != 0)
            found = hits.any(axis=1)
            out[pending[found]] = rows[hits].astype(np.int64) - 1
            walk_on = ~found & (rows[:, -1] != 0)
            pending, at = pending[walk_on], (at[walk_on] + 1) % len(table)
            if not len(pending):
                break
    return out


def look_up_bytes(keys: pa.Array, table: Array, data: Array, offsets: Array) -> Array:
    """Rows (int64, -1 where not found or null) of large_binary `keys`; the ids stored are those of data and offsets."""
    stored = binary_array(data, offsets)
    out = np.full(len(keys), -1, np.int64)
    for start in range(0, len(keys), _BLOCK):
        block = keys.slice(start, _BLOCK)
        h = hash_bytes(*binary_parts(block))
        pending = np.flatnonzero(np.asarray(block.is_valid()))
        at = home(h[pending], len(table))
        for _ in range(len(table)):
            slots = table["slot"][at]
            candidates = (slots["tag"] == h[pending, None].astype(np.uint32)) & (slots["row"] != 0)
            found = np.zeros(len(pending), np.bool_)
            for column in range(slots.shape[1]):
                which = np.flatnonzero(candidates[:, column] & ~found)
                rows = slots["row"][which, column].astype(np.int64) - 1
                same = pc.equal(stored.take(pa.array(rows)), block.take(pa.array(pending[which])))
                equal = np.asarray(same, dtype=np.bool_)
                out[start + pending[which[equal]]] = rows[equal]
                found[which[equal]] = True
            walk_on = ~found & (slots["row"][:, -1] != 0)
            pending, at = pending[walk_on], (at[walk_on] + 1) % len(table)
            if not len(pending):
                break
    return out


def build_ints(keys: Array, indexed: Array, table: Array) -> Array:
    """Fill a zeroed table with the rows where `indexed`. Returns duplicates as [n, 2] (first row, row), by row."""
    rows = np.flatnonzero(indexed)
    _, first, inverse = np.unique(keys[rows], return_index=True, return_inverse=True)
    keep, duplicates = _split(rows, first, inverse)
    for at, slot, row in _place(keep, home(mix(keys[keep]), len(table)), len(table), 5):
        table["key"][at, slot] = keys[row]
        table["row"][at, slot] = row + 1
    return duplicates


def build_bytes(data: Array, offsets: Array, indexed: Array, table: Array) -> Array:
    """As build_ints, for byte strings."""
    rows = np.flatnonzero(indexed)
    codes = binary_array(data, offsets).take(pa.array(rows)).dictionary_encode().indices.to_numpy()
    _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    keep, duplicates = _split(rows, first, inverse)
    h = hash_bytes(data, offsets)
    lengths = np.minimum(np.diff(offsets.astype(np.int64)), _LONG_LENGTH).astype(np.uint64)
    place = offsets[:-1].astype(np.uint64) | lengths << np.uint64(48)
    for at, slot, row in _place(keep, home(h[keep], len(table)), len(table), 4):
        table["slot"]["tag"][at, slot] = h[row].astype(np.uint32)
        table["slot"]["row"][at, slot] = row + 1
        table["slot"]["place"][at, slot] = place[row]
    return duplicates


def binary_array(data: Array, offsets: Array) -> pa.Array:
    """View ids as stored (uint8 data, uint64 offsets) as a large_binary array, without a copy."""
    buffers = [None, pa.py_buffer(np.ascontiguousarray(offsets)), pa.py_buffer(data)]
    return pa.Array.from_buffers(pa.large_binary(), len(offsets) - 1, buffers)


def binary_parts(array: pa.Array) -> tuple[Array, Array]:
    """The (uint8 data, int64 offsets [n + 1]) that a large_binary array lies in; its offset is taken off."""
    _, offsets_buffer, data_buffer = array.buffers()
    if offsets_buffer is None or not len(array):
        return np.empty(0, np.uint8), np.zeros(1, np.int64)
    offsets = np.frombuffer(offsets_buffer, np.int64)[array.offset : array.offset + len(array) + 1]
    data = np.empty(0, np.uint8) if data_buffer is None else np.frombuffer(data_buffer, np.uint8)
    return data, offsets


def _split(rows: Array, first: Array, inverse: Array) -> tuple[Array, Array]:
    firsts = rows[first[inverse]]
    again = firsts != rows
    return rows[~again], np.stack([firsts[again], rows[again]], axis=1)


def _place(rows: Array, at: Array, buckets: int, slots: int) -> Any:
    """Give every row a slot: in rounds, those that find their bucket full try the next one."""
    filled = np.zeros(buckets, np.int64)
    while len(rows):
        order = np.argsort(at, kind="stable")
        rows, at = rows[order], at[order]
        starts = np.flatnonzero(np.concatenate([[True], at[1:] != at[:-1]]))
        rank = np.arange(len(at)) - np.repeat(starts, np.diff(np.append(starts, len(at))))
        slot = filled[at] + rank
        fits = slot < slots
        yield at[fits], slot[fits], rows[fits]
        np.add.at(filled, at[fits], 1)
        rows, at = rows[~fits], (at[~fits] + 1) % buckets
