from __future__ import annotations

from pathlib import Path

import pytest

from tests.privacy.canary import World, make_world


@pytest.fixture
def world(tmp_path: Path, icd9: list[tuple[str, str, str]]) -> World:
    """Records with a canary among them, below ``in``."""
    return make_world(tmp_path / "in", icd9)
