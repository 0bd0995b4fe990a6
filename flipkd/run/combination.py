"""The LLM's answer and the encoder's score to one calibrated probability.

``probability = sigmoid(llm_logit * logit(p) + score * s + intercept)`` with p the LLM's probability and s the score: a
logistic regression on two features, fitted on pairs whose label is known. Features and
form are our choice.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flipkd.data.columns import as_numbers
from flipkd.data.commit import write_json
from flipkd.data.find import find_shards
from flipkd.data.json_files import parse_object, read_option_file
from flipkd.data.labels import read_labels
from flipkd.data.location import Location
from flipkd.data.odds import sigmoid
from flipkd.data.shards import ShardReader
from flipkd.errors import ConfigError, InputError

COMBINATION_FILE = "_combination.json"  # with a _ no reader takes it for one of the Parquet files beside it
_KIND = "flipkd.rescore.combination"
# Probabilities nearer to 0 or 1 are not told apart: a float32 model does not mean them.
_LEAST = 1e-6
_ROWS = 1 << 18

Numbers = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Combination:
    """Coefficients of the log-odds of the LLM's answer and of the score, and the intercept."""

    llm_logit: float
    score: float
    intercept: float

    def probability(self, answers: Numbers, scores: Numbers) -> npt.NDArray[np.float32]:
        """Calibrated probabilities float32 [N] of the LLM's [N] and the scores [N]."""
        odds = self.llm_logit * _log_odds(answers) + self.score * scores.astype(np.float64) + self.intercept
        return sigmoid(odds).astype(np.float32)


def fit_combination(answers: Numbers, scores: Numbers, labels: Numbers) -> Combination:
    """Fits the coefficients by logistic regression (scikit-learn's, with its own weak penalty).

    Args:
        answers: [N] probabilities of the LLM.
        scores: [N] scores of the encoder.
        labels: [N], 1 or 0.

    Raises:
        InputError: one of the two labels is missing.
    """
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(labels)) < 2:
        raise InputError(
            "--fit-labels: the pairs that the LLM was asked hold not both labels; label more of them, or take a wider "
            "--band or a larger --budget"
        )
    features = np.column_stack([_log_odds(answers), scores.astype(np.float64)])
    model = LogisticRegression(max_iter=1000).fit(features, labels.astype(np.int64))
    llm_logit, score = (float(value) for value in model.coef_[0])
    return Combination(llm_logit, score, float(model.intercept_[0]))


def fit_from_output(output: Location, label_column: str) -> tuple[Combination, int]:
    """Fits on the answered and labelled rows of an output of ``rescore``.

    Returns:
        The combination, and on how many pairs it was fitted.

    Raises:
        ConfigError: a column is missing.
        InputError: a label is not 0 or 1, or all are the same.
    """
    columns = ("llm_probability", "score", label_column)
    parts: list[npt.NDArray[np.float64]] = []
    for shard in find_shards(output):
        row = 0
        with ShardReader(output, shard) as reader:
            for table in reader.all_batches(columns, _ROWS):
                source = output.naming(shard.name)
                labels = read_labels(table.column(label_column), label_column, source, first_row=row, allows_null=True)
                row += table.num_rows
                values = [as_numbers(column) for column in (*table.select(columns[:2]).columns, labels)]
                stacked = np.stack(values, axis=1)
                parts.append(stacked[np.isfinite(stacked).all(axis=1)])
    found = np.concatenate(parts)
    return fit_combination(found[:, 0], found[:, 1], found[:, 2]), len(found)


def write_combination(output: Location, combination: Combination, pairs: int) -> None:
    """Writes ``_combination.json``: the coefficients, and on how many pairs they were fitted."""
    write_json(output, COMBINATION_FILE, {"kind": _KIND, **asdict(combination), "pairs": pairs})


def read_combination(path: str) -> Combination:
    """Reads what ``write_combination`` wrote.

    Raises:
        ConfigError: the file cannot be read, or is something else.
    """
    data = read_option_file("--combine", path)
    try:
        values = parse_object(data)
        if values["kind"] != _KIND:
            raise ValueError("another kind of file")
        numbers = [float(values[name]) for name in ("llm_logit", "score", "intercept")]
        if not all(map(math.isfinite, numbers)):
            raise ValueError("numbers that are not finite")
    except (ValueError, OverflowError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--combine {path}: expected a _combination.json that rescore --fit-labels wrote ({type(error).__name__})"
        ) from None  # it may quote the file
    return Combination(*numbers)


def _log_odds(answers: Numbers) -> npt.NDArray[np.float64]:
    bounded = np.clip(answers.astype(np.float64), _LEAST, 1 - _LEAST)
    found: npt.NDArray[np.float64] = np.log(bounded) - np.log1p(-bounded)
    return found
