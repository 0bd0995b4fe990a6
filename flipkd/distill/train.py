"""Training: one plain loop.

Input: Parquet with two text columns and ``teacher_score``, ``label``, or both, as ``teach`` writes it. Output: a run
folder (``flipkd.distill.run_folder``) whose ``adapter/`` is the best student. A run that was broken off goes on from
its last whole checkpoint; on a CPU in float32 its weights are those of an unbroken run, bit for bit.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flipkd.data.location import open_location
from flipkd.distill.checkpoint import Progress, load_checkpoint, newest_checkpoint, save_checkpoint
from flipkd.distill.config import TrainConfig
from flipkd.distill.facts import run_facts, summary
from flipkd.distill.gradients import Workers, backward_vectors
from flipkd.distill.language_model import backward_language_model
from flipkd.distill.objective import Batch, batch_loss, check_objective, metrics_of_step
from flipkd.distill.picture import draw_learning_curve
from flipkd.distill.run_folder import CHECKPOINTS, RunFolder
from flipkd.distill.training_data import TrainingData, read_training_data, with_unlabelled
from flipkd.distill.training_pairs import BatchOrder, TrainingPairs
from flipkd.distill.validation import deciding_value, validate
from flipkd.distill.whitening import whiten_projection
from flipkd.errors import ConfigError, InputError, ModelError
from flipkd.models.adapter import base_fingerprint, new_student
from flipkd.models.llm_prompt import TRAINED_PROMPTS, pair_prompt
from flipkd.models.student import Student
from flipkd.run.job import available_cores
from flipkd.run.lock import locked
from flipkd.run.overlap import refuse_other_kind, refuse_overlap
from flipkd.run.progress import progress_bar
from flipkd.run.ray_session import ray_session

logger = logging.getLogger(__name__)


def train(config: TrainConfig) -> dict[str, Any]:
    """Trains a student, or goes on with a run that was broken off. Returns a summary.

    Raises:
        ConfigError: an option does not fit the data or the base.
        InputError: the pairs cannot be read.
        ModelError: the base cannot be loaded, or a loss is not finite.
        OutputError: the folder is another run's, or in use.
    """
    output = open_location(config.output)
    if not output.is_local:
        raise ConfigError(f"--output {output.uri}: a run's folder must be local (or on a shared disk)")
    inputs = [("--pairs", config.pairs), ("--validation", config.validation), ("--unlabelled", config.unlabelled)]
    refuse_overlap(output, [(option, open_location(uri)) for option, uri in inputs if uri is not None])
    refuse_other_kind(output, "train")
    with locked(output):
        if config.run.ray is None:
            torch.set_num_threads(config.run.threads or available_cores())
            return train_worker(config, Workers())
        from flipkd.distill.cluster import train_on_ray

        with ray_session():
            return train_on_ray(config)


def train_worker(config: TrainConfig, workers: Workers) -> dict[str, Any]:
    """What each of the workers that train together does. See ``train``.

    Rank 0 alone writes, and says where the run goes on: each worker by itself might take another checkpoint for whole.
    """
    data = read_training_data(config)
    check_objective(config.loss, data.pairs.labels is not None, data.pairs.teacher is not None)
    path, base = run_path(config), base_fingerprint(config.student.folder)
    facts = run_facts(config, data, base)
    device = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    folder = RunFolder(path, facts, config.run.overwrite) if workers.leads else None
    is_finished, step = _start(facts["fingerprint"], folder, workers, device)
    if is_finished:
        if workers.leads:
            logger.info("%s is complete already", config.output)
        return summary(config, path)
    if folder is not None and (changed := config.other_rounding(folder.facts.get("config", {}))):
        logger.warning("%s goes on with another %s: its last bits may differ", config.output, ", ".join(changed))
    student = new_student(config.student, device, config.seed, base)
    if config.gradient_checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # its new name is not in every transformers that we take
            student.decoder.gradient_checkpointing_enable({"use_reentrant": False})
    _Training(config, workers, folder, student, data).run(step)
    return summary(config, path)


def _start(fingerprint: str, folder: RunFolder | None, workers: Workers, device: str) -> tuple[bool, int]:
    """Whether the run is finished, and the step of the checkpoint to go on from: rank 0's, which has the ``folder``.

    Raises:
        InputError: this worker's data, base or options are others than rank 0's.
    """
    of_run = int(fingerprint[:15], 16)  # 60 bits of it
    own = [0, 0, 0]
    if folder is not None:
        is_finished = folder.is_finished
        own = [int(is_finished), 0 if is_finished else newest_checkpoint(folder.checkpoints, folder.has_best), of_run]
    finished, step, of_leader = workers.told(own, device)
    if of_run != of_leader:
        raise InputError(
            f"training worker {workers.rank} finds other pairs or another base than worker 0; all nodes must see the "
            "same files"
        )
    return bool(finished), step


def run_path(config: TrainConfig) -> Path:
    """The run's folder."""
    return Path(open_location(config.output).path)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of step ``step`` (from 0): a linear rise, then a cosine that is 0 at step ``steps``."""
    warmup = round(config.warmup_fraction * config.steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(config.steps - warmup, 1)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


class _Training:
    """The state of a run, and its loop."""

    def __init__(
        self,
        config: TrainConfig,
        workers: Workers,
        folder: RunFolder | None,
        student: Student,
        data: TrainingData,
    ) -> None:
        self._config, self._workers, self._folder, self._student = config, workers, folder, student
        self._pairs, self._validation = data.pairs, data.validation
        # For each order the place of its first pair.
        self._orders = [(0, BatchOrder(data.pairs, config.batch_pairs, config.seed))]
        if data.unlabelled is not None:
            self._pairs = with_unlabelled(data.pairs, data.unlabelled)
            more = BatchOrder(data.unlabelled, config.unlabelled_batch_pairs, config.seed)
            self._orders.append((len(data.pairs), more))
        self._ids = student.tokenize(self._pairs.texts).ids
        self._validation_ids = [] if self._validation is None else student.tokenize(self._validation.texts).ids
        self._parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        words = TRAINED_PROMPTS[config.student.prompt_version]
        self._prompt = pair_prompt(words, student.tokenizer) if config.loss.trains_language_model else None

    def run(self, step: int) -> None:
        """From the checkpoint of ``step`` (0: from the start) to the last step."""
        config, folder = self._config, self._folder
        progress = load_checkpoint(run_path(config) / CHECKPOINTS, step, self._student, self._optimizer)
        if progress.step == 0 and config.start == "whitened":
            whiten_projection(self._student, self._ids, self._workers, config.max_tokens, config.seed)
        if folder is not None:
            folder.forget_after(progress.step)
        started = time.perf_counter() - progress.seconds
        shown = folder is not None and config.run.progress
        with progress_bar("train", config.steps, "steps", shown) as bar, self._board() as board:
            bar.update(progress.step)
            while progress.step < config.steps and not progress.stopped:
                metrics = self._step(progress.step)
                progress = replace(progress, step=progress.step + 1, seconds=time.perf_counter() - started)
                last = progress.step == config.steps
                line: dict[str, Any] = {}
                if progress.step % config.log_every == 0 or last:
                    line |= {name: float(value) for name, value in metrics.items()}
                if self._validation is not None and (progress.step % config.evaluate_every == 0 or last):
                    progress = self._validate(progress, self._validation, line)
                if line and folder is not None:
                    line = {"step": progress.step, "seconds": round(progress.seconds, 3), **line}
                    folder.log(line)
                    board.add(line)
                if progress.step % config.checkpoint_every == 0 or last or progress.stopped:
                    if folder is not None:
                        keep = config.keep_checkpoints
                        save_checkpoint(folder.checkpoints, self._student, self._optimizer, progress, keep)
                        folder.forget_older_bests()
                        draw_learning_curve(folder.metrics(), folder.path / "learning_curve.png")
                    self._wait()
                bar.update(1)
        if folder is not None:
            folder.finish(self._student, progress.best_step)
        self._wait()

    def _wait(self) -> None:
        self._workers.sum(torch.zeros(1, device=self._student.device))

    def _board(self) -> Any:
        from flipkd.distill.board import Board

        return Board(None if self._folder is None else self._folder.path)

    def _step(self, step: int) -> dict[str, Any]:
        config = self._config
        self._student.train()
        rate = learning_rate(config, step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        tokens, texts, parts = 0, 0, []
        for part in range(config.accumulate):
            number = step * config.accumulate + part
            rows = np.concatenate([first + order.batch(number) for first, order in self._orders])
            chosen = self._pairs.subset(rows)
            assert chosen.places is not None
            ids = [self._ids[place] for place in chosen.places]
            tokens, texts = tokens + sum(map(len, ids)), texts + len(ids)
            parts.append(self._backward(chosen, ids, number))
        self._workers.sum_gradients(self._parameters)
        for parameter in self._parameters:
            if parameter.grad is not None and config.accumulate > 1:
                parameter.grad /= config.accumulate
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, config.max_gradient_norm)
        if not torch.isfinite(norm):
            raise ModelError(
                f"the gradient of step {step + 1} is not finite; lower --learning-rate, or train in float32; the last "
                "checkpoint is kept"
            )
        self._optimizer.step()
        found = metrics_of_step(parts)
        return {**found, "learning_rate": rate, "gradient_norm": norm, "tokens": tokens, "texts": texts}

    def _backward(self, chosen: TrainingPairs, ids: Sequence[Sequence[int]], number: int) -> dict[str, Any]:
        config, student, device = self._config, self._student, self._student.device
        batch = Batch(
            torch.from_numpy(chosen.left).to(device),
            torch.from_numpy(chosen.right).to(device),
            None if chosen.labels is None else torch.from_numpy(chosen.labels).to(device),
            None if chosen.teacher is None else torch.from_numpy(chosen.teacher).to(device),
            None if chosen.teacher_vectors is None else torch.from_numpy(chosen.teacher_vectors).to(device),
        )
        metrics: dict[str, Any] = {}
        if config.loss.objective != "lm":
            metrics = backward_vectors(
                student,
                ids,
                lambda vectors: batch_loss(config.loss, vectors, batch),
                self._workers,
                config.max_tokens,
                (config.seed, number),
            )
        if self._prompt is not None:
            assert chosen.labels is not None
            labelled = np.flatnonzero(~np.isnan(chosen.labels))
            own = labelled[self._workers.rank :: self._workers.count].tolist()
            bodies = [student.body(text) for text in ids]
            triples = [(bodies[chosen.left[i]], bodies[chosen.right[i]], int(chosen.labels[i])) for i in own]
            weight = 1.0 if config.loss.objective == "lm" else config.loss.weight_lm
            # The last number: others than those of the passes of the vectors.
            own_seed = (config.seed, number, self._workers.rank, 1)
            found = backward_language_model(
                student, self._prompt, triples, weight, len(labelled), config.max_tokens, own_seed
            )
            metrics["loss_lm"] = self._workers.sum(found)
            metrics["loss"] = metrics.get("loss", 0.0) + weight * metrics["loss_lm"]
        return metrics

    def _validate(self, progress: Progress, pairs: TrainingPairs, line: dict[str, Any]) -> Progress:
        """Validates on rank 0 and tells the others; returns the progress with the best value and whether to stop."""
        config = self._config
        told = torch.zeros(2, dtype=torch.float64, device=self._student.device)
        if self._workers.leads:
            line["validation"] = validate(
                self._student,
                pairs,
                self._validation_ids,
                config.max_tokens,
                self._prompt,
                trains_vectors=config.loss.objective != "lm",
            )
            value = deciding_value(line["validation"])
            told[:] = torch.tensor([0.0 if value is None else 1.0, value or 0.0])
        has_value, value = self._workers.sum(told).tolist()
        if not has_value:
            return progress
        if progress.best_value is None or value > progress.best_value:
            if self._folder is not None:
                self._folder.save_best(self._student, progress.step)
            return replace(progress, best_value=value, best_step=progress.step, waited=0)
        waited = progress.waited + 1
        return replace(progress, waited=waited, stopped=config.patience is not None and waited >= config.patience)
