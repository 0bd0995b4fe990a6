"""Smoothing changes no vector but for rounding, and makes int8 nearer to float32 where channels are uneven."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cosine_similarity

from flipkd.kernels.encoder_ops import Heads, Texts
from flipkd.models import decoder as decoder_module
from flipkd.models.decoder import Decoder, load_decoder
from flipkd.models.smoothing import smooth_block

from .conftest import random_model

CPU = torch.device("cpu")
TEXTS = Texts(np.array([3, 7, 30]), CPU)
LARGE = 60.0


@pytest.fixture(params=["llama", "qwen2"])
def uneven(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model with a few channels that are far larger than the others, as trained ones have them."""
    random_model(request.param, width=64).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor[[3, 17]] *= LARGE
        elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
            tensor[:, [3, 17]] /= LARGE
    save_file(tensors, file, metadata={"format": "pt"})
    return tmp_path


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 600, (40,), generator=torch.Generator().manual_seed(1))


def run(folder: Path, dtype: torch.dtype, ids: Tensor) -> Tensor:
    decoder = load_decoder(folder, dtype, CPU)
    with torch.inference_mode():
        return decoder(ids, TEXTS).float()


def test_int8_is_nearer_to_float32(uneven: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, smoothed = run(uneven, torch.float32, ids), run(uneven, torch.int8, ids)
    monkeypatch.setattr(decoder_module, "smooth_block", lambda tensors, *_: tensors)
    plain = run(uneven, torch.int8, ids)
    errors = [1.0 - cosine_similarity(exact, found).mean() for found in (plain, smoothed)]
    assert errors[1] < 0.5 * errors[0], errors


def test_smoothed_weights_give_the_same_vectors(uneven: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 there is nothing to round."""
    blocks = []

    def keep(*arguments: Any) -> Mapping[str, Tensor]:
        blocks.append(smooth_block(*arguments))
        return blocks[-1]

    monkeypatch.setattr(decoder_module, "smooth_block", keep)
    exact = run(uneven, torch.float32, ids)
    run(uneven, torch.int8, ids)
    file = uneven / "model.safetensors"
    before = load_file(file)
    after = {f"layers.{number}.{name}": t for number, block in enumerate(blocks) for name, t in block.items()}
    assert before.keys() > after.keys()
    assert not torch.equal(before["layers.0.self_attn.v_proj.weight"], after["layers.0.self_attn.v_proj.weight"])
    save_file({**before, **{name: t.contiguous() for name, t in after.items()}}, file, metadata={"format": "pt"})
    torch.testing.assert_close(run(uneven, torch.float32, ids), exact, atol=1e-4, rtol=1e-4)


def test_weights_do_not_hang_on_the_number_of_threads(uneven: Path, ids: Tensor) -> None:
    before, found = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            decoder = load_decoder(uneven, torch.int8, CPU)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        assert isinstance(decoder, Decoder)
        with torch.inference_mode():
            found.append(decoder(ids, TEXTS))
    assert torch.equal(*found)


def test_an_embedding_of_a_token_in_no_text_may_be_anything(uneven: Path, ids: Tensor) -> None:
    exact = run(uneven, torch.int8, ids)
    file = uneven / "model.safetensors"
    tensors = load_file(file)
    unused = next(number for number in range(600) if number not in ids.tolist())
    tensors["embed_tokens.weight"][unused] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    found = run(uneven, torch.int8, ids)
    assert torch.isfinite(found).all()
    assert cosine_similarity(exact, found).mean() > 0.99


@settings(max_examples=30)
@given(
    shape=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    zero=st.sets(st.integers(0, 7)),
    power=st.floats(-12, 12),
    seed=st.integers(0, 99),
)
def test_any_size_of_channel_gives_finite_weights(
    shape: tuple[int, int], zero: set[int], power: float, seed: int
) -> None:
    heads, key_heads = shape
    generator = torch.Generator().manual_seed(seed)

    def weight(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    block = {
        "input_layernorm.weight": weight(8),
        "self_attn.q_proj.weight": weight(heads * 2, 8),
        "self_attn.k_proj.weight": weight(key_heads * 2, 8),
        "self_attn.v_proj.weight": weight(key_heads * 2, 8),
        "self_attn.v_proj.bias": weight(key_heads * 2),
        "self_attn.o_proj.weight": weight(8, heads * 2),
        "post_attention_layernorm.weight": weight(8),
        "mlp.gate_proj.weight": weight(12, 8),
        "mlp.up_proj.weight": weight(12, 8),
        "mlp.down_proj.weight": weight(8, 12),
    }
    largest = [10.0**power * weight(size).abs() for size in (8, heads * 2, 8)]
    for channel in zero:
        for values in largest:
            values[channel % len(values)] = 0.0
    smoothed = smooth_block(block, Heads(heads, key_heads, 2, causal=True), *largest)
    assert smoothed.keys() == block.keys()
    assert all(torch.isfinite(tensor).all() and tensor.dtype is torch.float32 for tensor in smoothed.values())

    def product(tensors: Mapping[str, Tensor], norm: str, name: str) -> Tensor:
        return tensors[f"{name}.weight"] * tensors[f"{norm}.weight"]

    for norm, name in (("input_layernorm", "self_attn.q_proj"), ("post_attention_layernorm", "mlp.up_proj")):
        torch.testing.assert_close(product(smoothed, norm, name), product(block, norm, name))

    def read(tensors: Mapping[str, Tensor], part: str) -> Tensor:
        """What o_proj makes of each channel of each key head."""
        made = tensors[f"self_attn.v_proj.{part}"].view(key_heads, 2, -1).repeat_interleave(heads // key_heads, 0)
        reader = tensors["self_attn.o_proj.weight"].view(8, heads, 2)
        return torch.einsum("wgc,gci->wgi", reader, made * (1.0 if part == "bias" else _norm(tensors)))

    def _norm(tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["input_layernorm.weight"]

    for part in ("weight", "bias"):
        torch.testing.assert_close(read(smoothed, part), read(block, part), atol=1e-4, rtol=1e-4)
