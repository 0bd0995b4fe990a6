"""Checks that several configurations share. Each names the option and what it may be."""

from __future__ import annotations

from flipkd.errors import ConfigError


def check_positive(name: str, value: int) -> None:
    """Refuses what is below 1."""
    if value < 1:
        raise ConfigError(f"--{name} must be at least 1, not {value}")


def check_cache(cache: str | None, limit_bytes: int | None) -> None:
    """Refuses a limit of no cache."""
    if limit_bytes is not None:
        check_positive("cache-limit", limit_bytes)
        if cache is None:
            raise ConfigError("--cache-limit needs --cache")


def check_cosine(name: str, value: float | None) -> None:
    """Refuses what no cosine is compared with: a number below -1 or above 1, or NaN."""
    _check_range(name, value, -1, "it is compared with the score, which is a cosine")


def check_probability(name: str, value: float | None, why: str) -> None:
    """Refuses what is no probability, NaN too."""
    _check_range(name, value, 0, why)


def _check_range(name: str, value: float | None, least: int, why: str) -> None:
    if value is None:
        return
    if value != value:
        raise ConfigError(f"--{name} must be a number, not NaN")
    if not least <= value <= 1:
        raise ConfigError(f"--{name} must be from {least} to 1, not {value:g}: {why}")
