"""How far workers of other processes are with their units: notes in the output folder, one a unit under way.

Ray carries a unit's report when it ends; a note says how things stand until then. It is the note that counts the tries.
"""

from __future__ import annotations

import contextlib
import posixpath
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import pyarrow.fs as pafs

from flipkd.data.commit import read_json, write_json
from flipkd.data.location import Location
from flipkd.errors import FlipkdError
from flipkd.models.progress import Listener
from flipkd.run.manifest import WORK_FOLDER
from flipkd.run.units import WorkUnit

TRIES = f"{WORK_FOLDER}/tries"
_INTERVAL_S = 5.0


def note_name(unit: WorkUnit) -> str:
    """Where the note of a unit is, below the output folder."""
    return f"{TRIES}/{unit.fingerprint}.json"


def write_note(output: Location, unit: WorkUnit, tries: int) -> Listener:
    """Notes that a unit begins. Returns what adds to the note, every few seconds, how far the unit is.

    Args:
        output: the output folder.
        unit: the unit.
        tries: how often it has begun, this time too.
    """
    write_json(output, note_name(unit), {"tries": tries})
    due = time.monotonic() + _INTERVAL_S

    def told(done: int, total: int) -> None:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + _INTERVAL_S
            with contextlib.suppress(FlipkdError):  # what is wrong with the disk the unit's output will tell
                write_json(output, note_name(unit), {"tries": tries, "done": done, "total": total})

    return told


@contextlib.contextmanager
def following_notes(
    output: Location, units: Iterable[WorkUnit], listener: Callable[[WorkUnit], Listener]
) -> Iterator[None]:
    """Reads the notes every few seconds, in a thread, and tells the units' listeners."""
    by_name = {posixpath.basename(note_name(unit)): unit for unit in units}
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(_INTERVAL_S):
            with contextlib.suppress(OSError):
                selector = pafs.FileSelector(output.child(TRIES).path, allow_not_found=True)
                names = [info.base_name for info in output.filesystem.get_file_info(selector)]
                for name in by_name.keys() & set(names):
                    with contextlib.suppress(FlipkdError, OSError):
                        facts = read_json(output, f"{TRIES}/{name}") or {}
                        if "done" in facts:
                            listener(by_name[name])(facts["done"], facts["total"])

    thread = threading.Thread(target=follow, name="unit-notes", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
