"""Parquet files that are broken on purpose, each a function of its number, and what flipkd makes of them.

``python -m tests.data.broken_files STORE FOLDER SEED NUMBER...`` scores these files one after another and prints a
line of JSON before and after each: a process that dies has named the file.
"""

from __future__ import annotations

import datetime
import io
import json
import resource
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.score import write_store
from flipkd.config import ScoreConfig
from flipkd.data.location import open_location
from flipkd.data.shards import find_shards
from flipkd.errors import ConfigError, FlipkdError
from flipkd.run.pipeline import score
from flipkd.run.texts import TextsTask, TextsWorker
from flipkd.run.units import plan_units

RECORDS, ROWS, ROW_GROUP_ROWS, DIM = 50, 210, 70, 16
CODECS = ("none", "snappy", "zstd", "gzip")
# Every way to write the same rows: codec, data page version, dictionary, page checksums.
FORMS = tuple(product(CODECS, ("1.0", "2.0"), (False, True), (False, True)))
# What a broken page header may ask for: far more than any file here needs, far less than a machine has.
MOST_ARROW_BYTES = 3 << 30
_ADDRESS_SPACE_BYTES = 12 << 30


def record_ids() -> list[str]:
    """Ids of the store's records."""
    return [f"record-{row:04d}" for row in range(RECORDS)]


def vectors() -> np.ndarray:
    """[RECORDS, DIM] unit vectors."""
    values = np.random.default_rng(5).standard_normal((RECORDS, DIM), dtype=np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def make_store(folder: Path) -> Path:
    """A float32 store of the records."""
    write_store(folder / "store", pa.array(record_ids()), vectors(), "float32")
    return folder / "store"


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
def whole_file(form: int) -> bytes:
    """The pairs, written in one of ``FORMS``."""
    codec, page_version, dictionary, checksum = FORMS[form]
    sink = io.BytesIO()
    pq.write_table(
        pairs_table(), sink, row_group_size=ROW_GROUP_ROWS, compression=codec, data_page_version=page_version,
        use_dictionary=dictionary, write_page_checksum=checksum, data_page_size=512,
    )  # fmt: skip
    return sink.getvalue()


def _flip_bits(data: bytearray, random: np.random.Generator, form: int) -> None:
    for _ in range(int(random.integers(1, 5))):
        data[int(random.integers(len(data)))] ^= 1 << int(random.integers(8))


def _flip_footer_bit(data: bytearray, random: np.random.Generator, form: int) -> None:
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    data[int(random.integers(footer, len(data)))] ^= 1 << int(random.integers(8))


def _truncate(data: bytearray, random: np.random.Generator, form: int) -> None:
    del data[int(random.integers(len(data))) :]


def _lose_middle(data: bytearray, random: np.random.Generator, form: int) -> None:
    start, stop = sorted(random.integers(0, len(data), 2).tolist())
    del data[start : stop + 1]


def _zero_range(data: bytearray, random: np.random.Generator, form: int) -> None:
    start = int(random.integers(len(data)))
    stop = min(start + int(2 ** random.uniform(0, 12)), len(data))
    data[start:stop] = bytes(stop - start)


def _noise_range(data: bytearray, random: np.random.Generator, form: int) -> None:
    start = int(random.integers(len(data)))
    stop = min(start + int(2 ** random.uniform(0, 8)), len(data))
    data[start:stop] = random.bytes(stop - start)


def _swap_footer(data: bytearray, random: np.random.Generator, form: int) -> None:
    """The footer of the same rows written in another form."""
    other = whole_file((form + int(random.integers(1, len(FORMS)))) % len(FORMS))
    own_bytes, other_bytes = (int.from_bytes(one[-8:-4], "little") + 8 for one in (data, other))
    data[-own_bytes:] = other[-other_bytes:]


def _swap_blocks(data: bytearray, random: np.random.Generator, form: int) -> None:
    """The file's first and last bytes, or two places of it, change places."""
    size = int(2 ** random.uniform(2, 11))
    first = 0 if random.random() < 0.5 else int(random.integers(len(data) - size))
    second = int(random.integers(len(data) - size))
    one, other = data[first : first + size], data[second : second + size]
    data[first : first + size], data[second : second + size] = other, one


Mutation = Callable[[bytearray, np.random.Generator, int], None]
MUTATIONS: tuple[tuple[Mutation, int], ...] = (
    (_flip_bits, 4), (_flip_footer_bit, 4), (_truncate, 2), (_lose_middle, 1),
    (_zero_range, 2), (_noise_range, 2), (_swap_footer, 1), (_swap_blocks, 2),
)  # fmt: skip


@dataclass(frozen=True)
class BrokenFile:
    """One file of the corpus."""

    number: int
    seed: int

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
            f"file {self.number} of seed {self.seed}: {self.mutation.__name__[1:]} of {codec}, pages {page_version}, "
            f"dictionary {dictionary}, checksum {checksum}"
        )

    def content(self) -> bytes:
        """The bytes: a function of seed and number."""
        data, generator = bytearray(whole_file(self.form)), np.random.default_rng((self.seed, self.number))
        while bytes(data) == whole_file(self.form):  # a flip may undo another, a range may have been zero
            self.mutation(data, generator, self.form)
        return bytes(data)


class Judge:
    """Scores files and says what came of each: ``error``, ``rows``, or what is wrong.

    Args:
        store: of ``make_store``.
        folder: for the files and the outputs.
    """

    def __init__(self, store: Path, folder: Path) -> None:
        self._store, self._folder = store, folder

    def judge(self, name: str, content: bytes) -> str:
        """``error: ...`` is a clean error that names the file, ``rows`` all rows with right scores; else a finding."""
        pairs = self._folder / "pairs"
        shutil.rmtree(pairs, ignore_errors=True)
        shutil.rmtree(self._folder / "out", ignore_errors=True)
        pairs.mkdir(parents=True)
        (pairs / name).write_bytes(content)
        config = ScoreConfig(pairs=str(pairs), output=str(self._folder / "out"), store=str(self._store))
        texts = self._list_texts(pairs, name)
        try:
            manifest = score(config)
        except FlipkdError as error:
            outputs = [path for path in (self._folder / "out").rglob("*") if path.suffix in (".parquet", ".tmp")]
            if outputs:
                return f"WRONG: an error, and yet there is {outputs[0].name}"
            return self._clean(error, name)
        if manifest["rows_in"] != ROWS:
            return f"WRONG: {manifest['rows_in']} rows of {ROWS}, and no error"
        wrong = texts if texts.startswith("WRONG") else check_rows(pairs / name, self._folder / "out")
        return wrong or "rows"

    def _list_texts(self, pairs: Path, name: str) -> str:
        """The other reader of pairs: distinct texts of inline pairs."""
        root = open_location(pairs)
        shutil.rmtree(self._folder / "lists", ignore_errors=True)
        output = open_location(self._folder / "lists")
        task = TextsTask(root, output, "00" * 32, ("left_id", "text"), bytes(32))
        try:
            for unit in plan_units(root, find_shards(root), 100, "0" * 64).units:
                TextsWorker(task, 1)(unit)
        except FlipkdError as error:
            return self._clean(error, name)
        return "rows"

    @staticmethod
    def _clean(error: FlipkdError, name: str) -> str:
        told = str(error)
        if name not in told and not isinstance(error, ConfigError):
            return f"WRONG: the error does not name the file: {told}"
        return f"error: {type(error).__name__}: {told}"


def check_rows(pairs: Path, output: Path) -> str:
    """Whether the output holds what the file now says, and the scores of those ids; "" if so."""
    (scored,) = output.glob("*.parquet")
    with pq.ParquetFile(pairs) as file:
        given = file.read()
    found = pq.read_table(scored)
    for column in given.schema.names:
        if not same(found.column(column), given.column(column)):
            return f"WRONG: the column {column} is not what the file says"
    places = {name.encode(): row for row, name in enumerate(record_ids())}
    rows = []
    for name in ("left_id", "right_id"):
        ids = given.column(name).cast(pa.binary()).to_pylist()
        rows.append(np.array([-1 if item is None else places.get(item, -2) for item in ids]))
    missing_id = (rows[0] == -1) | (rows[1] == -1)
    unscored = missing_id | (rows[0] == -2) | (rows[1] == -2)
    reasons = np.where(missing_id, "missing_id", np.where(unscored, "missing_record", None))
    if found.column("reason").to_pylist() != reasons.tolist():
        return "WRONG: reasons"
    expected = np.einsum("id,id->i", vectors()[rows[0]], vectors()[rows[1]])
    scores = found.column("score")
    if np.asarray(scores.is_null()).tolist() != unscored.tolist():
        return "WRONG: nulls"
    if np.abs(scores.to_numpy()[~unscored] - expected[~unscored]).max(initial=0) > 1e-5:
        return "WRONG: scores"
    return ""


def same(left: pa.ChunkedArray, right: pa.ChunkedArray) -> bool:
    """Equal values, NaN equal to NaN, text compared by its bytes."""
    if pa.types.is_dictionary(left.type):
        left = left.cast(left.type.value_type)
    if pa.types.is_dictionary(right.type):
        right = right.cast(right.type.value_type)
    if pa.types.is_floating(left.type):
        return left.type == right.type and bool(np.array_equal(left.to_numpy(), right.to_numpy(), equal_nan=True))
    return left.type == right.type and bool(left.equals(right))


def main(store: str, folder: str, seed: int, numbers: list[int]) -> None:
    """Judges files and prints what came of them."""
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE_BYTES, _ADDRESS_SPACE_BYTES))
    judge = Judge(Path(store), Path(folder))
    for number in numbers:
        broken = BrokenFile(number, seed)
        print(json.dumps({"started": number}), flush=True)
        try:
            outcome = judge.judge(broken.name, broken.content())
        except Exception as error:
            outcome = f"WRONG: {type(error).__name__}: {error}"
        peak_bytes = pa.default_memory_pool().max_memory() or 0
        if peak_bytes > MOST_ARROW_BYTES:
            outcome = f"WRONG: {peak_bytes} bytes of memory were asked for, here or before"
        print(json.dumps({"number": number, "outcome": outcome, "peak_bytes": peak_bytes}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), [int(number) for number in sys.argv[4:]])
