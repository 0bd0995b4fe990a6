"""What an output folder must not be: in an input, around one, or that of another kind of job."""

from __future__ import annotations

import os
from collections.abc import Iterable

from flipkd.data.location import Location, open_location
from flipkd.distill.run_folder import RUN_FILE
from flipkd.errors import ConfigError, OutputError
from flipkd.run.manifest import MANIFEST, PLAN, glance
from flipkd.vectors.layout import HEADER_FILE

# What each kind of job leaves.
_LEFT = {
    "score": "scores",
    "rescore": "scores",
    "teach": "pairs with a teacher's scores",
    "encode": "a vector store",
    "train": "a run of train",
}


def refuse_overlap(output: Location, inputs: Iterable[tuple[str, Location]], cache: str | None = None) -> None:
    """Refuses an output folder that holds, or lies in, one of the inputs: the next run would take one for the other.

    Args:
        output: of the job.
        inputs: each with its option.
        cache: a folder in which the job works; it must not lie in the output or an input either.

    Raises:
        ConfigError: names both.
    """
    inputs = list(inputs)
    for option, location in inputs:
        if _lies_in(output, location) or _lies_in(location, output):
            raise ConfigError(f"--output {output.uri} and {option} {location.uri} lie in one another; choose another")
    if cache is not None:
        for option, location in [("--output", output), *inputs]:
            if _lies_in(open_location(cache), location):
                raise ConfigError(f"--cache {cache} lies in {option} {location.uri}; choose another --cache")


def _lies_in(inner: Location, outer: Location) -> bool:
    return f"{real_uri(inner)}/".startswith(f"{real_uri(outer).rstrip('/')}/")


def real_uri(location: Location) -> str:
    """One name for one place, whatever links lead there."""
    if location.is_local:
        return os.path.realpath(location.path)
    return location.uri.partition("?")[0].replace("://***@", "://", 1).rstrip("/")


def refuse_other_kind(output: Location, kind: str) -> None:
    """Refuses a folder that holds what another kind of job has made: each would delete or hide parts of the other's.

    Args:
        output: of the job.
        kind: ``score``, ``rescore``, ``teach``, ``encode`` or ``train``; what score and rescore write is of one kind.

    Raises:
        OutputError: names the folder and the other kind.
    """
    found = [
        glance(output, MANIFEST).get("kind"),
        glance(output, PLAN).get("kind"),
        "encode" if "fingerprint" in glance(output, HEADER_FILE) else None,
        "train" if "fingerprint" in glance(output, RUN_FILE) else None,
    ]
    for other in found:
        if isinstance(other, str) and other in _LEFT and _LEFT[other] != _LEFT[kind]:
            raise OutputError(f"--output {output.uri} holds {_LEFT[other]}, not {_LEFT[kind]}; choose another folder")
