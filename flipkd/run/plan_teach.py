"""Plan a ``teach``: read footers and labels, decide everything, start nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flipkd.config import DEFAULT_LABEL_COLUMN, TeachConfig
from flipkd.data.columns import first_clash
from flipkd.data.find import Shard, find_shards
from flipkd.data.labels import read_labels
from flipkd.data.location import Location, open_location
from flipkd.data.pairs import check_pair_columns
from flipkd.data.shards import ShardReader
from flipkd.data.teacher_scores import TEACHER_COLUMNS, TeacherFacts
from flipkd.errors import ConfigError, InputError
from flipkd.models.longest_text import check_max_length
from flipkd.models.teacher import read_cross_encoder, teacher_kind
from flipkd.models.trust import check_code
from flipkd.run.cached_encoder import cache_root
from flipkd.run.encode import encoder_fingerprint
from flipkd.run.job import check_device
from flipkd.run.join import JOIN_REASON, RecordTable, record_tables
from flipkd.run.overlap import refuse_overlap
from flipkd.run.units import Footer, Plan, cut_units, fingerprint, read_footers

_LABEL_ROWS = 1 << 18


@dataclass(frozen=True)
class TeachPlan:
    """A planned ``teach``.

    Args:
        config: what was asked for.
        pairs: root of the pair table.
        output: the output folder.
        teacher: what the scores will mean.
        tables: record tables of the left and, where they differ, the right records; empty for pairs of texts.
        plan: units over the pairs.
        run_fingerprint: of everything that decides the outputs besides the pairs.
    """

    config: TeachConfig
    pairs: Location
    output: Location
    teacher: TeacherFacts
    tables: tuple[RecordTable, ...]
    plan: Plan
    run_fingerprint: str


def plan_teach(config: TeachConfig) -> TeachPlan:
    """Reads the teacher's configuration, the inputs' footers and the labels, without starting any work.

    Raises:
        ConfigError: an option or a column cannot be used.
        InputError: an input cannot be read, or a label is not 0 or 1.
        ModelError: the folder cannot be a teacher.
    """
    pairs, output = open_location(config.pairs), open_location(config.output)
    inputs = [("--pairs", config.pairs), ("--records", config.records), ("--right-records", config.right_records)]
    refuse_overlap(output, [(option, open_location(uri)) for option, uri in inputs if uri is not None], config.cache)
    kind = teacher_kind(config.teacher.folder)
    if kind == "bi-encoder" and not output.is_local:
        raise ConfigError(
            f"--output {output.uri}: the vectors of a bi-encoder teacher are kept there and mapped into memory, so it "
            "must be a local folder"
        )
    check_device(config.teacher.device, config.run)
    if config.cache is not None:
        cache_root(config.cache)
    tables = record_tables(config.record_sides)
    shards = find_shards(pairs)
    kinds = [table.id_kind for table in tables]
    footers, label_column = _look_at_pairs(config, pairs, shards, kinds)
    teacher = _teacher(config, kind, label_column)
    run_fingerprint = fingerprint(
        {
            "kind": "teach",
            "format": 1,
            "teacher": teacher.footer(),
            "pair_columns": config.pair_columns,
            "records": [table.facts() for table in tables],
            "rows_per_unit": config.rows_per_unit,
        }
    )
    plan = cut_units(shards, footers, config.rows_per_unit, run_fingerprint, split_row_groups=True)
    return TeachPlan(config, pairs, output, teacher, tables, plan, run_fingerprint)


def _teacher(config: TeachConfig, kind: str, label_column: str | None) -> TeacherFacts:
    options = config.teacher
    columns = (config.left_text, config.right_text)
    if kind == "bi-encoder":
        return TeacherFacts("cosine", None, encoder_fingerprint(options), kind, columns, label_column)
    if options.dtype == "int8":
        raise ConfigError("--encoder-dtype int8 is for bi-encoders; a cross-encoder takes float32 or bf16")
    folder = read_cross_encoder(options.folder)
    check_code(folder.transformer_path, options.trust_remote_code)
    check_max_length(folder.transformer_path, options.max_length)
    own = fingerprint({"folder": folder.fingerprint(options.max_length), "dtype": options.dtype})
    return TeacherFacts(folder.scale, folder.activation, own, kind, columns, label_column)


def _look_at_pairs(
    config: TeachConfig, pairs: Location, shards: Sequence[Shard], kinds: Sequence[str]
) -> tuple[list[Footer], str | None]:
    """Looks at the schema and the labels of every shard, so that what cannot be used fails before hours of work.

    Returns:
        The footers, and the label column, or None where there is none.
    """
    labelled: dict[str, bool | None] = {}  # by name; one whose footer cannot be read has no entry

    def check(shard: Shard, reader: ShardReader) -> None:
        labelled[shard.name] = _check_shard(config, pairs.naming(shard.name), shard, reader, kinds)

    footers = read_footers(pairs, shards, config.run.on_bad_shard == "skip", check)
    with_labels = [shard for shard in shards if labelled.get(shard.name)]
    without = [shard for shard in shards if labelled.get(shard.name) is False]
    if with_labels and without:
        raise InputError(
            f"{pairs.uri}: {with_labels[0].name} has a label column {config.label_column!r} and {without[0].name} has "
            "none; add it there (null where unknown), or name another --label-column"
        )
    if without and config.label_column != DEFAULT_LABEL_COLUMN:
        raise ConfigError(f"{pairs.naming(without[0].name)} has no label column {config.label_column!r}")
    return footers, config.label_column if with_labels else None


def _check_shard(
    config: TeachConfig, source: str, shard: Shard, reader: ShardReader, kinds: Sequence[str]
) -> bool | None:
    """Whether the shard has labels; None where they cannot be read and may be skipped."""
    check_pair_columns(reader, config.pair_columns, kinds)
    added = [*TEACHER_COLUMNS, JOIN_REASON]
    if kinds:
        added += [config.left_text, config.right_text]
    clash = first_clash(reader.schema.names, added)
    if clash is not None:
        raise ConfigError(f"{source} has a column {clash!r} already, which teach adds; rename or drop it")
    name = config.label_column
    if name not in reader.schema.names and name not in dict(shard.partitions):
        return False
    tables, row = reader.all_batches([name], _LABEL_ROWS), 0
    while True:
        try:
            table = next(tables, None)
        except InputError:
            if config.run.on_bad_shard == "skip":
                return None
            raise
        if table is None:
            return True
        read_labels(table.column(name), name, source, first_row=row, allows_null=True)
        row += table.num_rows
