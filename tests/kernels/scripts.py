"""Scripts in a process of their own: Triton reads its environment once, at import."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap


def run(script: str, environment: dict[str, str]) -> None:
    """Runs a script that must print "right" and nothing else."""
    base = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON", "FLIPKD"))}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**base, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "right"
