"""What each command can be told, as frozen dataclasses; ``flipkd-batch`` has one flag per field."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from flipkd.checks import check_cache, check_cosine, check_positive, check_probability, check_types
from flipkd.errors import ConfigError
from flipkd.models.device import DEVICES
from flipkd.record_sides import RecordSides, check_one_way, text_template

VectorDtype = Literal["float32", "bf16", "int8"]
VECTOR_DTYPES: tuple[VectorDtype, ...] = ("float32", "bf16", "int8")

# Columns that scoring itself can write.
SCORE_COLUMNS = ("score", "probability", "match", "reason", "truncated")

DEFAULT_LABEL_COLUMN = "label"


@dataclass(frozen=True)
class RunOptions:
    """How a job runs, whatever it computes; nothing here changes the result.

    Args:
        ray: None runs in this process; ``local`` starts Ray on this machine, ``auto`` or an address joins a cluster.
            What a command has started or joined it leaves at its end; a connection that was there before is used, and
            stays.
        workers: work units in flight: threads in process (None: the number of cores); on Ray the largest number of
            workers (None: as many as the cluster holds).
        min_workers: Ray workers that must start before the job gives up waiting for them.
        threads: threads of one worker (None: in process all cores, on Ray 1). CPUs that a Ray worker reserves.
        gpus: GPUs that a Ray worker reserves (None: 1 if the cluster has any and the stage runs a model, unless on the
            CPU, else 0).
        on_bad_shard: ``fail`` at the first unreadable input file, or ``skip`` it, count it, and end as partial.
        max_retries: how often a unit is tried again whose read failed for a reason that may pass, and, counted apart,
            whose Ray worker died.
        max_failed_units: error budget: with ``on_bad_shard="skip"`` the job stops when more units than this failed.
        stall_timeout_s: seconds without a finished unit after which a Ray job ends with an error.
        start_timeout_s: seconds to wait for the first ``min_workers`` Ray workers.
        overwrite: whether the output of another run is deleted first.
        progress: whether progress is shown on stderr.
        metrics_file: text file of metrics for Prometheus, of ``encode``, ``score``, ``teach`` and ``rescore``.
    """

    ray: str | None = None
    workers: int | None = None
    min_workers: int = 1
    threads: int | None = None
    gpus: float | None = None
    on_bad_shard: Literal["fail", "skip"] = "fail"
    max_retries: int = 3
    max_failed_units: int = 1000
    stall_timeout_s: float = 1800.0
    start_timeout_s: float = 600.0
    overwrite: bool = False
    progress: bool = False
    metrics_file: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("workers", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name} must be at least 1, not {value}")
        if self.on_bad_shard not in ("fail", "skip"):
            raise ConfigError(f"--on-bad-shard must be fail or skip, not {self.on_bad_shard!r}")
        for name in ("max_retries", "max_failed_units", "min_workers"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name.replace('_', '-')} must not be negative")
        if self.workers is not None and self.min_workers > self.workers:
            raise ConfigError(f"--min-workers {self.min_workers} is more than --workers {self.workers}")
        if self.gpus is not None and not 0 <= self.gpus < float("inf"):
            raise ConfigError(f"--gpus must be a number of at least 0, not {self.gpus}")
        for name in ("stall_timeout_s", "start_timeout_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"--{name.replace('_', '-')} must be greater than 0 seconds")


@dataclass(frozen=True)
class EncoderOptions:
    """Which encoder turns texts into vectors, and how.

    Args:
        folder: a sentence-transformers bi-encoder folder.
        dtype: number format of the model's multiplications: ``float32``, ``bf16``, or (plain BERT, Llama and Qwen2
            encoders) ``int8``.
        device: ``cpu``, ``cuda`` or ``auto``.
        max_length: longest text in tokens, special tokens included (None: what the folder says).
        max_tokens: tokens in one forward pass (None: what suits the device).
        trust_remote_code: whether Python code in the folder may run.
    """

    folder: str
    dtype: Literal["float32", "bf16", "int8"] = "float32"
    device: str = "auto"
    max_length: int | None = None
    max_tokens: int | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        if self.dtype not in VECTOR_DTYPES:
            raise ConfigError(f"--encoder-dtype must be one of {', '.join(VECTOR_DTYPES)}, not {self.dtype!r}")
        if self.device not in DEVICES:
            raise ConfigError(f"--device must be one of {', '.join(DEVICES)}, not {self.device!r}")
        for name in ("max_length", "max_tokens"):
            value = getattr(self, name)
            if value is not None:
                check_positive(name.replace("_", "-"), value)


@dataclass(frozen=True)
class EncodeConfig:
    """Record tables to a vector store.

    Args:
        encoder: the encoder.
        records: Parquet file or folder.
        output: folder of the store; local, since it is mapped into memory.
        id_column: the record's id: any integer, string or binary type.
        text_column: the record's text; not with ``template``.
        template: several columns as one text, as in ``{name} | {address}``. Without either, the template that an
            exported encoder records in its ``flipkd.json``; where there is none, the column ``text``.
        dtype: number format of the stored vectors.
        cache: folder of the text cache (below it, ``texts``): texts that are in it are not encoded again.
        cache_limit_bytes: size of the text cache at most; what was not used for longest is dropped.
        rows_per_unit: records in one work unit.
    """

    encoder: EncoderOptions
    records: str
    output: str
    id_column: str = "id"
    text_column: str | None = None
    template: str | None = None
    dtype: VectorDtype = "int8"
    cache: str | None = None
    cache_limit_bytes: int | None = None
    rows_per_unit: int = 50_000
    run: RunOptions = field(default_factory=RunOptions)

    def __post_init__(self) -> None:
        check_types(self)
        _check_dtype(self.dtype)
        check_one_way(self.template, self.text_column)
        check_positive("rows-per-unit", self.rows_per_unit)
        check_cache(self.cache, self.cache_limit_bytes)

    @property
    def text_template(self) -> str:
        """The template; a plain text column is the template of that column alone."""
        return text_template(self.template, self.text_column)


@dataclass(frozen=True)
class ScoreConfig(RecordSides):
    """Candidate pairs to scores. Exactly one of: ``store``; ``encoder`` with ``records``; ``encoder`` alone (inline).

    Args:
        pairs: Parquet file or folder.
        output: folder for the scores.
        left_column: ids of the left records; ``right_column`` the right ones.
        left_text: inline texts, used when there is neither a store nor records; ``right_text`` likewise.
        store: vector store of the left (and right) records; ``right_store`` of the right ones where they differ.
        encoder: encodes ``records`` or the inline texts first.
        records: record table of the left (and right) records; ``right_records`` of the right ones where they differ.
        id_column, text_column, template, dtype: as in ``EncodeConfig``.
        right_id_column, right_text_column, right_template: of ``right_records``; None: as for ``records``.
        cache: folder that keeps the stores made from ``records`` (None: they are deleted at the end), and the text
            cache; ``cache_limit_bytes`` as in ``EncodeConfig``, for the text cache alone.
        threshold: adds the column ``match``: probability (with a calibration, else score) at least this.
        min_score: only pairs with at least this score are written.
        top_k: only the K best pairs of each left record are written.
        columns: what is written, in this order: names of input columns and of ``SCORE_COLUMNS``; None writes all
            input columns, then the score columns.
        calibration: JSON file from ``evaluate``: ``slope`` and ``intercept`` (probability = sigmoid(slope * score +
            intercept), in the kernel), or ``scores`` and ``probabilities`` (straight lines between these points).
        rows_per_unit: pairs in one work unit (whole row groups; at least one).
    """

    pairs: str
    output: str
    left_column: str = "left_id"
    right_column: str = "right_id"
    left_text: str = "left_text"
    right_text: str = "right_text"
    store: str | None = None
    right_store: str | None = None
    encoder: EncoderOptions | None = None
    records: str | None = None
    right_records: str | None = None
    id_column: str = "id"
    text_column: str | None = None
    template: str | None = None
    dtype: VectorDtype = "int8"
    cache: str | None = None
    cache_limit_bytes: int | None = None
    threshold: float | None = None
    min_score: float | None = None
    top_k: int | None = None
    columns: tuple[str, ...] | None = None
    calibration: str | None = None
    rows_per_unit: int = 4_000_000
    run: RunOptions = field(default_factory=RunOptions)
    right_id_column: str | None = None
    right_text_column: str | None = None
    right_template: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        _check_dtype(self.dtype)
        check_positive("rows-per-unit", self.rows_per_unit)
        check_cache(self.cache, self.cache_limit_bytes)
        if self.top_k is not None:
            check_positive("top-k", self.top_k)
        check_cosine("min-score", self.min_score)
        if self.calibration is None:
            check_cosine("threshold", self.threshold)
        else:
            check_probability("threshold", self.threshold, "with --calibration it is a probability")
        if self.store is not None and (self.encoder is not None or self.records is not None):
            raise ConfigError(
                "give either --store (vectors are ready) or --encoder (texts are encoded first), not both"
            )
        if self.store is None and self.encoder is None:
            raise ConfigError(
                "give --store STORE, or --encoder DIR with --records PATH, or --encoder DIR for inline texts"
            )
        if self.right_store is not None and self.store is None:
            raise ConfigError("--right-store needs --store")
        # With stores the options are for the texts that the LLM of a cascade reads.
        self.check_record_sides((self.right_records or self.right_store) is not None)
        if self.columns is not None:
            if not self.columns:
                raise ConfigError("--columns is empty; name at least one, for instance score")
            if len(set(self.columns)) != len(self.columns):
                raise ConfigError("--columns names a column twice")

    @property
    def is_inline(self) -> bool:
        """Whether the pairs hold the texts themselves."""
        return self.store is None and self.records is None

    @property
    def pair_columns(self) -> tuple[str, str]:
        """The two input columns that say what is compared."""
        return (self.left_text, self.right_text) if self.is_inline else (self.left_column, self.right_column)


@dataclass(frozen=True)
class TeachConfig(RecordSides):
    """Pairs to teacher scores. The pairs hold texts; or, with ``records``, ids of records.

    Args:
        teacher: a sentence-transformers bi-encoder folder, or a cross-encoder (a ``...ForSequenceClassification`` model
            or a CrossEncoder folder) with one or two logits.
        pairs: Parquet file or folder.
        output: folder for the pairs with their scores; local for a bi-encoder, whose vectors are kept there too.
        left_text: column of left texts; for id pairs the name of the column that is added. ``right_text`` likewise.
        left_column: ids of the left records; ``right_column`` the right ones.
        records: record table of the left (and right) records; ``right_records`` of the right ones where they differ.
        id_column, text_column, template: as in ``EncodeConfig``.
        right_id_column, right_text_column, right_template: of ``right_records``; None: as for ``records``.
        label_column: labels; checked before any work (1 or 0 as integer, float, boolean or string; null is allowed) and
            passed through. It may be absent under its default name.
        cache, cache_limit_bytes: as in ``EncodeConfig``; for a bi-encoder, whose vectors are float32 here.
        rows_per_unit: pairs in one work unit.
    """

    teacher: EncoderOptions
    pairs: str
    output: str
    left_text: str = "left_text"
    right_text: str = "right_text"
    left_column: str = "left_id"
    right_column: str = "right_id"
    records: str | None = None
    right_records: str | None = None
    id_column: str = "id"
    text_column: str = "text"
    template: str | None = None
    label_column: str = DEFAULT_LABEL_COLUMN
    cache: str | None = None
    cache_limit_bytes: int | None = None
    rows_per_unit: int = 20_000
    run: RunOptions = field(default_factory=RunOptions)
    right_id_column: str | None = None
    right_text_column: str | None = None
    right_template: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_positive("rows-per-unit", self.rows_per_unit)
        check_cache(self.cache, self.cache_limit_bytes)
        self.check_record_sides(self.right_records is not None)
        if self.left_text == self.right_text:
            raise ConfigError(f"--left-text and --right-text are both {self.left_text!r}; name two columns")

    @property
    def pair_columns(self) -> tuple[str, str]:
        """The two input columns that say what is compared."""
        ids = (self.left_column, self.right_column)
        return (self.left_text, self.right_text) if self.records is None else ids


def _check_dtype(dtype: str) -> None:
    if dtype not in VECTOR_DTYPES:
        raise ConfigError(f"--dtype must be one of {', '.join(VECTOR_DTYPES)}, not {dtype!r}")
