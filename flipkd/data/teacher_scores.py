"""What the files of teacher scores say of their teacher, so that scores of two teachers are never mixed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Literal

from flipkd.data.location import Location
from flipkd.data.shards import Shard, ShardReader
from flipkd.errors import InputError

TEACHER_KEY = "flipkd.teacher"
TEACHER_SCORE = "teacher_score"
TEACHER_VECTORS = "_teacher_vectors"


@dataclass(frozen=True)
class TeacherFacts:
    """A teacher, as the footer of each file of its scores tells.

    Args:
        kind: ``bi-encoder`` or ``cross-encoder``.
        scale: of the scores: ``cosine`` (-1..1), ``probability`` (0..1) or ``logit`` (any number).
        activation: the function after a cross-encoder's last layer; None for a bi-encoder.
        fingerprint: hex, of the model's files and options.
        text_columns: names of the left and the right text column.
    """

    kind: Literal["bi-encoder", "cross-encoder"]
    scale: Literal["cosine", "probability", "logit"]
    activation: str | None
    fingerprint: str
    text_columns: tuple[str, str]

    def footer(self) -> dict[str, str]:
        """Key-value pair for a Parquet footer."""
        return {TEACHER_KEY: json.dumps(asdict(self), sort_keys=True)}


def read_teacher_facts(location: Location, shards: Sequence[Shard]) -> TeacherFacts | None:
    """The teacher of all shards; None where no shard names one.

    Raises:
        InputError: two shards were scored by different teachers, or on different scales; names both.
    """

    def one(shard: Shard) -> TeacherFacts | None:
        with ShardReader(location, shard) as reader:
            found = reader.key_values.get(TEACHER_KEY)
        if found is None:
            return None
        values = json.loads(found)
        return TeacherFacts(**{**values, "text_columns": tuple(values["text_columns"])})

    with ThreadPoolExecutor(max_workers=16) as pool:
        all_facts = list(pool.map(one, shards))
    for shard, facts in zip(shards, all_facts, strict=True):
        first = all_facts[0]
        if facts == first:
            continue
        scales = " and ".join("no teacher" if each is None else f"scale {each.scale}" for each in (first, facts))
        raise InputError(
            f"{shards[0].name} and {shard.name} of {location.uri} hold scores of different teachers ({scales}); "
            "keep the output of one teach run in a folder of its own"
        )
    return all_facts[0] if all_facts else None
