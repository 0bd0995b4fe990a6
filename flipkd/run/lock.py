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
from contextvars import ContextVar

from filelock import FileLock, Timeout

from flipkd.data.commit import make_private_folder, open_remote, writing
from flipkd.data.location import Location, reason
from flipkd.errors import OutputError, OutputInUseError
from flipkd.run.manifest import WORK_FOLDER

logger = logging.getLogger(__name__)

_LOCK = "lock"
_GLANCE_S = 0.5  # longer than ``is_locked`` holds a lock
_HEARTBEAT_S = 20.0
# A lock of an object store that stays as it is for so long is a dead job's: three heartbeats.
_UNCHANGED_S = 60.0
_LOOK_S = 1.0
# For who only looks, and cannot wait: by the clocks of two machines.
_OLD_S = 120.0
# How long two jobs that start at one time wait for the other's name: the last one that wrote its own has the lock.
_SETTLE_S = 0.5


class Lock:
    """A lock that is held. That of an operating system cannot be lost."""

    def check(self) -> None:
        """Looks whether it is held still.

        Raises:
            OutputInUseError: another job has taken it over.
        """


# Those that are held here, outermost first.
_held: ContextVar[tuple[Lock, ...]] = ContextVar("locks", default=())


def check_locks() -> None:
    """Looks whether all locks are held still that the caller stands in.

    Raises:
        OutputInUseError: another job has taken one over.
    """
    for lock in _held.get():
        lock.check()


@contextlib.contextmanager
def locked(output: Location, waits: bool = False) -> Iterator[Lock]:
    """Holds the folder's lock; where another live job holds it, waits for that job to end, or refuses.

    On a local or shared disk it is an operating system lock, which ends with the process, however that ends. On an
    object store it is an object that the holder renews. Whether a job is alive that holds it is told by waiting for a
    change of the object, a minute at most: the clocks of two machines may differ. A job that stands still for longer
    loses its lock, and learns it by ``check_locks``.

    Raises:
        OutputInUseError: another live job holds it.
        OutputError: the folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context((_file_lock if output.is_local else _heartbeat)(output, waits))
        _held.set((*_held.get(), lock))
        try:
            yield lock
        finally:
            _held.set(tuple(other for other in _held.get() if other is not lock))


def _refusal(output: Location) -> OutputInUseError:
    return OutputInUseError(f"another job is working on {output.uri}; wait for it, or choose another --output")


@contextlib.contextmanager
def _file_lock(output: Location, waits: bool) -> Iterator[Lock]:
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
                raise _refusal(output) from None
            logger.warning("waiting for another job that works on %s", output.uri)
            lock.acquire(timeout=-1)
    try:
        yield Lock()
    finally:
        lock.release()


def is_locked(output: Location) -> bool:
    """Whether a job is alive that works on the folder. Nothing is written.

    On an object store this trusts the clocks of two machines, so nothing may hang on it but what is shown.
    """
    lock = output.child(f"{WORK_FOLDER}/{_LOCK}")
    if not output.is_local:
        return _is_fresh(lock)
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


def _is_fresh(lock: Location) -> bool:
    for _ in range(2):
        content = _content(lock)
        if content is None:
            return False
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return time.time() - float(json.loads(content)["time"]) < _OLD_S
        time.sleep(_SETTLE_S)  # its holder may be writing it, where that is no single step
    return False


def _content(lock: Location) -> bytes | None:
    """What stands in the lock of an object store; None where there is none.

    Raises:
        OutputError: it cannot be looked at.
    """
    try:
        with lock.filesystem.open_input_stream(lock.path) as source:
            return bytes(source.read())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OutputError(f"cannot read {lock.uri}: {reason(error)}") from error


def _holder(content: bytes) -> str | None:
    """Who holds a lock; None where that is not told: its holder may be writing it, where that is no single step."""
    try:
        return str(json.loads(content)["holder"])
    except (ValueError, KeyError, TypeError):
        return None


class _Heartbeat(Lock):
    """The lock of an object store.

    Args:
        output: the folder.
    """

    def __init__(self, output: Location) -> None:
        self._output, self._target = output, output.child(f"{WORK_FOLDER}/{_LOCK}")
        self._own = f"{socket.gethostname()}:{os.getpid()}:{time.time_ns()}"
        self._renewing = threading.Lock()
        self._renewed, self._is_lost = time.monotonic(), False

    def take(self, waits: bool) -> None:
        """Raises OutputInUseError where another live job holds it; ``waits`` for that one to end."""
        while True:
            self._wait_until_free(waits)
            self._beat()
            time.sleep(_SETTLE_S)
            if _holder(_content(self._target) or b"") == self._own:
                return
            if not waits:
                raise _refusal(self._output)

    def _wait_until_free(self, waits: bool) -> None:
        seen, since, is_told = _content(self._target), time.monotonic(), False
        if seen is not None:
            logger.warning(
                "%s is there: waiting for up to %.0f s to see whether a job renews it", self._target.uri, _UNCHANGED_S
            )
        while seen is not None and time.monotonic() - since < _UNCHANGED_S:
            time.sleep(min(_LOOK_S, _UNCHANGED_S))
            found = _content(self._target)
            if found not in (None, seen):
                if not waits:
                    raise _refusal(self._output)
                if not is_told:
                    logger.warning("waiting for another job that works on %s", self._output.uri)
                since, is_told = time.monotonic(), True
            seen = found

    def _beat(self) -> None:
        with writing(self._target.uri), open_remote(self._target) as sink:
            sink.write(json.dumps({"holder": self._own, "time": time.time()}).encode())
        self._renewed = time.monotonic()

    def _is_own(self) -> bool:
        """Whether no other job has written or deleted it."""
        content = _content(self._target)
        return content is not None and _holder(content) in (None, self._own)

    def _renew(self) -> None:
        with self._renewing:
            if self._is_lost:
                return
            try:
                self._is_lost = not self._is_own()
                if not self._is_lost:
                    self._beat()
            except (OutputError, OSError):  # looking may fail too, and the thread must live on
                logger.warning("could not renew the lock of %s", self._output.uri)

    def keep_renewing(self, ended: threading.Event) -> None:
        """Renews it until the event comes."""
        while not ended.wait(_HEARTBEAT_S):
            self._renew()

    def check(self) -> None:
        if time.monotonic() - self._renewed > _UNCHANGED_S:  # this process stood still: the thread did too
            self._renew()
        if self._is_lost:
            raise OutputInUseError(
                f"another job has taken over {self._output.uri} while this one stood still for {_UNCHANGED_S:.0f} s or "
                "longer; this one ends, finished units are kept"
            )

    def release(self) -> None:
        """Deletes it, unless it is another job's by now."""
        with contextlib.suppress(OSError, OutputError):
            if self._is_own():
                self._target.filesystem.delete_file(self._target.path)


@contextlib.contextmanager
def _heartbeat(output: Location, waits: bool) -> Iterator[Lock]:
    lock, ended = _Heartbeat(output), threading.Event()
    lock.take(waits)
    thread = threading.Thread(target=lock.keep_renewing, args=(ended,), daemon=True)
    thread.start()
    try:
        yield lock
    finally:
        ended.set()
        thread.join()
        lock.release()
