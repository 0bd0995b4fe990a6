"""Unlabelled pairs beside labelled ones."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from flipkd.config import EncoderOptions, TeachConfig
from flipkd.data.teacher_scores import TeacherFacts
from flipkd.distill.config import LossOptions, TrainConfig
from flipkd.distill.facts import run_facts
from flipkd.distill.train import train
from flipkd.distill.training_data import read_training_data, with_unlabelled
from flipkd.distill.training_pairs import TrainingPairs, read_training_pairs
from flipkd.errors import ConfigError, InputError
from flipkd.run.teach import teach
from tests.distill.conftest import MakeConfig


@pytest.fixture
def unlabelled(pairs_dir: Path, tmp_path: Path) -> Path:
    """Pairs of texts that the labelled pairs hold and of others; their labels are wrong on purpose."""
    table = pq.read_table(pairs_dir)
    rights = [f"{text} again" if row % 2 else text for row, text in enumerate(table["right_text"].to_pylist())]
    columns = {
        "left_text": table["left_text"],
        "right_text": rights[::-1],
        "label": pa.array([7] * len(rights)),
        "teacher_score": np.linspace(0, 1, len(rights), dtype=np.float32),
    }
    pq.write_table(pa.table(columns), tmp_path / "unlabelled.parquet")
    return tmp_path / "unlabelled.parquet"


def weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output) / "adapter" / "adapter_model.safetensors")


def test_both_stand_over_the_texts_of_both(make_config: MakeConfig, unlabelled: Path) -> None:
    data = read_training_data(make_config(unlabelled=str(unlabelled)))
    assert data.unlabelled is not None
    assert data.unlabelled.labels is None
    both = with_unlabelled(data.pairs, data.unlabelled)
    assert len(set(both.texts)) == len(both.texts)
    assert both.labels is not None
    count = len(data.pairs)
    assert np.isnan(both.labels[count:]).all()
    assert not np.isnan(both.labels[:count]).any()
    for part, pairs in ((slice(0, count), data.pairs), (slice(count, None), data.unlabelled)):
        assert [both.texts[place] for place in both.left[part]] == [pairs.texts[place] for place in pairs.left]
        assert [both.texts[place] for place in both.right[part]] == [pairs.texts[place] for place in pairs.right]


def test_each_text_keeps_its_teacher_vector() -> None:
    def pairs(texts: list[str], first: float) -> TrainingPairs:
        vectors = np.arange(first, first + len(texts), dtype=np.float32)[:, None]
        places = np.arange(len(texts) - 1)
        return TrainingPairs(texts, places, places + 1, None, np.zeros(len(places), np.float32), vectors)

    both = with_unlabelled(pairs(["a", "b", "c"], 0), pairs(["d", "b", "e"], 10))
    assert both.texts == ["a", "b", "c", "d", "e"]
    assert both.teacher_vectors is not None
    assert both.teacher_vectors[:, 0].tolist() == [0, 1, 2, 10, 12]
    assert both.labels is None


def test_labels_of_unlabelled_pairs_are_not_read_and_every_batch_has_both(
    make_config: MakeConfig, unlabelled: Path
) -> None:
    options = {"unlabelled": str(unlabelled), "unlabelled_batch_pairs": 9, "steps": 3}
    config = make_config(**options)
    train(config)
    first = weights(config)
    table = pq.read_table(unlabelled)
    pq.write_table(table.drop_columns("label"), unlabelled)
    again = make_config(**options, output=config.output + "-again")
    train(again)
    assert first.keys() == weights(again).keys()
    assert all(torch.equal(value, weights(again)[name]) for name, value in first.items())
    without = make_config(steps=3, output=config.output + "-without")
    train(without)
    assert not all(torch.equal(value, weights(without)[name]) for name, value in first.items())


def test_what_needs_labels_learns_nothing_from_unlabelled_pairs(make_config: MakeConfig, unlabelled: Path) -> None:
    ends = []
    for name, options in (("with", {"unlabelled": str(unlabelled)}), ("without", {})):
        config = make_config(
            output=make_config().output + name,
            loss=LossOptions(weight_pairs=0, weight_matrix=0, weight_infonce=0, weight_lm=0.5),
            student={"whole_tower": True},
            start="random",
            steps=3,
            **options,
        )
        train(config)
        ends.append(weights(config))
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], atol=1e-5, rtol=1e-3)


def test_one_teacher_is_known_whatever_the_columns_are_called(tmp_path: Path, minilm_dir: Path) -> None:
    """Labelled pairs and candidates without a column of labels, as ``teach`` writes them."""
    texts = [["acute renal failure", "cholera", "sepsis"], ["kidney failure", "typhoid", "septic shock"]]
    for name, columns in (
        ("labelled", {"left_text": texts[0], "right_text": texts[1], "label": [1, 0, 1]}),
        ("candidates", {"a": texts[1], "b": texts[0]}),
    ):
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
        left, right = list(columns)[:2]
        teacher = EncoderOptions(str(minilm_dir), device="cpu", max_length=64)
        teach(
            TeachConfig(
                teacher, str(tmp_path / f"{name}.parquet"), str(tmp_path / name), left_text=left, right_text=right
            )
        )
    pairs = read_training_pairs(str(tmp_path / "labelled"))
    both = with_unlabelled(pairs, read_training_pairs(str(tmp_path / "candidates"), ignores_labels=True))
    assert len(both) == 6
    assert both.labels is not None
    assert np.isnan(both.labels[3:]).all()
    assert both.teacher_vectors is not None
    assert len(both.texts) == len(both.teacher_vectors) == 6


def test_unlabelled_pairs_need_scores_of_the_same_teacher(
    make_config: MakeConfig, unlabelled: Path, pairs_dir: Path
) -> None:
    pairs = read_training_pairs(str(pairs_dir))
    for missing in ("teacher", "facts"):
        other = read_training_pairs(str(unlabelled), ignores_labels=True)
        facts = TeacherFacts("cosine", None, "00", "bi-encoder", ("left_text", "right_text"))
        object.__setattr__(other, missing, None if missing == "teacher" else facts)
        kind = ConfigError if missing == "teacher" else InputError
        with pytest.raises(kind, match="flipkd-batch teach"):
            with_unlabelled(pairs, other)
    pq.write_table(pq.read_table(unlabelled).drop_columns("teacher_score"), unlabelled)
    with pytest.raises(ConfigError, match="teach"):
        train(make_config(unlabelled=str(unlabelled)))


def candidates(pairs_dir: Path, target: Path, swapped: bool) -> str:
    """A night's candidates: all labelled pairs are among them, and twenty others."""
    table = pq.read_table(pairs_dir)
    left, right = (table[name].to_pylist() for name in ("left_text", "right_text"))
    others = [f"other {row}" for row in range(20)]
    sides = ([*left, *others], [*right, *others[::-1]])
    columns = dict(zip(("left_text", "right_text"), sides[::-1] if swapped else sides, strict=True))
    scores = np.linspace(0, 1, len(left) + 20, dtype=np.float32)
    pq.write_table(pa.table({**columns, "teacher_score": scores}), target)
    return str(target)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("by_file", [False, True])
def test_what_is_validated_on_is_not_learned_from_unlabelled_pairs(
    make_config: MakeConfig,
    pairs_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    swapped: bool,
    by_file: bool,
) -> None:
    options: dict[str, Any] = {"unlabelled": candidates(pairs_dir, tmp_path / "candidates.parquet", swapped)}
    if by_file:
        options |= {"pairs": str(pairs_dir / "part-0.parquet"), "validation": str(pairs_dir / "part-1.parquet")}
    with caplog.at_level(logging.WARNING):
        data = read_training_data(make_config(**options))
    assert data.validation is not None
    assert data.unlabelled is not None
    assert len(data.validation)
    assert not data.unlabelled.is_among(data.validation).any()
    found = read_training_pairs(options["unlabelled"], ignores_labels=True)
    left_out = int(np.count_nonzero(found.is_among(data.validation)))
    assert len(data.unlabelled) == len(found) - left_out > 20
    assert f"--unlabelled: pairs left out, since they are validated on: {left_out}" in caplog.text
    assert data.unlabelled.fingerprint != found.fingerprint


def test_a_run_of_which_nothing_is_left_out_is_the_same_run(make_config: MakeConfig, unlabelled: Path) -> None:
    """The one that it was before anybody looked; and the same options give the same one again."""
    config = make_config(unlabelled=str(unlabelled), validation_fraction=0)
    data = read_training_data(config)
    assert data.unlabelled is not None
    assert data.unlabelled.fingerprint == read_training_pairs(str(unlabelled), ignores_labels=True).fingerprint
    assert data.pairs.fingerprint == read_training_pairs(config.pairs).fingerprint
    assert run_facts(config, data, "base") == run_facts(config, read_training_data(config), "base")


def test_unlabelled_pairs_that_are_all_validated_on_are_none(make_config: MakeConfig, pairs_dir: Path) -> None:
    held = str(pairs_dir / "part-1.parquet")
    config = make_config(pairs=str(pairs_dir / "part-0.parquet"), validation=held, unlabelled=held, steps=2)
    assert read_training_data(config).unlabelled is None
    train(config)


def test_pairs_that_are_learned_and_validated_on_are_told(
    make_config: MakeConfig, pairs_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    part = str(pairs_dir / "part-1.parquet")
    with caplog.at_level(logging.WARNING):
        data = read_training_data(make_config(validation=part))
    assert data.validation is not None
    count = len(data.validation)
    assert f"--validation: {count} of {count} pairs stand in --pairs too" in caplog.text
