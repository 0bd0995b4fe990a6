"""What ``evaluate`` can be told."""

from __future__ import annotations

from dataclasses import dataclass

from flipkd.checks import check_types
from flipkd.config import DEFAULT_LABEL_COLUMN
from flipkd.errors import ConfigError


@dataclass(frozen=True)
class EvaluateConfig:
    """Scores and labels to a report; or, with ``sample``, scores to a sample of pairs that somebody labels.

    Args:
        scores: Parquet file or folder, an output of ``score``.
        output: folder of the report, local; with ``sample`` the Parquet file of the sample, local.
        labels: Parquet file or folder with ``key`` columns and labels, or a sample with its labels filled in; None
            where the scores have the labels themselves.
        label_column: 1 or 0 as integer, float, boolean or string; null is unlabelled.
        key: columns of ids that scores and ``labels`` have in common.
        score_column: what is evaluated; a higher value must speak for a match.
        weight_column: of the table with the labels: how many pairs one labelled pair stands for. Not for a sample made
            by ``sample``, which holds its own.
        slices: columns of the scores by whose values the metrics are shown too.
        precision: also choose a threshold for this precision.
        cost_ratio: also choose the threshold of least cost where a false match costs so many missed ones.
        sample: number of pairs to draw.
        bootstrap: resamples for the confidence intervals.
        seed: of every random choice.
        show_examples: so many worst errors of each kind are shown, with all their columns: the report then holds ids
            and texts.
        overwrite: whether an older report or sample is replaced.
        progress: whether progress is shown on stderr.
    """

    scores: str
    output: str
    labels: str | None = None
    label_column: str = DEFAULT_LABEL_COLUMN
    key: tuple[str, ...] = ("left_id", "right_id")
    score_column: str = "score"
    weight_column: str | None = None
    slices: tuple[str, ...] = ()
    precision: float | None = None
    cost_ratio: float | None = None
    sample: int | None = None
    bootstrap: int = 1000
    seed: int = 0
    show_examples: int = 0
    overwrite: bool = False
    progress: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        if self.precision is not None and not 0 < self.precision <= 1:
            raise ConfigError(f"--precision must be above 0 and at most 1, not {self.precision}")
        if self.cost_ratio is not None and not 0 < self.cost_ratio < float("inf"):
            raise ConfigError(f"--cost-ratio must be a number above 0, not {self.cost_ratio}")
        if self.sample is not None and self.labels is not None:
            raise ConfigError("--sample draws pairs to label; give --labels when they are labelled, without --sample")
        for name in ("bootstrap", "sample"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name} must be at least 1, not {value}")
        if not 0 <= self.seed < 1 << 32 or self.show_examples < 0:
            raise ConfigError("--seed must be from 0 to 4294967295, and --show-examples not negative")
        if not self.key or len(set(self.key)) != len(self.key):
            raise ConfigError("--key must name at least one column, and none twice")
        hidden = [name for name in self.slices if name in self.key]
        if hidden:
            raise ConfigError(f"--slice {hidden[0]} is a column of ids; name one with few values, such as a country")
