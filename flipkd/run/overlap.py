"""Folders of a job that must not lie in one another."""

from __future__ import annotations

import os
from collections.abc import Iterable

from flipkd.data.location import Location, open_location
from flipkd.errors import ConfigError


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
    return os.path.realpath(location.path) if location.is_local else location.uri.rstrip("/")
