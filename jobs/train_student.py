"""Train a student on a Ray cluster: a decoder's LoRA learns from a teacher's scores.

Input: Parquet as ``precompute_teacher.py`` writes it: ``left_text``, ``right_text``, ``teacher_score`` (float32, its
scale in the footer; a logit is read as its sigmoid), optional ``label`` (1 or 0), and the teacher's vectors beside it.
Output: a run folder with ``adapter/`` (LoRA in PEFT's format; its matrix A of layer k turns a text into a vector),
``metrics.jsonl``, ``learning_curve.png`` and checkpoints. All nodes must see both folders under the same paths.

    ray job submit --working-dir jobs -- python train_student.py --student DIR --pairs PATH --output RUN --workers 8

Takes every option of ``flipkd-batch train``; ``--ray auto`` (the cluster that runs the job) unless another is given.
"""

from __future__ import annotations

import sys

from flipkd.cli import main

if __name__ == "__main__":
    given = sys.argv[1:]
    address = [] if any(option.split("=")[0] == "--ray" for option in given) else ["--ray", "auto"]
    main(["train", *address, *given])
