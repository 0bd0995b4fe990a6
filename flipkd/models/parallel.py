"""Runs a model over batches, several at once, with a second try in float32 where bf16 overflows.

Importing this imports no torch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from flipkd.errors import NotFiniteError
from flipkd.models.allocator import keep_freed_memory

if TYPE_CHECKING:
    import torch

    # Arguments of one batch (token ids, and whatever else the model takes) to numbers [rows, width].
    Model = Callable[..., torch.Tensor]


def finite_rows(found: np.ndarray) -> np.ndarray:
    """Bool [rows]: whether all numbers of a row are finite."""
    finite: np.ndarray = np.isfinite(found).all(axis=1)
    return finite


def run_batches(
    batches: Iterable[tuple[Any, ...]],
    model: Model,
    exact_model: Model | None,
    device: torch.device,
    threads: int,
    are_finite: Callable[[np.ndarray], np.ndarray] = finite_rows,
) -> Generator[tuple[np.ndarray, np.ndarray, np.ndarray], None, None]:
    """Runs a model over batches, in their order.

    On a CPU each batch has one thread to itself. So no thread waits for another inside every operation, which is slow
    for small batches and slower still on a shared machine, and results do not depend on the number of threads. On a GPU
    each batch has a stream: with two of them one batch is copied in or out of pinned memory while the other computes.

    Args:
        batches: the places int64 [rows] of a batch's rows in the caller's input, then the model's arguments.
        model: the arguments, arrays among them as tensors on ``device``, to numbers [rows, width].
        exact_model: gives the same in float32 arithmetic; called for a batch only where ``model`` gives a row that is
            not finite.
        device: where the model runs.
        threads: how many batches run at once.
        are_finite: the results of a batch to bool [rows], which of them can be used.

    Yields:
        The places, the results [rows, width], and bool [rows]: which of them are finite.
    """
    import torch

    if device.type == "cpu":
        keep_freed_memory()
    own_threads = torch.get_num_threads()
    waiting: deque[tuple[np.ndarray, Future[tuple[np.ndarray, np.ndarray]]]] = deque()
    try:
        with ThreadPoolExecutor(
            threads, "flipkd-encode", partial(torch.set_num_threads, 1) if device.type == "cpu" else None
        ) as pool:
            for places, *arguments in batches:
                waiting.append((places, pool.submit(_run, arguments, model, exact_model, device, are_finite)))
                if len(waiting) > 2 * threads:
                    first, done = waiting.popleft()
                    yield first, *done.result()
            while waiting:
                first, done = waiting.popleft()
                yield first, *done.result()
    finally:
        torch.set_num_threads(own_threads)  # what threads that start later take over


def _run(
    arguments: list[Any],
    model: Model,
    exact_model: Model | None,
    device: torch.device,
    are_finite: Callable[[np.ndarray], np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Results of a batch, and which of its rows are finite."""
    import torch

    with torch.inference_mode(), _own_stream(device):
        sent = [_sent(argument, device) for argument in arguments]
        found: np.ndarray = model(*sent).cpu().numpy()
        finite = are_finite(found)
        if not finite.all() and exact_model is not None:
            exact = exact_model(*sent).cpu().numpy()
            # The others stay: a vector must not depend on its neighbours.
            found = np.where(finite.reshape(-1, *[1] * (found.ndim - 1)), found, exact)
            finite = are_finite(found)
        return found, finite


def _sent(argument: Any, device: torch.device) -> Any:
    import torch

    if not isinstance(argument, np.ndarray):
        return argument
    tensor = torch.from_numpy(argument)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


_streams: dict[torch.device, list[torch.cuda.Stream]] = {}  # that no thread uses now


@contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """A stream for one batch on a GPU. Streams serve again and again: each has a memory pool of its own in PyTorch."""
    if device.type != "cuda":
        yield
        return
    import torch

    free = _streams.setdefault(device, [])
    try:
        stream = free.pop()
    except IndexError:
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.default_stream(device))  # where weights are made
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        free.append(stream)


def loaded_at_first_use(load: Callable[[], Model]) -> Model:
    """A model that is loaded when it is first called, by whatever thread, and then kept: most runs never need it."""
    loaded: list[Model] = []
    loading = Lock()

    def model(*arguments: Any) -> torch.Tensor:
        with loading:
            if not loaded:
                loaded.append(load())
                if arguments[0].is_cuda:
                    import torch

                    torch.cuda.synchronize()  # another thread's stream may use it next
        return loaded[0](*arguments)

    return model


def not_finite(model: str, inputs: str, rows: np.ndarray, places: np.ndarray) -> NotFiniteError:
    """The error for results that are not finite, in float32 too.

    Args:
        model: what gave them, for the message.
        inputs: what it was given, for the message.
        rows: int64 [N], for each input the caller gave its place among the distinct ones.
        places: the bad ones among the distinct inputs.
    """
    # By place in the input, not by text: records are private.
    bad = np.flatnonzero(np.isin(rows, places))
    shown = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
    return NotFiniteError(
        f"the {model} gives numbers that are not finite, in float32 too, for {len(bad)} of the {inputs} "
        f"(places {shown}); its weights or the texts are out of range",
        bad.tolist(),
    )
