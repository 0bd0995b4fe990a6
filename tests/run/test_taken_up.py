"""What could not be read is taken up once it can be, and what was made without it is made again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flipkd.config import EncodeConfig, EncoderOptions, RunOptions, ScoreConfig
from flipkd.errors import OutputError
from flipkd.models.llm_options import LlmOptions
from flipkd.report.config import EvaluateConfig
from flipkd.report.evaluate import evaluate
from flipkd.run import score as score_job
from flipkd.run.cascade import score_and_rescore
from flipkd.run.encode import PARTS, encode
from flipkd.run.forget import forget
from flipkd.run.rescore import rescore
from flipkd.run.rescore_config import RescoreConfig
from flipkd.run.score_unit import ScoreWorker
from flipkd.run.units import WorkUnit
from flipkd.vectors.store import VectorStore

from .conftest import World

SKIP = RunOptions(on_bad_shard="skip", threads=1)


class Unreadable:
    """A Parquet file with a turned-over bit, which its page checksum shows; its size and time stay as they are."""

    def __init__(self, path: Path, at: bytes) -> None:
        self._path, self._whole, self._time = path, path.read_bytes(), path.stat().st_mtime_ns
        place = self._whole.rindex(at)
        self._write(self._whole[:place] + bytes([self._whole[place] ^ 1]) + self._whole[place + 1 :])

    def mend(self) -> None:
        self._write(self._whole)

    def _write(self, data: bytes) -> None:
        self._path.write_bytes(data)
        os.utime(self._path, ns=(self._time, self._time))


def write(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    pq.write_table(table, path, write_page_checksum=True, use_dictionary=False, compression="none")
    return path


def rows(folder: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(folder).select(columns).to_pylist()
    return found


class DiedError(Exception):
    """In place of a killed process."""


def test_texts_of_a_unit_that_can_be_read_again_are_encoded(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run listed and merged the others' texts, then died: its pairs had no vectors in the second."""
    for name in "ab":
        texts = {f"{side}_text": [f"{name} {side} {i}" for i in range(4)] for side in ("left", "right")}
        write(tmp_path / "pairs" / f"{name}.parquet", **texts)
    damage = Unreadable(tmp_path / "pairs" / "b.parquet", b"b left 2")

    def config(output: str) -> ScoreConfig:
        encoder = EncoderOptions(str(world.encoder))
        return ScoreConfig(str(tmp_path / "pairs"), str(tmp_path / output), encoder=encoder, run=SKIP)

    def die(self: ScoreWorker, unit: WorkUnit) -> None:
        raise DiedError

    with monkeypatch.context() as patch:
        patch.setattr(ScoreWorker, "__call__", die)
        with pytest.raises(DiedError):
            score_job.score(config("out"))
    damage.mend()
    found, wanted = score_job.score(config("out")), score_job.score(config("whole"))
    assert found["complete"]
    assert found["reasons"] == wanted["reasons"] == {}
    columns = ["left_text", "score", "reason"]
    assert rows(tmp_path / "out", columns) == rows(tmp_path / "whole", columns)


@pytest.mark.parametrize("cut", [False, True])
def test_records_are_taken_up_by_the_same_command(world: World, tmp_path: Path, cut: bool) -> None:
    for name in "ab":
        ids, texts = [f"{name}{i}" for i in range(4)], [f"{name} word {i}" for i in range(4)]
        write(tmp_path / "records" / f"{name}.parquet", id=ids, text=texts)
    broken = tmp_path / "records" / "b.parquet"
    encoder = EncoderOptions(str(world.encoder))
    config = EncodeConfig(encoder, str(tmp_path / "records"), str(tmp_path / "store"), run=SKIP)
    damage = Unreadable(broken, b"PAR1" if cut else b"b word 2")
    for _ in range(2):
        partial = encode(config)
        assert not partial["complete"]
        assert len(VectorStore.open(tmp_path / "store")) == 4
    damage.mend()
    pairs = write(tmp_path / "pairs.parquet", left_id=["a0", "b1"], right_id=["a1", "a2"])
    score = ScoreConfig(str(pairs), str(tmp_path / "out"), store=config.output)
    assert score_job.score(score)["reasons"] == {"missing_record": 1}
    assert score_job.score(score)["units_resumed"] == 1
    manifest = encode(config)
    assert manifest["complete"]
    assert manifest["units_resumed"] == 1
    with pytest.raises(OutputError, match="of another run, or of input that has changed"):
        score_job.score(score)
    assert len(VectorStore.open(tmp_path / "store")) == 8
    assert not (tmp_path / "store" / PARTS).exists()
    assert encode(config) == {**manifest, "units_resumed": 2, "rows_per_second": 0.0}


def test_pairs_are_scored_again_with_records_that_can_be_read_again(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One unit was written without them, before the run died."""
    for name in "ab":
        ids, texts = [f"{name}{i}" for i in range(4)], [f"{name} word {i}" for i in range(4)]
        write(tmp_path / "records" / f"{name}.parquet", id=ids, text=texts)
        write(tmp_path / "pairs" / f"{name}.parquet", left_id=["a0", "b1", "a2"], right_id=["b0", "a1", "a3"])
    damage = Unreadable(tmp_path / "records" / "b.parquet", b"b word 2")

    def config(output: str) -> ScoreConfig:
        return ScoreConfig(
            str(tmp_path / "pairs"),
            str(tmp_path / output),
            encoder=EncoderOptions(str(world.encoder)),
            records=str(tmp_path / "records"),
            run=RunOptions(on_bad_shard="skip", threads=1, workers=1),
        )

    call = ScoreWorker.__call__

    def die_at_b(self: ScoreWorker, unit: WorkUnit) -> Any:
        if unit.shard.name == "b.parquet":
            raise DiedError
        return call(self, unit)

    with monkeypatch.context() as patch:
        patch.setattr(ScoreWorker, "__call__", die_at_b)
        with pytest.raises(DiedError):
            score_job.score(config("out"))
    (first,) = (tmp_path / "out").glob("a*.parquet")
    assert pq.read_table(first).column("reason").to_pylist() == ["missing_record", "missing_record", None]
    damage.mend()
    found, wanted = score_job.score(config("out")), score_job.score(config("whole"))
    assert found["complete"]
    assert found["reasons"] == wanted["reasons"] == {}
    assert rows(tmp_path / "out", ["score", "reason"]) == rows(tmp_path / "whole", ["score", "reason"])


@pytest.mark.parametrize("top_k", [None, 1])
def test_a_finished_partial_job_takes_up_records_that_can_be_read_again(
    world: World, tmp_path: Path, top_k: int | None
) -> None:
    for name in "ab":
        ids, texts = [f"{name}{i}" for i in range(4)], [f"{name} word {i}" for i in range(4)]
        write(tmp_path / "records" / f"{name}.parquet", id=ids, text=texts)
    write(tmp_path / "pairs" / "p.parquet", left_id=["a0", "a0", "a2"], right_id=["b0", "a1", "a3"])
    write(tmp_path / "pairs" / "q.parquet", left_id=["a0", "a3"], right_id=["a2", "a1"])
    damage = Unreadable(tmp_path / "records" / "b.parquet", b"b word 2")

    def run(output: str) -> dict[str, Any]:
        return score_job.score(
            ScoreConfig(
                str(tmp_path / "pairs"),
                str(tmp_path / output),
                encoder=EncoderOptions(str(world.encoder)),
                records=str(tmp_path / "records"),
                run=SKIP,
                top_k=top_k,
            )
        )

    for _ in range(2):
        partial = run("out")
        assert not partial["complete"]
        assert partial["reasons"] == {"missing_record": 1}
    assert partial["units_resumed"] == 2
    damage.mend()
    found, wanted = run("out"), run("whole")
    assert found["complete"]
    assert found["reasons"] == wanted["reasons"] == {}
    columns = ["left_id", "right_id", "score"]
    assert rows(tmp_path / "out", columns) == rows(tmp_path / "whole", columns)
    assert run("out")["units_resumed"] == 2


@pytest.fixture
def llm(llm_dir: Path, tmp_path: Path) -> LlmOptions:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Same? {left} / {right}\nAnswer:")
    return LlmOptions(str(llm_dir), prompt_file=str(prompt), labels=(" yes", " no"), device="cpu")


def test_a_budget_is_kept_when_more_can_be_read(llm: LlmOptions, tmp_path: Path) -> None:
    """The pairs of b are nearer to the threshold than those that the first run had asked about."""
    for name, values in (("a", [0.9, 0.1, 0.8, 0.95]), ("b", [0.5, 0.51, 0.49, 0.52])):
        texts = [f"{name}{i}" for i in range(len(values))]
        numbers = pa.array(values, pa.float32())
        write(tmp_path / "s" / f"{name}.parquet", left_text=texts, right_text=texts, score=numbers, probability=numbers)
    damage = Unreadable(tmp_path / "s" / "b.parquet", np.float32([0.5, 0.51]).tobytes())

    def run(output: str) -> dict[str, Any]:
        return rescore(RescoreConfig(llm, str(tmp_path / "s"), str(tmp_path / output), budget="2", run=SKIP))

    assert run("out")["counts"]["rescored"] == 2
    damage.mend()
    found, wanted = run("out"), run("whole")
    assert found["complete"]
    assert found["counts"]["rescored"] == wanted["counts"]["rescored"] == 2
    columns = ["left_text", "rescore_reason"]
    assert rows(tmp_path / "out", columns) == rows(tmp_path / "whole", columns)


def test_a_damaged_output_of_a_finished_cascade_is_made_again(world: World, llm: LlmOptions, tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / "pairs" / f"{name}.parquet", left_text=[name, "x"], right_text=["y", "z"])
    score = ScoreConfig(
        str(tmp_path / "pairs"), str(tmp_path / "out"), encoder=EncoderOptions(str(world.encoder)), run=SKIP
    )
    ask = RescoreConfig(llm, scores="", output="", band=(-1.0, 1.0), run=SKIP)
    assert score_and_rescore(score, ask)["complete"]
    first = sorted((tmp_path / "out").glob("*.parquet"))[0]
    whole = first.read_bytes()
    first.write_bytes(whole[:100])
    assert score_and_rescore(score, ask)["complete"]
    assert first.read_bytes() == whole


def view(values: Sequence[str]) -> pa.Array:
    return pa.array(values, pa.string_view())


def test_columns_of_string_views_are_taken_everywhere(world: World, llm: LlmOptions, tmp_path: Path) -> None:
    """pyarrow's take does not know them, and polars writes them."""
    pairs = write(tmp_path / "pairs.parquet", left_text=view(["a", "b"]), right_text=view(["a", "c"]))
    encoder = EncoderOptions(str(world.encoder))
    for name, options in (("plain", {}), ("min", {"min_score": 0.9}), ("top", {"top_k": 1})):
        manifest = score_job.score(ScoreConfig(str(pairs), str(tmp_path / name), encoder=encoder, **options))
        assert manifest["rows_out"] == (1 if name == "min" else 2)
        assert pq.read_table(tmp_path / name).schema.field("left_text").type == pa.string_view()
    asked = rescore(RescoreConfig(llm, str(tmp_path / "plain"), str(tmp_path / "asked"), band=(-1.0, 1.0)))
    assert asked["counts"]["rescored"] == 2
    sample = EvaluateConfig(scores=str(tmp_path / "plain"), output=str(tmp_path / "sample.parquet"), sample=1)
    assert evaluate(sample)["pairs"] == 1


def test_forgotten_are_the_ids_of_all_files_of_a_folder(world: World, tmp_path: Path) -> None:
    """Spark names a folder ids.parquet; only its first file was read."""
    records = write(tmp_path / "records.parquet", id=view(["a", "b", "c"]), text=view(["x", "y", "z"]))
    for number, one in enumerate("ab"):
        write(tmp_path / "ids.parquet" / f"part-{number}.parquet", id=[one])
    config = EncodeConfig(
        EncoderOptions(str(world.encoder)), str(records), str(tmp_path / "store"), cache=str(tmp_path / "cache")
    )
    encode(config)
    found = forget(config, str(tmp_path / "ids.parquet"))
    assert (found["ids"], found["ids_not_found"], found["deleted_vectors"], found["deleted_stores"]) == (2, 0, 2, 1)
