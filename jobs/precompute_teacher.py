"""Score pairs with a teacher on a Ray cluster: what ``train_student.py`` learns from.

Input: Parquet pairs (``left_text``, ``right_text`` inline, or ``left_id``, ``right_id`` into record tables; optional
``label``, 1 or 0; any other columns pass through) and, for ids, Parquet records (``id``, and ``text`` or a template's
columns). The teacher is a sentence-transformers bi-encoder folder, or a cross-encoder with one or two logits.
Output: one Parquet file per work unit, rows in input order: the input columns (for ids also the two texts),
``teacher_score`` (float32; of a bi-encoder the cosine of its two vectors, -1 to 1, the same in both orders; of a
cross-encoder, for the pair in this order, a probability from 0 to 1 or a logit, as the footer ``flipkd.teacher`` says;
null with a ``reason``), ``truncated``; ``_teacher_vectors``, a bi-encoder's vectors of the distinct texts; and
``_manifest.json``.

    ray job submit --working-dir jobs -- python precompute_teacher.py --teacher DIR --pairs PATH --output PATH

Takes every option of ``flipkd-batch teach``; ``--ray auto`` (the cluster that runs the job) unless another is given.
"""

from __future__ import annotations

import sys

from flipkd.cli import main

if __name__ == "__main__":
    given = sys.argv[1:]
    address = [] if any(option.split("=")[0] == "--ray" for option in given) else ["--ray", "auto"]
    main(["teach", *address, *given])
