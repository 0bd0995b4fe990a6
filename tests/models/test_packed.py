"""Packed texts give what padded ones give, for every family and both padding sides, at any mix of lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear, normalize

from flipkd.errors import ConfigError
from flipkd.kernels.encoder_ops import Texts
from flipkd.models.adapter import FAMILIES, new_student, save_student
from flipkd.models.options import STUDENT_POOLINGS, StudentOptions
from flipkd.models.packed import attention_for_transformers, pack, pool_texts
from flipkd.models.pooling import pool_packed, pool_segments
from flipkd.models.student import Student
from tests.small_models import make_base

CLASSES = {
    "llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral", "gemma": "Gemma", "gemma2": "Gemma2",
    "gemma3_text": "Gemma3Text",
}  # fmt: skip
WINDOWED = ("mistral", "gemma2", "gemma3_text")
TEXTS = ["renal failure", "x", "acute kidney failure, " * 9, "chronic kidney disease stage four", "sepsis", ""]


def shaken(student: Student) -> Student:
    """B away from zero, so that LoRA does something."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return student


def test_every_family_is_tried() -> None:
    assert set(CLASSES) == set(FAMILIES)


# PEFT asks the model by a name that transformers has given up.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("family", "attention"),
    [*((family, "causal") for family in FAMILIES), ("llama", "full"), ("qwen2", "full"), ("qwen3", "full")],
)
def test_equals_the_whole_padded_model(family: str, attention: Any, tmp_path: Path, minilm_dir: Path) -> None:
    """e is what the whole tower's hidden state gives, padded left or right, through PEFT's own model."""
    import peft
    import transformers

    window: dict[str, Any] = {"sliding_window": 7} if family in WINDOWED else {}
    base = make_base(tmp_path / "base", minilm_dir, 0, CLASSES[family], **window)
    for pooling in ("mean", "last", "weighted"):
        options = StudentOptions(str(base), layer=2, dimension=8, rank=4, pooling=pooling, attention=attention)  # type: ignore[arg-type]
        student = shaken(new_student(options))
        ids = student.tokenize(TEXTS).ids
        with torch.no_grad():
            together = student.encode_ids(ids)
            alone = torch.cat([student.encode_ids([text]) for text in ids])
        torch.testing.assert_close(together, alone, atol=5e-6, rtol=0)

        save_student(student, tmp_path / "adapter")
        whole = transformers.AutoModelForCausalLM.from_pretrained(
            str(base), dtype=torch.float32, attn_implementation="eager"
        )
        model = peft.PeftModel.from_pretrained(whole, str(tmp_path / "adapter")).eval()
        for side in ("left", "right"):
            width = max(map(len, ids))
            padded, mask = torch.zeros(len(ids), width, dtype=torch.int64), torch.zeros(len(ids), width)
            for row, text in enumerate(ids):
                place = slice(width - len(text), width) if side == "left" else slice(0, len(text))
                padded[row, place], mask[row, place] = torch.tensor(text), 1
            positions = (mask.cumsum(1) - 1).clamp(min=0).long()
            with torch.no_grad():
                states = model(
                    input_ids=padded,
                    attention_mask=mask.long(),
                    position_ids=positions,
                    output_hidden_states=True,
                    is_causal=attention == "causal",
                ).hidden_states[2]
                layer = model.get_base_model().model.layers[2]
                x = layer.input_layernorm(states)
                if pooling != "last":
                    weights = mask if pooling == "mean" else mask * (positions + 1)
                    pooled = (x * weights[:, :, None]).sum(1) / weights.sum(1, keepdim=True)
                else:
                    last = [width - 1 if side == "left" else len(text) - 1 for text in ids]
                    pooled = x[torch.arange(len(ids)), last]
                expected = normalize(linear(pooled, layer.self_attn.q_proj.lora_A["default"].weight), dim=-1)
            torch.testing.assert_close(together, expected, atol=5e-6, rtol=0)


def test_blocks_above_are_neither_loaded_nor_run(base_dir: Path) -> None:
    student = new_student(StudentOptions(str(base_dir), layer=1, dimension=8, rank=4))
    assert len(student.decoder.layers) == 2  # block 1 lends its norm and its projection, and is not run
    ran: list[int] = []
    whole = new_student(StudentOptions(str(base_dir), layer=1, dimension=8, rank=4, whole_tower=True))
    for model in (student, whole):
        for number, block in enumerate(model.decoder.layers):
            block.register_forward_hook(lambda *_, number=number: ran.append(number))
        with torch.no_grad():
            model.encode_ids([[5, 6, 7]])
    assert ran == [0, 0]
    assert len(whole.decoder.layers) == 3


def test_pack_orders_by_length_and_restarts_positions() -> None:
    packed = pack([[1, 2, 3], [], [4], [5, 6, 7], [8]])
    assert packed.ids.tolist() == [[4, 8, 1, 2, 3, 5, 6, 7]]
    assert packed.texts.positions.tolist() == [0, 0, 0, 1, 2, 0, 1, 2]
    assert packed.groups == ((2, 1), (2, 3))
    assert packed.order.tolist() == [1, 2, 4, 0, 3]


def test_attention_refuses_a_mask() -> None:
    one = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="no attention mask"):
        attention_for_transformers(torch.nn.Identity(), one, one, one, torch.ones(1, 1, 2, 2), groups=((1, 2),))


def test_gradients_reach_every_lora_weight_that_is_read(base_dir: Path) -> None:
    student = shaken(new_student(StudentOptions(str(base_dir), layer=2, dimension=8, rank=4)))
    student.encode_ids([[5, 6, 7], [9, 10]]).sum().backward()
    without = [name for name, p in student.named_parameters() if p.requires_grad and p.grad is None]
    assert [name for name in without if "layers.2.self_attn.q_proj.lora_B" not in name] == []


def test_bf16_stays_near_float32(base_dir: Path) -> None:
    texts = ["acute kidney failure", "renal failure", "cholera due to vibrio cholerae"] * 3
    vectors = [
        shaken(new_student(StudentOptions(str(base_dir), layer=2, dimension=8, rank=4, dtype=dtype))).encode(texts)  # type: ignore[arg-type]
        for dtype in ("float32", "bf16")
    ]
    assert (vectors[0] * vectors[1]).sum(1).min() > 0.99


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_on_a_cpu_attention_is_float32_inside_and_outside_of_autocast(softcap: float | None) -> None:
    """Its bf16 kernel takes several times as long for short texts; autocast would choose it behind our back."""
    torch.manual_seed(3)
    row = [torch.randn(1, heads, 11, 16).bfloat16() for heads in (4, 2, 2)]
    groups = ((2, 3), (1, 5))
    found = []
    for inside in (False, True):
        query, key, value = (part.clone().requires_grad_() for part in row)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            mixed, _ = attention_for_transformers(
                torch.nn.Identity(), query, key, value, None, groups=groups, softcap=softcap
            )
        mixed.float().square().sum().backward()
        found.append([mixed, query.grad, key.grad, value.grad])
    for outside, inside_ in zip(*found, strict=True):
        assert torch.equal(outside, inside_)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_short_and_long_texts_together_in_bf16_are_finite(family: str, tmp_path: Path, minilm_dir: Path) -> None:
    """3 and 700 tokens in one batch, forwards and backwards.

    transformers#31035, transformers#45491.
    """
    base = make_base(tmp_path / "base", minilm_dir, 0, CLASSES[family], max_position_embeddings=1024)
    student = shaken(new_student(StudentOptions(str(base), layer=2, dimension=8, rank=4, max_length=700, dtype="bf16")))
    ids = [[5, 6, 7], [number % 900 + 5 for number in range(700)]]
    vectors = student.encode_ids(ids)
    assert torch.isfinite(vectors).all()
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))
    vectors.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


@pytest.mark.parametrize("pooling", ["mean", "last", "weighted"])
def test_pooling_in_one_go_is_pooling_by_length(pooling: str) -> None:
    """What a GPU does in a few launches; run on the CPU here, forwards and backwards."""
    generator = torch.Generator().manual_seed(0)
    packed = pack([[1] * length for length in (5, 2, 9, 2, 0, 1)])
    states = torch.randn(1, 19, 8, generator=generator, requires_grad=True)
    expected = pool_texts(states, packed, pooling)[packed.order[1:]]
    found = pool_segments(states[0], packed.texts, STUDENT_POOLINGS[pooling])
    torch.testing.assert_close(found, expected)
    weights = torch.randn(5, 8, generator=generator)
    for rows in (expected, found):
        states.grad = None
        torch.autograd.backward((rows * weights).sum())
        assert states.grad is not None
        if rows is expected:
            wanted = states.grad.clone()
    torch.testing.assert_close(states.grad, wanted)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_the_way_of_a_gpu_is_the_way_of_a_cpu(heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a flash kernel were there: the same views go in, and the same numbers come out, also backwards."""
    generator = torch.Generator().manual_seed(0)
    packed = pack([[1] * length for length in (3, 1, 3, 7)])
    rows = [
        torch.randn(1, count, 14, 16, generator=generator, requires_grad=True) for count in (heads[0], *[heads[1]] * 2)
    ]
    weights = torch.randn(1, 14, heads[0], 16, generator=generator)
    found = []
    for takes in (False, True):
        monkeypatch.setattr("flipkd.models.packed.takes_flash", lambda query, takes=takes: takes)
        for row in rows:
            row.grad = None
        mixed, _ = attention_for_transformers(
            torch.nn.Identity(),
            *rows,
            None,
            groups=packed.groups,
            starts=packed.texts.starts,
            scaling=0.3,
            sliding_window=7,
        )
        torch.autograd.backward((mixed * weights).sum())
        found.append([mixed.detach(), *(row.grad for row in rows)])
    for other, one in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("family", WINDOWED)
def test_full_attention_is_refused_where_there_are_windows(family: str, tmp_path: Path, minilm_dir: Path) -> None:
    base = make_base(tmp_path / "base", minilm_dir, 0, CLASSES[family], sliding_window=7)
    with pytest.raises(ConfigError, match=r"--attention full: .* windows"):
        new_student(StudentOptions(str(base), layer=2, dimension=8, rank=4, attention="full"))


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    skip=st.integers(0, 3),
    mode=st.sampled_from(["cls", "lasttoken", "max", "mean", "mean_sqrt_len_tokens", "weightedmean"]),
)
def test_every_pooling_in_one_go(lengths: list[int], skip: int, mode: str) -> None:
    texts = Texts(np.array(lengths) + skip, torch.device("cpu"))
    states = torch.randn(texts.tokens, 5, generator=torch.Generator().manual_seed(len(lengths)))
    torch.testing.assert_close(pool_segments(states, texts, mode, skip), pool_packed(states, texts, (mode,), skip))
