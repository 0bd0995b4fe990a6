"""How far a job is, from its output folder alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from flipkd.data.commit import read_json
from flipkd.data.location import Location, open_location, reason
from flipkd.distill.run_folder import RUN_FILE, run_status
from flipkd.errors import InputError
from flipkd.run.encode import PARTS, STORE_FILE
from flipkd.run.lock import is_locked
from flipkd.run.manifest import MANIFEST, PLAN, WORK_FOLDER, Totals, read_reports
from flipkd.run.output import list_outputs
from flipkd.run.publishers import PROGRESS_FILE

_REPORT = ("metrics.json", "report.html")


def status(folder: str) -> dict[str, Any]:
    """Units and rows done, rate, time left and counts per reason.

    Args:
        folder: output of ``encode``, ``score``, ``teach`` or ``rescore``, a run of ``train``, or a report of
            ``evaluate``.

    Returns:
        ``state``: ``finished``, ``partial`` or ``unfinished``; then ``running`` tells whether a job is alive that works
        on it, and ``stage`` what it is at. Of a running job the numbers are those that it wrote last (every few
        seconds); else they come from the outputs that are there, the rate from those committed since the last start.

    Raises:
        InputError: the folder cannot be looked at, or is not an output of flipkd.
    """
    output = open_location(folder)
    try:
        kind = output.filesystem.get_file_info(output.path).type
    except OSError as error:
        raise InputError(f"cannot look at {output.uri}: {reason(error)}") from error
    if kind != pafs.FileType.Directory:
        raise InputError(f"{output.uri} is not a folder")
    running = is_locked(output)
    found = _training(output) or (_at_work(output) if running else None) or _finished(output) or _left(output)
    if found is None and running:  # it has only just begun
        found = {"state": "unfinished", "kind": None}
    if found is None:
        raise InputError(
            f"{output.uri} is not an output of flipkd: it has no {PLAN}; give the folder that was named by --output"
        )
    return {**found, "running": running} if found["state"] == "unfinished" else found


def _training(output: Location) -> dict[str, Any] | None:
    run = read_json(output, RUN_FILE, config=dict) if output.is_local else None
    return None if run is None else run_status(Path(output.path), run)


def _at_work(output: Location) -> dict[str, Any] | None:
    facts = read_json(output, PROGRESS_FILE)
    return None if facts is None else {"state": "unfinished", **facts}


def _finished(output: Location) -> dict[str, Any] | None:
    manifest = read_json(output, MANIFEST, fingerprint=str, complete=bool)
    if output.is_local:
        store = read_json(output, STORE_FILE)
        if store is not None and manifest is None and (Path(output.path) / PARTS).is_dir():
            return None  # it is being made again, with more records or anew
        if store is not None:
            complete = (manifest or {}).get("complete", True)
            state = "finished" if complete else "partial"
            return {"state": state, "kind": "encode", "store": store, **_kept(manifest or {})}
        if all((Path(output.path) / name).is_file() for name in _REPORT):
            labelled = (read_json(output, _REPORT[0]) or {}).get("labelled")
            return {"state": "finished", "kind": "evaluate", "labelled": labelled}
    facts = None if manifest is None else _progress(output)
    if manifest is None or facts is None or facts["fingerprint"] != manifest["fingerprint"]:
        return None
    state = "finished" if manifest["complete"] else "partial"
    found = {name: manifest.get(name) for name in ("skipped_shards", "skipped_units")}
    skipped = {name: len(value) for name, value in found.items() if isinstance(value, list) and value}
    done = facts["units_done"]
    if done != manifest.get("units", done) or facts["units"] > done + skipped.get("skipped_units", 0):
        return None  # an output was taken away, or a later run over more input was broken off
    return {**facts, "state": state, **skipped, "seconds_left": 0.0}


def _left(output: Location) -> dict[str, Any] | None:
    """Of what a job has left that was broken off."""
    left = read_json(output, PROGRESS_FILE) or {}
    told: dict[str, Any] = {name: left[name] for name in ("error", "updated") if name in left}
    own = _progress(output)
    stages = [stage for stage in map(_progress, _stage_folders(output)) if stage is not None]
    unfinished = [stage for stage in stages if stage["units_done"] < stage["units"]]
    if own is not None and not (own["units_done"] == 0 and unfinished):
        return {**own, **told}
    if stages:
        stage = (unfinished or stages[-1:])[0]
        return {**stage, "stage": stage["kind"], **told}
    return {"state": "unfinished", **left} if left else None


def _kept(manifest: dict[str, Any]) -> dict[str, Any]:
    return {key: manifest[key] for key in ("rows_in", "reasons", "counts", "wall_seconds") if key in manifest}


def _stage_folders(output: Location) -> list[Location]:
    """Folders of the stages before the last: a store's parts; pairs, texts, stores, candidates, scores of a cascade."""
    found = [output.child(PARTS)]
    selector = pafs.FileSelector(output.child(WORK_FOLDER).path, allow_not_found=True)
    for info in sorted(output.filesystem.get_file_info(selector), key=lambda info: info.path):
        if info.type == pafs.FileType.Directory and info.base_name != "parts":
            work = output.child(f"{WORK_FOLDER}/{info.base_name}")
            found += [work.child("joined"), work.child("lists"), work.child("store").child(PARTS)]
            found += [*_stage_folders(work), work.child("candidates"), work]
    return found


def _progress(output: Location) -> dict[str, Any] | None:
    """From the plan, and the footers of what is there."""
    plan = read_json(output, PLAN, fingerprint=str, kind=str, unit_name=str, units=int, rows=int, started=float)
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
    sums = totals.as_dict()
    return {
        "state": "unfinished",
        "kind": plan["kind"],
        "fingerprint": plan["fingerprint"],
        "unit_name": plan["unit_name"],
        "units": plan["units"],
        "units_done": totals.units,
        "rows": plan["rows"],
        "rows_done": totals.rows_in,
        "rows_out": totals.rows_out,
        "reasons": sums["reasons"],
        "counts": sums["counts"],
        "rows_per_second": round(rate, 1),
        "seconds_left": round(left / rate, 1) if rate > 0 else None,
    }
