"""Records with a canary among them, and a search for it in everything that a run leaves or prints."""

from __future__ import annotations

import base64
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

# Words that stand nowhere else; any case of them counts.
TEXT_WORD, ID_WORD = "Quxzvorbel", "Krumzwak77"
TEXT, ID = f"Amalia {TEXT_WORD}, 12 Strandweg", f"id-{ID_WORD}"
WORDS = (TEXT_WORD, ID_WORD)


@dataclass(frozen=True)
class World:
    """Tables with the canary in the row 3 of each.

    Args:
        records: ids and texts, two files.
        pairs: left_id, right_id, label, n.
        inline: left_text, right_text, label.
        ids: a file of the canary's id alone.
    """

    records: Path
    pairs: Path
    inline: Path
    ids: Path


def make_world(folder: Path, icd9: list[tuple[str, str, str]], rows: int = 24) -> World:
    """Writes the tables; every left record is paired with its own right text and with its neighbour's."""
    chosen = icd9[:: len(icd9) // rows][:rows]
    left, right = [long for _, long, _ in chosen], [short for _, _, short in chosen]
    ids = [f"id-{row}" for row in range(rows)]
    left[3], right[3], ids[3] = TEXT, f"{TEXT_WORD} Amalia", ID
    places = [(row, (row + step) % rows) for row in range(rows) for step in (0, 1)]
    labels = pa.array([int(one == other) for one, other in places], pa.int8())
    for part in (0, 1):
        rows_of = slice(part * rows // 2, (part + 1) * rows // 2)
        write(folder / f"records/{part}.parquet", id=ids[rows_of], text=left[rows_of])
    write(
        folder / "pairs/0.parquet",
        left_id=[ids[one] for one, _ in places],
        right_id=[ids[other] for _, other in places],
        label=labels,
        n=list(range(len(places))),
    )
    write(
        folder / "inline/0.parquet",
        left_text=[left[one] for one, _ in places],
        right_text=[right[other] for _, other in places],
        label=labels,
    )
    (folder / "ids.txt").write_text(f"{ID}\n")
    return World(folder / "records", folder / "pairs", folder / "inline", folder / "ids.txt")


def write(path: Path, **columns: object) -> Path:
    """Writes a Parquet file and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def needles(word: str) -> list[bytes]:
    """The forms of a word that are looked for, in lower case."""
    plain = word.lower()
    encoded = [plain.encode(), plain.encode("utf-16-le"), plain.encode("utf-16-be"), word.encode().hex().encode()]
    # Base64 of a text depends on where in it the word stands.
    whole = [base64.b64encode(b" " * shift + word.encode())[4:-4].lower() for shift in range(3)]
    return [*encoded, *whole]


def words_in(data: bytes | str) -> set[str]:
    """Which of the words stand in the data."""
    lowered = (data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data).lower()
    return {word for word in WORDS if any(needle in lowered for needle in needles(word))}


def leaks(folder: Path, allowed: Iterable[str] = ()) -> dict[str, set[str]]:
    """The files below a folder that hold a word, and which.

    Args:
        folder: every file in it is read; Parquet also as tables, so that compression hides nothing.
        allowed: globs, relative to the folder, of files whose business it is.
    """
    patterns = tuple(allowed)
    found = {}
    for path in files(folder):
        name = path.relative_to(folder)
        if any(
            name.full_match(pattern) if hasattr(name, "full_match") else _matches(name, pattern) for pattern in patterns
        ):
            continue
        words = words_in(str(name)) | words_in(path.read_bytes())
        if path.suffix == ".parquet" or path.read_bytes()[:4] == b"PAR1":
            words |= _in_parquet(path)
        if words:
            found[name.as_posix()] = words
    return found


def files(folder: Path) -> Iterator[Path]:
    """Regular files below a folder; no pipes, sockets and links."""
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root) / name
            if stat.S_ISREG(path.lstat().st_mode):
                yield path


def _matches(name: Path, pattern: str) -> bool:
    """``full_match`` of Python 3.13: ``**`` stands for any number of folders."""
    parts, wanted = list(name.parts), pattern.split("/")

    def matches(place: int, want: int) -> bool:
        if want == len(wanted):
            return place == len(parts)
        if wanted[want] == "**":
            return any(matches(start, want + 1) for start in range(place, len(parts) + 1))
        return place < len(parts) and Path(parts[place]).match(wanted[want]) and matches(place + 1, want + 1)

    return matches(0, 0)


def _in_parquet(path: Path) -> set[str]:
    try:
        with pq.ParquetFile(path) as file:
            told = repr(file.metadata.metadata) + repr(file.schema_arrow)
            for group in range(file.metadata.num_row_groups):
                for column in range(file.metadata.num_columns):
                    told += repr(file.metadata.row_group(group).column(column).statistics)
            return words_in(told + repr(file.read().to_pylist()))
    except pa.ArrowException:  # a broken one: its bytes have been searched
        return set()
