"""Parquet files that are broken on purpose, each a function of its number; what flipkd makes of them: ``judges.py``."""

from __future__ import annotations

import datetime
import io
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

RECORDS, ROWS, ROW_GROUP_ROWS = 50, 210, 70
CODECS = ("none", "snappy", "zstd", "gzip")
# Every way to write the same rows: codec, data page version, dictionary, page checksums.
FORMS = tuple(product(CODECS, ("1.0", "2.0"), (False, True), (False, True)))


def record_ids() -> list[str]:
    """Ids of the store's records."""
    return [f"record-{row:04d}" for row in range(RECORDS)]


@cache
def pairs_table() -> pa.Table:
    """Pairs with pass-through columns of many types, nulls in all of them."""
    random = np.random.default_rng(6)
    ids = np.array([*record_ids(), "nobody"])

    def some(values: list[Any], kind: pa.DataType) -> pa.Array:
        return pa.array([None if random.random() < 0.1 else value for value in values], kind)

    numbers = random.integers(0, 1000, ROWS)
    moment = datetime.datetime(2026, 1, 1)
    columns = {
        "left_id": some(list(ids[random.integers(0, len(ids), ROWS)]), pa.string()),
        "right_id": some(list(ids[random.integers(0, len(ids), ROWS)]), pa.string()).dictionary_encode(),
        "number": some(numbers.tolist(), pa.int64()),
        "text": some([f"text {number} ü" for number in numbers % 7], pa.large_string()),
        "real": some((numbers / 7).tolist(), pa.float64()),
        "flag": some((numbers % 2 == 0).tolist(), pa.bool_()),
        "moment": some([moment + datetime.timedelta(hours=int(n)) for n in numbers], pa.timestamp("us")),
        "amount": some([Decimal(int(number)) / 100 for number in numbers], pa.decimal128(12, 2)),
        "list": some([[int(n), None] * (int(n) % 3) for n in numbers], pa.list_(pa.int32())),
        "struct": some([{"a": str(n), "b": int(n)} for n in numbers], pa.struct({"a": pa.string(), "b": pa.int16()})),
        "map": some([[("key", int(n))] for n in numbers], pa.map_(pa.string(), pa.int64())),
    }
    return pa.table(columns)


@cache
def records_table() -> pa.Table:
    """Records of ``encode``, nulls in all columns; ``number`` is read by nobody."""
    random = np.random.default_rng(7)
    texts = [None if row % 11 == 3 else f" text {random.integers(40)} \u00fc" for row in range(ROWS)]
    ids = [None if row % 50 == 7 else f"record-{row:04d}" for row in range(ROWS)]
    numbers = pa.array([None if row % 9 == 1 else row for row in range(ROWS)], pa.int64())
    return pa.table({"id": ids, "text": texts, "number": numbers})


@cache
def texts_table() -> pa.Table:
    """Pairs of texts for ``teach``, labelled, with a column that is passed through."""
    random = np.random.default_rng(8)
    left, right = random.integers(0, 40, (2, ROWS))
    return pa.table(
        {
            "left_text": [None if row % 13 == 3 else f"text {left[row]}" for row in range(ROWS)],
            "right_text": pa.array([f"{right[row]} \u00fc text" for row in range(ROWS)]).dictionary_encode(),
            "label": pa.array([None if row % 17 == 2 else row % 2 for row in range(ROWS)], pa.int8()),
            "tags": pa.array([[str(row), None] * (row % 3) for row in range(ROWS)], pa.list_(pa.string())),
        }
    )


TABLES = {"pairs": pairs_table, "records": records_table, "texts": texts_table}


@cache
def whole_file(form: int, table: str = "pairs") -> bytes:
    """A table, written in one of ``FORMS``."""
    codec, page_version, dictionary, checksum = FORMS[form]
    sink = io.BytesIO()
    pq.write_table(
        TABLES[table](), sink, row_group_size=ROW_GROUP_ROWS, compression=codec, data_page_version=page_version,
        use_dictionary=dictionary, write_page_checksum=checksum, data_page_size=512,
    )  # fmt: skip
    return sink.getvalue()


# The same rows, written in the form that is so many after the file's own.
Others = Callable[[int], bytes]


def _flip_bits(data: bytearray, random: np.random.Generator, others: Others) -> None:
    for _ in range(int(random.integers(1, 5))):
        data[int(random.integers(len(data)))] ^= 1 << int(random.integers(8))


def _flip_footer_bit(data: bytearray, random: np.random.Generator, others: Others) -> None:
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    data[int(random.integers(footer, len(data)))] ^= 1 << int(random.integers(8))


def _truncate(data: bytearray, random: np.random.Generator, others: Others) -> None:
    del data[int(random.integers(len(data))) :]


def _lose_middle(data: bytearray, random: np.random.Generator, others: Others) -> None:
    start, stop = sorted(random.integers(0, len(data), 2).tolist())
    del data[start : stop + 1]


def _zero_range(data: bytearray, random: np.random.Generator, others: Others) -> None:
    start = int(random.integers(len(data)))
    stop = min(start + int(2 ** random.uniform(0, 12)), len(data))
    data[start:stop] = bytes(stop - start)


def _noise_range(data: bytearray, random: np.random.Generator, others: Others) -> None:
    start = int(random.integers(len(data)))
    stop = min(start + int(2 ** random.uniform(0, 8)), len(data))
    data[start:stop] = random.bytes(stop - start)


def _swap_footer(data: bytearray, random: np.random.Generator, others: Others) -> None:
    """The footer of the same rows written in another form."""
    other = others(int(random.integers(1, len(FORMS))))
    own_bytes, other_bytes = (int.from_bytes(one[-8:-4], "little") + 8 for one in (data, other))
    data[-own_bytes:] = other[-other_bytes:]


def _swap_blocks(data: bytearray, random: np.random.Generator, others: Others) -> None:
    """The file's first and last bytes, or two places of it, change places."""
    size = int(2 ** random.uniform(2, 11))
    first = 0 if random.random() < 0.5 else int(random.integers(len(data) - size))
    second = int(random.integers(len(data) - size))
    one, other = data[first : first + size], data[second : second + size]
    data[first : first + size], data[second : second + size] = other, one


Mutation = Callable[[bytearray, np.random.Generator, Others], None]
MUTATIONS: tuple[tuple[Mutation, int], ...] = (
    (_flip_bits, 4), (_flip_footer_bit, 4), (_truncate, 2), (_lose_middle, 1),
    (_zero_range, 2), (_noise_range, 2), (_swap_footer, 1), (_swap_blocks, 2),
)  # fmt: skip


@dataclass(frozen=True)
class BrokenFile:
    """One file of the corpus."""

    number: int
    seed: int
    table: str = "pairs"

    @property
    def form(self) -> int:
        return self.number % len(FORMS)

    @property
    def mutation(self) -> Mutation:
        weighted = [one for one, weight in MUTATIONS for _ in range(weight)]
        return weighted[(self.number // len(FORMS)) % len(weighted)]

    @property
    def name(self) -> str:
        return f"broken-{self.number:05d}.parquet"

    def __str__(self) -> str:
        codec, page_version, dictionary, checksum = FORMS[self.form]
        return (
            f"{self.table} file {self.number} of seed {self.seed}: {self.mutation.__name__[1:]} of {codec}, "
            f"pages {page_version}, dictionary {dictionary}, checksum {checksum}"
        )

    def content(self) -> bytes:
        """The bytes: a function of seed and number."""
        whole = whole_file(self.form, self.table)
        data, generator = bytearray(whole), np.random.default_rng((self.seed, self.number))
        while bytes(data) == whole:  # a flip may undo another, a range may have been zero
            self.mutation(data, generator, lambda step: whole_file((self.form + step) % len(FORMS), self.table))
        return bytes(data)
