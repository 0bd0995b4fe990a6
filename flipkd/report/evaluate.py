"""``evaluate``: scores and labels in; metrics, a calibration and a report out. Or a sample to label."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flipkd.data.calibration import SCORE_COLUMN, as_json, probabilities
from flipkd.data.commit import make_private_folder, read_json, writing
from flipkd.data.find import Shard, find_shards
from flipkd.data.folders import check_replaceable, is_whole, publish_folder, remove_unpublished
from flipkd.data.json_files import parse_object
from flipkd.data.location import Location, open_location
from flipkd.errors import ConfigError, OutputError
from flipkd.report.calibrate import Fitted, calibration_error, fit_calibration, reliability
from flipkd.report.config import EvaluateConfig
from flipkd.report.document import document
from flipkd.report.examples import read_examples, worst_errors
from flipkd.report.metrics import measured
from flipkd.report.pairs import LabelledPairs
from flipkd.report.read import LabelledRun, check_columns, read_labelled
from flipkd.report.sample import STRATUM, draw_sample, is_sample, random_numbers, write_sample
from flipkd.report.scan import RowCounts, count_rows, scores_identity
from flipkd.report.slices import slice_rows
from flipkd.report.thresholds import ThresholdChoice, add_run_counts
from flipkd.report.timeline import job_spans
from flipkd.run.manifest import MANIFEST, versions
from flipkd.run.overlap import refuse_overlap
from flipkd.run.progress import progress_bar
from flipkd.run.units import fingerprint

METRICS_FILE, CALIBRATION_FILE, REPORT_FILE = "metrics.json", "calibration.json", "report.html"
_FEW_PAIRS = 100


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Writes the report, or with ``sample`` the sample. Returns what ``metrics.json`` holds, or facts of the sample.

    Raises:
        ConfigError: an option or a column cannot be used, or there are no labels.
        InputError: an input cannot be read, or a label is neither 0 nor 1.
        OutputError: there is another report or sample at ``output``, or it cannot be written.
    """
    scores, output = open_location(config.scores), open_location(config.output)
    if not output.is_local:
        raise ConfigError(
            f"--output {output.uri}: reports and samples are written to a local disk; copy them from there"
        )
    inputs = [("--scores", scores)] + ([("--labels", open_location(config.labels))] if config.labels else [])
    refuse_overlap(output, inputs)
    shards = find_shards(scores)
    check_columns(config, scores, shards)
    if config.sample is not None:
        return _sample(config, scores, shards, output)
    run = _fingerprint(config, scores, shards)
    target = Path(os.path.realpath(output.path))
    done = _finished(target, run, config.overwrite)
    if done is not None:
        return done
    read = read_labelled(config, scores, shards)
    manifest = read_json(scores, MANIFEST) or {}
    facts, calibration, fitted = _facts(config, read, manifest)
    facts["fingerprint"] = run
    report = document(facts, _pictures(facts, read.pairs, fitted, manifest), _examples(config, read))

    def write(folder: Path) -> None:
        (folder / METRICS_FILE).write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n")
        (folder / REPORT_FILE).write_text(report, encoding="utf-8")
        if calibration is not None:
            (folder / CALIBRATION_FILE).write_text(json.dumps(calibration, indent=1, allow_nan=False) + "\n")

    make_private_folder(str(target.parent))
    remove_unpublished(target.parent, target.name)
    publish_folder(target, write)
    return facts


def _fingerprint(config: EvaluateConfig, scores: Location, shards: list[Shard]) -> str:
    labels = None
    if config.labels is not None:
        label_shards = find_shards(open_location(config.labels))
        labels = [(shard.name, shard.size_bytes, shard.modified_ns) for shard in label_shards]
    options = {name: value for name, value in vars(config).items() if name not in ("output", "overwrite", "progress")}
    inputs = [(shard.name, shard.size_bytes, shard.modified_ns) for shard in shards]
    return fingerprint({"kind": "evaluate", "format": 1, **options, "inputs": inputs, "label_inputs": labels})


def _finished(target: Path, run: str, overwrite: bool) -> dict[str, Any] | None:
    """The facts of this very evaluation, where it is done already.

    Raises:
        OutputError: there is something else.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return None
    if not (target / METRICS_FILE).is_file() or not (target / REPORT_FILE).is_file():
        raise OutputError(f"{target} is there already and is not a report; choose another --output")
    try:
        facts = parse_object((target / METRICS_FILE).read_bytes())
    except (OSError, ValueError):
        facts = {}
    if facts.get("fingerprint") == run and is_whole(target):
        return facts
    if not overwrite and facts.get("fingerprint") != run:
        raise OutputError(f"{target} holds another report; choose another --output, or pass --overwrite to replace it")
    check_replaceable(target, "a report")
    return None


def _facts(
    config: EvaluateConfig, read: LabelledRun, manifest: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any] | None, Fitted | None]:
    """What ``metrics.json`` and ``calibration.json`` hold."""
    pairs, rows, counts = read.pairs, read.rows, read.counts
    generator = random_numbers(config.seed)
    matches = int(np.count_nonzero(pairs.label))
    match_weight = float(pairs.weight[pairs.label].sum())
    all_matches = match_weight + counts.unscored_match_weight
    facts: dict[str, Any] = {
        "format": 1,
        "labels_from": read.kind,
        "weighted": read.kind == "sample" or config.weight_column is not None,
        "rows": {"rows": rows.rows, "scored": rows.scores.total, "unscored": dict(sorted(rows.unscored.items()))},
        "labels": counts.as_dict(),
        "labelled": {
            "pairs": len(pairs),
            "matches": matches,
            "weight": float(pairs.weight.sum()),
            "match_weight": match_weight,
        },
        "recall_ceiling": match_weight / all_matches if all_matches else None,
        "metrics": None,
        "curve": None,
        "bootstrap_resamples": 0,
        "thresholds": {},
        "calibration": None,
        "slices": {},
        "encoder_fingerprint": manifest.get("encoder_fingerprint"),
        "versions": versions(),
    }
    fitted, calibration = None, None
    if pairs.has_both_classes:
        facts.update(measured(pairs, config.bootstrap, generator))
        fitted = fit_calibration(pairs, config.seed)
        facts["thresholds"] = {"score": _thresholds(config, ThresholdChoice(pairs.score, pairs), rows)}
    if fitted is not None:
        calibration = _calibration_facts(fitted, pairs, config, manifest)
        facts["calibration"] = {
            key: value for key, value in calibration.items() if key not in as_json(fitted.calibration)
        }
        choice = ThresholdChoice(probabilities(fitted.calibration, pairs.score), pairs)
        facts["thresholds"]["probability"] = _thresholds(config, choice, None)
    threshold = facts["metrics"]["best_f1"]["threshold"] if facts["metrics"] else float("inf")
    for column in config.slices:
        facts["slices"][column] = slice_rows(pairs, column, threshold, config.bootstrap, generator)
    facts["warnings"] = _warnings(facts, manifest, fitted)
    return facts, calibration, fitted


def _thresholds(config: EvaluateConfig, choice: ThresholdChoice, rows: RowCounts | None) -> dict[str, Any]:
    found: dict[str, Any] = {"best_f1": choice.best_f1(), "table": choice.table()}
    chosen = [found["best_f1"], *found["table"]]
    if config.precision is not None:
        found["precision"] = {"wanted": config.precision, **choice.for_precision(config.precision)}
        chosen += [row for row in (found["precision"]["estimate"], found["precision"]["cautious"]) if row is not None]
    if config.cost_ratio is not None:
        found["cost_ratio"] = {"ratio": config.cost_ratio, **choice.for_cost_ratio(config.cost_ratio)}
        chosen += [found["cost_ratio"]] if found["cost_ratio"]["threshold"] is not None else []
    if rows is not None:
        add_run_counts(chosen, rows.scores.at_least)
    return found


def _calibration_facts(
    fitted: Fitted, pairs: LabelledPairs, config: EvaluateConfig, manifest: Mapping[str, Any]
) -> dict[str, Any]:
    bins = reliability(fitted.held_out, pairs.label, pairs.weight)
    return {
        "format": 1,
        "method": fitted.method,
        **as_json(fitted.calibration),
        SCORE_COLUMN: config.score_column,
        "encoder_fingerprint": manifest.get("encoder_fingerprint") if config.score_column == "score" else None,
        "fitted_pairs": len(pairs),
        "fitted_matches": int(np.count_nonzero(pairs.label)),
        "held_out": fitted.quality,
        "held_out_reliability": bins,
        "held_out_calibration_error": calibration_error(bins),
    }


def _warnings(facts: Mapping[str, Any], manifest: Mapping[str, Any], fitted: Fitted | None) -> list[str]:
    found = []
    labelled, sample = facts["labelled"], facts["labels"]["sample"]
    if facts["metrics"] is None:
        kind = "matches" if labelled["matches"] else "pairs that do not match"
        why = f"All labelled pairs are {kind}"
        if 0 < labelled["matches"] < labelled["pairs"]:
            kind = "pairs that do not match" if labelled["match_weight"] else "labelled matches"
            why = f"All {kind} have the weight 0" if labelled["weight"] else "All weights are 0"
        found.append(f"{why}: nothing can be told apart, so there are no metrics.")
    elif min(labelled["matches"], labelled["pairs"] - labelled["matches"]) < _FEW_PAIRS:
        found.append(f"One class has fewer than {_FEW_PAIRS} labelled pairs: read the intervals, not the figures.")
    if facts["metrics"] is not None and fitted is None:
        found.append(
            "No calibration was fitted: a class has fewer than two pairs, or higher scores do not mean matches."
        )
    if not manifest.get("complete", True):
        found.append("The score job was partial: some of its input was skipped.")
    if not manifest:
        found.append("The scores have no manifest: their job is not finished, or another program wrote them.")
    if facts["labels"]["labels"] is not None and facts["labels"]["labels"]["conflicts"]:
        found.append(f"{facts['labels']['labels']['conflicts']} labels contradict one another and were left out.")
    if sample is not None and sample["unseen_matches_limit"] > 0.02 * labelled["match_weight"]:
        found.append(
            f"Where no labelled pair is a match, there can still be {sample['unseen_matches_limit']} matches in the "
            f"run (95 % bound; {labelled['match_weight']:.0f} are estimated in all): recall and ROC AUC may be lower "
            "than shown. More labels in the low strata tell."
        )
    if sample is not None and sample["rows_represented"] < facts["rows"]["scored"]:
        share = sample["rows_represented"] / facts["rows"]["scored"]
        found.append(f"Strata without any label are left out: the sample stands for {share:.1%} of the scored rows.")
    return found


def _pictures(
    facts: Mapping[str, Any], pairs: LabelledPairs, fitted: Fitted | None, manifest: Mapping[str, Any]
) -> list[tuple[str, str]]:
    from flipkd.report import pictures

    metrics = facts["metrics"]
    found = []
    if metrics is not None:
        best = metrics["best_f1"]
        svg = pictures.precision_recall(facts["curve"], [(best["recall"], best["precision"])])
        found.append((svg, "Precision over recall with its 95 % band; the diamond is the best F1."))
    threshold = metrics["best_f1"]["threshold"] if metrics is not None else None
    found.append((pictures.score_histogram(pairs, threshold), "Scores by class; each class adds up to one."))
    if fitted is not None:
        rows = facts["calibration"]["held_out_reliability"]
        found.append((pictures.reliability_diagram(rows), "Probability said and matches seen, on held-out pairs."))
    if "wall_seconds" in manifest:
        found.append((pictures.time_line(job_spans(manifest)), "Where the time went when these scores were made."))
    return found


def _examples(config: EvaluateConfig, read: LabelledRun) -> dict[str, Any] | None:
    if not config.show_examples:
        return None
    return read_examples(*read.rows_of, config.score_column, worst_errors(read.pairs, config.show_examples))


def _sample(config: EvaluateConfig, scores: Location, shards: list[Shard], output: Location) -> dict[str, Any]:
    assert config.sample is not None
    if not output.path.lower().endswith(".parquet"):
        raise ConfigError(f"--output {output.uri}: with --sample it is one file; let its name end in .parquet")
    if Path(output.path).exists() and not config.overwrite:
        raise OutputError(
            f"{output.uri} is there already, and labels may have been filled in; choose another --output, or pass "
            "--overwrite to replace it"
        )
    if Path(output.path).exists() and not is_sample(output, find_shards(output)):
        raise OutputError(f"{output.uri} is no sample of flipkd's (it lacks {STRATUM}); choose another --output")
    with progress_bar("sample", 2 * count_rows(scores, shards), "pairs", config.progress) as bar:
        table, counts = draw_sample(
            scores, shards, config.score_column, config.label_column, config.sample, config.seed, bar.update
        )
    with writing(output.uri):
        make_private_folder(str(Path(output.path).parent))
    write_sample(table, output, {"scores": scores_identity(scores, shards), "seed": config.seed})
    return {
        "output": output.path,
        "pairs": table.num_rows,
        "rows": counts.rows,
        "scored": counts.scores.total,
        "strata": len(set(table.column("sample_stratum").to_pylist())),
        "label_column": config.label_column,
    }
