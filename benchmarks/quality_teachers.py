"""A stronger teacher for ``benchmarks.quality``: a cross-encoder, which reads both texts of a pair together."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flipkd.data.folders import publish_folder
from flipkd.demo.teacher import FineTuning

# What makes MiniLM's folder a sentence-transformers bi-encoder; without it, it is a plain transformer.
_OF_BI_ENCODER = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling")
_FACTS = "fine_tuning.json"


def fine_tune_cross_encoder(base: Path, train: Path, output: Path, options: FineTuning) -> dict[str, Any]:
    """Trains a copy of a BERT with a new head of one logit by binary cross entropy; one that is there stays.

    Args:
        base: sentence-transformers folder of a BERT.
        train: Parquet file or folder with ``left_text``, ``right_text`` and ``label``.
        output: folder of the cross-encoder.
        options: how.

    Returns:
        ``seconds`` of the training.
    """

    def write(folder: Path) -> None:
        started = time.perf_counter()
        table = pq.read_table(train, columns=["left_text", "right_text", "label"])
        _train(base, table, folder, options)
        (folder / _FACTS).write_text(json.dumps({"seconds": round(time.perf_counter() - started, 1)}))

    if not output.exists():
        publish_folder(output, write)
    found: dict[str, Any] = json.loads((output / _FACTS).read_text())
    return found


def _train(base: Path, table: pa.Table, saved: Path, options: FineTuning) -> None:
    import torch
    from datasets import Dataset
    from sentence_transformers.cross_encoder import CrossEncoder
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
    from sentence_transformers.cross_encoder.trainer import CrossEncoderTrainer
    from sentence_transformers.cross_encoder.training_args import CrossEncoderTrainingArguments

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch) / "plain"
        shutil.copytree(base, plain, ignore=shutil.ignore_patterns(*_OF_BI_ENCODER))
        model = CrossEncoder(str(plain), num_labels=1, max_length=2 * options.max_tokens, device=device)
        model.model_card_data.widget = [{"text": ""}]  # else records would be picked as examples for a card
        arguments = CrossEncoderTrainingArguments(
            output_dir=str(Path(scratch) / "runs"),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            warmup_steps=max(1, options.steps // 10),
            lr_scheduler_type="linear",
            seed=options.seed,
            use_cpu=device == "cpu",
            bf16=options.in_bf16(device),
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        order = _shuffled(len(table), options)
        columns = {name: table[name].take(order).to_pylist() for name in ("left_text", "right_text")}
        label = table["label"].take(order).cast(pa.float32()).to_pylist()
        trainer = CrossEncoderTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_dict({**columns, "label": label}),
            loss=BinaryCrossEntropyLoss(model),
        )
        trainer.train()
        model.save_pretrained(str(saved), create_model_card=False)


def _shuffled(pairs: int, options: FineTuning) -> Sequence[int]:
    return list(np.random.default_rng(options.seed).permutation(pairs).tolist())
