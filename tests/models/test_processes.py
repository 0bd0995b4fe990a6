from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

import pytest

from flipkd.models.processes import call_while_alive


def echo(pipe: Connection) -> None:
    while True:
        pipe.send(pipe.recv())


@pytest.fixture
def child() -> Iterator[tuple[SpawnProcess, Connection]]:
    context = multiprocessing.get_context("spawn")
    own, other = context.Pipe()
    process = context.Process(target=echo, args=(other,), daemon=True)
    process.start()
    yield process, own
    process.kill()
    process.join()


def test_answers_and_errors_come_through(child: tuple[SpawnProcess, Connection]) -> None:
    process, pipe = child

    def asks(value: float) -> Callable[[], float]:
        def ask() -> float:
            pipe.send(1 / value)
            answer: float = pipe.recv()
            return answer

        return ask

    assert call_while_alive(asks(2.0), [process]) == 0.5
    with pytest.raises(ZeroDivisionError):
        call_while_alive(asks(0.0), [process])
    # An error of the call's own is that error, also where it is the one that waiting uses.
    with pytest.raises(TimeoutError, match="mine"):
        call_while_alive(_times_out, [process])


def _times_out() -> None:
    raise TimeoutError("mine")


def test_a_killed_process_is_not_waited_for(child: tuple[SpawnProcess, Connection]) -> None:
    process, _ = child
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)  # alive, and silent

    def waits() -> None:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        time.sleep(3600)

    started = time.monotonic()
    with pytest.raises(ChildProcessError, match="has died"):
        call_while_alive(waits, [process])
    assert time.monotonic() - started < 30
