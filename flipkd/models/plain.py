"""What the forwards of our own (``bert``, ``decoder``) share: which folders are theirs, and how they read weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_WEIGHTS_FILE = "model.safetensors"


class NotPlainError(Exception):
    """A model that a forward of our own does not compute, so that transformers must; says why."""


@contextmanager
def plain_config() -> Iterator[None]:
    """Turns what a config.json of another form does to the code that reads it into a ``NotPlainError``."""
    try:
        yield
    except KeyError as error:
        raise NotPlainError(f"config.json has no {error}") from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise NotPlainError(f"config.json is of a form that is not known ({type(error).__name__})") from error


def read_weights(path: Path, device: torch.device, name_of: Callable[[str], str | None]) -> dict[str, Tensor]:
    """Reads the weights of a folder by the names that ``name_of`` gives those of the file; None leaves one out.

    Only where they are in one file: a model in several has always been computed by transformers, and vectors that are
    kept under its fingerprint must not get others, rounded in another way, beside them.

    Raises:
        NotPlainError: they are in several files, or the file is damaged, of which transformers says more.
    """
    try:
        with safe_open(path / _WEIGHTS_FILE, framework="pt") as file:
            names = {stored: name_of(stored) for stored in file.keys()}  # noqa: SIM118 (not a mapping)
            return {name: file.get_tensor(stored).to(device) for stored, name in names.items() if name is not None}
    except FileNotFoundError as error:
        raise NotPlainError(f"its weights are not in one {_WEIGHTS_FILE}") from error
    except SafetensorError as error:
        raise NotPlainError(f"its {_WEIGHTS_FILE} cannot be read") from error


def check_shapes(weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int | None, ...]]) -> None:
    """Refuses weights that are not of the shapes that the config promises (None: any size); others may be there too.

    Raises:
        NotPlainError: names the first weight that is missing or of another shape.
    """
    for name, shape in shapes.items():
        if name not in weights:
            raise NotPlainError(f"its weight {name} is missing")
        found = tuple(weights[name].shape)
        if len(found) != len(shape) or any(
            wanted not in (None, size) for size, wanted in zip(found, shape, strict=True)
        ):
            raise NotPlainError(f"its weight {name} is not of the shape that config.json says")
