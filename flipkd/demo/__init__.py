"""The whole way on real data: labelled pairs, a teacher, a distilled encoder, a night's scores, an evaluation."""

from __future__ import annotations

from flipkd.demo.story import run_demo as run_demo
from flipkd.demo.tables import demo_tables as demo_tables

__all__ = ["demo_tables", "run_demo"]
