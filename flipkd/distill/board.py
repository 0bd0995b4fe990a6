"""Metrics to TensorBoard, where it is installed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flipkd.data.commit import make_private_folder


class Board:
    """Writes lines of metrics to ``RUN/tensorboard``; does nothing without TensorBoard, or without a folder."""

    def __init__(self, folder: Path | None) -> None:
        self._writer: Any = None
        if folder is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        make_private_folder(str(folder / "tensorboard"))  # its files have the umask's modes
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def add(self, line: Mapping[str, Any]) -> None:
        """Adds the numbers of a line of metrics."""
        if self._writer is None:
            return
        for name, value in _flat(line, ""):
            self._writer.add_scalar(name, value, line["step"])

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        elif name != "step":
            yield prefix + name, float(value)
