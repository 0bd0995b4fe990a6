"""The folder of a training run: whose it is, its metrics, its best student.

::

    run.json                what was asked for, and of which data and base
    metrics.jsonl           a line per log step and per validation
    learning_curve.png
    checkpoints/step-*/     to go on from
    best/step-*/            the best student so far, and those that a checkpoint names
    adapter/                the best student of the finished run; ``export`` reads it
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flipkd.data.commit import TEMPORARY_NAME, make_private_folder, read_json, write_json, writing
from flipkd.data.folders import (
    SEAL,
    check_replaceable,
    is_whole,
    publish_folder,
    remove_published,
    remove_unpublished,
)
from flipkd.data.location import open_location
from flipkd.errors import InputError, OutputError

if TYPE_CHECKING:
    from flipkd.models.student import Student

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
ADAPTER = "adapter"
CHECKPOINTS = "checkpoints"
_CURVE_FILE = "learning_curve.png"
_FOLDERS = (CHECKPOINTS, "best", ADAPTER)
_STEP = re.compile(r"step-[0-9]{8}")


class RunFolder:
    """A run's folder; made, or found again. ``facts`` are those that it was made with.

    Args:
        path: the folder, which the caller has locked.
        facts: what ``run.json`` holds; ``fingerprint`` says whose run it is.
        overwrite: whether another run's folder is emptied.

    Raises:
        OutputError: it holds another run, or has something else in the place of what a run makes.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any], overwrite: bool) -> None:
        self.path = path
        self.checkpoints = path / CHECKPOINTS
        self._best = path / "best"
        location = open_location(str(path))
        found = read_json(location, RUN_FILE, fingerprint=str)
        if found is not None and found["fingerprint"] != facts["fingerprint"]:
            if not overwrite:
                raise OutputError(
                    f"{path} holds another training run, or one of data that has changed since; choose another "
                    "--output, or pass --overwrite to delete it"
                )
            _empty(path)
            found = None
        if found is None:
            _check_free(path)
            write_json(location, RUN_FILE, facts)
        self.facts: Mapping[str, Any] = facts if found is None else found
        for folder in (path, self.checkpoints, self._best):
            remove_unpublished(folder)

    @property
    def is_finished(self) -> bool:
        """Whether the run's last step is done and its student published."""
        return is_whole(self.path / ADAPTER)

    def log(self, line: Mapping[str, Any]) -> None:
        """Appends a line of metrics."""
        with writing(str(self.path)), open(self.path / METRICS_FILE, "a", opener=_private) as file:
            file.write(json.dumps(line) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics."""
        return read_metrics(self.path)

    def forget_after(self, step: int) -> None:
        """Drops the metrics of steps after ``step``: a resumed run takes them again."""
        kept = [line for line in self.metrics() if line["step"] <= step]
        with writing(str(self.path)):
            temporary = self.path / f".{METRICS_FILE}.tmp"
            with open(temporary, "w", opener=_private) as file:
                file.writelines(json.dumps(line) + "\n" for line in kept)
            os.replace(temporary, self.path / METRICS_FILE)

    def save_best(self, student: Student, step: int) -> None:
        """Publishes the best student so far; older ones stay while a checkpoint names them."""
        from flipkd.models.adapter import save_student

        make_private_folder(str(self._best))
        publish_folder(self._best_of(step), lambda folder: save_student(student, folder))

    def has_best(self, step: int) -> bool:
        """Whether ``save_best`` published one of this step, and it is whole."""
        return is_whole(self._best_of(step))

    def forget_older_bests(self) -> None:
        """Deletes best students that no checkpoint names any more: a run may go back to any checkpoint."""
        kept: set[str] = set()
        for path in self.checkpoints.glob("step-*/progress.json"):
            with suppress(OSError, ValueError, LookupError, TypeError):  # it is damaged, so nobody goes back to it
                kept.add(f"step-{json.loads(path.read_text())['best_step']:08d}")
        for old in self._best.glob("step-*"):
            if old.name not in kept:
                remove_published(old)

    def finish(self, student: Student, best_step: int | None) -> None:
        """Publishes the best student, or the last one where nothing was validated, as the run's.

        The best one stays where it was too: from it and the last checkpoint a lost ``adapter/`` is made again.

        Raises:
            OutputError: the best student is damaged.
        """
        from flipkd.models.adapter import save_student

        if best_step is not None and not self.has_best(best_step):
            raise OutputError(
                f"{self._best_of(best_step)} is damaged or gone; run train again, it goes on from a checkpoint before"
            )

        def write(folder: Path) -> None:
            if best_step is None:
                save_student(student, folder)
                return
            for file in self._best_of(best_step).iterdir():
                if file.name != SEAL:
                    shutil.copyfile(file, folder / file.name)

        publish_folder(self.path / ADAPTER, write)

    def _best_of(self, step: int) -> Path:
        return self._best / f"step-{step:08d}"


def _check_free(path: Path) -> None:
    """Refuses a folder in which somebody else's files have the names of what a run makes, and would be lost."""
    for name in (*_FOLDERS, METRICS_FILE, _CURVE_FILE):
        if os.path.lexists(path / name):
            raise OutputError(f"{path / name} is there already and no run is ({RUN_FILE}); choose another --output")


def _empty(path: Path) -> None:
    """Deletes what a run has made, after a look whether there is anything else in its place.

    Raises:
        OutputError: there is; names it. Nothing has been deleted then.
    """
    made = [path / ADAPTER]
    for name in (CHECKPOINTS, "best"):
        children = sorted((path / name).iterdir()) if (path / name).is_dir() else []
        made += [child for child in children if not TEMPORARY_NAME.fullmatch(child.name)]
    for folder in made:
        if os.path.lexists(folder) and (folder.name != ADAPTER and not _STEP.fullmatch(folder.name)):
            raise OutputError(f"{folder} was not made by flipkd; move it away, or choose another --output")
        if folder.is_dir():
            check_replaceable(folder, "a checkpoint")
    for name in _FOLDERS:
        if (path / name).is_symlink():
            raise OutputError(f"{path / name} is a symbolic link, which flipkd does not make; remove it")
        shutil.rmtree(path / name, ignore_errors=True)
    for name in (METRICS_FILE, _CURVE_FILE):
        (path / name).unlink(missing_ok=True)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics; a line that a killed process left half is dropped."""
    lines = []
    if (run / METRICS_FILE).exists():
        for line in (run / METRICS_FILE).read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue
    return lines


def run_status(run: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """How far a training run is.

    Args:
        run: its folder.
        facts: what its ``run.json`` holds.

    Raises:
        InputError: that is damaged.
    """
    lines = read_metrics(run)
    step, seconds = (max((line.get(name, 0) for line in lines), default=0) for name in ("step", "seconds"))
    steps, finished = facts["config"].get("steps"), is_whole(run / ADAPTER)
    if not isinstance(steps, int):
        raise InputError(f"{run / RUN_FILE} is damaged: it does not tell the number of steps")
    left = None if not step else round(seconds / step * (steps - step), 1)
    validations = [{"step": line["step"], **line["validation"]} for line in lines if "validation" in line]
    return {
        "state": "finished" if finished else "unfinished",
        "kind": "train",
        "steps": steps,
        "steps_done": step,
        "seconds": seconds,
        "seconds_left": 0.0 if finished else left,
        "last_validation": validations[-1] if validations else None,
    }


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)
