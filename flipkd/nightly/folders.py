"""Where nights lie. A night's place says what it is worth, and it moves there in one rename::

    OUTPUT/2026-11-25/                 released: whole, and every gate passed (or somebody accepted it)
        scores/  rescored/  evaluation/  report/{night.json, night.html}  stores/ (of the newest nights)
    OUTPUT/_held/2026-11-25/           whole, and a gate tripped
    OUTPUT/_unfinished/2026-11-25/     at work, or broken off; the next run goes on here
    OUTPUT/current.json                the newest released night: the one file that a consumer needs to read

Readers of Parquet folders (Spark, Arrow, flipkd) take no notice of names that begin with ``_``. ``report/`` is
published last, sealed with the digests of its files: a folder with a whole report of its own date is a whole night, and
nothing else is ever moved or removed.
"""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from flipkd.data.commit import make_private_folder, read_json, sync, write_json, writing
from flipkd.data.folders import is_whole, remove_published, remove_unpublished
from flipkd.data.location import open_location
from flipkd.errors import ConfigError, OutputError

logger = logging.getLogger(__name__)

REPORT, NIGHT_FILE, NIGHT_PAGE = "report", "night.json", "night.html"
STORES, ACCEPTED_FILE, CURRENT_FILE = "stores", "accepted.json", "current.json"
_STORES_KEPT = 2  # nights whose vector stores are kept, of those released and of those held back
MARKER, KIND = "_night.json", "night"
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_REMOVED = re.compile(rf"\.({_DATE.pattern}|{STORES})\.[0-9a-f]{{32}}\.tmp")


class Nights:
    """The folder of all nights.

    Raises:
        ConfigError: it is not a local (or shared) folder, in which a rename is one step.
    """

    def __init__(self, output: str) -> None:
        location = open_location(output)
        if not location.is_local:
            raise ConfigError(
                f"output {location.uri}: nights need a local or shared folder, where a rename is one step"
            )
        self.root = Path(location.path)
        self._held, self._unfinished = self.root / "_held", self.root / "_unfinished"

    def unfinished(self, date: str) -> Path:
        """Where the night is worked on."""
        return self._unfinished / date

    def finished(self, date: str) -> tuple[Path, dict[str, Any]] | None:
        """A whole night, wherever it lies, and what its ``night.json`` holds.

        Raises:
            OutputError: its place is taken by something that is no whole night.
        """
        for folder in (self.root / date, self._held / date):
            facts = night_facts(folder)
            if facts is not None:
                return folder, facts
            if folder.is_symlink() or folder.exists():
                raise OutputError(f"{folder} is there and is no whole night of flipkd; move it away")
        facts = night_facts(self.unfinished(date))  # killed between the report and the move
        return None if facts is None else (self.unfinished(date), facts)

    def is_released(self, folder: Path) -> bool:
        """Whether a whole night is where consumers look."""
        return folder.parent == self.root

    def released(self) -> list[tuple[Path, dict[str, Any]]]:
        """Whole released nights, oldest first."""
        return _whole(self.root)

    def all(self) -> list[Path]:
        """Folders of all nights in order of date: released, held back, worked on or broken off."""
        parents = [parent for parent in (self.root, self._held, self._unfinished) if parent.is_dir()]
        folders = [folder for parent in parents for folder in parent.iterdir() if _DATE.fullmatch(folder.name)]
        return sorted(filter(is_night, folders), key=lambda folder: folder.name)

    def last_before(self, date: str) -> tuple[Path, dict[str, Any]] | None:
        """The newest released night before a date. One that was held back is no measure for tonight."""
        return max((night for night in self.released() if night[0].name < date), default=None, key=lambda one: one[0])

    def start(self, date: str) -> Path:
        """Makes tonight's folder, or finds the one that was broken off.

        Raises:
            OutputError: there is a folder that flipkd did not make, or it cannot be written.
        """
        folder = self.unfinished(date)
        if not is_night(folder):
            with writing(str(folder)):
                make_private_folder(str(folder))
            if any(not entry.name.startswith(".") for entry in folder.iterdir()):
                raise OutputError(f"{folder} holds files that flipkd did not write; move them away")
            write_json(open_location(folder), MARKER, {"format": 1, "kind": KIND, "date": date})
        return folder

    def settle(self, folder: Path, is_good: bool) -> Path:
        """Moves a whole night to where it belongs, and returns that."""
        parent = self.root if is_good else self._held
        target = parent / folder.name
        if target != folder:
            with writing(str(target)):
                make_private_folder(str(parent))
                os.rename(folder, target)
                sync(str(parent))
                sync(str(folder.parent))
        return target

    def point(self, without: str | None = None) -> str | None:
        """Lets ``current.json`` name the newest released night; returns its date.

        Args:
            without: date of a night that is about to be removed.
        """
        nights = [night for night in self.released() if night[0].name != without]
        root = open_location(self.root)
        if not nights:
            (self.root / CURRENT_FILE).unlink(missing_ok=True)
            return None
        folder, facts = nights[-1]
        current = {
            "format": 1,
            "date": folder.name,
            "scores": f"{folder.name}/{facts['scores']}",
            "report": f"{folder.name}/{REPORT}/{NIGHT_PAGE}",
            "gates": "accepted" if accepted(folder) is not None else "passed",
        }
        if read_json(root, CURRENT_FILE) != current:
            write_json(root, CURRENT_FILE, current)
        return folder.name

    def remove(self, date: str) -> None:
        """Removes a night that is to be run again; ``current.json`` stops naming it first.

        Raises:
            OutputError: what lies there is not flipkd's.
        """
        found = self.finished(date)
        if found is not None:
            self.point(without=date)
            remove_published(found[0])
        folder = self.unfinished(date)
        if folder.exists():
            if not is_night(folder):
                raise OutputError(f"{folder} holds files that flipkd did not write; move them away")
            remove_published(folder)

    def prune(self, keep: int, date: str) -> list[str]:
        """Removes whole nights beyond the newest ``keep`` of the released, and of those held back; never tonight's.

        Vector stores stay for the two newest released nights: the next night is compared with the newest, and the
        newest with the one before it when it is run again. Likewise for the two newest that are held back and newer
        than those: when one of them is accepted, it is what the next night is compared with.

        Returns:
            Dates of the removed nights, oldest first.
        """
        removed = []
        newest = max((folder.name for folder, _ in self.released()), default="")
        for parent in (self.root, self._held):
            nights = [folder for folder, _ in _whole(parent)]
            for folder in nights[:-keep]:
                if folder.name != date:
                    logger.info("removing the night %s: %d newer ones are kept", folder.name, keep)
                    remove_published(folder)
                    removed.append(folder.name)
            with_stores = [folder for folder in nights if parent == self.root or folder.name > newest][-_STORES_KEPT:]
            for folder in nights:
                needs_stores = folder in with_stores or folder.name == date
                if folder.exists() and not needs_stores and (folder / STORES).is_dir():
                    remove_published(folder / STORES)
            for place in (parent, *nights):
                _remove_remnants(place)
        return removed


def accepted(folder: Path) -> dict[str, Any] | None:
    """Who let a night pass whose gates had tripped, and why; None where nobody did."""
    return read_json(open_location(folder), ACCEPTED_FILE)


def is_night(folder: Path) -> bool:
    """Whether flipkd made it: a night that is worked on, or a whole one."""
    found = read_json(open_location(folder), MARKER) or {}
    return not folder.is_symlink() and found.get("kind") == KIND and found.get("date") == folder.name


def night_facts(folder: Path) -> dict[str, Any] | None:
    """What the report of a whole night holds; None where the folder is not one that flipkd made and finished."""
    report = folder / REPORT
    if not _DATE.fullmatch(folder.name) or folder.is_symlink() or report.is_symlink() or not is_whole(report):
        return None
    try:
        facts: dict[str, Any] = json.loads((report / NIGHT_FILE).read_text())
        return facts if (facts["kind"], facts["date"]) == (KIND, folder.name) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _whole(parent: Path) -> list[tuple[Path, dict[str, Any]]]:
    folders = sorted(parent.iterdir()) if parent.is_dir() else []
    found = ((folder, night_facts(folder)) for folder in folders)
    return [(folder, facts) for folder, facts in found if facts is not None]


def _remove_remnants(parent: Path) -> None:
    """Of a removal that was killed: what is left is hidden, and named as only flipkd names it."""
    for path in list(parent.iterdir()) if parent.is_dir() else []:
        match = _REMOVED.fullmatch(path.name)
        if match and path.is_dir() and not path.is_symlink():
            remove_unpublished(parent, match[1])
