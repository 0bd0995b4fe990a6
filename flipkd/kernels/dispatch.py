"""Which implementation of a kernel runs here. Resolved once, logged, with one override.

The override is an environment variable (or the argument `backend`): FLIPKD_PAIR_SCORE is "cpu", "reference" or
"triton"; FLIPKD_POOL_PROJECT and FLIPKD_ENCODER_OPS (on a GPU) are "reference" or "triton". An explicit choice that
cannot run raises KernelError; it never falls back.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os

from flipkd.errors import KernelError
from flipkd.kernels.native import native

BACKENDS = ("cpu", "reference", "triton")
OVERRIDE = "FLIPKD_PAIR_SCORE"
POOL_PROJECT_BACKENDS = ("reference", "triton")
POOL_PROJECT_OVERRIDE = "FLIPKD_POOL_PROJECT"
ENCODER_OPS_OVERRIDE = "FLIPKD_ENCODER_OPS"

_log = logging.getLogger(__name__)


def pair_score_backend(asked: str | None = None) -> str:
    """Return the backend that scores pairs of rows held in main memory: "cpu", "reference" or "triton".

    Without a choice it is the compiled library, or the PyTorch reference where there is none (`native` warns once).
    Triton is never picked by itself: it needs the rows in GPU memory.

    Args:
        asked: a backend's name; None reads FLIPKD_PAIR_SCORE.

    Raises:
        KernelError: the choice is unknown or cannot run here.
    """
    return _resolve(asked or os.environ.get(OVERRIDE) or "")


def pool_project_backend(asked: str | None, device: str) -> str:
    """Return the backend that turns token states on `device` into vectors: "reference" or "triton".

    Without a choice it is Triton for states in the memory of a CUDA GPU, where the package is installed, and the
    reference elsewhere.

    Args:
        asked: a backend's name; None reads FLIPKD_POOL_PROJECT.
        device: a PyTorch device type, "cpu" or "cuda".

    Raises:
        KernelError: the choice is unknown or cannot run here.
    """
    asked = asked or os.environ.get(POOL_PROJECT_OVERRIDE) or ""
    return _resolve_on_device("pool_project", POOL_PROJECT_OVERRIDE, asked, device)


def encoder_ops_backend(device: str) -> str:
    """Return the backend of what stands between an encoder's multiplications on a GPU: "reference" or "triton".

    The choice, without FLIPKD_ENCODER_OPS, is that of `pool_project_backend`. On a CPU nobody asks.

    Args:
        device: a PyTorch device type.

    Raises:
        KernelError: the choice is unknown or cannot run here.
    """
    return _resolve_on_device("encoder_ops", ENCODER_OPS_OVERRIDE, os.environ.get(ENCODER_OPS_OVERRIDE) or "", device)


@functools.cache
def _resolve_on_device(kernel: str, override: str, asked: str, device: str) -> str:
    if asked and asked not in POOL_PROJECT_BACKENDS:
        raise KernelError(
            f"{kernel} backend {asked!r} is not one of {', '.join(POOL_PROJECT_BACKENDS)}; see {override}"
        )
    installed = importlib.util.find_spec("triton") is not None
    if asked == "triton":
        if not installed:
            raise KernelError(
                f"{kernel} backend 'triton' needs the triton package: pip install 'flipkd[gpu]', or unset {override}"
            )
        if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise KernelError(
                f"{kernel} backend 'triton' needs states on a CUDA GPU, not on {device}; unset {override}"
            )
    chosen = asked or ("triton" if device == "cuda" and installed else "reference")
    _log.info("%s on %s runs on backend %r (%s)", kernel, device, chosen, "asked for" if asked else "chosen")
    return chosen


@functools.cache
def _resolve(asked: str) -> str:
    if asked and asked not in BACKENDS:
        raise KernelError(f"pair_score backend {asked!r} is not one of {', '.join(BACKENDS)}; see {OVERRIDE}")
    if asked == "triton" and importlib.util.find_spec("triton") is None:
        raise KernelError(
            f"pair_score backend 'triton' needs the triton package: pip install 'flipkd[gpu]', or unset {OVERRIDE}"
        )
    if asked in ("reference", "triton"):
        chosen = asked
    elif native() is not None:
        chosen = "cpu"
    elif asked == "cpu":
        raise KernelError(
            "pair_score backend 'cpu' needs the compiled library: reinstall flipkd with a C++17 compiler present, "
            f"or unset {OVERRIDE}"
        )
    else:
        chosen = "reference"
    _log.info("pair_score runs on backend %r (%s)", chosen, "asked for" if asked else "chosen")
    return chosen
