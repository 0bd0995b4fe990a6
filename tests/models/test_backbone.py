"""Which forward computes a model: ours or transformers', and that nobody is left to guess it."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from flipkd.errors import ModelError
from flipkd.models import bert as bert_module
from flipkd.models import decoder as decoder_module
from flipkd.models.encoder import load_encoder

from .conftest import MakeFolder, wrapped


@pytest.mark.parametrize(("kind", "module"), [("bert", bert_module), ("llama", decoder_module)])
def test_too_little_memory_is_no_reason_for_the_other_forward(
    make_folder: MakeFolder, small_vocabulary: Tokenizer, kind: str, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its vectors are rounded in another way under the same fingerprint."""
    folder = make_folder(kind, wrapped(small_vocabulary, pad_token="<pad>"), "mean")

    def refuse(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("there is no more")

    monkeypatch.setattr(module, "Norm", refuse)
    with pytest.raises(torch.OutOfMemoryError):
        load_encoder(folder)


def test_the_log_says_once_why_transformers_computes(
    make_folder: MakeFolder, small_vocabulary: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "flipkd")
    folder = make_folder("bert", wrapped(small_vocabulary, pad_token="<pad>"), "mean")
    load_encoder(folder)
    assert not caplog.records
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chunk_size_feed_forward": 2}))
    for _ in range(2):
        load_encoder(folder)
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder}: transformers computes this model, slower than a forward of our own would: "
        "chunk_size_feed_forward is 2"
    ]
    with pytest.raises(ModelError, match=r"one safetensors file only \(chunk_size_feed_forward is 2\); use bf16"):
        load_encoder(folder, dtype="int8")
