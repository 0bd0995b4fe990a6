"""Metrics as a text file, for the textfile collector of Prometheus' node_exporter."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.core import Metric as MetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from flipkd.data.commit import write_public_file
from flipkd.errors import ConfigError
from flipkd.run.metrics import Metric, metrics
from flipkd.run.observe import CommandState

_LAST_SUCCESS = "flipkd_last_success_time_seconds"


class MetricsFile:
    """Writes the file: whole, in one step, again and again.

    Every sample has the label ``batch_job``, the file's name without its ending, so that several jobs may have a file
    each in one folder. The time of the last success is taken over from the file that an earlier run has left.

    Args:
        path: the file; its folder is there.

    Raises:
        ConfigError: it is not.
    """

    interval_s = 5.0

    def __init__(self, path: str) -> None:
        self._path = os.path.abspath(path)
        if not os.path.isdir(os.path.dirname(self._path)):
            raise ConfigError(f"--metrics-file {path}: its folder is not there; make it, readable for node_exporter")
        if os.path.isdir(self._path):
            raise ConfigError(f"--metrics-file {path} is a folder; name a file in it, such as flipkd.prom")
        self._name = Path(path).stem
        self._last_success = _last_success(self._path)

    def publish(self, state: CommandState) -> None:
        """Writes the file.

        Raises:
            OutputError: it cannot be written.
        """
        found = metrics(state)
        for place, metric in enumerate(found):
            if metric.name == _LAST_SUCCESS:
                found[place] = replace(metric, values=metric.values or self._last_success)
        registry = CollectorRegistry()
        registry.register(_Fixed([_family(metric, self._name) for metric in found]))
        write_public_file(self._path, generate_latest(registry))


class _Fixed(Collector):
    def __init__(self, families: list[MetricFamily]) -> None:
        self._families = families

    def collect(self) -> Iterator[MetricFamily]:
        return iter(self._families)


def _family(metric: Metric, name: str) -> MetricFamily:
    kind = CounterMetricFamily if metric.is_counter else GaugeMetricFamily
    family: CounterMetricFamily | GaugeMetricFamily = kind(
        metric.name, metric.documentation, labels=["batch_job", *metric.labels]
    )
    for labels, value in metric.values.items():
        family.add_metric([name, *labels], value)
    return family


def _last_success(path: str) -> dict[tuple[str, ...], float]:
    """Of the run before; nothing where the file is not there, or not ours."""
    try:
        families = list(text_string_to_metric_families(Path(path).read_text()))
    except (OSError, ValueError):
        return {}
    found = [sample.value for family in families for sample in family.samples if sample.name == _LAST_SUCCESS]
    return {(): found[0]} if found else {}
