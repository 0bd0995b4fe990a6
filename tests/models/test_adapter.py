"""A student survives a save, and is never put on another base."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from flipkd.errors import ConfigError, ModelError
from flipkd.models.adapter import WEIGHTS_FILE, load_student, new_student, save_student
from flipkd.models.options import StudentOptions
from tests.models.test_packed import shaken
from tests.small_models import make_base

TEXTS = ["acute kidney failure", "renal failure, chronic", "sepsis"]


@pytest.fixture
def saved(base_dir: Path, tmp_path: Path) -> tuple[Path, np.ndarray]:
    student = shaken(new_student(StudentOptions(str(base_dir), layer=2, dimension=8, rank=4)))
    save_student(student, tmp_path / "adapter")
    return tmp_path / "adapter", student.encode(TEXTS)


def test_a_fresh_process_gives_the_same_vectors(saved: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    """Saved and loaded it is the same student to the bit: peft#310, peft#577."""
    folder, vectors = saved
    code = (
        "import sys, numpy; from flipkd.models.adapter import load_student;"
        f"numpy.save(sys.argv[2], load_student(sys.argv[1]).encode({TEXTS!r}))"
    )
    subprocess.run([sys.executable, "-c", code, str(folder), str(tmp_path / "found.npy")], check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "found.npy"), vectors)


def test_a_missing_weight_is_fatal(saved: tuple[Path, np.ndarray]) -> None:
    """No weight is silently replaced by a random one: peft#310, peft#577."""
    weights = load_file(saved[0] / WEIGHTS_FILE)
    lost = sorted(weights)[3]
    del weights[lost]
    save_file(weights, saved[0] / WEIGHTS_FILE)
    with pytest.raises(ModelError, match="1 weights are missing"):
        load_student(saved[0])


@pytest.mark.parametrize("name", [WEIGHTS_FILE, "student.json"])
def test_a_missing_or_cut_file_is_fatal(saved: tuple[Path, np.ndarray], name: str) -> None:
    path = saved[0] / name
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ModelError):
        load_student(saved[0])
    path.unlink()
    with pytest.raises(ModelError, match="no whole student"):
        load_student(saved[0])


@pytest.mark.parametrize("shape", [{}, {"hidden_size": 64}])
def test_another_base_is_refused(
    saved: tuple[Path, np.ndarray], shape: dict[str, int], tmp_path: Path, minilm_dir: Path
) -> None:
    """Of the same shape with other weights, and of another shape.

    peft#1932, peft PR#2118.
    """
    other = make_base(tmp_path / "other", minilm_dir, seed=1, **shape)
    with pytest.raises(ModelError, match="another base"):
        load_student(saved[0], base=str(other))


def test_the_same_base_elsewhere_is_taken(saved: tuple[Path, np.ndarray], tmp_path: Path, minilm_dir: Path) -> None:
    moved = make_base(tmp_path / "moved", minilm_dir, seed=0)
    np.testing.assert_array_equal(load_student(saved[0], base=str(moved)).encode(TEXTS), saved[1])


def test_other_families_are_refused_by_name(tmp_path: Path, minilm_dir: Path) -> None:
    with pytest.raises(ModelError, match="a bert model; students are of llama"):
        new_student(StudentOptions(str(minilm_dir)))


def test_a_layer_above_the_tower_is_refused(base_dir: Path) -> None:
    with pytest.raises(ConfigError, match="--layer 3: the base has 3 blocks"):
        new_student(StudentOptions(str(base_dir), layer=3))


def test_default_layer_is_a_quarter(base_dir: Path) -> None:
    student = new_student(StudentOptions(str(base_dir), dimension=8, rank=4))
    assert student.layer == 1
    assert json.dumps(student.base_fingerprint)  # plain text
