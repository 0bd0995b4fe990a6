"""The trainer: the same weights however it is broken off, cut into passes, or shared out."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

from flipkd.cli import main
from flipkd.data.folders import is_whole
from flipkd.distill.config import LossOptions, TrainConfig
from flipkd.distill.gradients import Workers, backward_vectors
from flipkd.distill.objective import Batch, batch_loss, metrics_of_step
from flipkd.distill.train import train
from flipkd.distill.training_pairs import BatchOrder, read_training_pairs
from flipkd.errors import ConfigError, ModelError, OutputError
from flipkd.models.adapter import WEIGHTS_FILE, load_student, new_student
from flipkd.models.llm import load_llm
from flipkd.models.llm_options import LlmOptions
from flipkd.run.status import status
from tests.distill.conftest import MakeConfig


def weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output) / "adapter" / WEIGHTS_FILE)


def newest_checkpoint(config: TrainConfig) -> Path:
    return max((Path(config.output) / "checkpoints").glob("step-*"))


def lines(config: TrainConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def test_a_run_learns_and_leaves_what_it_should(make_config: MakeConfig) -> None:
    config = make_config(steps=30, learning_rate=5e-3, evaluate_every=10)
    found = train(config)
    logged = [line for line in lines(config) if "loss" in line]
    assert [line["step"] for line in logged] == list(range(1, 31))
    assert np.mean([line["loss"] for line in logged[-5:]]) < np.mean([line["loss"] for line in logged[:5]])
    assert {"kept_positives", "filtered_negatives", "between_active", "loss_mcl", "loss_pairs"} <= logged[0].keys()
    assert found["steps"] == 30
    assert {"auc", "f1", "average_precision", "spearman"} <= found["validation"].keys()
    folder = Path(config.output)
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert oct(folder.stat().st_mode)[-3:] == "700"
    assert {oct(path.stat().st_mode)[-3:] for path in folder.rglob("*.*") if path.is_file()} == {"600"}
    # The best student is published, not the last.
    best = max((line for line in lines(config) if "validation" in line), key=lambda line: line["validation"]["auc"])
    assert found["best_step"] == best["step"]
    told = status(config.output)
    assert (told["state"], told["steps_done"], told["last_validation"]["step"]) == ("finished", 30, 30)
    assert train(config)["steps"] == 30  # finished already: nothing is done again


def test_no_text_stands_in_the_run_folder(make_config: MakeConfig, icd9: list[tuple[str, str, str]]) -> None:
    config = make_config()
    train(config)
    told = b"".join(path.read_bytes() for path in Path(config.output).rglob("*") if path.suffix in (".json", ".jsonl"))
    assert not [long for _, long, _ in icd9[:120] if long.lower().encode() in told]


@pytest.mark.parametrize("objective", ["flip", "cosent", "lm"])
def test_resumed_weights_are_those_of_an_unbroken_run(
    make_config: MakeConfig, tmp_path: Path, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout included; also from a checkpoint before the last, when the last is damaged.

    ray#46814; ray#41700.
    """
    loss = LossOptions(objective=objective)  # type: ignore[arg-type]
    student = {"dropout": 0.2, "whole_tower": objective == "lm"}
    options: dict[str, Any] = {"student": student, "loss": loss, "checkpoint_every": 2}
    whole = make_config(output=str(tmp_path / "whole"), **options)
    train(whole)
    broken = make_config(output=str(tmp_path / "broken"), **options)
    import flipkd.distill.train as module

    real, steps = module.save_checkpoint, []

    def stop_at_four(*arguments: Any) -> None:
        real(*arguments)
        steps.append(arguments[3].step)
        if arguments[3].step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_checkpoint", stop_at_four)
    with pytest.raises(KeyboardInterrupt):
        train(broken)
    monkeypatch.undo()
    assert steps == [2, 4]
    damaged = newest_checkpoint(broken) / "adapter.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-8])
    assert not is_whole(newest_checkpoint(broken))
    train(broken)
    assert_same(weights(broken), weights(whole))
    assert_same(*(load_file(newest_checkpoint(each) / "optimizer.safetensors") for each in (broken, whole)))
    strip = [[{k: v for k, v in line.items() if k != "seconds"} for line in lines(each)] for each in (broken, whole)]
    assert strip[0] == strip[1]


def test_the_best_student_stays_while_a_checkpoint_names_it(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step after the last checkpoint was better; when it was taken again (on a GPU, in bf16) it was not."""
    import flipkd.distill.train as module

    config = make_config(steps=5, evaluate_every=1, checkpoint_every=2, validation_fraction=0.2)
    values: list[float] = []
    monkeypatch.setattr(module, "validate", lambda *_, **__: {"auc": values.pop(0)})
    real, killed_at = module._Training._step, [3]

    def step(self: Any, number: int) -> Any:
        if [number] == killed_at:
            raise KeyboardInterrupt
        return real(self, number)

    monkeypatch.setattr(module._Training, "_step", step)
    values[:] = [0.4, 0.5, 0.9]
    with pytest.raises(KeyboardInterrupt):
        train(config)
    killed_at.clear()
    values[:] = [0.45, 0.48, 0.49]
    assert train(config)["best_step"] == 2
    assert [path.name for path in (Path(config.output) / "best").iterdir()] == ["step-00000002"]


def broken_off(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """A run that stops after ``step`` steps and a checkpoint."""
    import flipkd.distill.train as module

    real = module._Training._step

    def stop(self: Any, number: int) -> Any:
        if number == step:
            raise KeyboardInterrupt
        return real(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(module._Training, "_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train(config)


def test_a_lost_adapter_is_made_again(make_config: MakeConfig) -> None:
    config = make_config()
    told = train(config)
    before, adapter = weights(config), Path(config.output) / "adapter"
    (adapter / WEIGHTS_FILE).unlink()  # not over it: what was loaded of it is mapped
    (adapter / WEIGHTS_FILE).write_bytes(b"damaged")
    assert train(config) == told
    assert_same(weights(config), before)
    shutil.rmtree(adapter)
    assert train(config) == told
    assert_same(weights(config), before)


def test_a_run_whose_best_student_is_lost_too_is_trained_again(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As is that of an older version, which kept it in ``adapter/`` alone."""
    config = make_config(checkpoint_every=2)
    train(config)
    before, folder = weights(config), Path(config.output)
    for name in ("adapter", "best"):
        shutil.rmtree(folder / name)
    broken_off(config, monkeypatch, 3)
    assert "step-00000006: its best student, of step" in caplog.text
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002"]  # none of the lost run
    train(config)
    assert_same(weights(config), before)


def test_a_damaged_best_student_is_not_published(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    import flipkd.distill.train as module

    config, draw = make_config(), module.draw_learning_curve

    def damage(*arguments: Any) -> None:
        draw(*arguments)
        for path in (Path(config.output) / "best").glob(f"*/{WEIGHTS_FILE}"):
            path.write_bytes(b"damaged")

    with monkeypatch.context() as patch:
        patch.setattr(module, "draw_learning_curve", damage)
        with pytest.raises(OutputError, match="is damaged or gone; run train again"):
            train(config)
    assert not (Path(config.output) / "adapter").exists()
    train(config)
    load_student(Path(config.output) / "adapter")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_tokens": 64}, "--max-tokens"),
        ({"gradient_checkpointing": True}, "--gradient-checkpointing"),
        ({"device": "auto", "max_tokens": 4096}, "--device, --max-tokens"),
        ({"checkpoint_every": 1}, ""),
    ],
)
def test_a_broken_off_run_goes_on_with_other_options_that_do_not_decide(
    make_config: MakeConfig,
    tmp_path: Path,
    options: dict[str, Any],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Such as when memory did not suffice."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    whole = make_config(output=str(tmp_path / "whole"))
    train(whole)
    config = make_config(checkpoint_every=3)
    broken_off(config, monkeypatch, 4)
    assert newest_checkpoint(config).name == "step-00000003"
    other = replace(config, **options)
    assert "last bits" not in caplog.text
    assert train(other)["steps"] == 6
    assert (f"goes on with another {told}: its last bits may differ" in caplog.text) == bool(told)
    assert [line["step"] for line in lines(config) if "loss" in line] == [1, 2, 3, 4, 5, 6]
    if not told:
        assert_same(weights(other), weights(whole))
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(other)[name], value, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "options", [{"max_tokens": 64, "student": {"dropout": 0.1}}, {"evaluate_every": 2}, {"learning_rate": 1e-3}]
)
def test_a_run_with_options_that_decide_is_another_run(
    make_config: MakeConfig, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pass has a dropout of its own, so with one the passes decide."""
    student = {"student": options.get("student", {})}
    broken_off(make_config(**student), monkeypatch, 1)
    with pytest.raises(OutputError, match="another training run"):
        train(make_config(**options))


# ``train`` that is killed when the weights of its fifth checkpoint are written, and half of the moments.
KILLED_WHILE_WRITING = """
import os, signal
import flipkd.distill.checkpoint as checkpoint
from flipkd.cli import main

real, written = checkpoint.save_file, []

def save_file(tensors, path):
    real(tensors, path)
    written.append(path)
    if len(written) == 10:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

checkpoint.save_file = save_file
main()
"""


def test_killed_runs_go_on_and_end_the_same(make_config: MakeConfig, tmp_path: Path) -> None:
    """SIGKILL at any moment, and while a checkpoint is written: what is there is whole, and the rerun ends the same.

    ray#41700.
    """
    options: dict[str, Any] = {"steps": 12, "evaluate_every": 8}
    whole = make_config(output=str(tmp_path / "whole"), **options)
    train(whole)
    config = make_config(output=str(tmp_path / "killed"), checkpoint_every=1, **options)
    command = [
        sys.executable, "-m", "flipkd.cli", "train", "--student", config.student.folder, "--pairs", config.pairs,
        "--output", config.output, "--layer", "2", "--dimension", "8", "--rank", "4", "--steps", "12", "--batch-pairs",
        "16", "--evaluate-every", "8", "--checkpoint-every", "1", "--log-every", "1", "--device", "cpu",
        "--threads", "1",
    ]  # fmt: skip
    folder = Path(config.output) / "checkpoints"
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    done = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, *command[3:]], check=False, **quiet)
    assert done.returncode == -signal.SIGKILL
    assert list(folder.rglob("*.tmp"))
    assert newest_checkpoint(config).name == "step-00000004"
    assert is_whole(newest_checkpoint(config))
    process = subprocess.Popen(command, **quiet)
    deadline = time.monotonic() + 120
    while not (folder / "step-00000009").exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for path in folder.glob("step-*"):
        assert is_whole(path)
    train(config)
    assert_same(weights(config), weights(whole))
    assert not list(Path(config.output).rglob("*.tmp"))


def test_gradient_caching_gives_the_same_gradient(make_config: MakeConfig, base_dir: Path) -> None:
    config = make_config(student={"dropout": 0.0})
    pairs = read_training_pairs(config.pairs)
    chosen = pairs.subset(BatchOrder(pairs, 16, 0).batch(0))
    rng = np.random.default_rng(0)
    teacher_vectors = rng.normal(size=(len(chosen.texts), 5)).astype(np.float32)
    teacher_vectors /= np.linalg.norm(teacher_vectors, axis=1, keepdims=True)
    assert chosen.labels is not None
    assert chosen.teacher is not None
    batch = Batch(*map(torch.from_numpy, (chosen.left, chosen.right, chosen.labels, chosen.teacher, teacher_vectors)))
    found = []
    for max_tokens in (10_000, 64):
        student = new_student(config.student)
        ids = student.tokenize(chosen.texts).ids
        metrics = backward_vectors(
            student, ids, lambda vectors: batch_loss(LossOptions(), vectors, batch), Workers(), max_tokens, (0, 0)
        )
        gradients = {name: p.grad for name, p in student.named_parameters() if p.requires_grad and p.grad is not None}
        found.append((metrics["loss"], gradients))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        assert (gradient - found[1][1][name]).norm() <= 1e-5 * gradient.norm(), name


def test_small_passes_and_checkpointing_end_where_large_ones_do(make_config: MakeConfig, tmp_path: Path) -> None:
    ends = []
    for number, options in enumerate(({}, {"max_tokens": 64}, {"gradient_checkpointing": True})):
        config = make_config(output=str(tmp_path / str(number)), **options)
        train(config)
        ends.append(weights(config))
    for other in ends[1:]:
        for name in other:
            torch.testing.assert_close(other[name], ends[0][name], atol=1e-4, rtol=1e-3)


def test_accumulated_batches_are_one_step(make_config: MakeConfig, tmp_path: Path) -> None:
    """The squared error over pairs is a mean, so two batches of 8 make the gradient of one of 16."""
    loss = LossOptions(weight_mcl=0, weight_matrix=0, weight_infonce=0)
    ends = []
    for number, options in enumerate(({"batch_pairs": 16}, {"batch_pairs": 8, "accumulate": 2})):
        config = make_config(output=str(tmp_path / str(number)), loss=loss, **options)
        train(config)
        ends.append(weights(config))
    for name in ends[0]:
        torch.testing.assert_close(ends[1][name], ends[0][name], atol=1e-4, rtol=1e-3)


def test_metrics_of_accumulated_batches_are_those_of_the_step(make_config: MakeConfig, tmp_path: Path) -> None:
    """A mean over pairs is the mean of those of its halves; counts are added up."""
    loss = LossOptions(weight_mcl=0, weight_matrix=0, weight_infonce=0)
    whole = make_config(output=str(tmp_path / "whole"), steps=1, batch_pairs=16, loss=loss)
    halves = make_config(output=str(tmp_path / "halves"), steps=1, batch_pairs=8, accumulate=2, loss=loss)
    train(whole)
    train(halves)
    (one,), (two,) = lines(whole), lines(halves)
    assert two["loss_pairs"] == pytest.approx(one["loss_pairs"], rel=1e-4)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    found = metrics_of_step([{"loss": 1.0, "score_positive": 0.5, "kept_positives": 3}] * 2)
    assert found == {"loss": 1.0, "score_positive": 0.5, "kept_positives": 6}


def test_pairs_without_a_label_are_learned_and_validated_beside_the_others(
    make_config: MakeConfig, pairs_dir: Path, tmp_path: Path
) -> None:
    table = pq.read_table(pairs_dir)
    labels = table["label"].to_numpy().astype(object)
    labels[1::3] = None
    place = table.column_names.index("label")
    pq.write_table(table.set_column(place, "label", pa.array(labels, pa.int8())), tmp_path / "some.parquet")
    loss = LossOptions(weight_lm=0.5)
    config = make_config(
        pairs=str(tmp_path / "some.parquet"), validation_fraction=0.3, student={"whole_tower": True}, loss=loss
    )
    assert {"auc", "answer_auc", "spearman"} <= train(config)["validation"].keys()
    assert all(np.isfinite(line["loss"]) for line in lines(config) if "loss" in line)


def test_training_stops_when_it_no_longer_helps(make_config: MakeConfig) -> None:
    config = make_config(steps=60, learning_rate=1e-9, evaluate_every=1, patience=2)
    assert train(config)["steps"] < 60
    assert is_whole(Path(config.output) / "adapter")


@pytest.mark.parametrize("objective", ["cosent_teacher", "margin_mse", "kl"])
def test_teacher_scores_alone_teach(make_config: MakeConfig, pairs_dir: Path, tmp_path: Path, objective: str) -> None:
    for part in pairs_dir.glob("*.parquet"):
        (tmp_path / "unlabelled").mkdir(exist_ok=True)
        pq.write_table(pq.read_table(part).drop_columns("label"), tmp_path / "unlabelled" / part.name)
    for name in (objective, "flip"):
        loss = LossOptions(objective=name)  # type: ignore[arg-type]
        config = make_config(pairs=str(tmp_path / "unlabelled"), output=str(tmp_path / name), loss=loss)
        assert "spearman" in train(config)["validation"]
    with pytest.raises(ConfigError, match="learns from labels"):
        train(make_config(pairs=str(tmp_path / "unlabelled"), loss=LossOptions(objective="cosent")))


def test_labels_alone_teach_only_what_needs_no_teacher(
    make_config: MakeConfig, pairs_dir: Path, tmp_path: Path
) -> None:
    labelled = tmp_path / "labelled.parquet"
    pq.write_table(pq.read_table(pairs_dir).drop_columns("teacher_score"), labelled)
    train(make_config(pairs=str(labelled), loss=LossOptions(weight_pairs=0, weight_matrix=0)))
    with pytest.raises(ConfigError, match="run flipkd-batch teach first"):
        train(make_config(pairs=str(labelled), output=str(tmp_path / "other")))


def test_a_batch_of_one_class_is_finite(make_config: MakeConfig, pairs_dir: Path, tmp_path: Path) -> None:
    table = pq.read_table(pairs_dir)
    pq.write_table(table.filter(pa.compute.equal(table["label"], 1)), tmp_path / "ones.parquet")
    config = make_config(pairs=str(tmp_path / "ones.parquet"))
    train(config)
    logged = [line for line in lines(config) if "loss" in line]
    assert all(np.isfinite(line["loss"]) and line["one_class"] == 1 for line in logged)


def test_the_language_model_learns_its_answer(make_config: MakeConfig) -> None:
    config = make_config(
        steps=25, learning_rate=1e-2, student={"whole_tower": True}, loss=LossOptions(objective="lm"), evaluate_every=25
    )
    found = train(config)["validation"]
    losses = [line["loss_lm"] for line in lines(config) if "loss_lm" in line]
    assert losses[-1] < losses[0] - 0.3
    # What is validated, and decides which step is the best, are the answers: nobody trains the vectors.
    assert found.keys() == {"answer_auc", "answer_average_precision", "answer_f1", "answer_f1_threshold"}
    with pytest.raises(ConfigError, match="--whole-tower"):
        make_config(loss=LossOptions(weight_lm=0.1))


def test_the_answers_that_are_validated_are_those_of_scoring(make_config: MakeConfig, pairs_dir: Path) -> None:
    """Beside the vectors' figures, which decide; from the adapter alone, by the engine that scoring uses."""
    pairs = {"pairs": str(pairs_dir / "part-0.parquet"), "validation": str(pairs_dir / "part-1.parquet")}
    config = make_config(
        **pairs, steps=3, evaluate_every=3, student={"whole_tower": True}, loss=LossOptions(weight_lm=0.5)
    )
    found = train(config)["validation"]
    assert {"auc", "answer_auc"} <= found.keys()
    table = pq.read_table(pairs_dir / "part-1.parquet")
    llm = load_llm(LlmOptions(config.output, device="cpu"), threads=1)
    answers = llm.score_pairs(table["left_text"].to_pylist(), table["right_text"].to_pylist()).probabilities
    assert found["answer_auc"] == pytest.approx(roc_auc_score(table["label"].to_numpy(), answers), abs=1e-3)


def test_flip_with_the_language_model_cut_into_passes(make_config: MakeConfig, tmp_path: Path) -> None:
    ends = []
    for tokens in (8192, 128):
        loss = LossOptions(weight_lm=0.5)
        config = make_config(
            output=str(tmp_path / str(tokens)), student={"whole_tower": True}, loss=loss, max_tokens=tokens
        )
        train(config)
        ends.append(weights(config))
    for name in ends[0]:
        torch.testing.assert_close(ends[1][name], ends[0][name], atol=1e-4, rtol=1e-3)


def test_a_loss_that_is_not_finite_ends_the_run(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(learning_rate=1e30)
    with pytest.raises(ModelError, match="is not finite; lower --learning-rate"):
        train(config)


def test_another_runs_folder_is_refused(make_config: MakeConfig) -> None:
    train(make_config())
    with pytest.raises(OutputError, match="another training run"):
        train(make_config(seed=1))
    config = make_config(seed=1)
    train(replace(config, run=replace(config.run, overwrite=True)))


def test_merged_options_and_file_reach_the_run(make_config: MakeConfig, tmp_path: Path) -> None:
    """A run from the command line with a configuration file; the student loads and gives unit vectors."""
    config = make_config()
    (tmp_path / "train.yaml").write_text("dimension: 6\nlayer: 1\nrank: 2\nsteps: 2\nbatch_pairs: 8\n")
    arguments = ["train", "--student", config.student.folder, "--pairs", config.pairs, "--output", config.output]
    result = CliRunner().invoke(
        main, [*arguments, "--config", str(tmp_path / "train.yaml"), "--log-every", "1", "--no-progress", "--json"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["steps"] == 2
    student = load_student(Path(config.output) / "adapter")
    assert (student.layer, student.options.dimension) == (1, 6)
    np.testing.assert_allclose(np.linalg.norm(student.encode(["acute kidney failure"]), axis=1), 1, rtol=1e-6)
