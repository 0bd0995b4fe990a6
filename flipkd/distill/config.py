"""What ``train`` can be told; ``flipkd-batch train`` has one flag per field. Defaults are our choices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from flipkd.checks import check_types
from flipkd.config import RunOptions
from flipkd.errors import ConfigError
from flipkd.models.options import StudentOptions

Objective = Literal["flip", "cosent", "cosent_infonce", "cosent_teacher", "margin_mse", "kl", "lm"]
# Options that do not decide the result but for its last bits: a run may go on with others. In what makes a run's
# fingerprint they stand at their defaults, so a run from before they were free is still the same one.
_FREE = ("device", "max_tokens", "gradient_checkpointing", "checkpoint_every")
OBJECTIVES: tuple[Objective, ...] = ("flip", "cosent", "cosent_infonce", "cosent_teacher", "margin_mse", "kl", "lm")


@dataclass(frozen=True)
class LossOptions:
    """What is minimised.

    ``flip`` is weight_mcl L_MCL + weight_pairs L_pairs + weight_matrix L_matrix + weight_infonce L_InfoNCE + weight_lm
    L_LM. The equations stand in ``flipkd.distill.losses`` and ``infonce``. The other objectives are for comparison in
    the same trainer.

    Args:
        objective: ``flip``; ``cosent`` (on labels), ``cosent_infonce`` (CoSENT + weight_infonce L_InfoNCE, on labels),
            ``cosent_teacher`` (on teacher scores), ``margin_mse``, ``kl`` or ``lm`` (the language model's loss alone).
        weight_mcl: of the margin-aware contrastive loss.
        weight_pairs: of the squared error between student and teacher over the pairs.
        weight_matrix: of the row-wise KL over the in-batch matrix; needs teacher vectors, else it is left out. It is a
            mean over rows and MCL a sum over pairs: 20 was the best of 0, 1, 5 and 20 after 80 steps on ICD-9.
        weight_infonce: of InfoNCE, a match against all other texts of the batch. On the validation pairs of ICD-9 5
            was better than 0, 1 and 20.
        weight_lm: of the language model's loss on the label's token. More than 0 runs the whole tower in every step;
            the exported encoder does not need it, a decoder that judges pairs does.
        margin_between: m_between of MCL.
        margin_within: m_within of MCL.
        temperature: of MCL and of InfoNCE.
        matrix_temperature: of the in-batch matrix; also of ``kl``.
        positive_threshold: positives that the teacher scores lower are left out of MCL and InfoNCE as noise.
        negative_threshold: negatives that the teacher scores higher are left out of both as noise.
    """

    objective: Objective = "flip"
    weight_mcl: float = 1.0
    weight_pairs: float = 1.0
    weight_matrix: float = 20.0
    weight_infonce: float = 5.0
    weight_lm: float = 0.0
    margin_between: float = 0.2
    margin_within: float = 0.1
    temperature: float = 0.05
    matrix_temperature: float = 0.05
    positive_threshold: float = 0.3
    negative_threshold: float = 0.9

    def __post_init__(self) -> None:
        check_types(self)
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"--objective must be one of {', '.join(OBJECTIVES)}, not {self.objective!r}")
        weights = ("weight_mcl", "weight_pairs", "weight_matrix", "weight_infonce", "weight_lm")
        for name in (*weights, "margin_between", "margin_within"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"--{name.replace('_', '-')} must be a number of at least 0")
        for name in ("positive_threshold", "negative_threshold"):
            if math.isnan(getattr(self, name)):  # infinity leaves nothing out
                raise ConfigError(f"--{name.replace('_', '-')} must be a number")
        for name in ("temperature", "matrix_temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"--{name.replace('_', '-')} must be greater than 0")

    @property
    def trains_language_model(self) -> bool:
        """Whether the whole tower is needed."""
        return self.objective == "lm" or (self.objective == "flip" and self.weight_lm > 0)


@dataclass(frozen=True)
class TrainConfig:
    """Pairs with teacher scores to a student.

    Args:
        pairs: output of ``teach`` (or any Parquet with two text columns and labels or teacher scores).
        output: folder of the run.
        student: the base and its LoRA.
        loss: what is minimised.
        validation: pairs to validate on, in the form of ``pairs``; None holds some of ``pairs`` out.
        validation_fraction: of left texts that are held out where ``validation`` is None; 0 for none.
        unlabelled: more pairs for L_dist, in the form of ``pairs``, without labels (any are ignored): a teacher scores
            any pair for nothing. InfoNCE takes their texts for other texts of the batch. Those to validate on are left
            out.
        unlabelled_batch_pairs: of them in one batch, beside ``batch_pairs``.
        left_text, right_text: the text columns; None for what ``teach`` recorded, else ``left_text``/``right_text``.
        label_column: None takes ``label`` if there is such a column, and trains from teacher scores alone if not.
        steps: optimizer steps.
        batch_pairs: pairs in one batch, over all workers (all there are, where that is fewer); losses compare the pairs
            of a batch, and the in-batch matrix is over their texts.
        accumulate: batches of one step, which takes the mean of their gradients: it learns from ``accumulate *
            batch_pairs`` pairs, but compares those of one batch alone.
        learning_rate: highest, after warm-up.
        warmup_fraction: of the steps with a linearly rising rate; then it falls along a cosine to 0.
        weight_decay: AdamW's.
        max_gradient_norm: gradients are scaled down to this norm.
        start: where A of layer k starts: ``whitened`` (``flipkd.distill.whitening``), or ``random`` as LoRA does.
        max_tokens: tokens in one pass through the blocks. A batch that has more is computed by gradient caching: the
            result is the same (but for dropout, which each pass has of its own), memory is that of one pass, and each
            text is run forward twice.
        gradient_checkpointing: forget activations of a block and compute them again backwards.
        evaluate_every: steps between validations.
        checkpoint_every: steps between checkpoints.
        keep_checkpoints: how many are kept.
        patience: validations without a better value after which training stops; None for never.
        seed: of LoRA's start, of the order of pairs, of dropout.
        log_every: steps between lines of metrics.
        device: ``cpu``, ``cuda`` or ``auto``.
        run: how to run; ``run.ray`` trains on ``run.workers`` Ray workers.
    """

    pairs: str
    output: str
    student: StudentOptions
    loss: LossOptions = field(default_factory=LossOptions)
    validation: str | None = None
    validation_fraction: float = 0.05
    unlabelled: str | None = None
    unlabelled_batch_pairs: int = 64
    left_text: str | None = None
    right_text: str | None = None
    label_column: str | None = None
    steps: int = 1000
    batch_pairs: int = 64
    accumulate: int = 1
    learning_rate: float = 2e-3
    warmup_fraction: float = 0.1
    weight_decay: float = 0.01
    max_gradient_norm: float = 1.0
    start: Literal["whitened", "random"] = "whitened"
    max_tokens: int = 8192
    gradient_checkpointing: bool = False
    evaluate_every: int = 100
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    patience: int | None = None
    seed: int = 0
    log_every: int = 10
    device: str = "auto"
    run: RunOptions = field(default_factory=RunOptions)

    def __post_init__(self) -> None:
        check_types(self)
        counts = ("steps", "batch_pairs", "unlabelled_batch_pairs", "accumulate", "max_tokens", "evaluate_every")
        for name in (*counts, "checkpoint_every", "keep_checkpoints", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.batch_pairs < 2:
            raise ConfigError("--batch-pairs must be at least 2: every loss compares pairs")
        if self.start not in ("whitened", "random"):
            raise ConfigError(f"--start must be whitened or random, not {self.start!r}")
        if self.patience is not None and self.patience < 1:
            raise ConfigError("--patience must be at least 1")
        for name in ("validation_fraction", "warmup_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be from 0 to less than 1")
        if not 0 <= self.seed < 1 << 32:
            raise ConfigError(f"--seed must be from 0 to 4294967295, not {self.seed}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ConfigError("--weight-decay must be a number of at least 0")
        for name in ("learning_rate", "max_gradient_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"--{name.replace('_', '-')} must be greater than 0")
        if self.loss.trains_language_model and not self.student.whole_tower:
            raise ConfigError("the language model's loss needs the whole tower: pass --whole-tower")

    def deciding(self) -> dict[str, Any]:
        """Every option that decides the result, as plain values; the others that stand here are at their defaults."""
        values = self.recorded()
        for name in _FREE:
            # Every pass has a dropout of its own, so where there is any the passes decide.
            if name != "max_tokens" or not self.student.dropout:
                values[name] = getattr(TrainConfig, name)
        return values

    def other_rounding(self, recorded: Mapping[str, Any]) -> list[str]:
        """Flags of the options with which a run that ``recorded`` tells of gets other last bits than with these."""
        own = {name: getattr(self, name) for name in _FREE if name != "checkpoint_every"}
        return [f"--{name.replace('_', '-')}" for name, value in own.items() if recorded.get(name, value) != value]

    def recorded(self) -> dict[str, Any]:
        """Every option that tells how the student was trained, as plain values."""
        values = asdict(self)
        for name in ("run", "output", "log_every", "keep_checkpoints"):
            del values[name]
        if not self.loss.trains_language_model or self.student.prompt_version == 1:
            # Not asked, or what all runs asked before there were versions: such a run is still the same one.
            del values["student"]["prompt_version"]
        if self.student.attention == "causal":  # likewise
            del values["student"]["attention"]
        return values
