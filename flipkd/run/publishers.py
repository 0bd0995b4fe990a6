"""Who is told how far a command is."""

from __future__ import annotations

from typing import Any

from flipkd.config import RunOptions
from flipkd.data.commit import write_json
from flipkd.data.location import Location
from flipkd.run.manifest import WORK_FOLDER
from flipkd.run.observe import CommandState, Publisher, StageState
from flipkd.run.output import remove_folder
from flipkd.run.progress import ProgressBar

# A folder of its own: what stands beside the plan may be tidied up while the job runs.
PROGRESS_FOLDER = f"{WORK_FOLDER}/progress"
PROGRESS_FILE = f"{PROGRESS_FOLDER}/progress.json"


def publishers(command: str, run: RunOptions, output: Location | None) -> list[Publisher]:
    """Those that the options name.

    Raises:
        ConfigError: ``--metrics-file`` cannot be used.
    """
    found: list[Publisher] = []
    if run.progress:
        found.append(ProgressBar())
    if output is None:
        return found
    found.append(ProgressFile(output))
    if run.metrics_file is not None:
        from flipkd.run.metrics_file import MetricsFile

        found.append(MetricsFile(run.metrics_file))
    if run.ray is not None:
        from flipkd.run.cluster_metrics import RayMetrics

        found.append(RayMetrics())
    return found


class ProgressFile:
    """What ``status`` reads of a command that is at work; gone when it is done.

    Args:
        output: the command's output folder, locked.
    """

    interval_s = 5.0

    def __init__(self, output: Location) -> None:
        self._output = output
        remove_folder(output.child(PROGRESS_FOLDER))  # of a run that was killed

    def publish(self, state: CommandState) -> None:
        """Writes the file, or removes it at the end of a command that has not failed."""
        if state.state in ("finished", "partial"):
            remove_folder(self._output.child(PROGRESS_FOLDER))
            return
        facts: dict[str, Any] = {"format": 1, "kind": state.command, "started": state.started, "updated": state.updated}
        if state.stages:
            facts.update(_facts(state.stages[-1]))
        if state.error is not None:
            facts["error"] = state.error
        write_json(self._output, PROGRESS_FILE, facts)


def _facts(stage: StageState) -> dict[str, Any]:
    left = stage.seconds_left
    totals = stage.totals.as_dict()
    return {
        "stage": stage.kind,
        "unit_name": stage.unit_name,
        "units": stage.units,
        "units_done": totals["units"],
        "rows": stage.rows,
        "rows_done": round(stage.rows_done),
        "rows_out": totals["rows_out"],
        "reasons": totals["reasons"],
        "counts": totals["counts"],
        "rows_per_second": round(stage.rows_per_second, 1),
        "seconds_left": None if left is None else round(left, 1),
    }
