"""A call that waits for other processes, and must not wait for dead ones.

vLLM 0.32 computes in a process of its own. When that one is killed, ``LLM.generate`` waits for its answer for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from multiprocessing.process import BaseProcess
from threading import Thread
from typing import TypeVar

T = TypeVar("T")

_LOOK_EVERY_S = 0.5


def call_while_alive(function: Callable[[], T], processes: Sequence[BaseProcess]) -> T:
    """Calls a function in a thread of its own, and gives up on it once one of the processes has died.

    Args:
        function: what to call; a call that is given up on goes on waiting in its thread, which ends with the program.
        processes: children of this one that must live meanwhile.

    Raises:
        ChildProcessError: a process died before the call came back.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name="flipkd-waiting", daemon=True).start()
    while True:
        were_alive = all(process.is_alive() for process in processes)
        try:
            return future.result(timeout=_LOOK_EVERY_S)
        except TimeoutError:
            if future.done():  # its own error, or its answer came in this moment
                return future.result()
            # A whole interval after the death: what it had sent before has come in.
            if not were_alive:
                raise ChildProcessError("a process that was waited for has died") from None
