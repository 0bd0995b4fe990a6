"""From the options of ``evaluate`` to labelled pairs, wherever the labels are."""

from __future__ import annotations

from dataclasses import dataclass

from flipkd.data.location import Location, open_location
from flipkd.data.shards import Shard, ShardReader, find_shards
from flipkd.errors import ConfigError, InputError
from flipkd.report.config import EvaluateConfig
from flipkd.report.labels import LABEL_OPTIONS, read_label_table
from flipkd.report.pairs import LabelledPairs, PairCounts, from_label_column, from_label_table
from flipkd.report.sample import is_sample, read_sample, sample_facts
from flipkd.report.scan import RowCounts, column_names, count_rows, scan, scores_identity
from flipkd.run.progress import progress_bar


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


def read_labelled(config: EvaluateConfig, scores: Location, shards: list[Shard]) -> LabelledRun:
    """Reads all scores once.

    Raises:
        ConfigError: a column is missing or of a type that cannot be used.
        InputError: an input cannot be read, a label is neither 0 nor 1, or no pair has both a label and a score.
    """
    read = _read_any(config, scores, shards)
    if not len(read.pairs):
        raise InputError(_no_labels(config, read))
    return read


def check_labels(config: EvaluateConfig) -> None:
    """Refuses a table of labels that cannot be read or lacks a column, from its footers alone.

    A job that evaluates at its end calls this at its beginning.

    Raises:
        ConfigError: a column is missing.
        InputError: there is no such file, or it cannot be read.
    """
    if config.labels is None:
        return
    location = open_location(config.labels)
    shards = find_shards(location)
    keys = () if is_sample(location, shards) else config.key
    columns = [*keys, config.label_column, *([config.weight_column] if config.weight_column is not None else [])]
    for shard in shards:
        with ShardReader(location, shard) as reader:
            reader.check_columns(columns, f"{LABEL_OPTIONS} name columns")


def _read_any(config: EvaluateConfig, scores: Location, shards: list[Shard]) -> LabelledRun:
    with progress_bar("evaluate", count_rows(scores, shards), "pairs", config.progress) as bar:
        if config.labels is None:
            names = column_names(scores, shards)
            if config.label_column not in names:
                raise ConfigError(
                    f"{scores.uri} has no label column {config.label_column!r}; it has {', '.join(names)}. Name "
                    "another with --label-column, or a table of labels with --labels; where there is none yet, "
                    "--sample draws pairs to label"
                )
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
        table = read_label_table(location, label_shards, config.key, config.label_column, config.weight_column)
        found = from_label_table(scores, shards, config.score_column, table, config.slices, bar.update)
        return LabelledRun(*found, "table", (scores, shards))


def _no_labels(config: EvaluateConfig, read: LabelledRun) -> str:
    where = config.scores if config.labels is None else config.labels
    if read.kind == "table" and read.counts.unmatched:
        return (
            f"none of the {read.counts.unmatched} labelled pairs of {where} stands in {config.scores}; the ids in "
            f"{', '.join(config.key)} must be those of the scores, on the same side"
        )
    unscored = sum(pairs for pairs, _ in read.counts.unscored.values())
    if unscored:
        return f"{where}: none of the {unscored} labelled pairs has a score"
    return f"{where}: every label in column {config.label_column!r} is null; fill some in"
