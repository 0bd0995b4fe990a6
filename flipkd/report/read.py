"""From the options of ``evaluate`` to labelled pairs, wherever the labels are."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import pyarrow as pa

from flipkd.data.find import Shard, find_shards
from flipkd.data.labels import read_labels
from flipkd.data.location import Location, open_location
from flipkd.data.shards import ShardReader, each_file
from flipkd.errors import ConfigError, InputError
from flipkd.report.config import EvaluateConfig
from flipkd.report.labels import LABEL_OPTIONS, read_label_table
from flipkd.report.pairs import LabelledPairs, PairCounts, from_label_column, from_label_table
from flipkd.report.sample import WEIGHT, check_sample_columns, is_sample, read_sample, sample_facts
from flipkd.report.scan import (
    COLUMN_OPTIONS,
    RowCounts,
    check_score_type,
    column_names,
    count_rows,
    scan,
    scores_identity,
)
from flipkd.run.progress import progress_bar
from flipkd.urls import without_secrets
from flipkd.vectors.id_types import check_id_type

logger = logging.getLogger(__name__)


class NoLabelledPairsError(InputError):
    """No labelled pair has a score; ``counts`` say what became of the labels."""

    def __init__(self, message: str, counts: PairCounts) -> None:
        super().__init__(message)
        self.counts = counts


@dataclass(frozen=True, eq=False)
class LabelledRun:
    """What was read.

    Args:
        pairs: the labelled pairs, at least one.
        rows: all rows of the scores, counted.
        counts: what became of the labels.
        kind: where the labels are from: ``scores``, ``table`` or ``sample``.
        rows_of: the table whose rows ``pairs.row`` numbers.
    """

    pairs: LabelledPairs
    rows: RowCounts
    counts: PairCounts
    kind: str
    rows_of: tuple[Location, list[Shard]]


def check_columns(config: EvaluateConfig, scores: Location, shards: list[Shard]) -> None:
    """Looks at the footers of all files, so that what cannot be used is said before anything is read or refused.

    Raises:
        ConfigError: a column is missing or of a type that cannot be used.
        InputError: a file cannot be read.
    """
    if config.sample is not None:
        check_sample_columns(scores, shards, config.label_column)
        _check_each(scores, shards, [config.score_column], config)
        return
    weight = [] if config.weight_column is None else [config.weight_column]
    if config.labels is None:
        names = column_names(scores, shards)
        if config.label_column not in names:
            raise ConfigError(
                f"{scores.uri} has no label column {config.label_column!r}; it has {', '.join(names)}. Name another "
                "with --label-column, or a table of labels with --labels; where there is none yet, --sample draws "
                "pairs to label"
            )
        _check_each(scores, shards, [config.score_column, config.label_column, *config.slices, *weight], config)
        return
    joined = [] if check_labels(config) else [*config.key, *config.slices]
    _check_each(scores, shards, [config.score_column, *joined], config)


def _check_each(
    location: Location, shards: list[Shard], columns: list[str], config: EvaluateConfig, hint: str = COLUMN_OPTIONS
) -> None:
    def look(shard: Shard) -> None:
        source = location.naming(shard.name)
        with ShardReader(location, shard) as reader:
            reader.check_columns(columns, hint)
            if config.score_column in columns:
                check_score_type(reader.column_type(config.score_column), config.score_column, source)
            if config.label_column in columns:
                none = pa.chunked_array([], reader.column_type(config.label_column))
                read_labels(none, config.label_column, source, allows_null=True)
            for name in set(config.key) & set(columns):
                check_id_type(reader.column_type(name), name)

    each_file(look, shards)


def read_labelled(config: EvaluateConfig, scores: Location, shards: list[Shard]) -> LabelledRun:
    """Reads all scores once; ``check_columns`` has looked at them before.

    Raises:
        ConfigError: a column is missing or of a type that cannot be used.
        InputError: an input cannot be read, a label is neither 0 nor 1, or no pair has both a label and a score.
    """
    read = _read_any(config, scores, shards)
    if not len(read.pairs):
        told = _no_labels(config, read)
        # A table of labels without any is a mistake in that file, whatever the scores are.
        if read.kind != "scores" and not read.counts.unmatched and not read.counts.unscored:
            raise InputError(told)
        raise NoLabelledPairsError(told, read.counts)
    return read


def check_labels(config: EvaluateConfig) -> bool:
    """Looks at the footers of a table of labels; a job that evaluates at its end calls this at its beginning.

    Returns:
        Whether it is a sample that ``evaluate`` has drawn.

    Raises:
        ConfigError: a column is missing, named twice or of a type that cannot be used.
        InputError: there is no such file, or it cannot be read.
    """
    if config.labels is None:
        return False
    location = open_location(config.labels)
    shards = find_shards(location)
    if is_sample(location, shards):
        _check_each(location, shards, [config.score_column, config.label_column, *config.slices], config)
        return True
    columns = [*config.key, config.label_column, *([config.weight_column] if config.weight_column is not None else [])]
    if len(set(columns)) != len(columns):
        raise ConfigError(f"{LABEL_OPTIONS} name a column twice: {', '.join(columns)}")
    _check_each(location, shards, columns, config, f"{LABEL_OPTIONS} name columns")
    return False


def _read_any(config: EvaluateConfig, scores: Location, shards: list[Shard]) -> LabelledRun:
    with progress_bar("evaluate", count_rows(scores, shards), "pairs", config.progress) as bar:
        if config.labels is None:
            _warn_of_weights(config, scores, shards)
            found = from_label_column(
                scores,
                shards,
                config.score_column,
                config.label_column,
                config.weight_column,
                config.slices,
                bar.update,
            )
            return LabelledRun(*found, "scores", (scores, shards))
        location = open_location(config.labels)
        label_shards = find_shards(location)
        if is_sample(location, label_shards):
            if config.weight_column is not None:
                raise ConfigError("--weight-column: a sample holds its own weights")
            drawn_from = sample_facts(location, label_shards[0]).get("scores")
            if drawn_from not in (None, scores_identity(scores, shards)):
                raise ConfigError(f"--labels {location.uri} was drawn from other scores than {scores.uri}; name those")
            rows = RowCounts()
            for _ in scan(scores, shards, config.score_column, [], rows, bar.update):
                pass
            pairs, counts = read_sample(location, label_shards, config.score_column, config.label_column, config.slices)
            return LabelledRun(pairs, rows, counts, "sample", (location, label_shards))
        _warn_of_weights(config, location, label_shards)
        table = read_label_table(location, label_shards, config.key, config.label_column, config.weight_column)
        found = from_label_table(scores, shards, config.score_column, table, config.slices, bar.update)
        return LabelledRun(*found, "table", (scores, shards))


def _warn_of_weights(config: EvaluateConfig, location: Location, shards: list[Shard]) -> None:
    """Of what was a sample once: without its strata each pair counts as one, however many it was drawn for."""
    if config.weight_column is None and WEIGHT in column_names(location, shards):
        logger.warning(
            "%s has a column %s, and is not read as a sample: each pair counts as one. Keep all columns of the sample "
            "and give it as --labels, or pass --weight-column %s",
            location.uri,
            WEIGHT,
            WEIGHT,
        )


def _no_labels(config: EvaluateConfig, read: LabelledRun) -> str:
    scores = without_secrets(config.scores)
    where = scores if config.labels is None else without_secrets(config.labels)
    if read.kind == "table" and read.counts.unmatched:
        return (
            f"none of the {read.counts.unmatched} labelled pairs of {where} stands in {scores}; the ids in "
            f"{', '.join(config.key)} must be those of the scores, on the same side"
        )
    unscored = sum(pairs for pairs, _ in read.counts.unscored.values())
    if unscored:
        return f"{where}: none of the {unscored} labelled pairs has a score"
    return f"{where}: every label in column {config.label_column!r} is null; fill some in"
