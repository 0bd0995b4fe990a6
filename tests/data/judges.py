"""What flipkd makes of broken Parquet files: of pairs in ``score``, of records in ``encode``, of texts in ``teach``.

``python -m tests.data.judges TABLE SOURCE FOLDER SEED NUMBER...`` runs these files one after another and prints a line
of JSON before and after each: a process that dies has named the file. SOURCE is a store for pairs, else an encoder.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.score import write_store
from flipkd.config import EncodeConfig, EncoderOptions, ScoreConfig, TeachConfig
from flipkd.data.find import find_shards
from flipkd.data.location import open_location
from flipkd.data.pairs import REASONS
from flipkd.data.records import is_bytes_like
from flipkd.errors import FlipkdError
from flipkd.run.encode import encode
from flipkd.run.score import score
from flipkd.run.teach import teach
from flipkd.run.texts import TextsTask, TextsWorker
from flipkd.run.units import plan_units
from flipkd.vectors.store import STATUS_INVALID_TEXT, STATUS_MISSING_TEXT, VectorStore
from tests.data.broken_files import RECORDS, ROWS, BrokenFile, record_ids

DIM = 16
# What a broken page header may ask for: far more than any file here needs, far less than a machine has.
MOST_ARROW_BYTES = 3 << 30
_ADDRESS_SPACE_BYTES = 12 << 30


def vectors() -> np.ndarray:
    """[RECORDS, DIM] unit vectors."""
    values = np.random.default_rng(5).standard_normal((RECORDS, DIM), dtype=np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def make_store(folder: Path) -> Path:
    """A float32 store of the records."""
    write_store(folder / "store", pa.array(record_ids()), vectors(), "float32")
    return folder / "store"


class Judge(ABC):
    """Runs a job over files and says what came of each: ``error``, ``rows``, or what is wrong.

    Args:
        source: what the job needs beside the file: a store of ``make_store``, or an encoder.
        folder: for the files and the outputs.
    """

    def __init__(self, source: Path, folder: Path) -> None:
        self.source, self.input, self.output = source, folder / "input", folder / "out"

    def judge(self, name: str, content: bytes) -> str:
        """``error: ...`` is a clean error that names the file, ``rows`` all rows with right values; else a finding."""
        for folder in (self.input, self.output):
            shutil.rmtree(folder, ignore_errors=True)
        self.input.mkdir(parents=True)
        (self.input / name).write_bytes(content)
        try:
            manifest = self.run()
        except FlipkdError as error:
            outputs = self.outputs()
            return f"WRONG: an error, and yet there is {outputs[0].name}" if outputs else told(error, name)
        if manifest["rows_in"] != ROWS:
            return f"WRONG: {manifest['rows_in']} rows of {ROWS}, and no error"
        return self.check(self.input / name) or "rows"

    @abstractmethod
    def run(self) -> Mapping[str, Any]:
        """The job over the file; its manifest."""

    def outputs(self) -> list[Path]:
        """Outputs that a failed job must not leave."""
        return [path for path in self.output.rglob("*") if path.suffix in (".parquet", ".tmp")]

    @abstractmethod
    def check(self, path: Path) -> str:
        """Whether the output is what the file now says; "" if so."""


def told(error: FlipkdError, name: str) -> str:
    """An error, which must name the file."""
    if name not in str(error):
        return f"WRONG: the error does not name the file: {error}"
    return f"error: {type(error).__name__}: {error}"


class ScoreJudge(Judge):
    """Of pairs of ids."""

    def judge(self, name: str, content: bytes) -> str:
        """Scores the file; and lists the texts of two of its columns, with the other reader of pairs."""
        outcome = super().judge(name, content)
        texts = self.list_texts(name)
        return texts if texts.startswith("WRONG") else outcome

    def run(self) -> Mapping[str, Any]:
        return score(ScoreConfig(pairs=str(self.input), output=str(self.output), store=str(self.source)))

    def list_texts(self, name: str) -> str:
        """Distinct texts, as of inline pairs: ``error``, ``rows``, or what is wrong."""
        root, columns = open_location(self.input), ("left_id", "text")
        shutil.rmtree(self.output.parent / "lists", ignore_errors=True)
        lists = open_location(self.output.parent / "lists")
        task = TextsTask(root, lists, "00" * 32, columns, bytes(32))
        rows, found = 0, set()
        try:
            for unit in plan_units(root, find_shards(root), 100, "0" * 64).units:
                rows += TextsWorker(task, 1)(unit).rows_in
                found |= set(pq.read_table(lists.child(unit.output).path).column("text").to_pylist())
        except FlipkdError as error:
            return told(error, name)
        if rows != ROWS:
            return f"WRONG: texts of {rows} rows of {ROWS}, and no error"
        given = read(self.input / name, columns)
        wanted = {text for column in columns for text in texts_of(given.column(column)) if isinstance(text, str)}
        return "rows" if found == wanted else f"WRONG: {len(found ^ wanted)} texts are missing or too many"

    def check(self, path: Path) -> str:
        given, found = read(path), read_output(self.output)
        wrong = passed_on(given, found)
        places = {name.encode(): row for row, name in enumerate(record_ids())}
        rows = []
        for name in ("left_id", "right_id"):
            ids = given.column(name).cast(pa.binary()).to_pylist()
            rows.append(np.array([-1 if item is None else places.get(item, -2) for item in ids]))
        missing_id = (rows[0] == -1) | (rows[1] == -1)
        unscored = missing_id | (rows[0] == -2) | (rows[1] == -2)
        reasons = np.where(missing_id, "missing_id", np.where(unscored, "missing_record", None))
        expected = np.einsum("id,id->i", vectors()[rows[0]], vectors()[rows[1]])
        return wrong or check_scores(found, "score", reasons.tolist(), expected)


class _WithEncoder(Judge):
    def __init__(self, source: Path, folder: Path) -> None:
        from flipkd.models.encoder import load_encoder

        super().__init__(source, folder)
        self._encoder = load_encoder(source)
        self._known: dict[str, np.ndarray] = {}

    def vectors(self, texts: Sequence[str | bytes | None]) -> np.ndarray:
        """[N, d]; zeros where there is no text."""
        new = list({text for text in texts if isinstance(text, str)} - set(self._known))
        self._known |= dict(zip(new, self._encoder.encode_texts(new).vectors, strict=True)) if new else {}
        nothing = np.zeros(DIM, np.float32)
        return np.stack([self._known[text] if isinstance(text, str) else nothing for text in texts])


class EncodeJudge(_WithEncoder):
    """Of records."""

    def run(self) -> Mapping[str, Any]:
        options, units = EncoderOptions(str(self.source)), {"rows_per_unit": 100}
        return encode(EncodeConfig(options, str(self.input), str(self.output), dtype="float32", **units))

    def outputs(self) -> list[Path]:
        return [path for path in self.output.glob("*") if not path.name.startswith(".")]  # a store

    def check(self, path: Path) -> str:
        given, store = read(path, ("id", "text")), VectorStore.open(self.output)
        texts, ids = texts_of(given.column("text")), given.column("id")
        known = ids.drop_null().unique()
        if len(store) != len(known) + store.header["counts"]["duplicate_records"] + ids.null_count:
            return f"WRONG: {len(store)} records in the store, {len(known)} ids in the file"
        places = store.index.look_up(ids)
        if ((places < 0) != np.asarray(ids.is_null())).any():
            return "WRONG: an id is not in the store, or null is"
        has_id = places >= 0
        status = [
            STATUS_MISSING_TEXT if text is None else STATUS_INVALID_TEXT if isinstance(text, bytes) else 0
            for text in texts
        ]
        if not np.array_equal(store.status[places[has_id]], np.array(status)[has_id]):
            return "WRONG: marks of records"
        off = np.abs(store.rows.values[places[has_id]] - self.vectors(texts)[has_id])
        return "WRONG: vectors" if off.max(initial=0) > 1e-5 else ""


class TeachJudge(_WithEncoder):
    """Of pairs of texts."""

    def run(self) -> Mapping[str, Any]:
        return teach(TeachConfig(EncoderOptions(str(self.source)), str(self.input), str(self.output)))

    def outputs(self) -> list[Path]:
        return [path for path in self.output.glob("*") if path.suffix in (".parquet", ".tmp")]

    def check(self, path: Path) -> str:
        given, found = read(path), read_output(self.output)
        sides = [texts_of(given.column(name)) for name in ("left_text", "right_text")]
        codes = [[reason_of(text) for text in side] for side in sides]
        # The reason of a pair is the one of its two sides that stands first.
        reasons = [REASONS[min(filter(None, pair), default=0)] for pair in zip(*codes, strict=True)]
        expected = np.einsum("id,id->i", self.vectors(sides[0]), self.vectors(sides[1]))
        return passed_on(given, found) or check_scores(found, "teacher_score", reasons, expected)


JUDGES: dict[str, type[Judge]] = {"pairs": ScoreJudge, "records": EncodeJudge, "texts": TeachJudge}


def read(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """What a file says."""
    with pq.ParquetFile(path) as file:
        return file.read(None if columns is None else list(columns))


def read_output(folder: Path) -> pa.Table:
    """The one file of an output."""
    (path,) = folder.glob("*.parquet")
    return pq.read_table(path)


def texts_of(column: pa.ChunkedArray) -> list[str | bytes | None]:
    """Normal texts; None where there is none, bytes where these are not UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not is_bytes_like(column.type):
        column = column.cast(pa.large_string())
    texts: list[str | bytes | None] = []
    for item in column.cast(pa.large_binary()).to_pylist():
        try:
            texts.append(None if item is None else unicodedata.normalize("NFC", item.decode()).strip() or None)
        except UnicodeDecodeError:
            texts.append(item)
    return texts


def reason_of(text: str | bytes | None) -> int:
    """Place in ``REASONS``."""
    return 0 if isinstance(text, str) else REASONS.index("missing_text" if text is None else "invalid_text")


def passed_on(given: pa.Table, found: pa.Table) -> str:
    """Whether all columns of the input stand in the output; "" if so."""
    for column in given.schema.names:
        if not same(found.column(column), given.column(column)):
            return f"WRONG: the column {column} is not what the file says"
    return ""


def check_scores(found: pa.Table, column: str, reasons: Sequence[str | None], expected: np.ndarray) -> str:
    """Whether reasons, nulls and scores are these; "" if so."""
    if found.column("reason").to_pylist() != reasons:
        return "WRONG: reasons"
    scores, unscored = found.column(column), np.array([reason is not None for reason in reasons])
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


def main(table: str, source: str, folder: str, seed: int, numbers: list[int]) -> None:
    """Judges files and prints what came of them."""
    from flipkd.data import commit

    commit.sync = lambda _: None  # the disk's flushes are not what is tested
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE_BYTES, _ADDRESS_SPACE_BYTES))
    judge = JUDGES[table](Path(source), Path(folder))
    for number in numbers:
        broken = BrokenFile(number, seed, table)
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
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), [int(number) for number in sys.argv[5:]])
