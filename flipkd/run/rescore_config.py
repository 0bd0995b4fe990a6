"""What ``rescore`` can be told. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

from flipkd.checks import check_positive, check_probability, check_types
from flipkd.config import RunOptions
from flipkd.errors import ConfigError
from flipkd.models.llm_options import LlmOptions
from flipkd.record_sides import RecordSides


@dataclass(frozen=True)
class RescoreConfig(RecordSides):
    """Scores to scores in which an LLM has answered for the pairs near the threshold.

    Args:
        llm: who answers.
        scores: output folder of ``score``.
        output: folder for the copy.
        band: lowest and highest probability (or score, where there is no probability) of the pairs that are asked.
        budget: or how many pairs, the most uncertain of the whole job: a share (``1%``) of the scored ones, or a
            number (``5000``).
        left_text: column of left texts; ``right_text`` the right ones. Not used with ``records``.
        left_column: ids of the left records; ``right_column`` the right ones.
        records: record table of the left (and right) records; ``right_records`` of the right ones where they differ.
        id_column, text_column, template: as in ``EncodeConfig``.
        right_id_column, right_text_column, right_template: of ``right_records``; None: as for ``records``.
        threshold: of the probability, for the column ``match`` (None: the one that ``score`` used).
        combine: JSON file of a combination (see ``flipkd.run.combination``): the probability of an answered pair comes
            from the LLM's answer and the score. None: it is the LLM's.
        fit_labels: column of labels: at the end a combination is fitted on the answered pairs that have one, and
            written to the output as ``_combination.json``.
        rows_per_unit: pairs in one work unit.
    """

    llm: LlmOptions
    scores: str
    output: str
    band: tuple[float, float] | None = None
    budget: str | None = None
    left_text: str = "left_text"
    right_text: str = "right_text"
    left_column: str = "left_id"
    right_column: str = "right_id"
    records: str | None = None
    right_records: str | None = None
    id_column: str = "id"
    text_column: str = "text"
    template: str | None = None
    threshold: float | None = None
    combine: str | None = None
    fit_labels: str | None = None
    rows_per_unit: int = 20_000
    run: RunOptions = field(default_factory=RunOptions)
    right_id_column: str | None = None
    right_text_column: str | None = None
    right_template: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_positive("rows-per-unit", self.rows_per_unit)
        if (self.band is None) == (self.budget is None):
            raise ConfigError("say which pairs the LLM is asked: either --band LOW:HIGH or --budget 1%")
        if self.band is not None and len(self.band) != 2:
            raise ConfigError("--band must be two numbers, the lowest and the highest")
        if self.band is not None and not self.band[0] <= self.band[1]:
            raise ConfigError(f"--band {self.band[0]}:{self.band[1]}: the first number must not be above the second")
        if self.band is not None and (self.band[1] < -1 or self.band[0] > 1):
            raise ConfigError(
                f"--band {self.band[0]:g}:{self.band[1]:g} holds no probability (0 to 1) and no score (-1 to 1)"
            )
        if self.budget is not None:
            budget_rows(self.budget, 0)
        check_probability("threshold", self.threshold, "it is compared with the probability")
        self.check_record_sides(self.right_records is not None)
        if self.combine is not None and self.fit_labels is not None:
            raise ConfigError("--fit-labels makes a combination and --combine uses one; give one of them")

    @property
    def pair_columns(self) -> tuple[str, str]:
        """The two input columns that say what is compared."""
        ids = (self.left_column, self.right_column)
        return (self.left_text, self.right_text) if self.records is None else ids


def budget_rows(budget: str, rows: int) -> int:
    """Pairs of a budget: a share (``1%``, rounded down) of ``rows``, or a number.

    Raises:
        ConfigError: it is neither.
    """
    try:
        if budget.endswith("%"):
            share = Fraction(budget[:-1]) / 100
            if 0 <= share <= 1:
                return int(share * rows)  # exact: 29% of 100 is 29, which it is not in floating point
        elif int(budget) >= 0:
            return min(int(budget), rows) if rows else 0
    except (ValueError, ZeroDivisionError):
        pass
    raise ConfigError(f"--budget {budget}: write a share from 0% to 100%, as in 1%, or a number of pairs, as in 5000")
