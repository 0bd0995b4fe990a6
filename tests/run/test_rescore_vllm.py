"""``rescore --engine vllm`` as a whole, in vLLM's own environment; its engine process is killed midway."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers

import flipkd
from flipkd.models.llm_options import LlmOptions
from flipkd.run.rescore import rescore
from flipkd.run.rescore_config import RescoreConfig
from tests.models.test_export_vllm import vllm_python as vllm_python

ROWS = 400
_ENGINE = "EngineCore"


@pytest.fixture
def base(smollm2_dir: Path, tmp_path: Path) -> Path:
    """The real model cut to three blocks."""
    model = transformers.AutoModelForCausalLM.from_pretrained(str(smollm2_dir), num_hidden_layers=3)
    model.save_pretrained(str(tmp_path / "base"))
    transformers.AutoTokenizer.from_pretrained(str(smollm2_dir)).save_pretrained(str(tmp_path / "base"))
    return tmp_path / "base"


@contextlib.contextmanager
def running(command: list[str], environment: dict[str, str], work: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process with a log, in a session of its own, which ends with the test."""
    with (work / "vllm.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=work, start_new_session=True)
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def environment(work: Path) -> dict[str, str]:
    """That of the test, with this flipkd and little memory for vLLM."""
    return {
        **{name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"},
        "PYTHONPATH": str(Path(flipkd.__file__).parent.parent),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(work / "vllm"),
    }


def outputs(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}


@pytest.mark.slow
def test_an_engine_that_is_killed_ends_the_job_and_the_next_run_goes_on(
    vllm_python: Path, base: Path, icd9: list[tuple[str, str, str]], tmp_path: Path
) -> None:
    rows = icd9[:ROWS]
    table = {
        "left_text": [rows[place - place % 10][1] for place in range(ROWS)],
        "right_text": [short for _, _, short in rows],
        "score": pa.array(np.linspace(-1, 1, ROWS), pa.float32()),
        "probability": pa.array(np.linspace(0, 1, ROWS), pa.float32()),
    }
    (tmp_path / "scores").mkdir()
    pq.write_table(pa.table(table), tmp_path / "scores" / "part-0.parquet")
    output = tmp_path / "out"
    command = [
        str(vllm_python), "-m", "flipkd.cli", "rescore", "--scores", str(tmp_path / "scores"), "--llm", str(base),
        "--output", str(output), "--engine", "vllm", "--band", "0:1", "--rows-per-unit", "5", "--no-progress",
    ]  # fmt: skip
    with running(command, environment(tmp_path), tmp_path) as process:
        deadline = time.monotonic() + 400
        while len(outputs(output)) < 5 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.005)
        engines = [child for child in psutil.Process(process.pid).children(recursive=True) if _ENGINE in child.name()]
        assert len(engines) == 1, (tmp_path / "vllm.log").read_text()[-4000:]
        engines[0].send_signal(signal.SIGKILL)
        status = process.wait(timeout=120)
    log = (tmp_path / "vllm.log").read_text()
    half = outputs(output)
    assert status == 1, log[-4000:]
    assert "Error: vLLM's engine failed while it answered (" in log
    assert 5 <= len(half) < ROWS // 5
    assert rows[0][1] not in log

    with running(command, environment(tmp_path), tmp_path) as process:
        deadline = time.monotonic() + 400
        # Its process may abort at its end after correct work: the manifest tells that the work is done.
        while not (output / "_manifest.json").exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=60)
    assert (output / "_manifest.json").exists(), (tmp_path / "vllm.log").read_text()[-4000:]
    whole = outputs(output)
    assert len(whole) == ROWS // 5
    assert half.items() <= whole.items()  # nothing was written twice
    torch_engine = LlmOptions(str(base), device="cpu")
    rescore(RescoreConfig(torch_engine, str(tmp_path / "scores"), str(tmp_path / "torch"), band=(0.0, 1.0)))
    odds = []
    for folder in (output, tmp_path / "torch"):
        answers = pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob("*.parquet"))])
        values = answers["llm_probability"].to_numpy().astype(np.float64)
        odds.append(np.log(values / (1 - values)))
    assert np.abs(odds[0] - odds[1]).max() < 0.04
    assert odds[1].std() > 0.1
