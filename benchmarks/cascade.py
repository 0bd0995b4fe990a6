"""Does it pay to ask an LLM about the uncertain pairs only? Quality against the share of pairs that it is asked.

    python -m benchmarks.cascade [--quick] [--datasets sec_names,icd9] [--encoders minilm,teacher] [--steps N]
                                 [--device cuda] [--batch-pairs N] [--test-pairs N]
                                 [--work FOLDER] [--results FILE] [--picture FILE.svg]

Per data set (those of ``benchmarks.quality``, same splits) and encoder:

1. The LLM is SmolLM2-135M (dequantised 4-bit weights), trained to answer: ``train --objective lm --whole-tower``. It
   sees the training pairs and their labels, as a fine-tuned encoder does.
2. ``score`` with the encoder (*minilm*: all-MiniLM-L6-v2 as it is; *teacher*: fine-tuned on the training pairs),
   calibrated on the validation pairs, with the threshold that is best there.
3. ``rescore`` of all validation pairs fits how answer and score are combined; ``rescore`` of the test pairs with each
   budget uses that.

A row is ``dataset, encoder, share, pairs, asked, f1, auc, ap, f1_if_right, seconds``: F1 on the test pairs at the
threshold that is best on the validation pairs *with the same budget*, average precision, the F1 if every answer had
been the label (its threshold chosen alike), seconds of ``score`` and of ``rescore`` (the model's loading
included). ``NAME_gain_at_5`` is the part of the gain of asking about all pairs that asking about 5 % of
them brings; it is left out where asking about all brings nothing.

Then common beginnings of prompts: ICD-9 descriptions with their ten nearest codes' as candidates, by the torch engine
with and without sharing, in turn, for each version of the prompt. Log-odds must agree within 1e-3.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.cascade_prefixes import sharing
from benchmarks.common import machine, report, save_svg, svg_figure, versions
from benchmarks.quality import names_of
from benchmarks.quality_sets import DATASETS, some_pairs
from flipkd.assets import minilm_folder, smollm2_folder
from flipkd.config import EncoderOptions, RunOptions, ScoreConfig
from flipkd.data.calibration import Sigmoid, as_json, probabilities
from flipkd.data.columns import as_numbers
from flipkd.data.find import find_shards
from flipkd.data.location import open_location
from flipkd.demo.evaluation import quality
from flipkd.demo.pair_sets import write_pairs
from flipkd.demo.teacher import FineTuning, fine_tune_teacher
from flipkd.distill.config import LossOptions, TrainConfig
from flipkd.distill.validation import label_metrics
from flipkd.models.llm_options import LlmOptions
from flipkd.models.options import StudentOptions
from flipkd.report.calibrate import fit_platt
from flipkd.run.combination import COMBINATION_FILE, read_combination
from flipkd.run.rescore import rescore
from flipkd.run.rescore_config import RescoreConfig, budget_rows
from flipkd.run.score import score
from flipkd.run.select import ScoreColumn, select_nearest
from flipkd.run.units import plan_units

SHARES = ("0%", "0.1%", "1%", "5%", "20%", "100%")
ENCODERS = ("minilm", "teacher")
_RESULTS = Path(__file__).parent / "results" / "cascade.json"

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Settings:
    """What decides a row besides data set, encoder and share.

    Args:
        steps: of the LLM's training; ``batch_pairs`` in each.
        rank: of its LoRA, and half of alpha.
        learning_rate: highest.
        teacher_steps: of the fine-tuned encoder, 64 pairs each.
        dtype: of the LLM, in training and in answering.
        device: ``cpu`` or ``cuda``, of all models.
        validation_pairs, test_pairs: at most, chosen at random: the LLM reads every one.
        pairs: of each split, at most.
        groups: left records whose candidates show what sharing saves.
        rounds: of that comparison.
    """

    steps: int = 450
    batch_pairs: int = 16
    rank: int = 16
    learning_rate: float = 1e-3
    teacher_steps: int = 400
    dtype: str = "bf16"
    device: str = "cpu"
    validation_pairs: int = 1000
    test_pairs: int = 3000
    pairs: int | None = None
    groups: int = 32
    rounds: int = 3


QUICK = Settings(steps=2, batch_pairs=4, rank=2, teacher_steps=2, pairs=40, groups=2, rounds=1)


class Trial:
    """One data set: pairs, the trained LLM, and what it makes of an encoder's scores.

    Args:
        dataset: a name of ``DATASETS``.
        settings: of the training and the answers.
        work: folder for all of it; what is there already is not made again.
        threads: of every job.
    """

    def __init__(self, dataset: str, settings: Settings, work: Path, threads: int | None) -> None:
        self._dataset, self._settings = dataset, settings
        self._work = work / f"{dataset}-{settings.pairs or 'all'}-pairs-{settings.steps}-steps"
        self._run = RunOptions(threads=threads, progress=True)
        splits = DATASETS[dataset].splits()
        for name in ("train", "validation", "test"):
            pairs = getattr(splits, name)
            limits = [settings.pairs, getattr(settings, f"{name}_pairs", None)]
            most = min(limit for limit in (*limits, len(pairs)) if limit is not None)
            if len(pairs) > most:
                pairs = some_pairs(pairs, most)
            write_pairs(pairs, self._pairs(name) / "part-0.parquet")

    def rows(self, encoder: str) -> list[dict[str, Any]]:
        """A row for each share."""
        self.train()
        folder = self._work / encoder
        scores, seconds = self._score(encoder, folder)
        validation = self._rescore(folder, scores["validation"], "100%", fit_labels="label")[0]
        combination = str(validation / COMBINATION_FILE)
        labels = {name: _column(path, "label") for name, path in scores.items()}
        found = []
        for share in SHARES:
            test, asked, asking_seconds = self._rescore(folder, scores["test"], share, combine=combination)
            known, after = labels["validation"], labels["test"]
            chosen, before, answers = mixed(scores["validation"], validation, share)
            probability = _column(test, "probability")
            figures = quality(known, np.where(chosen, answers, before), after, probability)
            was_asked = np.isfinite(_column(test, "llm_probability"))
            right = quality(known, np.where(chosen, known, before), after, np.where(was_asked, after, probability))
            found.append(
                {
                    "dataset": self._dataset,
                    "encoder": encoder,
                    "share": share,
                    "pairs": len(labels["test"]),
                    "asked": asked,
                    **{name: round(getattr(figures, name), 5) for name in ("f1", "auc", "ap")},
                    "f1_if_right": round(right.f1, 5),
                    "seconds": round(seconds + asking_seconds, 2),
                }
            )
            print(json.dumps(found[-1]), flush=True)
        return found

    def _pairs(self, name: str) -> Path:
        return self._work / "pairs" / name

    def train(self) -> dict[str, Any]:
        """Trains the LLM, or goes on with it."""
        from flipkd.distill.train import train

        settings = self._settings
        dtype: Any = settings.dtype
        return train(
            TrainConfig(
                pairs=str(self._pairs("train")),
                validation=str(self._pairs("validation")),
                output=str(self._llm),
                student=StudentOptions(
                    str(smollm2_folder()),
                    layer=8,
                    rank=settings.rank,
                    alpha=2.0 * settings.rank,
                    dtype=dtype,
                    whole_tower=True,
                ),
                loss=LossOptions(objective="lm"),
                steps=settings.steps,
                batch_pairs=settings.batch_pairs,
                learning_rate=settings.learning_rate,
                evaluate_every=max(1, settings.steps // 6),
                checkpoint_every=max(1, settings.steps // 18),
                log_every=5,
                device=settings.device,
                run=self._run,
            )
        )

    @property
    def _llm(self) -> Path:
        return self._work / "llm"

    def _encoder(self, name: str) -> str:
        if name == "minilm":
            return str(minilm_folder())
        folder = self._work / "teacher-model"
        steps = self._settings.teacher_steps
        fine_tune_teacher(minilm_folder(), self._pairs("train"), folder, FineTuning(steps=steps), progress=True)
        return str(folder)

    def _score(self, name: str, folder: Path) -> tuple[dict[str, Path], float]:
        """Folders of the calibrated scores, and seconds of those of the test pairs."""
        encoder = EncoderOptions(self._encoder(name), device=self._settings.device)
        raw = str(folder / "raw")
        score(ScoreConfig(str(self._pairs("validation")), raw, encoder=encoder, run=self._run))
        values, labels = _column(Path(raw), "score"), _column(Path(raw), "label")
        found = fit_platt(values.astype(np.float32), labels > 0, np.ones(len(labels)))
        calibration = Sigmoid(1.0, 0.0) if found is None else found
        best = label_metrics(labels, probabilities(calibration, values))["f1_threshold"]
        (folder / "calibration.json").write_text(json.dumps(as_json(calibration)))
        scores, seconds = {}, 0.0
        for split in ("validation", "test"):
            scores[split] = folder / "scores" / split
            options: dict[str, Any] = {"calibration": str(folder / "calibration.json"), "threshold": best}
            pairs, output = str(self._pairs(split)), str(scores[split])
            done = score(ScoreConfig(pairs, output, encoder=encoder, run=self._run, **options))
            parts = [*done.get("stages", {}).values(), done]
            seconds = sum(part["wall_seconds"] for part in parts)
        return scores, seconds

    def _rescore(self, folder: Path, scores: Path, budget: str, **how: Any) -> tuple[Path, int, float]:
        """The output, pairs that were asked, and the seconds that it took when it was made."""
        output = folder / f"rescored-{scores.name}-{budget.rstrip('%')}"
        note = output / "seconds.json"
        dtype: Any = self._settings.dtype
        llm = LlmOptions(str(self._llm), device=self._settings.device, dtype=dtype)
        started = time.perf_counter()
        done = rescore(RescoreConfig(llm, str(scores), str(output), budget=budget, run=self._run, **how))
        if not note.exists():  # an earlier call of the same benchmark has timed it else
            note.write_text(json.dumps(time.perf_counter() - started))
        return output, int(done["counts"].get("rescored", 0)), float(json.loads(note.read_text()))


def _column(folder: Path, name: str) -> Floats:
    """A column over all files, in order."""
    tables = [pq.read_table(path, columns=[name]) for path in sorted(folder.glob("*.parquet"))]
    return as_numbers(pa.concat_tables(tables).column(name))


def mixed(scores: Path, rescored: Path, share: str) -> tuple[npt.NDArray[np.bool_], Floats, Floats]:
    """Which pairs a job with this budget would ask about (chosen by the same code), and each pair's probability before
    and after it was asked, the latter by the combination that was fitted on all of them."""
    location = open_location(str(scores))
    center = json.loads((scores / "_manifest.json").read_text())["threshold"]
    plan = plan_units(location, find_shards(location), 1 << 62, "")
    column = ScoreColumn(location, "probability", False)
    nearest = select_nearest(column, plan.units, center, lambda rows: budget_rows(share, rows), 1)[0]
    values = [np.concatenate([*column.values(unit)]) for unit in plan.units]
    chosen = np.concatenate([nearest.chosen(each, unit.output) for each, unit in zip(values, plan.units, strict=True)])
    combination = read_combination(str(rescored / COMBINATION_FILE))
    after = combination.probability(_column(rescored, "llm_probability"), _column(rescored, "score"))
    return chosen, np.concatenate(values), after.astype(np.float64)


def gains(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """``DATASET_ENCODER_f1_gain_at_5`` and the same of average precision: parts of the gain at 100 %."""
    found = {}
    tables: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        tables.setdefault(f"{row['dataset']}_{row['encoder']}", {})[row["share"]] = row
    for name, shares in tables.items():
        for figure in ("f1", "ap"):
            none, some, everything = (shares[share][figure] for share in ("0%", "5%", "100%"))
            if everything > none:
                found[f"{name}_{figure}_gain_at_5"] = round((some - none) / (everything - none), 3)
    return found


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """F1 over the share of pairs that were asked, a line for each data set and encoder, as SVG."""
    figure = svg_figure(6.4, 3.6)
    axes = figure.subplots()
    lines: dict[str, list[float]] = {}
    for row in rows:
        lines.setdefault(f"{row['dataset']}, {row['encoder']}", []).append(row["f1"])
    for name, values in lines.items():
        axes.plot(range(len(SHARES)), values, marker="o", label=name)
    axes.set_xticks(range(len(SHARES)), SHARES)
    axes.set_xlabel("pairs that the LLM was asked (the most uncertain first)")
    axes.set_ylabel("F1 on the test pairs")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save_svg(figure, path)


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two steps on few pairs, in a folder that is deleted")
    parser.add_argument("--datasets", type=names_of(DATASETS), help="default: icd9,sec_names; sec_names with --quick")
    parser.add_argument("--encoders", type=names_of(ENCODERS), default=["minilm"])
    parser.add_argument("--steps", type=int, default=Settings.steps, help="of the LLM's training")
    parser.add_argument("--batch-pairs", type=int, default=Settings.batch_pairs, help="in each step")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=Settings.device)
    parser.add_argument("--pairs", type=int, help="of each split, at most; default: all")
    parser.add_argument("--test-pairs", type=int, default=Settings.test_pairs, help="at most; validation: a third")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, default=Path("build") / "cascade", help="models, scores and checkpoints")
    parser.add_argument("--results", type=Path, default=_RESULTS, help="file of the rows")
    parser.add_argument("--picture", type=Path, help="an SVG of F1 over the share")
    arguments = parser.parse_args()
    datasets = arguments.datasets or (["sec_names"] if arguments.quick else ["icd9", "sec_names"])
    settings = Settings(
        steps=arguments.steps,
        batch_pairs=arguments.batch_pairs,
        device=arguments.device,
        validation_pairs=arguments.test_pairs // 3,
        test_pairs=arguments.test_pairs,
        pairs=arguments.pairs,
    )
    settings = replace(QUICK, device=arguments.device) if arguments.quick else settings
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch) if arguments.quick else arguments.work.resolve()
        rows = []
        for dataset in datasets:
            trial = Trial(dataset, settings, work, arguments.threads)
            for encoder in arguments.encoders:
                rows += trial.rows(encoder)
    shared, ratios, correct = sharing(settings.groups, settings.rounds, arguments.threads, arguments.device)
    if not arguments.quick:
        found = {"rows": rows, "sharing": shared, "settings": asdict(settings)}
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        values = {**found, "machine": machine(), "versions": versions()}
        arguments.results.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    if arguments.picture is not None:
        draw(rows, arguments.picture)
    correct &= all(0.0 <= row[name] <= 1.0 for row in rows for name in ("f1", "auc", "ap"))
    report("cascade", [*rows, *shared], {**gains(rows), **ratios}, correct)


if __name__ == "__main__":
    main()
