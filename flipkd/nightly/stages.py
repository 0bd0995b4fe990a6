"""The stages of a night, each a job of its own that goes on where it was; and a journal of what they said."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from flipkd.config import EncodeConfig, ScoreConfig
from flipkd.data.commit import read_json, write_json
from flipkd.data.folders import is_whole, remove_published
from flipkd.data.location import open_location
from flipkd.errors import OutputError
from flipkd.nightly.config import NightConfig
from flipkd.nightly.folders import STORES
from flipkd.report.config import EvaluateConfig
from flipkd.report.evaluate import evaluate
from flipkd.report.pairs import PairCounts
from flipkd.report.read import NoLabelledPairsError, check_labels
from flipkd.report.timeline import Span, job_spans
from flipkd.run.encode import encode
from flipkd.run.plan_score import encode_config, plan_score
from flipkd.run.record_template import template_of_scores
from flipkd.run.rescore_config import RescoreConfig
from flipkd.run.score import score
from flipkd.run.stages import summary

logger = logging.getLogger(__name__)

JOURNAL = "_stages.json"
_TIMES = ("wall_seconds", "seconds", "seal_seconds", "stages")


class Journal:
    """What finished stages said, in the night's folder: a rerun finds nothing to do and could not say it again.

    Args:
        folder: of the night.
    """

    def __init__(self, folder: Path) -> None:
        self._root = open_location(folder)
        found = read_json(self._root, JOURNAL) or {}
        self.starts = found.get("starts", 0) + 1
        self._stages: dict[str, dict[str, Any]] = found.get("stages", {})
        self._order: list[str] = []
        self._write()

    def run(self, name: str, stage: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Runs a stage and returns what it says; of one that was finished before, with the times of when it worked."""
        logger.info("night: %s", name)
        started = time.perf_counter()
        said = dict(stage())
        said.setdefault("wall_seconds", round(time.perf_counter() - started, 3))
        before = self._stages.get(name)
        if before is not None and _is_repeated(said, before):
            said |= {key: before[key] for key in _TIMES if key in before}
        self._stages[name] = said
        self._order.append(name)
        self._write()
        return said

    def spans(self) -> list[Span]:
        """The time line of the stages that have run."""
        return [span for name in self._order for span in job_spans(self._stages[name], name)]

    def _write(self) -> None:
        write_json(self._root, JOURNAL, {"format": 1, "starts": self.starts, "stages": self._stages})


def _is_repeated(said: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Whether a stage that was finished before has found nothing to do."""
    if "fingerprint" in said:
        return bool(said["fingerprint"] == before.get("fingerprint"))
    return bool(said.get("units_resumed", -1) == said.get("units") or said["wall_seconds"] == before["wall_seconds"])


def run_stages(config: NightConfig, folder: Path, journal: Journal) -> dict[str, dict[str, Any]]:
    """Encodes, scores, rescores and evaluates, as far as the night asks for it.

    Returns:
        What each stage said: ``encode left``, ``encode right``, ``score``, ``rescore``, ``evaluate``.

    Raises:
        FlipkdError: see ``flipkd.errors``; what was finished stays, and the same call goes on from there.
    """
    _refuse_leftovers(config, folder)
    if config.evaluate is not None:
        check_labels(config.evaluate)
    if config.score.record_sides:
        plan_score(config.score)  # a mistake in the pairs or the right table is found before the left one is encoded
    said: dict[str, dict[str, Any]] = {}
    score_config, encodes = store_stages(config.score, folder / STORES)
    for side, one in encodes.items():
        name = f"encode {side}"
        said[name] = journal.run(name, partial(_kept, partial(encode, one)))
    said["score"] = journal.run("score", partial(_kept, partial(score, score_config)))
    if config.rescore is not None:
        from flipkd.run.rescore import rescore

        rescore_config = rescore_stage(config.score, config.rescore)
        said["rescore"] = journal.run("rescore", partial(_kept, partial(rescore, rescore_config)))
    if config.evaluate is not None:
        said["evaluate"] = journal.run("evaluate", partial(_kept_metrics, config.evaluate))
    return said


def store_stages(config: ScoreConfig, stores: Path) -> tuple[ScoreConfig, dict[str, EncodeConfig]]:
    """Splits scoring over record tables in two: encoding them into stores of the night, and scoring with these.

    ``score`` alone would keep its store in the cache, where the next night deletes it. Without record tables there is
    nothing to split.
    """
    if config.records is None or config.encoder is None:
        return config, {}
    encodes = {}
    for side in config.record_sides:
        name = "right" if side.is_right else "left"
        encodes[name] = replace(encode_config(config, side), output=str(stores / name))
    split = replace(
        config,
        store=encodes["left"].output,
        right_store=encodes["right"].output if "right" in encodes else None,
        encoder=None,
        records=None,
        right_records=None,
        cache=None,
        cache_limit_bytes=None,
    )
    return split, encodes


def rescore_stage(score: ScoreConfig, rescore: RescoreConfig) -> RescoreConfig:
    """Rescoring of what the night has scored; unless it says otherwise, records are read by the encoder's template."""
    if rescore.template is not None or rescore.text_column != RescoreConfig.text_column:
        return rescore
    return replace(rescore, template=template_of_scores(score))


def _refuse_leftovers(config: NightConfig, folder: Path) -> None:
    for name, section in (("rescored", config.rescore), ("evaluation", config.evaluate)):
        if section is None and (folder / name).exists():
            raise OutputError(
                f"{folder} was begun with a stage that the YAML file has no more, and holds {name}; put the section "
                "back, or pass --overwrite to run the night again from its beginning"
            )


def _kept(job: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Runs a job; what the night keeps of its manifest."""
    manifest = job()
    names = ("kind", "stages", "units_resumed", "skipped_shards", "skipped_units", "threshold", "encoder_fingerprint")
    kept = summary(dict(manifest)) | {key: manifest[key] for key in names if key in manifest}
    # Names of files stay in the job's own manifest.
    kept["skipped_files"] = len(kept.pop("skipped_shards", [])) + len(kept.pop("skipped_units", []))
    return kept


def _kept_metrics(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluates; what the night keeps of ``metrics.json``. Where nothing can be measured the gates are to say so."""
    try:
        facts = evaluate(config)
    except NoLabelledPairsError as error:
        logger.warning("%s", error)
        report = Path(config.output)
        if is_whole(report):  # of labels that have changed since
            remove_published(report)
        return {"kind": "evaluate", **_nothing_measured(config, error.counts)}
    names = ("fingerprint", "labelled", "labels", "metrics", "recall_ceiling", "warnings", "weighted")
    return {"kind": "evaluate", **{key: facts[key] for key in names}}


def _nothing_measured(config: EvaluateConfig, counts: PairCounts) -> dict[str, Any]:
    unscored = sum(pairs for pairs, _ in counts.unscored.values())
    return {
        "labelled": {"pairs": 0, "matches": 0, "weight": 0.0, "match_weight": 0.0},
        "labels": counts.as_dict(),
        "metrics": None,
        "recall_ceiling": 0.0 if counts.unscored_match_weight else None,
        "warnings": [
            f"No gold pair has a score, so nothing was measured: {unscored} were not scored, and {counts.unmatched} "
            "are not among tonight's pairs."
        ],
        "weighted": config.weight_column is not None,
    }
