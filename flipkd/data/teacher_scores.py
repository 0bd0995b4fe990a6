"""What ``teach`` leaves beside its scores, and how it is read again: names, the facts in every footer, one check."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from flipkd.data.find import Shard
from flipkd.data.json_files import parse_object
from flipkd.data.location import Location
from flipkd.data.shards import ShardReader, each_file
from flipkd.errors import InputError

TEACHER_SCORE = "teacher_score"
# Columns that ``teach`` adds to the pairs.
TEACHER_COLUMNS = (TEACHER_SCORE, "reason", "truncated")
# Folder with the vectors of a bi-encoder teacher, below the output. Not Parquet, and hidden from who lists the pairs.
TEACHER_VECTORS = "_teacher_vectors"
TEACHER_KEY = "flipkd.teacher"


@dataclass(frozen=True)
class TeacherFacts:
    """What a teacher score means.

    Args:
        scale: ``cosine`` (-1 to 1), ``probability`` (0 to 1) or ``logit`` (any number).
        activation: what a cross-encoder's logits went through; None for a bi-encoder.
        fingerprint: hex, of the teacher's files and the options that change its scores.
        kind: ``bi-encoder`` (symmetric in a pair's two texts) or ``cross-encoder`` (not).
        text_columns: names of the left and the right text column.
        label_column: name of the column of labels, None where there is none.
    """

    scale: str
    activation: str | None
    fingerprint: str
    kind: str
    text_columns: tuple[str, str]
    label_column: str | None = None

    def footer(self) -> dict[str, str]:
        """Key and value for a Parquet footer."""
        return {TEACHER_KEY: json.dumps(asdict(self), sort_keys=True)}


def of_one_teacher(one: TeacherFacts | None, other: TeacherFacts | None) -> bool:
    """Whether the scores of two tables mean the same, however their columns are called."""
    if one is None or other is None:
        return one is other
    return replace(one, text_columns=other.text_columns, label_column=other.label_column) == other


def read_teacher_facts(location: Location, shards: Sequence[Shard]) -> TeacherFacts | None:
    """Reads what the footers of all shards say of the teacher.

    Args:
        location: root of the table.
        shards: its files, from ``find_shards``.

    Returns:
        The facts; None when no shard has any.

    Raises:
        InputError: shards of several teachers, scales or column names stand together, or of teacher scores and none;
            names two of them. Or a shard cannot be read.
    """
    facts = each_file(lambda shard: _read_one(location, shard), shards)
    for shard, found in zip(shards, facts, strict=True):
        if found != facts[0]:
            raise InputError(
                f"{location.uri} mixes teacher scores: {shards[0].name} has {_told(facts[0], found)}, and {shard.name} "
                f"{_told(found, facts[0])}; run teach on all pairs with one teacher, into one folder"
            )
    return facts[0] if facts else None


def _told(facts: TeacherFacts | None, other: TeacherFacts | None) -> str:
    if facts is None:
        return "no teacher scores"
    told = f"the scale {facts.scale} of a {facts.kind} {facts.fingerprint[:12]}"
    if other is not None and (facts.text_columns, facts.label_column) != (other.text_columns, other.label_column):
        told += f" for the columns {', '.join(facts.text_columns)} and label column {facts.label_column}"
    return told


def _read_one(location: Location, shard: Shard) -> TeacherFacts | None:
    with ShardReader(location, shard) as reader:
        value = reader.metadata.get(TEACHER_KEY)
    if value is None:
        return None
    try:
        facts = parse_object(value)
        left, right = facts.pop("text_columns")
        return TeacherFacts(text_columns=(left, right), **facts)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{location.naming(shard.name)}: its footer {TEACHER_KEY} cannot be read; run teach again"
        ) from error
