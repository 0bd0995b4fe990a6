"""The stores that ``score --cache`` keeps beside the text cache: of what they are, who uses one, which are out of date.

A store's note holds the fingerprint of its *origin*: where its records lie and how they are encoded, not what they say.
A job holds a shared lock of the notes of its stores from before it encodes to its end, and touches them as it begins.
So a store of the same origin whose note is older, and that nobody holds, is of an earlier night.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from flipkd.data.commit import make_private_folder, writing
from flipkd.data.location import Location, open_location
from flipkd.errors import OutputError, OutputInUseError
from flipkd.run.encode import PARTS, EncodePlan
from flipkd.run.lock import locked
from flipkd.run.manifest import MANIFEST, WORK_FOLDER
from flipkd.run.output import STORE_NAME, remove_folder
from flipkd.run.overlap import real_uri
from flipkd.run.units import fingerprint
from flipkd.vectors.layout import HEADER_FILE, SEALING_FOLDER, STORE_FILES

logger = logging.getLogger(__name__)

_NOTE = f"{WORK_FOLDER}/origin"
_NOTE_BYTES = 64


@contextlib.contextmanager
def in_use(plans: Sequence[EncodePlan]) -> Iterator[None]:
    """No other job deletes the stores of these plans meanwhile.

    Raises:
        OutputError: a note cannot be written.
    """
    with contextlib.ExitStack() as held:
        for plan in plans:
            held.callback(os.close, _hold(plan))
        yield


def remove_older(plans: Sequence[EncodePlan]) -> None:
    """Deletes stores of the same origin as these, beside them, that are of an earlier night and that no job holds."""
    own = {Path(plan.config.output).name for plan in plans}
    for plan in plans:
        with contextlib.suppress(FileNotFoundError):  # of a finished job whose store was deleted since
            touched_ns = os.stat(_note(plan.config.output)).st_mtime_ns
            for folder in sorted(Path(plan.config.output).parent.iterdir()):
                if STORE_NAME.fullmatch(folder.name) and folder.name not in own:
                    _remove_if_older(open_location(folder), _origin(plan), touched_ns)


def remove_store(store: Location) -> None:
    """Deletes what a store is made of, finished or not, but not its folder; the caller has locked it.

    Raises:
        OutputError: something cannot be deleted.
    """
    folder = Path(store.path)
    with writing(store.uri):
        (folder / HEADER_FILE).unlink(missing_ok=True)  # first: without it nobody takes the rest for a store
        for name in (*STORE_FILES, MANIFEST):
            (folder / name).unlink(missing_ok=True)
    remove_folder(store.child(PARTS))
    remove_folder(store.child(SEALING_FOLDER))


def _origin(plan: EncodePlan) -> str:
    return fingerprint({"records": real_uri(open_location(plan.config.records)), "run": plan.run_fingerprint})


def _note(store: str) -> str:
    return os.path.join(store, _NOTE)


def _hold(plan: EncodePlan) -> int:
    """Writes and touches the note; returns its open descriptor, with a shared lock."""
    path = _note(plan.config.output)
    with writing(path):
        while True:
            with contextlib.suppress(FileNotFoundError):  # the folder is deleted at this moment
                make_private_folder(os.path.dirname(path))
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
                with contextlib.ExitStack() as opened:
                    opened.callback(os.close, descriptor)
                    fcntl.flock(descriptor, fcntl.LOCK_SH)
                    if os.fstat(descriptor).st_nlink:
                        os.pwrite(descriptor, _origin(plan).encode(), 0)
                        os.utime(descriptor)
                        opened.pop_all()
                        return descriptor


def _remove_if_older(store: Location, origin: str, touched_ns: int) -> None:
    try:
        descriptor = os.open(_note(store.path), os.O_RDWR | os.O_NOFOLLOW)
    except OSError:  # no note, so not a store of score's
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_older = os.fstat(descriptor).st_mtime_ns < touched_ns
        if is_older and os.pread(descriptor, _NOTE_BYTES, 0) == origin.encode():
            with locked(store):
                remove_store(store)
                remove_folder(store)
    except (BlockingIOError, OutputInUseError):
        logger.info("%s stays: another job uses it", store.uri)
    except (OSError, OutputError) as error:  # the scores are there: no reason to fail
        logger.warning("%s, a store of older records, was not deleted: %s", store.uri, error)
    finally:
        os.close(descriptor)
