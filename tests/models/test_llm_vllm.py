"""The vLLM engine, in vLLM's own environment (see ``test_export_vllm``), answers as the torch engine does."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

import flipkd
from flipkd.models.adapter import new_student, save_student
from flipkd.models.llm import load_llm
from flipkd.models.llm_options import LlmOptions
from flipkd.models.options import StudentOptions
from tests.models.test_export_vllm import vllm_python as vllm_python
from tests.models.test_packed import shaken

PAIRS = 500
_SCRIPT = """
import json, os, sys

from flipkd.models.llm import load_llm
from flipkd.models.llm_options import LlmOptions

if __name__ == "__main__":  # vLLM starts processes that import this file
    source, target = sys.argv[1:]
    asked = json.load(open(source))
    llm = load_llm(LlmOptions(**asked["options"]))
    found = llm.score_pairs(*asked["pairs"]).probabilities
    with open(target + ".tmp", "w") as file:
        json.dump(found.tolist(), file)
    os.replace(target + ".tmp", target)
"""


def answers(python: Path, options: LlmOptions, pairs: tuple[list[str], list[str]], work: Path) -> np.ndarray:
    """P(match) by vLLM. Its process may abort at its end after correct work: what it wrote counts."""
    script, source, target = work / "ask.py", work / "asked.json", work / "answers.json"
    script.write_text(_SCRIPT)
    source.write_text(json.dumps({"options": asdict(options), "pairs": pairs}))
    environment = {
        **{name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"},
        "PYTHONPATH": str(Path(flipkd.__file__).parent.parent),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(work / "vllm"),
    }
    command = [str(python), str(script), str(source), str(target)]
    with (work / "vllm.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=work, start_new_session=True)
        try:
            process.wait(timeout=600)
        finally:
            with contextlib.suppress(ProcessLookupError):  # its own processes too
                os.killpg(process.pid, signal.SIGKILL)
    assert target.exists(), (work / "vllm.log").read_text()[-4000:]
    return np.array(json.loads(target.read_text()))


# What vLLM's environment lacks cannot be imported.
_WITHOUT_PYARROW = """
import sys

sys.modules["pyarrow"] = None
import flipkd.models.llm_vllm
from flipkd.models.llm import load_prompts
from flipkd.models.llm_options import LlmOptions

prompts = load_prompts(LlmOptions(sys.argv[1], prompt_file=sys.argv[2], labels=("yes", "no"), engine="vllm"))
print(len(prompts.tokenize([("a fever", "fever")]).own))
"""


def test_a_model_and_its_prompts_need_no_pyarrow(base_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Is {left} the same as {right}? Answer:")
    command = [sys.executable, "-c", _WITHOUT_PYARROW, str(base_dir), str(tmp_path / "prompt.txt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapter", "prompt file"])
def test_vllm_answers_as_torch_does(
    vllm_python: Path, smollm2_dir: Path, icd9: list[tuple[str, str, str]], tmp_path: Path, kind: str
) -> None:
    """On real pairs grouped by their left text, with the real model cut to three blocks."""
    base = tmp_path / "base"
    model = transformers.AutoModelForCausalLM.from_pretrained(str(smollm2_dir), num_hidden_layers=3)
    model.save_pretrained(str(base))
    transformers.AutoTokenizer.from_pretrained(str(smollm2_dir)).save_pretrained(str(base))
    settings: dict[str, Any] = {"folder": str(base)}
    if kind == "adapter":
        student = new_student(StudentOptions(str(base), layer=1, dimension=48, rank=16, alpha=16.0))
        save_student(shaken(student), tmp_path / "adapter")
        settings = {"folder": str(tmp_path / "adapter")}
    else:
        (tmp_path / "prompt.txt").write_text("Is {left} the same as {right}? Answer:")
        # Several tokens each, and the first is the same.
        settings.update(prompt_file=str(tmp_path / "prompt.txt"), labels=(" yes they are", " yes or no"))
    rows = random.Random(9).sample(icd9, PAIRS)
    left = [rows[place - place % 10][1] for place in range(PAIRS)]
    pairs = (left, [short for _, _, short in rows])
    wanted = load_llm(LlmOptions(**settings, device="cpu"), threads=2).score_pairs(*pairs).probabilities
    found = answers(vllm_python, LlmOptions(**settings, engine="vllm"), pairs, tmp_path)
    # An adapter of random weights answers near 0, where probabilities tell little: log-odds do. 0.04 in log-odds is at
    # most 0.01 in probability.
    odds, wanted_odds = (np.log(values / (1 - values)) for values in (found, wanted.astype(np.float64)))
    print(
        f"{kind}: largest difference of log-odds {np.abs(odds - wanted_odds).max():.7f}, their spread {odds.std():.4f}"
    )
    assert found.shape == (PAIRS,)
    assert np.abs(odds - wanted_odds).max() < 0.04
    # The test must be able to fail: the answers differ by more than that.
    assert wanted_odds.std() > 0.1
