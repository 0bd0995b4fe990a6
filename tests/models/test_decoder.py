"""Our decoder forward against transformers', and what it must leave to transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from flipkd.kernels.encoder_ops import Texts
from flipkd.models.decoder import load_decoder
from flipkd.models.plain import NotPlainError

from .conftest import packed, random_model

CPU = torch.device("cpu")


@pytest.fixture(params=["llama", "qwen2"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    random_model(request.param, width=64).save_pretrained(tmp_path)
    return tmp_path


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (1, 700)])
def test_equals_transformers(folder: Path, shape: tuple[int, int]) -> None:
    decoder = load_decoder(folder, torch.float32, CPU)
    ids = torch.randint(0, 600, shape, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=ids).last_hidden_state
    torch.testing.assert_close(packed(decoder, ids), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "least"), [(torch.bfloat16, 0.995), (torch.int8, 0.98)])
def test_low_precision_is_close_and_mixing_lengths_changes_nothing(
    folder: Path, dtype: torch.dtype, least: float
) -> None:
    exact, decoder = load_decoder(folder, torch.float32, CPU), load_decoder(folder, dtype, CPU)
    ids = torch.randint(0, 600, (40,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted, found = (model(ids, Texts(np.array([3, 7, 30]), CPU)).float() for model in (exact, decoder))
        alone = decoder(ids[3:10], Texts(np.array([7]), CPU)).float()
    assert torch.nn.functional.cosine_similarity(wanted, found).mean() > least
    torch.testing.assert_close(alone, found[3:10], atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "mistral"}, "model_type"),
        ({"hidden_act": "tanh"}, "hidden_act"),
        ({"auto_map": {"AutoModel": "code.Model"}}, "auto_map"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "rope_parameters"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"num_hidden_layers": 3}, "is missing"),
        ({"intermediate_size": 47}, "not of the shape"),
        ({"num_key_value_heads": 1}, "k_proj.weight is not of the shape"),
        ({"num_attention_heads": 3}, "not known"),
        ({"rms_norm_eps": None}, "not known"),
    ],
    ids=str,
)
def test_anything_else_is_left_to_transformers(folder: Path, changes: dict[str, Any], reason: str) -> None:
    change_config(folder, **changes)
    with pytest.raises(NotPlainError, match=reason):
        load_decoder(folder, torch.float32, CPU)


def test_broken_weights_are_left_to_transformers(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(NotPlainError, match="cannot be read"):
        load_decoder(folder, torch.float32, CPU)
    file.unlink()
    with pytest.raises(NotPlainError, match="not in one model"):
        load_decoder(folder, torch.float32, CPU)


@pytest.mark.parametrize(
    "name", ["norm.weight", "layers.1.input_layernorm.weight", "layers.1.post_attention_layernorm.weight"]
)
def test_norms_of_another_width_are_left_to_transformers(folder: Path, name: str) -> None:
    """The compiled functions read as many numbers as the config promises."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, name: tensors[name][:8].clone()}, file)
    with pytest.raises(NotPlainError, match="shape"):
        load_decoder(folder, torch.bfloat16, CPU)
