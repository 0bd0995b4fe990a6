"""How far nights are, from their folder alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flipkd.data.commit import read_json
from flipkd.data.location import open_location
from flipkd.nightly.folders import CURRENT_FILE, KIND, NIGHT_PAGE, REPORT, Nights, is_night, night_facts
from flipkd.nightly.stages import JOURNAL
from flipkd.run.lock import is_locked


def night_status(folder: str) -> dict[str, Any] | None:
    """State of one night, or of all nights of an ``output``; None for any other folder.

    Returns:
        Of a night ``state``: ``released``, ``held`` (with the gates that ``tripped``) or ``unfinished`` (with the
        ``stages`` that are done); of all nights that of each, the one that ``current.json`` names, and whether a job
        works on them now.
    """
    location = open_location(folder)
    if not location.is_local:
        return None
    path = Path(location.path)
    if is_night(path):
        return {"kind": KIND, **_night(path)}
    nights = Nights(folder)
    found = [_night(one) for one in nights.all()]
    if not found:
        return None
    current = (read_json(location, CURRENT_FILE) or {}).get("date")
    return {"kind": "nights", "current": current, "running": is_locked(location), "nights": found}


def _night(path: Path) -> dict[str, Any]:
    facts = night_facts(path)
    if facts is None:
        journal = read_json(open_location(path), JOURNAL) or {}
        return {"date": path.name, "state": "unfinished", "stages": list(journal.get("stages", {}))}
    state = {"_held": "held", "_unfinished": "unfinished"}.get(path.parent.name, "released")
    report = str(path / REPORT / NIGHT_PAGE)
    return {"date": path.name, "state": state, "tripped": _tripped(facts), "report": report}


def _tripped(facts: Mapping[str, Any]) -> list[str]:
    return [gate["name"] for gate in facts["gates"] if gate["verdict"] == "tripped"]
