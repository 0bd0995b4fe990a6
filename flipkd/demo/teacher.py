"""Fine-tunes the demo's teacher with sentence-transformers' own trainer: all-MiniLM-L6-v2 on labelled pairs.

Loss: CoSENT over the labels plus in-batch negatives over the positives, from one forward pass. Batches hold pairs of
near-equal length, so that little is padded. Nothing is reported anywhere, and no network is used.
"""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flipkd.data.commit import make_private_folder
from flipkd.data.folders import is_whole, publish_folder, remove_unpublished
from flipkd.errors import ConfigError, OutputError
from flipkd.models.folder import folder_fingerprint
from flipkd.run.progress import progress_bar
from flipkd.run.units import fingerprint

INSTALL = "pip install -c constraints.txt -e '.[demo]'"
_PACKAGES = ("sentence_transformers", "datasets", "accelerate", "gguf")
_FACTS = "fine_tuning.json"
_COLUMNS = ("left_text", "right_text", "label")
# Pairs of so many batches are sorted by length together: enough to pad little (16 % of tokens in place of 119 %), few
# enough to mix.
_BATCHES_SORTED_TOGETHER = 32


@dataclass(frozen=True)
class FineTuning:
    """How the teacher is trained. Defaults are our choices.

    Args:
        steps: optimizer steps.
        batch_size: pairs in a step.
        learning_rate: highest, after a tenth of the steps; then it falls linearly to 0.
        max_tokens: longer texts are cut, in training alone.
        seed: of the order of pairs.
        dtype: of multiplications, by autocast; "auto" is bf16 on a GPU and on a CPU with AMX (a step took 0.45 of the
            time of one in float32), float32 elsewhere (without AMX the backward pass in bf16 took four times as long).
    """

    steps: int = 400
    batch_size: int = 64
    learning_rate: float = 2e-4
    max_tokens: int = 64
    seed: int = 0
    dtype: Literal["auto", "float32", "bf16"] = "auto"

    def in_bf16(self, device: str) -> bool:
        """Whether multiplications on ``cpu`` or ``cuda`` are bf16."""
        return self.dtype == "bf16" or (self.dtype == "auto" and _multiplies_bf16(device))

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "float32", "bf16"):
            raise ConfigError(f"dtype must be auto, float32 or bf16, not {self.dtype!r}")
        for name in ("steps", "max_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.batch_size < 2:
            raise ConfigError("batch_size must be at least 2: both losses compare pairs")


def missing_packages() -> list[str]:
    """Packages of the extra ``demo`` that are not installed."""
    return [name for name in _PACKAGES if importlib.util.find_spec(name) is None]


def fine_tune_teacher(
    base: Path, train: Path, output: Path, options: FineTuning | None = None, progress: bool = False
) -> dict[str, Any]:
    """Trains a copy of a sentence-transformers folder on pairs and publishes it in one step (a rename).

    A folder that the same call has already written is left as it is.

    Args:
        base: sentence-transformers folder.
        train: Parquet file or folder with ``left_text``, ``right_text`` and ``label`` (0 or 1).
        output: folder of the fine-tuned model.
        options: how; None for the defaults.
        progress: progress with ETA on stderr.

    Returns:
        What ``fine_tuning.json`` in the folder holds: options, base, pairs, a fingerprint of each of the two, seconds.

    Raises:
        ConfigError: a package of the extra ``demo`` is not installed.
        OutputError: the folder holds a model of other options, pairs or another base, or cannot be written.
    """
    options = options or FineTuning()
    table = pq.read_table(train, columns=list(_COLUMNS))
    wanted = {
        "options": asdict(options),
        "base": base.name,
        "base_fingerprint": folder_fingerprint(base),
        "pairs": table.num_rows,
        "pairs_fingerprint": fingerprint({name: table.column(name).to_pylist() for name in _COLUMNS}),
    }
    if output.exists():
        return _facts_of(output, wanted)
    missing = missing_packages()
    if missing:
        raise ConfigError(f"fine-tuning the teacher needs {', '.join(missing)}: {INSTALL}")
    make_private_folder(str(output.parent))
    remove_unpublished(output.parent)

    def write(folder: Path) -> None:
        started = time.perf_counter()
        _train(base, table, folder, options, progress)
        facts = {**wanted, "seconds": round(time.perf_counter() - started, 1)}
        (folder / _FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")
        for path in folder.rglob("*"):
            if path.is_dir():
                path.chmod(0o700)

    publish_folder(output, write)
    return _facts_of(output, wanted)


def _facts_of(output: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if is_whole(output):
        facts = json.loads((output / _FACTS).read_text(encoding="utf-8"))
    if {name: facts.get(name) for name in wanted} != wanted:
        raise OutputError(f"{output} holds something else than this fine-tuned teacher; delete it or choose another")
    return facts


def _train(base: Path, table: pa.Table, saved: Path, options: FineTuning, progress: bool) -> None:
    """Runs the trainer and saves the model in ``saved``."""
    import torch
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from sentence_transformers.sentence_transformer.losses import CoSENTLoss, MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.training_args import SentenceTransformerTrainingArguments
    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback

    class LabelsAndInBatch(torch.nn.Module):
        """CoSENT over all pairs plus in-batch negatives over the positives, of one forward pass a column."""

        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model
            self.cosent = CoSENTLoss(model)
            self.in_batch = MultipleNegativesRankingLoss(model)

        def forward(self, features: Any, labels: torch.Tensor) -> torch.Tensor:
            left, right = (self.model(each)["sentence_embedding"] for each in features)
            loss: torch.Tensor = self.cosent.compute_loss_from_embeddings([left, right], labels)
            positive = labels.bool()
            if int(positive.sum()) > 1:
                both = [left[positive], right[positive]]
                loss = loss + self.in_batch.compute_loss_from_embeddings(both, labels[positive])
            return loss

    class Shown(TrainerCallback):  # type: ignore[misc]
        """The same progress as that of every job of ours."""

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            bar.update(1)

    with _quiet_and_offline(), tempfile.TemporaryDirectory() as scratch:
        torch.manual_seed(options.seed)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = SentenceTransformer(str(base), device=device)
        longest = model.max_seq_length
        model.max_seq_length = min(options.max_tokens, longest or options.max_tokens)
        # Else the trainer picks records as examples for a model card; none is written, and records are private.
        model.model_card_data.widget = [{"text": ""}]
        order = _order(model.tokenizer, table, options)

        def batches(dataset: Any, batch_size: int, drop_last: bool, **rest: Any) -> Any:
            del dataset
            return DefaultBatchSampler(order, batch_size=batch_size, drop_last=drop_last, **rest)

        arguments = SentenceTransformerTrainingArguments(
            output_dir=scratch,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            warmup_steps=max(1, options.steps // 10),
            lr_scheduler_type="linear",
            batch_sampler=batches,
            seed=options.seed,
            use_cpu=device == "cpu",
            bf16=options.in_bf16(device),
            dataloader_pin_memory=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            push_to_hub=False,
            disable_tqdm=True,
        )
        columns = {name: table[name].to_pylist() for name in ("left_text", "right_text")}
        dataset = Dataset.from_dict({**columns, "label": table["label"].cast(pa.float32()).to_pylist()})
        trainer = SentenceTransformerTrainer(
            model=model, args=arguments, train_dataset=dataset, loss=LabelsAndInBatch(model), callbacks=[Shown()]
        )
        trainer.remove_callback(PrinterCallback)
        with progress_bar("teacher", options.steps, "steps", progress) as bar:
            trainer.train()
        model.max_seq_length = longest
        model.save_pretrained(str(saved), create_model_card=False)


def _multiplies_bf16(device: str) -> bool:
    """Whether training in bf16 is faster."""
    import torch

    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch 2.10 has it
    return bool(capabilities.get("amx_bf16", False))


def _order(tokenizer: Any, table: pa.Table, options: FineTuning) -> list[int]:
    """Rows in the order of their use: each run of ``batch_size`` is a batch of near-equal lengths.

    Every row comes once before any comes twice.
    """
    lengths = []
    for name in ("left_text", "right_text"):
        ids = tokenizer(table[name].to_pylist(), truncation=True, max_length=options.max_tokens)["input_ids"]
        lengths.append(np.array([len(each) for each in ids]))
    left, right = lengths
    random = np.random.default_rng(options.seed)
    wanted = options.steps * options.batch_size
    rounds = -(-wanted // len(left))
    shuffled = np.concatenate([random.permutation(len(left)) for _ in range(rounds)])[:wanted]
    batches: list[Any] = []
    together = _BATCHES_SORTED_TOGETHER * options.batch_size
    for start in range(0, wanted, together):
        part = shuffled[start : start + together]
        # Each column is padded to its own longest text: left lengths first, right lengths among near-equal left ones.
        part = part[np.lexsort((right[part], left[part] // 4))]
        cut = part.reshape(-1, options.batch_size)
        batches += list(cut[random.permutation(len(cut))])
    return [int(row) for row in np.concatenate(batches)]


@contextmanager
def _quiet_and_offline() -> Iterator[None]:
    """No look at the hub, and no progress but ours, while the model is loaded, trained and saved."""
    import datasets
    import transformers

    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    before = {name: os.environ.get(name) for name in names}
    shown = transformers.utils.logging.is_progress_bar_enabled()
    os.environ.update(dict.fromkeys(names, "1"))
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="torch.utils.data")
            yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()
        datasets.enable_progress_bars()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
