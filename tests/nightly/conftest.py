"""A bank in small: two record tables that change a little every day, candidate pairs per day, and gold pairs."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner, Result

from flipkd.data.folders import publish_folder
from jobs.nightly import nightly

RECORDS, PAIRS, GOLD = 100, 300, 80
FIRST, SECOND, THIRD = "2026-11-24", "2026-11-25", "2026-11-26"
CHANGED = RECORDS // 50


@dataclass(frozen=True)
class Bank:
    """The folder of the YAML file.

    Args:
        folder: it holds ``customers/DATE``, ``sanctions``, ``pairs/DATE``, ``gold.parquet`` and ``nightly.yaml``.
        values: of the YAML file.
        texts: of the two record tables.
    """

    folder: Path
    values: dict[str, Any]
    texts: tuple[list[str], list[str]]

    @property
    def nights(self) -> Path:
        return self.folder / "nights"

    def customers(self, date: str, texts: list[str], first_id: int = 0) -> None:
        """One night's left records, in two files."""
        folder = self.folder / "customers" / date
        folder.mkdir(parents=True, exist_ok=True)
        ids, half = pa.array(np.arange(len(texts)) + first_id, pa.int64()), len(texts) // 2
        for part, rows in enumerate((slice(0, half), slice(half, None))):
            pq.write_table(pa.table({"id": ids[rows], "text": texts[rows]}), folder / f"{part}.parquet")

    def pairs(self, date: str, columns: dict[str, Any] | None = None, rows: int = PAIRS, seed: int = 0) -> None:
        """One night's candidates, in two files; the first ``GOLD`` pairs are the same every night."""
        generator = np.random.default_rng(seed)
        left = np.concatenate([np.arange(GOLD), generator.integers(0, RECORDS, rows - GOLD)])
        right = np.concatenate([np.arange(GOLD) + np.arange(GOLD) % 2, generator.integers(0, RECORDS, rows - GOLD)])
        table = pa.table(columns if columns is not None else {"left_id": left, "right_id": right})
        folder = self.folder / "pairs" / date
        folder.mkdir(parents=True, exist_ok=True)
        for part in range(2):
            rows_of_part = table.slice(part * (table.num_rows // 2), table.num_rows // 2)
            pq.write_table(rows_of_part, folder / f"{part}.parquet", row_group_size=30)

    def write(self, **changes: Any) -> Path:
        """The YAML file, with some values changed: ``score={"threshold": 0.5}`` leaves the others of ``score``."""
        values = json.loads(json.dumps(self.values))
        for section, value in changes.items():
            if isinstance(value, dict) and isinstance(values.get(section), dict):
                values[section].update(value)
            else:
                values[section] = value
        path = self.folder / "nightly.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    def run(self, date: str, *options: str, code: int = 0, **changes: Any) -> Result:
        """Runs a night in this process."""
        arguments = [str(self.write(**changes)), "--date", date, "--no-progress", *options]
        result = CliRunner().invoke(nightly, arguments)
        assert result.exit_code == code, (result.exception, result.output)
        return result

    def facts(self, date: str, place: str = "") -> dict[str, Any]:
        """What ``night.json`` holds."""
        found: dict[str, Any] = json.loads((self.nights / place / date / "report/night.json").read_text())
        return found

    def forge(self, date: str, place: str = "") -> Path:
        """A whole night like the first one, without running it."""
        target = self.nights / place / date
        shutil.copytree(self.nights / FIRST, target)
        facts = {**self.facts(FIRST), "date": date, "passed": not place}
        page = (target / "report/night.html").read_text()

        def write(folder: Path) -> None:
            (folder / "night.json").write_text(json.dumps(facts))
            (folder / "night.html").write_text(page)

        publish_folder(target / "report", write)
        return target

    def current(self) -> dict[str, Any]:
        """What a consumer reads."""
        found: dict[str, Any] = json.loads((self.nights / "current.json").read_text())
        return found


def gold_table() -> pa.Table:
    """Every second of the gold pairs is a match: the two descriptions of one code."""
    ids = np.arange(GOLD)
    return pa.table({"left_id": ids, "right_id": ids + ids % 2, "label": pa.array(1 - ids % 2, pa.int8())})


@pytest.fixture(scope="session")
def first_night(minilm_dir: Path, icd9: list[tuple[str, str, str]], tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """The bank after its first night."""
    folder = tmp_path_factory.mktemp("bank")
    chosen = icd9[:: len(icd9) // RECORDS][: RECORDS + 1]
    texts = [long for _, long, _ in chosen][:RECORDS], [short for _, _, short in chosen]
    (folder / "sanctions").mkdir()
    pq.write_table(pa.table({"id": np.arange(len(texts[1])), "text": texts[1]}), folder / "sanctions/0.parquet")
    pq.write_table(gold_table(), folder / "gold.parquet")
    values = {
        "output": "nights",
        "score": {
            "encoder": str(minilm_dir),
            "records": "customers/{date}",
            "right_records": "sanctions",
            "pairs": "pairs/{date}",
            "cache": "cache",
            "threshold": 0.6,
            "rows_per_unit": 30,
        },
        "run": {"threads": 1},
    }
    bank = Bank(folder, values, texts)
    bank.customers(FIRST, texts[0])
    bank.pairs(FIRST)
    bank.run(FIRST)
    return bank


@pytest.fixture
def bank(first_night: Bank, tmp_path: Path) -> Bank:
    """A copy of the bank on its second evening: 2 % of the customers have changed, and other pairs are candidates."""
    shutil.copytree(first_night.folder, tmp_path / "bank")
    bank = Bank(tmp_path / "bank", first_night.values, first_night.texts)
    changed = [f"{text} (corrected)" if row < CHANGED else text for row, text in enumerate(bank.texts[0])]
    bank.customers(SECOND, changed)
    bank.pairs(SECOND, seed=1)
    return bank
