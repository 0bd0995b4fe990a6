"""No word of a record gets out of a night, whether it is released, held back or broken off, with debug logs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from tests.privacy.canary import ID_WORD, World, files, leaks, words_in
from tests.test_logs import objects

ROOT = Path(__file__).parents[2]
SCRIPT = [str(ROOT / "jobs/nightly.py")]
FAULTY = ["-m", "tests.privacy.faults", "unit", "nightly"]
FIRST, SECOND, THIRD, FOURTH = "2026-11-24", "2026-11-25", "2026-11-26", "2026-11-27"


@pytest.mark.slow
def test_nights_tell_nothing_of_a_record(world: World, minilm_dir: Path, base_dir: Path, tmp_path: Path) -> None:
    inputs, out = world.records.parent, tmp_path / "out"
    watched, here = tmp_path / "tmp", tmp_path / "cwd"
    watched.mkdir()
    here.mkdir()
    pq.write_table(pq.read_table(world.pairs).drop_columns("n"), inputs / "gold.parquet")
    values = {
        "output": str(out / "nights"),
        "score": {"encoder": str(minilm_dir), "records": "records", "pairs": "pairs", "cache": str(out / "cache")},
        "rescore": {"llm": str(base_dir), "band": [-1, 1]},
        "evaluate": {"labels": "gold.parquet", "bootstrap": 10},
        "gates": {"min_gold_pairs": 40},
        "run": {"threads": 1, "metrics_file": str(out / "night.prom")},
    }
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(watched)}

    def run(program: list[str], date: str, *options: str, code: int) -> str:
        (inputs / "nightly.yaml").write_text(yaml.safe_dump(values))
        command = [sys.executable, *program, str(inputs / "nightly.yaml"), "--date", date, "--log-level", "debug"]
        done = subprocess.run(
            [*command, *options], cwd=here, env=environment, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == code, done.stderr
        assert not words_in(done.stdout + done.stderr)
        assert "Traceback" not in done.stderr
        return done.stderr

    assert "night: rescore" in run(SCRIPT, FIRST, code=0)
    assert (out / "night.prom").stat().st_size > 0
    values["gates"]["min_gold_pairs"] = 49
    told = objects(run(SCRIPT, SECOND, "--log-format", "json", code=3))
    assert told[-1]["message"] == "gate min_gold_pairs: 48, limit 49"
    assert "this should not happen, please report it: builtins.ValueError in run" in run(FAULTY, THIRD, code=1)
    # A label that is a text: the last stage but one refuses it.
    gold = pq.read_table(inputs / "gold.parquet")
    pq.write_table(gold.set_column(2, "label", gold.column("left_id")), inputs / "gold.parquet")
    assert "is neither 0 nor 1" in run(SCRIPT, FOURTH, code=1)

    # Ids stand in a store's index, and in the scores, where they are passed through. Texts stand nowhere.
    found = leaks(out)
    assert all(words == {ID_WORD} for words in found.values())
    places = ("", "_held/", "_unfinished/", "_unfinished/")
    nights = [f"nights/{place}{date}" for place, date in zip(places, (FIRST, SECOND, THIRD, FOURTH), strict=True)]
    scores = {name.rpartition("/")[0] for name in found if name.endswith(".parquet")}
    assert scores == {f"{night}/{stage}" for night in (*nights[:2], nights[3]) for stage in ("scores", "rescored")}
    stores = {name for name in found if not name.endswith(".parquet")}
    assert stores == {f"{night}/stores/left/ids.bin" for night in nights}
    assert leaks(watched) == leaks(here) == {}
    assert [path.name for path in files(out) if path.stat().st_mode & 0o077] == ["night.prom"]  # Prometheus reads it
