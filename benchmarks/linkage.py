"""Person records: the same candidate pairs scored by flipkd, by Splink and by a string similarity, Parquet to Parquet.

    python -m benchmarks.linkage [--quick] [--pairs 5000000] [--encoder FOLDER]

Records are FEBRL's (``flipkd.demo.persons``): 11,000 originals, 9,000 duplicates; given name, surname, date of birth.
Pairs are the labelled ones of the test split and random ones of all records. Every tool is a whole process that reads
records (id, columns) and pairs (left_id, right_id) and writes left id, right id and score of each pair:

- *splink*: a model that was trained before, on the labels of the training split; the pairs are registered as blocked.
- *rapidfuzz*: ``token_set_ratio`` of the texts, by ``cpdist`` on all cores.
- *flipkd, cold*: ``flipkd-batch score --encoder --records``; *flipkd, warm*: the same again into another folder,
  vectors kept by ``--cache``.

Every pair must have a score. On the labelled pairs those of the peers must have an area under the ROC curve of 0.9, and
flipkd's are compared with float32 sentence-transformers. ``--encoder`` is a folder for sentence-transformers,
all-MiniLM-L6-v2 if absent: untuned it tells these records apart far worse than Splink (``benchmarks.quality --datasets
persons`` fine-tunes it).

Ratios: seconds of Splink over those of flipkd, cold and warm.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from sklearn.metrics import roc_auc_score

from benchmarks.common import report
from benchmarks.ladder import timed
from benchmarks.splink_model import connect, train_splink
from flipkd.assets import minilm_folder
from flipkd.demo.pair_sets import PairSet
from flipkd.demo.persons import COLUMNS, TEMPLATE, person_pairs, person_records

LEAST_AUC = 0.9  # of the peers on the labelled pairs
TOLERANCE = 0.03  # of flipkd's bf16 cosines


def write_input(folder: Path, pairs: int) -> PairSet:
    """Records, pairs and Splink's trained model; returns the labelled pairs, which stand first."""
    records = person_records()
    values = zip(*(each.values for each in records), strict=True)
    columns = {name: [value or None for value in column] for name, column in zip(COLUMNS, values, strict=True)}
    table = pa.table({"id": [each.record for each in records], **columns})
    original = pa.array([each.is_original for each in records])
    sides = {"left": table.filter(original), "right": table.filter(pc.invert(original))}
    for name, side in sides.items():
        (folder / name).mkdir()
        pq.write_table(side, folder / name / "part-0.parquet")

    splits = person_pairs()
    known, train = splits.test.first(pairs), splits.train
    random = np.random.default_rng(0)
    ids = {}
    for name, first in (("left", known.left_id), ("right", known.right_id)):
        rows = random.integers(0, len(sides[name]), pairs - len(first))
        ids[f"{name}_id"] = pa.concat_arrays([pa.array(first), sides[name]["id"].combine_chunks().take(pa.array(rows))])
    (folder / "pairs").mkdir()
    pq.write_table(pa.table(ids), folder / "pairs" / "part-0.parquet")

    matches = train.take(np.flatnonzero(train.label))
    matches_table = pa.table({"unique_id_l": matches.left_id, "unique_id_r": matches.right_id})
    trained = train_splink(connect(), table.rename_columns(["unique_id", *COLUMNS]), matches_table, COLUMNS)
    (folder / "splink.json").write_text(json.dumps(trained), encoding="utf-8")
    return known


def flipkd_command(folder: Path, output: str, encoder: Path) -> list[str]:
    """``flipkd-batch score`` over the input of this run."""
    return [
        sys.executable, "-m", "flipkd.cli", "score", "--encoder", str(encoder), "--encoder-dtype", "bf16",
        "--records", str(folder / "left"), "--right-records", str(folder / "right"), "--template", TEMPLATE,
        "--pairs", str(folder / "pairs"), "--output", str(folder / output), "--cache", str(folder / "cache"),
        "--columns", "left_id,right_id,score", "--no-progress",
    ]  # fmt: skip


def scores_of(output: Path, known: PairSet, pairs: int) -> npt.NDArray[np.float64] | None:
    """Scores of the labelled pairs, in their order; None where not every pair has one."""
    connection = connect()
    connection.register(
        "known", pa.table({"row": range(len(known)), "left_id": known.left_id, "right_id": known.right_id})
    )
    connection.execute(f"create view scored as from read_parquet('{output}/*.parquet')")
    (scored,) = connection.execute("select count(score) from scored").fetchone()
    found = connection.execute(
        "select min(score) as score from known left join scored using (left_id, right_id) group by row order by row"
    ).fetchnumpy()["score"]
    return None if scored != pairs or np.ma.is_masked(found) else np.asarray(found, np.float64)


def expected_cosines(encoder: Path, known: PairSet) -> npt.NDArray[np.float64]:
    """By sentence-transformers in float32."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(encoder), device="cpu")
    sides = [model.encode(list(side), normalize_embeddings=True) for side in (known.left_text, known.right_text)]
    return np.asarray(np.einsum("pd,pd->p", *sides), np.float64)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="20,000 pairs")
    parser.add_argument("--pairs", type=int, default=5_000_000)
    parser.add_argument("--encoder", type=Path, help="folder for sentence-transformers")
    arguments = parser.parse_args()
    pairs = 20_000 if arguments.quick else arguments.pairs
    encoder = arguments.encoder or minilm_folder()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        known = write_input(folder, pairs)
        commands = {
            tool: [sys.executable, "-m", "benchmarks.linkage_peers", tool, str(folder), str(folder / tool)]
            for tool in ("splink", "rapidfuzz")
        }
        commands["flipkd, cold"] = flipkd_command(folder, "flipkd, cold", encoder)
        commands["flipkd, warm"] = flipkd_command(folder, "flipkd, warm", encoder)
        rows, seconds, correct = [], {}, True
        expected = expected_cosines(encoder, known)
        for tool, command in commands.items():
            seconds[tool] = timed(command)
            scores = scores_of(folder / tool, known, pairs)
            if scores is None:
                raise SystemExit(f"{tool}: not every pair has a score")
            auc = float(roc_auc_score(known.label, scores))
            ours = tool.startswith("flipkd")
            correct &= bool(np.abs(scores - expected).max() <= TOLERANCE) if ours else auc >= LEAST_AUC
            rows.append(
                {
                    "tool": tool,
                    "seconds": round(seconds[tool], 2),
                    "pairs/s": round(pairs / seconds[tool]),
                    "auc": round(auc, 4),
                }
            )
    ratios = {
        f"{kind}_vs_splink": round(seconds["splink"] / seconds[f"flipkd, {kind}"], 2) for kind in ("cold", "warm")
    }
    report("linkage", rows, ratios, correct)


if __name__ == "__main__":
    main()
