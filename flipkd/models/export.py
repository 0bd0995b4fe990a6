"""A trained student to a stand-alone encoder, checked against the living student before anyone can see it.

The folder is in sentence-transformers format (``flipkd.models.encoder_files``) with one more file, ``flipkd.json``:
where it comes from, the records' template, the maximum length, and the lowest cosine that was measured between it and
the student. That file does not change the encoder's fingerprint.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from flipkd.data.commit import read_json
from flipkd.data.find import PARQUET_SUFFIXES, find_shards
from flipkd.data.folders import check_replaceable, publish_folder
from flipkd.data.location import Location, open_location
from flipkd.data.pairs import distinct_texts
from flipkd.data.shards import ShardReader
from flipkd.data.template import template_fields
from flipkd.errors import FlipkdError, InputError, ModelError, OutputError
from flipkd.models.adapter import load_student
from flipkd.models.encoder import load_encoder
from flipkd.models.encoder_files import (
    copy_licenses,
    write_modules,
    write_tokenizer,
    write_transformer,
)
from flipkd.models.folder import FLIPKD_FILE, find_folder, folder_fingerprint
from flipkd.models.student import Student
from flipkd.run.manifest import versions

logger = logging.getLogger(__name__)

MIN_COSINE = 0.9999
_SAMPLE_TEXTS = 200
_SAMPLE_ROWS = 4096
_LONG_TEXT_TOKENS = 600
# Always checked, besides the caller's texts: one token, digits, blanks, scripts, something like a special token.
_PROBES = (
    "a",
    "Fracture of vertebra C5-C7, 2nd  250.13",
    "ACME Holdings (UK) Ltd. | 12 High St.",
    "fièvre jaune 😀 糖尿病 الكوليرا",
    "x</s><|im_end|><eos> y",
)


def export(
    run_folder: str | Path,
    output: str | Path,
    *,
    base: str | None = None,
    template: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Exports the student of a finished training run.

    Args:
        run_folder: what ``train`` wrote.
        output: a local folder, made here.
        base: folder of the student's base, where it has moved since.
        template: how a record's text is made of its columns, as ``encode --template``; recorded in ``flipkd.json``,
            where ``encode`` and ``score`` find it when they are told none.
        overwrite: replace an older encoder at ``output``.
        trust_remote_code: whether Python code in the base's folder may run.

    Returns:
        What ``flipkd.json`` holds, and ``output``, ``size_bytes``.

    Raises:
        InputError: the folder holds no training run.
        ModelError: the student cannot be loaded, or the encoder does not give its vectors; nothing is published.
        OutputError: there is something at ``output``, or it cannot be written.
        ConfigError: the template does not parse.
    """
    if template is not None:
        template_fields(template)  # refuses one that does not parse
    run = open_location(run_folder)
    facts = read_json(run, "run.json", config=dict) if run.is_local else None
    adapter = Path(run.path) / "adapter"
    if facts is None:
        raise InputError(f"{run.uri} is not the local folder of a training run: there is no run.json in it")
    if not adapter.is_dir():
        raise InputError(f"{run.uri}: the training is not finished; run the same flipkd-batch train again, it goes on")
    target = _target(output, overwrite)
    student = load_student(adapter, base, trust_remote_code=trust_remote_code)
    about = {name: facts.get(name) for name in ("fingerprint", "config", "teacher", "pairs", "versions")}
    texts = _run_texts(facts)
    return export_student(student, target, texts, about, template=template, overwrite=overwrite)


def export_student(
    student: Student,
    output: str | Path,
    sample_texts: Sequence[str],
    about: Mapping[str, Any] | None = None,
    *,
    template: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Exports a student; see ``export``.

    LoRA is merged in float32 and the weights are stored as float32, whatever the base's are: transformers and vLLM
    compute by default in what is stored. With SmolLM2 at k = 10 (bfloat16 base, random LoRA) bfloat16 storage gave
    0.9999 as the lowest cosine in float32 arithmetic, and 0.995 in vLLM (a text of one token); float32 storage
    0.9999999, and 0.99999 in vLLM, which takes float16 for it by default. Where a base's activations overflow float16,
    tell vLLM ``dtype="bfloat16"``.

    Args:
        student: in any dtype; compared in float32.
        output: a local folder, made here.
        sample_texts: normalised texts to check with, in addition to a few of our own.
        about: what is known of the training, for ``flipkd.json``.
        template: of the records' texts.
        overwrite: replace an older encoder at ``output``.
    """
    if template is not None:
        template_fields(template)  # refuses one that does not parse
    target = _target(output, overwrite)
    base = find_folder(student.options.folder)
    texts = _check_texts(student, sample_texts)
    found: dict[str, Any] = {}

    def write(folder: Path) -> None:
        write_tokenizer(student, folder)
        write_modules(student, folder)
        copy_licenses(base, folder)
        with _in_float32(student):
            wanted = student.encode(texts)
            write_transformer(student, folder)
        encoder = load_encoder(folder)
        if encoder.max_length != student.options.max_length:
            raise ModelError(f"the encoder's maximum length is {encoder.max_length}, not {student.options.max_length}")
        exact = _lowest_cosine(encoder.encode(texts), wanted)
        if exact < MIN_COSINE:
            raise ModelError(
                f"nothing was exported: the encoder's vectors are not the student's (lowest cosine {exact:.6f} over "
                f"{len(texts)} texts; at least {MIN_COSINE} is asked for). A part of the base works otherwise than in "
                "the families that are known; please report it"
            )
        bf16 = _lowest_cosine(load_encoder(folder, dtype="bf16").encode(texts), wanted)
        facts = _facts(student, {"float32": exact, "bf16": bf16}, len(texts), about, template)
        text = json.dumps({**facts, "fingerprint": folder_fingerprint(folder)}, indent=2)
        (folder / FLIPKD_FILE).write_text(text + "\n")
        found.update(json.loads(text))

    publish_folder(target, write)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    return {**found, "output": str(target), "size_bytes": size}


def _facts(
    student: Student,
    tolerance: dict[str, float],
    texts: int,
    about: Mapping[str, Any] | None,
    template: str | None,
) -> dict[str, Any]:
    options = student.options
    return {
        "format": 1,
        "provenance": {
            "run": dict(about) if about is not None else None,
            "student": asdict(options),
            "base_fingerprint": student.base_fingerprint,
        },
        "layer": student.layer,
        "dimension": options.dimension,
        "pooling": options.pooling,
        "template": template,
        "max_length": options.max_length,
        "calibration": None,
        # The lowest cosine to the student in float32, over so many texts; what the encoder computes in is the key.
        "tolerance": tolerance,
        "checked_texts": texts,
        "versions": versions(),
    }


def _target(output: str | Path, overwrite: bool) -> Path:
    """The folder to be made.

    Raises:
        OutputError: it is not local, is there already, or is something that is not an encoder.
    """
    location = open_location(output)
    if not location.is_local:
        raise OutputError(f"{location.uri}: an encoder is written to a local disk; copy the folder from there")
    target = Path(os.path.realpath(location.path))
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return target
    if not (target / "modules.json").is_file():
        raise OutputError(f"{target} is there already and is not an encoder; choose another --output")
    if not overwrite:
        raise OutputError(f"{target} holds an encoder already; choose another --output, or pass --overwrite")
    check_replaceable(target, "an encoder")
    return target


def _check_texts(student: Student, sample_texts: Sequence[str]) -> list[str]:
    """The given texts, ours, and one that is longer than the maximum length; without those that have no token."""
    texts = list(dict.fromkeys([*_PROBES, *sample_texts]))
    tokenized = student.tokenize(texts).ids
    has_tokens = [text for text, ids in zip(texts, tokenized, strict=True) if ids]
    parts, tokens = [], 0
    for text, ids in zip(texts, tokenized, strict=True):
        parts.append(text)
        tokens += len(ids)
        if tokens > min(student.options.max_length, _LONG_TEXT_TOKENS):
            break
    return [*has_tokens, " ".join(parts)]


def _lowest_cosine(vectors: np.ndarray, wanted: np.ndarray) -> float:
    """Lowest cosine of two sets of unit rows, rounded to 8 digits; a number that is not finite counts as -1."""
    products = (vectors.astype(np.float64) * wanted.astype(np.float64)).sum(axis=1)
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1) * np.linalg.norm(wanted.astype(np.float64), axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return round(float(np.nan_to_num(products / lengths, nan=-1.0).min()), 8)


@contextmanager
def _in_float32(student: Student) -> Iterator[None]:
    """The student computes in float32 meanwhile. Its bfloat16 weights come back unchanged: float32 holds them all."""
    options, dtypes = student.options, [parameter.dtype for parameter in student.parameters()]
    try:
        student.options = replace(options, dtype="float32")
        for parameter in student.parameters():
            parameter.data = parameter.data.float()
        yield
    finally:
        student.options = options
        for parameter, dtype in zip(student.parameters(), dtypes, strict=True):
            parameter.data = parameter.data.to(dtype)


def _run_texts(facts: Mapping[str, Any]) -> list[str]:
    """Some of the run's validation texts, or of its training texts where it held none of its own.

    Data that has gone since is no reason to refuse an export: our own texts remain.
    """
    config, teacher = facts["config"], facts.get("teacher")
    try:
        recorded = teacher["text_columns"] if teacher else ("left_text", "right_text")
        columns = [
            str(config[name] or other) for name, other in zip(("left_text", "right_text"), recorded, strict=True)
        ]
        return _some_texts(open_location(config["validation"] or config["pairs"]), columns)
    except (FlipkdError, KeyError, TypeError, ValueError) as error:
        logger.warning("the run's texts cannot be read, so the export is checked with a few of our own: %s", error)
        return []


def _some_texts(location: Location, columns: Sequence[str]) -> list[str]:
    """At most 200 texts from the first rows of the first and the last file, chosen by a fixed seed."""
    shards = find_shards(location)
    if not all(shard.path.lower().endswith(PARQUET_SUFFIXES) for shard in shards):  # a file named it, not the user
        raise InputError(f"{location.uri} does not end in .parquet")
    texts: dict[str, None] = {}
    for shard in dict.fromkeys([shards[0], shards[-1]]):
        with ShardReader(location, shard) as reader:
            counts = reader.row_group_rows
            whole = (0, len(counts))
            rows = min(sum(counts), _SAMPLE_ROWS)
            table = pa.concat_tables(reader.batches(columns, rows or 1, row_groups=whole, skip_rows=0, rows=rows))
        for name in columns:
            found, _ = distinct_texts(table.column(name), name)
            texts.update(dict.fromkeys(text for text in found.values.to_pylist() if text))
    chosen = np.random.default_rng(0).permutation(len(texts))[:_SAMPLE_TEXTS]
    known = list(texts)
    return [known[place] for place in sorted(chosen)]
