"""A whole night: the stages, the comparison with the last night, the gates, the report, and what becomes of it all."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flipkd.data.commit import write_json
from flipkd.data.folders import publish_folder, remove_unpublished
from flipkd.data.location import open_location
from flipkd.errors import ConfigError, OutputError
from flipkd.nightly.config import NightConfig
from flipkd.nightly.folders import ACCEPTED_FILE, KIND, REPORT, STORES, Nights, accepted
from flipkd.nightly.gates import judge
from flipkd.nightly.measure import column_facts, count_records, count_scores
from flipkd.nightly.report import write_report
from flipkd.nightly.stages import Journal, run_stages, store_stages
from flipkd.run.job import available_cores
from flipkd.run.lock import locked
from flipkd.run.manifest import versions
from flipkd.run.overlap import refuse_overlap
from flipkd.run.ray_session import ray_session

logger = logging.getLogger(__name__)

PASSED, HELD = 0, 3


@dataclass(frozen=True)
class Night:
    """A whole night.

    Args:
        folder: where it lies.
        facts: what its ``night.json`` holds.
        released: whether its scores may be used.
        current: date of the night that ``current.json`` names now; None where there is none.
    """

    folder: Path
    facts: Mapping[str, Any]
    released: bool
    current: str | None

    @property
    def exit_code(self) -> int:
        """0 for a released night, 3 for one that a gate holds back."""
        return PASSED if self.released else HELD


def run_night(config: NightConfig, *, overwrite: bool = False) -> Night:
    """Runs a night, or what is left of it; a night that is whole already is left as it is.

    Args:
        config: the night.
        overwrite: whether what there is of this night is removed first.

    Raises:
        OutputInUseError: another job works on these nights.
        FlipkdError: see ``flipkd.errors``; what was finished stays, and the same call goes on from there.
    """
    nights = Nights(config.output)
    output = open_location(config.output)
    sections = {"score": config.score, "rescore": config.rescore, "evaluate": config.evaluate}
    inputs = [
        (f"{section}: {name}", getattr(options, name, None))
        for section, options in sections.items()
        for name in ("pairs", "records", "right_records", "store", "right_store", "labels")
    ]
    refuse_overlap(output, [(option, open_location(uri)) for option, uri in inputs if uri is not None])
    with locked(output), ray_session():
        if overwrite:
            nights.remove(config.date)
        found = nights.finished(config.date)
        if found is None:
            folder = nights.start(config.date)
            found = folder, _work(config, nights, folder)
        elif found[1]["fingerprint"] != config.fingerprint:
            raise OutputError(
                f"the night {config.date} is finished, and the YAML file has other options for score, rescore or "
                "evaluate now; nothing was done. Pass --overwrite to run that night again"
            )
        elif found[1]["limits"] != asdict(config.gates):
            logger.warning("the night %s was judged by other gates than the YAML file has now", config.date)
        return _conclude(nights, *found, config.keep)


def accept_night(config: NightConfig, reason: str) -> Night:
    """Releases a night that a gate has held back: somebody has looked at it, and says why it is good.

    Raises:
        ConfigError: there is no such night, or no reason is given.
    """
    if not reason.strip():
        raise ConfigError("--accept needs a reason, which is kept with the night")
    nights = Nights(config.output)
    with locked(open_location(config.output)):
        found = nights.finished(config.date)
        if found is None:
            raise ConfigError(f"--accept: the night {config.date} is not finished; run it first")
        folder, facts = found
        if not facts["passed"] and accepted(folder) is None:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            write_json(open_location(folder), ACCEPTED_FILE, {"format": 1, "reason": reason, "accepted": now})
        return _conclude(nights, folder, facts, config.keep)


def _conclude(nights: Nights, folder: Path, facts: Mapping[str, Any], keep: int) -> Night:
    """What follows a report; a killed job is taken up here as well as anywhere."""
    folder = nights.settle(folder, facts["passed"] or accepted(folder) is not None)
    current = nights.point()
    nights.prune(keep, folder.name)
    return Night(folder, facts, nights.is_released(folder), current)


def _work(config: NightConfig, nights: Nights, folder: Path) -> dict[str, Any]:
    journal = Journal(folder)
    said = run_stages(config, folder, journal)
    last = nights.last_before(config.date)
    scores = "scores" if config.rescore is None else "rescored"
    compared = journal.run("compare", lambda: _compare(config, folder / scores, last))
    score, final = said["score"], said.get("rescore", said["score"])
    starts = 0.0
    stages = []
    for span in journal.spans():
        stages.append({**asdict(span), "start_seconds": round(starts, 3)})
        starts += span.seconds
    facts = {
        "format": 1,
        "kind": KIND,
        "date": config.date,
        "fingerprint": config.fingerprint,
        "last_night": None if last is None else last[0].name,
        "scores": scores,
        "pairs": {"rows_in": score["rows_in"], "rows_out": final["rows_out"]},
        "reasons": score["reasons"],
        "rescored": None if config.rescore is None else {key: final[key] for key in ("reasons", "counts")},
        "threshold": final.get("threshold"),
        "encoder_fingerprint": score.get("encoder_fingerprint"),
        "encoded": {name: one.get("counts", {}) for name, one in said.items() if name.startswith("encode ")},
        "skipped_files": sum(one.get("skipped_files", 0) for one in said.values()),
        "evaluation": said.get("evaluate"),
        **{key: compared[key] for key in ("columns", "match", "records")},
        "starts": journal.starts,
        "stages": stages,
        "versions": versions(),
        "limits": asdict(config.gates),
    }
    gates = judge(config.gates, facts, None if last is None else last[1])
    facts |= {"gates": gates, "passed": all(gate["verdict"] != "tripped" for gate in gates)}
    remove_unpublished(folder, REPORT)
    publish_folder(folder / REPORT, lambda report: write_report(report, facts, None if last is None else last[1]))
    return facts


def _compare(config: NightConfig, scores: Path, last: tuple[Path, dict[str, Any]] | None) -> dict[str, Any]:
    threads = config.run.threads or available_cores()
    counted = count_scores(str(scores), threads)
    columns = {}
    for name, counts in counted.columns.items():
        columns[name] = column_facts(counts, name, config.psi_bins)
        before = None if last is None else last[1]["columns"].get(name)
        if before is not None:
            columns[name]["last_counts"] = counts.between(before["edges"]).tolist()
    _, encodes = store_stages(config.score, scores.parent / STORES)
    records = count_records(
        encodes,
        None if last is None else last[0] / STORES,
        threads,
        config.run.on_bad_shard == "skip",
    )
    return {
        "kind": "compare",
        "columns": columns,
        "match": {"judged": counted.judged, "matches": counted.matches},
        "records": {
            side: {"records": records.records[side], "new": records.new[side], "new_share": share}
            for side, share in records.shares().items()
        },
    }
