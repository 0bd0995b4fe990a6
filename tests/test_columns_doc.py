"""docs/columns-and-reasons.md says of columns and reasons what the code has."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pytest

from flipkd.config import SCORE_COLUMNS
from flipkd.data.pairs import NOT_SCORED, REASONS
from flipkd.data.teacher_scores import TEACHER_COLUMNS
from flipkd.distill.training_pairs import read_training_pairs
from flipkd.report.sample import STRATUM, STRATUM_ROWS, WEIGHT
from flipkd.report.scan import NO_SCORE, NOT_FINITE
from flipkd.run.plan_rescore import LLM_PROBABILITY, RESCORE_REASON
from tests.conftest import WriteParquet
from tests.documents import DOCS, sections, table

SECTIONS = sections(DOCS / "columns-and-reasons.md")


@pytest.mark.parametrize(
    ("heading", "names"),
    [
        ("`score`", SCORE_COLUMNS),
        ("`rescore`", (LLM_PROBABILITY, RESCORE_REASON)),
        ("`teach`", TEACHER_COLUMNS),
        ("`evaluate --sample`", (STRATUM, STRATUM_ROWS, WEIGHT, "label")),
        ("Reasons of `score` and `teach`", REASONS[1:NOT_SCORED]),  # in their order, which decides between two
        ("Reasons of `rescore`", REASONS[1:]),
        ("`evaluate`", (NO_SCORE, NOT_FINITE)),
    ],
)
def test_the_document_lists_what_the_code_writes(heading: str, names: Sequence[str]) -> None:
    assert [row[0] for row in table(SECTIONS[heading])] == list(names)


def test_reasons_of_train_are_those_listed(write_parquet: WriteParquet) -> None:
    path = write_parquet(
        "taught/part-0.parquet",
        {
            "left_text": ["a", " ", "b"],
            "right_text": ["x", "y", "z"],
            "label": [1, 0, 1],
            "teacher_score": pa.array([0.5, 0.5, None], pa.float32()),
        },
    )
    pairs = read_training_pairs(str(path.parent))
    assert pairs.skipped == {row[0]: 1 for row in table(SECTIONS["`train`"])}
