"""Score candidate pairs on a Ray cluster.

Input: Parquet pairs (``left_id``, ``right_id`` into record tables, or ``left_text``, ``right_text`` inline; optional
``label``; any other columns pass through) and, for ids, Parquet records (``id``, and ``text`` or a template's columns).
Output: one Parquet file per work unit, rows in input order: the input columns, ``score`` (float32, cosine of the two
vectors, -1 to 1; null with a ``reason``), ``truncated``; and ``_manifest.json``.

    ray job submit --working-dir jobs -- python score_pairs.py --encoder DIR --records PATH --pairs PATH --output PATH

Takes every option of ``flipkd-batch score``; ``--ray auto`` (the cluster that runs the job) unless another is given.
"""

from __future__ import annotations

import sys

from flipkd.cli import main

if __name__ == "__main__":
    given = sys.argv[1:]
    address = [] if any(option.split("=")[0] == "--ray" for option in given) else ["--ray", "auto"]
    main(["score", *address, *given])
