"""Who works on an output folder: one job at a time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator

from filelock import FileLock, Timeout

from flipkd.data.commit import make_private_folder, open_remote, writing
from flipkd.data.location import Location, reason
from flipkd.errors import OutputError, OutputInUseError
from flipkd.run.manifest import WORK_FOLDER

logger = logging.getLogger(__name__)

_LOCK = "lock"
_GLANCE_S = 0.5  # longer than ``is_locked`` holds a lock
_HEARTBEAT_S = 20.0
_HEARTBEAT_STALE_S = 120.0
# How long two jobs that start at one time wait for the other's name: the last one that wrote its own has the lock.
_SETTLE_S = 0.5


@contextlib.contextmanager
def locked(output: Location, waits: bool = False) -> Iterator[None]:
    """Holds the folder's lock; where another live job holds it, waits for that job to end, or refuses.

    On a local or shared disk it is an operating system lock, which ends with the process, however that ends. On an
    object store it is an object that the holder renews; one that was not renewed for two minutes is taken over.

    Raises:
        OutputInUseError: another live job holds it.
        OutputError: the folder cannot be written.
    """
    refusal = OutputInUseError(f"another job is working on {output.uri}; wait for it, or choose another --output")
    if output.is_local:
        folder = os.path.join(output.path, WORK_FOLDER)
        if os.path.islink(folder):
            raise OutputError(f"{folder} is a symbolic link; remove it")
        with writing(output.uri):
            make_private_folder(folder)
            lock = FileLock(os.path.join(folder, _LOCK), timeout=_GLANCE_S, mode=0o600)
            try:
                lock.acquire()
            except Timeout:
                if not waits:
                    raise refusal from None
                logger.warning("waiting for another job that works on %s", output.uri)
                lock.acquire(timeout=-1)
        try:
            yield
        finally:
            lock.release()
        return
    with _heartbeat(output.child(f"{WORK_FOLDER}/{_LOCK}"), refusal):
        yield


def is_locked(output: Location) -> bool:
    """Whether a job is alive that works on the folder. Nothing is written."""
    lock = output.child(f"{WORK_FOLDER}/{_LOCK}")
    if not output.is_local:
        return _holder(lock) is not None
    try:
        descriptor = os.open(lock.path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _holder(lock: Location) -> str | None:
    """Who holds the lock of an object store; None where nobody has renewed it for two minutes.

    Raises:
        OutputError: it cannot be looked at.
    """
    for _ in range(2):
        try:
            with lock.filesystem.open_input_stream(lock.path) as source:
                found = json.loads(source.read())
            return str(found["holder"]) if time.time() - float(found["time"]) < _HEARTBEAT_STALE_S else None
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):  # its holder may be writing it, where that is no single step
            time.sleep(_SETTLE_S)
        except OSError as error:
            raise OutputError(f"cannot read {lock.uri}: {reason(error)}") from error
    return None


@contextlib.contextmanager
def _heartbeat(target: Location, refusal: OutputInUseError) -> Iterator[None]:
    own = f"{socket.gethostname()}:{os.getpid()}:{time.time_ns()}"

    def beat() -> None:
        with writing(target.uri), open_remote(target) as sink:
            sink.write(json.dumps({"holder": own, "time": time.time()}).encode())

    if _holder(target) is not None:
        raise refusal
    beat()
    time.sleep(_SETTLE_S)
    if _holder(target) != own:
        raise refusal
    ended = threading.Event()

    def keep_beating() -> None:
        while not ended.wait(_HEARTBEAT_S):
            try:
                if _holder(target) not in (None, own):
                    logger.error(
                        "another job has taken over %s, since this one stood still; end one of them", target.uri
                    )
                    return
                beat()
            except (OutputError, OSError):  # looking may fail too, and the thread must live on
                logger.warning("could not renew the lock of %s", target.uri)

    thread = threading.Thread(target=keep_beating, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(OSError, OutputError):
            if _holder(target) in (None, own):
                target.filesystem.delete_file(target.path)
