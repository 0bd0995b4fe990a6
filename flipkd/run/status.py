"""How far a job is, from its output folder alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from flipkd.data.commit import read_json
from flipkd.data.location import Location, open_location
from flipkd.distill.run_folder import RUN_FILE, run_status
from flipkd.errors import InputError
from flipkd.run.encode import PARTS, STORE_FILE
from flipkd.run.manifest import MANIFEST, PLAN, WORK_FOLDER, Totals, read_reports
from flipkd.run.output import list_outputs


def status(folder: str) -> dict[str, Any]:
    """Units and rows done, rate, time left and counts per reason.

    Args:
        folder: output of ``score``, ``encode`` or ``teach``, or a run of ``train``.

    Returns:
        For a running or broken-off job: ``state`` ``unfinished``, with the stage that is at work. ``rows_per_second``
        and ``seconds_left`` come from the outputs committed since the job was last started.

    Raises:
        InputError: the folder is not an output of flipkd.
    """
    output = open_location(folder)
    if output.filesystem.get_file_info(output.path).type != pafs.FileType.Directory:
        raise InputError(f"{folder} is not a folder")
    store = read_json(output, STORE_FILE) if output.is_local else None
    run = read_json(output, RUN_FILE) if output.is_local else None
    if run is not None:
        return run_status(Path(output.path), run)
    manifest = read_json(output, MANIFEST)
    if store is not None:
        return {"state": "finished", "kind": "encode", "store": store, **_kept(manifest or {})}
    facts = _progress(output)
    if manifest is not None and facts is not None and facts["fingerprint"] == manifest["fingerprint"]:
        facts["state"] = "finished" if manifest["complete"] else "partial"
        facts["seconds_left"] = 0.0
        return facts
    stages = [stage for stage in map(_progress, _stage_folders(output)) if stage is not None]
    unfinished = [stage for stage in stages if stage["units_done"] < stage["units"]]
    if facts is not None and not (facts["units_done"] == 0 and unfinished):
        return facts
    if unfinished:
        return {**unfinished[0], "stage": unfinished[0]["kind"]}
    if stages:
        return {**stages[-1], "stage": stages[-1]["kind"]}
    raise InputError(f"{folder} is not an output of flipkd: it has no {PLAN}")


def _kept(manifest: dict[str, Any]) -> dict[str, Any]:
    return {key: manifest[key] for key in ("rows_in", "reasons", "counts", "wall_seconds") if key in manifest}


def _stage_folders(output: Location) -> list[Location]:
    """Folders of the stages before scoring: a store's parts; the work folder's joined pairs, text lists, stores."""
    found = [output.child(PARTS)]
    selector = pafs.FileSelector(output.child(WORK_FOLDER).path, allow_not_found=True)
    for info in sorted(output.filesystem.get_file_info(selector), key=lambda info: info.path):
        if info.type == pafs.FileType.Directory and info.base_name == "scores":  # the first stage of a cascade
            scores = output.child(f"{WORK_FOLDER}/{info.base_name}")
            found += [*_stage_folders(scores), scores]
        elif info.type == pafs.FileType.Directory and info.base_name != "parts":
            work = output.child(f"{WORK_FOLDER}/{info.base_name}")
            found += [work.child("joined"), work.child("lists"), work.child("store").child(PARTS), work.child(PARTS)]
    return found


def _progress(output: Location) -> dict[str, Any] | None:
    plan = read_json(output, PLAN)
    if plan is None:
        return None
    names, _ = list_outputs(output)
    totals = Totals()
    for report in read_reports(output, sorted(names)):
        totals.add(report)
    committed = [
        info.mtime_ns / 1e9
        for info in output.filesystem.get_file_info([output.child(name).path for name in sorted(names)])
        if info.mtime_ns
    ]
    fresh = [moment for moment in committed if moment >= plan["started"]]
    elapsed = max(fresh) - plan["started"] if fresh else 0.0
    rate = totals.rows_in / max(len(committed), 1) * len(fresh) / elapsed if elapsed > 0 else 0.0
    left = plan["rows"] - totals.rows_in
    return {
        "state": "unfinished",
        "kind": plan["kind"],
        "fingerprint": plan["fingerprint"],
        "units": plan["units"],
        "units_done": totals.units,
        "rows": plan["rows"],
        "rows_done": totals.rows_in,
        "rows_out": totals.rows_out,
        "reasons": totals.as_dict()["reasons"],
        "counts": totals.as_dict()["counts"],
        "rows_per_second": round(rate, 1),
        "seconds_left": round(left / rate, 1) if rate > 0 else None,
    }
