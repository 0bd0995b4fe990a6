"""What a night can be told: one YAML file and a date."""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from flipkd.config import RunOptions, ScoreConfig
from flipkd.data.pairs import NOT_SCORED, REASONS
from flipkd.data.yaml_files import parse_yaml, read_options_text
from flipkd.errors import ConfigError
from flipkd.nightly.build import Given, build
from flipkd.nightly.folders import Nights
from flipkd.report.config import EvaluateConfig
from flipkd.report.metrics import figure_names
from flipkd.run.rescore_config import RescoreConfig
from flipkd.run.units import fingerprint

PLACEHOLDER = "{date}"
_OTHER_PLACEHOLDER = re.compile(r"\{\w*\}")
# Keys whose values are files or folders, wherever they stand.
PATHS = (
    "output", "pairs", "records", "right_records", "store", "right_store", "cache", "calibration", "labels", "combine",
    "prompt_file", "folder",
)  # fmt: skip
# What `rescore` reads as `score` does, unless it says otherwise.
_SHARED = (
    "left_text", "right_text", "left_column", "right_column", "records", "right_records", "id_column", "text_column",
    "template", "right_id_column", "right_text_column", "right_template",
)  # fmt: skip
# Their braces hold columns, one of which may be called date.
_TEMPLATES = ("template", "right_template")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class GateLimits:
    """What holds a night's scores back. None, or a name that is not there, is no gate.

    A *change* is |tonight - last night| / last night. A *share* is a number from 0 to 1. A gate whose value cannot be
    measured trips; on the first night those that compare with the last one do not.

    Args:
        max_skipped_files: input files or units that could not be read and were skipped.
        require_last_night: trip when there is no night to compare with.
        max_score_psi: population stability index of the scores (``flipkd.nightly.stability``). By convention below 0.1
            is stable, and above 0.25 has changed.
        max_probability_psi: of the probabilities.
        max_pairs_change: change of the number of input pairs.
        max_records_change: change of the number of records, of the table that changed most.
        max_new_record_share: records whose id was not there last night, of the table that has most of them.
        min_match_rate, max_match_rate: matches among the scored pairs.
        max_match_rate_change: change of that rate.
        max_unscored_share: input pairs without a score.
        max_reason_share: per reason, the input pairs that it explains.
        max_reason_share_increase: tonight's share less last night's, of the reason where that is most.
        min_gold_pairs: labelled pairs with a score that ``evaluate`` found.
        min_metric: per figure of ``metrics.json`` (``roc_auc``, ``average_precision``, ``best_f1`` ...), its value.
    """

    max_skipped_files: int | None = 0
    require_last_night: bool = False
    max_score_psi: float | None = 0.25
    max_probability_psi: float | None = None
    max_pairs_change: float | None = None
    max_records_change: float | None = None
    max_new_record_share: float | None = None
    min_match_rate: float | None = None
    max_match_rate: float | None = None
    max_match_rate_change: float | None = None
    max_unscored_share: float | None = None
    max_reason_share: Mapping[str, float] = field(default_factory=dict)
    max_reason_share_increase: float | None = None
    min_gold_pairs: int | None = None
    min_metric: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in self.limits():
            if not 0 <= value < float("inf"):
                raise ConfigError(f"{name} must be a number of at least 0, not {value}")
        known = {"max_reason_share": REASONS[1:NOT_SCORED], "min_metric": figure_names()}
        for name, names in known.items():
            for key in getattr(self, name):
                if key not in names:
                    raise ConfigError(f"{name} has no {key!r}; known are {', '.join(map(str, names))}")

    def limits(self) -> list[tuple[str, float]]:
        """(name, limit) of every gate that is set; those of a mapping as ``name reason``."""
        found: list[tuple[str, float]] = []
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, Mapping):
                found += [(f"{one.name} {key}", limit) for key, limit in sorted(value.items())]
            elif value is not None and not isinstance(value, bool):
                found.append((one.name, value))
        return found


@dataclass(frozen=True)
class NightConfig:
    """One night.

    Args:
        date: YYYY-MM-DD, as the caller counts days (UTC, so that all machines agree).
        output: folder of the nights; local or shared.
        score: the scoring; its ``output`` lies in tonight's folder.
        rescore: the cascade, or None.
        evaluate: the gold pairs, or None.
        gates: what holds the scores back.
        psi_bins: steps of equal share that tonight's scores are cut into, for the next night to compare with.
        keep: whole nights that are kept, of those released and of those held back.
        run: how all stages run.
        fingerprint: of the file's values that decide what the night computes.
    """

    date: str
    output: str
    score: ScoreConfig
    rescore: RescoreConfig | None = None
    evaluate: EvaluateConfig | None = None
    gates: GateLimits = field(default_factory=GateLimits)
    psi_bins: int = 10
    keep: int = 30
    run: RunOptions = field(default_factory=RunOptions)
    fingerprint: str = ""

    def __post_init__(self) -> None:
        if not 2 <= self.psi_bins <= 1000:
            raise ConfigError(f"psi_bins must be from 2 to 1000, not {self.psi_bins}")
        if self.keep < 1:
            raise ConfigError(f"keep must be at least 1, not {self.keep}")
        self._check_gates()

    def _check_gates(self) -> None:
        """A gate that could never be measured is a mistake, and found before the work."""
        score = self.score
        written = score.columns if score.columns is not None else ("score", "probability", "match")
        is_probable = self.rescore is not None or (score.calibration is not None and "probability" in written)
        needs = {
            "score_psi": ("score" in written, "the column score among those that score writes"),
            "match_rate": (score.threshold is not None and "match" in written, "the column match (score: threshold)"),
            "probability": (is_probable, "the column probability (score: calibration)"),
            "record": (score.records is not None, "score: records"),
            "gold": (self.evaluate is not None, "a section evaluate"),
            "metric": (self.evaluate is not None, "a section evaluate"),
        }
        for name, _ in self.gates.limits():
            for part, (there, what) in needs.items():
                if part in name.split(" ")[0] and not there:
                    raise ConfigError(f"gates: {name} needs {what}; set it to null where there is none")


def read_config(path: str, date: str, *, ray: str | None = None, progress: bool = False) -> NightConfig:
    """Reads the YAML file of a night.

    Every text may hold ``{date}`` (but for templates, where it is a column). Relative paths lie below the file's own
    folder; another place is named by an absolute path or a URL.

    Args:
        path: the file.
        date: YYYY-MM-DD.
        ray: in place of ``run: ray``, if given.
        progress: whether progress is shown on stderr.

    Raises:
        ConfigError: the date is none; the file cannot be read, or a key or value in it cannot be used.
    """
    date = check_date(date)
    base = Path(os.path.abspath(path)).parent
    raw = _dated(_load(path), date)
    values = _located(raw, base)
    run = build(RunOptions, values.get("run"), f"{path}, run", {RunOptions: {"overwrite": False, "progress": progress}})
    if ray is not None:
        run = replace(run, ray=ray)
    if not isinstance(values.get("output"), str):
        raise ConfigError(f"{path}: output is missing: the folder of the nights")
    tonight = Nights(values["output"]).unfinished(date)
    scores, rescored = str(tonight / "scores"), str(tonight / "rescored")
    judged = rescored if values.get("rescore") is not None else scores
    given: Given = {
        ScoreConfig: {"output": scores, "run": run},
        RescoreConfig: {"scores": scores, "output": rescored, "run": run},
        # A report is made in seconds: one of labels that have changed since is made again.
        EvaluateConfig: {
            "scores": judged, "output": str(tonight / "evaluation"), "sample": None, "overwrite": True,
            "progress": progress,
        },
        NightConfig: {"date": date, "run": run, "fingerprint": _fingerprint(raw)},
    }  # fmt: skip
    sections = {key: value for key, value in values.items() if key != "run"}
    if isinstance(sections.get("rescore"), Mapping) and isinstance(sections.get("score"), Mapping):
        shared = {key: sections["score"][key] for key in _SHARED if key in sections["score"]}
        sections["rescore"] = {**shared, **sections["rescore"]}
    if isinstance(sections.get("evaluate"), Mapping) and isinstance(sections.get("score"), Mapping):
        # Gold pairs name their records as the candidates do.
        key = [sections["score"].get(name, getattr(ScoreConfig, name)) for name in ("left_column", "right_column")]
        sections["evaluate"] = {"key": key, **sections["evaluate"]}
    return build(NightConfig, sections, path, given)


def check_date(date: str) -> str:
    """The date, which is one.

    Raises:
        ConfigError: it is not, or is written in another way.
    """
    try:
        if re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", date):
            return datetime.date.fromisoformat(date).isoformat()
    except ValueError:
        pass
    raise ConfigError(f"--date {date!r} is no date; write it as YYYY-MM-DD, such as 2026-11-25")


def _load(path: str) -> dict[str, Any]:
    try:
        values = parse_yaml(read_options_text(Path(path)))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys and their values, such as output and score")
    return values


def _dated(values: Any, date: str, key: str = "") -> Any:
    if isinstance(values, dict):
        return {name: _dated(value, date, str(name)) for name, value in values.items()}
    if isinstance(values, list):
        return [_dated(value, date, key) for value in values]
    return values.replace(PLACEHOLDER, date) if isinstance(values, str) and key not in _TEMPLATES else values


def _located(values: Any, base: Path, key: str = "") -> Any:
    """The values with absolute paths."""
    if isinstance(values, dict):
        # `encoder: FOLDER` is short for `encoder: {folder: FOLDER}`.
        names = {"encoder": "folder", "llm": "folder"}
        if key == "folder":
            names["labels"] = "words"  # an LLM's labels are what it answers, not a file
        return {
            name: _located(value, base, names.get(str(name), str(name).replace("-", "_")))
            for name, value in values.items()
        }
    return _path(values, base, key) if isinstance(values, str) and key in PATHS else values


def _path(text: str, base: Path, key: str) -> str:
    other = _OTHER_PLACEHOLDER.search(text)
    if other is not None:
        raise ConfigError(f"{key}: {text!r} holds {other.group()}; only {PLACEHOLDER} is known")
    if "://" in text or os.path.isabs(text):
        return text
    if not text or text.startswith(("~", "$")):
        raise ConfigError(f"{key}: {text!r}: write a path in full; ~ and variables are not replaced")
    place = os.path.normpath(base / text)
    if place != str(base) and not place.startswith(f"{base}{os.sep}".replace("//", "/")):
        raise ConfigError(
            f"{key}: {text!r} leads out of {base}, the folder of the YAML file; write an absolute path if that is meant"
        )
    if key == "folder" and not os.path.exists(place) and _HUB_NAME.fullmatch(text):
        if os.path.exists(text):
            raise ConfigError(
                f"{key}: {text!r} is not in {base}, the folder of the YAML file, but in the working folder; write an "
                "absolute path"
            )
        return text  # a model of the hub
    return place


def _fingerprint(raw: Mapping[str, Any]) -> str:
    sections = {key: raw.get(key) for key in ("score", "rescore", "evaluate")}
    return fingerprint({"kind": "night", "format": 1, "values": _plain(sections)})


def _plain(values: Any) -> Any:
    """YAML's values as JSON's: keys and dates become text."""
    if isinstance(values, dict):
        return {str(key): _plain(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_plain(value) for value in values]
    return values if isinstance(values, str | int | float | bool | None) else str(values)
