"""Models tell how far a call is: never backwards, and at the end that all is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flipkd.models.cross_encoder import load_cross_encoder
from flipkd.models.encoder import load_encoder
from flipkd.models.llm import load_llm
from flipkd.models.llm_options import LlmOptions
from flipkd.models.progress import listening
from tests.run.test_teach import save_cross_encoder

Texts = list[str]


@pytest.fixture
def texts(icd9: list[tuple[str, str, str]]) -> Texts:
    return [long for _, long, _ in icd9[:60]]


def told_by(call: Callable[[], object]) -> list[tuple[int, int]]:
    told: list[tuple[int, int]] = []
    with listening(lambda done, total: told.append((done, total))):
        call()
    call()  # nobody listens any more
    return told


def check(told: list[tuple[int, int]], total: int) -> None:
    done = [number for number, _ in told]
    assert {number for _, number in told} == {total}
    assert len(told) > 2
    assert done == sorted(done)
    assert done[-1] == total


def test_an_encoder(minilm_dir: Path, texts: Texts) -> None:
    encoder = load_encoder(minilm_dir, threads=1)
    check(told_by(lambda: encoder.encode_texts(texts, max_tokens=100)), 60)


def test_a_cross_encoder(tmp_path: Path, minilm_dir: Path, texts: Texts) -> None:
    model = load_cross_encoder(save_cross_encoder(tmp_path / "model", minilm_dir), threads=1)
    check(told_by(lambda: model.score_pairs(texts, texts[::-1], max_tokens=100)), 60)


def test_a_decoder(base_dir: Path, texts: Texts) -> None:
    llm = load_llm(LlmOptions(str(base_dir), device="cpu", max_tokens=100), threads=1)
    left = [texts[0]] * 30 + texts[30:]
    check(told_by(lambda: llm.score_pairs(left, texts)), 60)
