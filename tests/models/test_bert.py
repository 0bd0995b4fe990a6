"""Our BERT forward against transformers', and what it must leave to transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertModel

from flipkd.models.bert import load_bert
from flipkd.models.plain import NotPlainError

from .conftest import packed, random_model

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random_model("bert").save_pretrained(tmp_path)
    return tmp_path


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (2, 128)])
def test_equals_transformers(folder: Path, activation: str, shape: tuple[int, int]) -> None:
    change_config(folder, hidden_act=activation)
    bert = load_bert(folder, torch.float32, CPU)
    ids = torch.randint(0, 600, shape, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = BertModel.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=ids).last_hidden_state
        torch.testing.assert_close(packed(bert, ids), expected, atol=2e-5, rtol=0)


def test_names_of_older_files(folder: Path) -> None:
    ids = torch.arange(12).view(2, 6)
    plain = load_bert(folder, torch.float32, CPU)
    file = folder / "model.safetensors"
    renamed = {
        "bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in load_file(file).items()
    }
    file.unlink()
    save_file({**renamed, "bert.embeddings.position_ids": torch.arange(128)[None]}, file)
    older = load_bert(folder, torch.float32, CPU)
    assert torch.equal(packed(plain, ids), packed(older, ids))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"is_decoder": True}, "is_decoder is True"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"hidden_act": "silu"}, "hidden_act is"),
        ({"auto_map": {"AutoModel": "code.Model"}}, "auto_map"),
        ({"model_type": "roberta"}, "model_type is 'roberta'"),
        ({"num_hidden_layers": 3}, "is missing"),
        ({"intermediate_size": 47}, "not of the shape"),
        ({"max_position_embeddings": 64}, "position_embeddings.weight is not of the shape"),
        ({"num_attention_heads": 5}, "not known"),
        ({"num_attention_heads": 0}, "not known"),
    ],
    ids=str,
)
def test_anything_else_is_left_to_transformers(folder: Path, changes: dict[str, Any], reason: str) -> None:
    change_config(folder, **changes)
    with pytest.raises(NotPlainError, match=reason):
        load_bert(folder, torch.float32, CPU)


def test_broken_weights_are_left_to_transformers(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(NotPlainError, match="cannot be read"):
        load_bert(folder, torch.float32, CPU)
    file.unlink()
    with pytest.raises(NotPlainError, match="not in one model"):
        load_bert(folder, torch.float32, CPU)


@pytest.mark.parametrize(
    "name",
    ["embeddings.LayerNorm.weight", "encoder.layer.1.output.LayerNorm.bias", "encoder.layer.1.output.dense.bias"],
)
def test_norms_and_biases_of_another_width_are_left_to_transformers(folder: Path, name: str) -> None:
    """The compiled functions read as many numbers as the config promises."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, name: tensors[name][:8].clone()}, file)
    with pytest.raises(NotPlainError, match="shape"):
        load_bert(folder, torch.bfloat16, CPU)
