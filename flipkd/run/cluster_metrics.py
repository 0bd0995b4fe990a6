"""Metrics through Ray's own, which every node exports to Prometheus; Ray puts ``ray_`` before their names.

They are the driver's: reports of units arrive there. Nothing is exported for a driver outside the cluster (``ray://``).
"""

from __future__ import annotations

from typing import Any

import ray
from ray.util.metrics import Counter, Gauge

from flipkd.run.metrics import Metric, metrics
from flipkd.run.observe import CommandState


class RayMetrics:
    """Publishes as soon as the job has joined a cluster."""

    interval_s = 5.0  # Ray exports every 10 seconds, and forgets gauges that were not set for twice as long

    def __init__(self) -> None:
        self._known: dict[str, Any] = {}
        self._counted: dict[tuple[str, tuple[str, ...]], float] = {}

    def publish(self, state: CommandState) -> None:
        """Adds to the counters what is new, and sets the gauges."""
        if not ray.is_initialized():
            return
        for metric in metrics(state):
            for labels, value in metric.values.items():
                self._record(metric, labels, value)

    def _record(self, metric: Metric, labels: tuple[str, ...], value: float) -> None:
        if metric.name not in self._known:
            kind = Counter if metric.is_counter else Gauge
            self._known[metric.name] = kind(metric.name, metric.documentation, tag_keys=metric.labels)
        tags = dict(zip(metric.labels, labels, strict=True))
        if not metric.is_counter:
            self._known[metric.name].set(value, tags=tags)
            return
        new = value - self._counted.get((metric.name, labels), 0.0)
        if new > 0:
            self._known[metric.name].inc(new, tags=tags)
            self._counted[metric.name, labels] = value
