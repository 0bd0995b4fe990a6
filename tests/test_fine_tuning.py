from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

from flipkd.demo import teacher as teacher_module
from flipkd.demo.pair_sets import PairSet, icd9_pairs, write_pairs
from flipkd.demo.teacher import FineTuning, _order, fine_tune_teacher
from flipkd.errors import ConfigError, OutputError
from flipkd.models.encoder import load_encoder

OPTIONS = FineTuning(steps=8, batch_size=16, learning_rate=3e-4)


@pytest.fixture(scope="module")
def pairs() -> PairSet:
    return icd9_pairs().train.first(60)


@pytest.fixture(scope="module")
def train_file(tmp_path_factory: pytest.TempPathFactory, pairs: PairSet) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "train.parquet"
    write_pairs(pairs, path)
    return path


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, minilm_dir: Path, train_file: Path) -> Path:
    output = tmp_path_factory.mktemp("tuned") / "models" / "teacher"
    fine_tune_teacher(minilm_dir, train_file, output, OPTIONS)
    return output


def auc(folder: Path, pairs: PairSet) -> float:
    encoder = load_encoder(folder)
    left, right = encoder.encode(list(pairs.left_text)), encoder.encode(list(pairs.right_text))
    return float(roc_auc_score(pairs.label, (left * right).sum(axis=1)))


def test_the_teacher_tells_its_training_pairs_apart_better_than_before(
    tuned: Path, minilm_dir: Path, pairs: PairSet
) -> None:
    assert auc(tuned, pairs) > auc(minilm_dir, pairs) + 0.05
    assert load_encoder(tuned).max_length == load_encoder(minilm_dir).max_length


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_in_either_arithmetic(
    tmp_path: Path, tuned: Path, minilm_dir: Path, train_file: Path, pairs: PairSet, dtype: Literal["float32", "bf16"]
) -> None:
    fine_tune_teacher(minilm_dir, train_file, tmp_path / dtype, replace(OPTIONS, dtype=dtype))
    assert auc(tmp_path / dtype, pairs) == pytest.approx(auc(tuned, pairs), abs=0.03)
    weights = load_file(tmp_path / dtype / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.float32}


def test_an_arithmetic_that_is_not_known() -> None:
    with pytest.raises(ConfigError, match="float32 or bf16, not 'float16'"):
        FineTuning(dtype="float16")  # type: ignore[arg-type]


def test_the_folder_is_private_and_holds_no_record(tuned: Path, pairs: PairSet) -> None:
    files = [path for path in tuned.rglob("*") if path.is_file()]
    assert all(path.stat().st_mode & 0o077 == 0 for path in [tuned.parent, tuned, *tuned.rglob("*")])
    assert [path.name for path in tuned.parent.iterdir()] == ["teacher"]
    for path in files:
        if path.suffix != ".safetensors":
            assert not any(text.encode() in path.read_bytes() for text in pairs.left_text)


def test_the_same_call_leaves_it_and_another_is_refused(tuned: Path, minilm_dir: Path, train_file: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tuned.rglob("*")}
    facts = fine_tune_teacher(minilm_dir, train_file, tuned, OPTIONS)
    assert facts["options"]["steps"] == 8
    assert facts["pairs"] == 60
    assert {path: path.stat().st_mtime_ns for path in tuned.rglob("*")} == before
    with pytest.raises(OutputError, match="something else"):
        fine_tune_teacher(minilm_dir, train_file, tuned, FineTuning(steps=9, batch_size=16))


def test_a_teacher_of_other_pairs_or_of_another_base_is_refused(
    tmp_path: Path, tuned: Path, minilm_dir: Path, train_file: Path, pairs: PairSet
) -> None:
    """As many pairs, and a base of the same name."""
    shutil.copyfile(train_file, tmp_path / "same.parquet")
    fine_tune_teacher(minilm_dir, tmp_path / "same.parquet", tuned, OPTIONS)
    table = pq.read_table(train_file)
    for column in ("left_text", "right_text", "label"):
        values = table.column(column).to_pylist()
        other = table.set_column(table.schema.get_field_index(column), column, [values[1:] + values[:1]])
        pq.write_table(other, tmp_path / "other.parquet")
        with pytest.raises(OutputError, match="something else"):
            fine_tune_teacher(minilm_dir, tmp_path / "other.parquet", tuned, OPTIONS)
    base = shutil.copytree(minilm_dir, tmp_path / minilm_dir.name)
    fine_tune_teacher(base, train_file, tuned, OPTIONS)
    settings = json.loads((base / "sentence_bert_config.json").read_text())
    (base / "sentence_bert_config.json").write_text(json.dumps({**settings, "max_seq_length": 32}))
    with pytest.raises(OutputError, match="something else"):
        fine_tune_teacher(base, train_file, tuned, OPTIONS)


def test_a_missing_package_is_named_with_the_way_out(
    tmp_path: Path, minilm_dir: Path, train_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_module, "_PACKAGES", ("a_package_that_is_not_there",))
    with pytest.raises(ConfigError, match=r"a_package_that_is_not_there: pip install .* '\.\[demo\]'"):
        fine_tune_teacher(minilm_dir, train_file, tmp_path / "teacher", OPTIONS)


def test_batches_are_of_near_equal_length_and_every_row_comes_once_before_any_comes_twice(minilm_dir: Path) -> None:
    import pyarrow as pa
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(minilm_dir))
    train = icd9_pairs().train.first(1000)
    table = pa.table({"left_text": train.left_text, "right_text": train.right_text})
    options = FineTuning(steps=40, batch_size=50)
    order = np.array(_order(tokenizer, table, options))
    assert sorted(order.tolist()) == sorted([*range(1000), *range(1000)])
    assert _order(tokenizer, table, options) == order.tolist()
    assert _order(tokenizer, table, FineTuning(steps=40, batch_size=50, seed=1)) != order.tolist()
    lengths = np.array([len(each) for each in tokenizer(list(train.left_text))["input_ids"]])

    def padded(rows: np.ndarray) -> float:
        batches = lengths[rows].reshape(-1, 50)
        return float(batches.max(axis=1).sum() * 50 / batches.sum())

    assert padded(order) < 1.25 < padded(np.random.default_rng(0).permutation(order))
