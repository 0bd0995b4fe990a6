"""What the manifest of a job tells of the stages before it, such as ``encode`` before ``score``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flipkd.data.location import Location
from flipkd.run.manifest import MANIFEST, glance
from flipkd.run.units import Plan


def stages_told(output: Location, run_fingerprint: str) -> dict[str, Any] | None:
    """The stages in the manifest of a run; None where it has none, as after a kill just before it was written."""
    manifest = glance(output, MANIFEST)
    stages = manifest.get("stages", {})
    is_whole = isinstance(stages, dict) and all(isinstance(stage, dict) for stage in stages.values())
    return stages if is_whole and manifest.get("fingerprint") == run_fingerprint else None


def skipped_before(stages: Mapping[str, Mapping[str, Any]], planned: Plan, left: Plan) -> list[dict[str, str]]:
    """The planned units that a stage has failed in and that are ``left`` out for it, each with the error."""
    missing = {unit.output for unit in planned.units} - {unit.output for unit in left.units}
    failures = (failure for stage in stages.values() for failure in stage.get("skipped_units", ()))
    return [failure for failure in failures if failure["output"] in missing]


def summary(manifest: dict[str, Any]) -> dict[str, Any]:
    """What the manifest of a job keeps of one of its stages."""
    kept = ("complete", "units", "rows_in", "rows_out", "reasons", "counts", "seconds", "wall_seconds", "seal_seconds")
    shown = {key: manifest[key] for key in (*kept, "store", "cache") if key in manifest}
    skipped = {key: manifest[key] for key in ("skipped_shards", "skipped_units") if manifest.get(key)}
    return {**shown, **skipped}
