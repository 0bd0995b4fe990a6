"""Tiny random sentence-transformers folders, made by sentence-transformers itself, with a fixed seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Model,
    RobertaConfig,
    RobertaModel,
)

from flipkd.kernels.encoder_ops import Texts
from tests.small_models import make_base

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<pad>"]
MakeFolder = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(
        1
    )  # small models gain nothing from more, and OpenMP's busy waiting is slow on a shared machine


@pytest.fixture(scope="session")
def small_vocabulary(icd9: list[tuple[str, str, str]]) -> Tokenizer:
    """A byte-level BPE of 600 entries, trained on medical descriptions."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([long for _, long, _ in icd9[:1500]], trainer)
    return tokenizer


def wrapped(
    vocabulary: Tokenizer, *, begins: bool = False, ends: bool = False, **settings: Any
) -> PreTrainedTokenizerFast:
    """A transformers tokenizer that puts <s> before and </s> after a text where asked."""
    backend = Tokenizer.from_str(vocabulary.to_str())
    if begins or ends:
        backend.post_processor = processors.TemplateProcessing(
            single=" ".join((["<s>"] if begins else []) + ["$A"] + (["</s>"] if ends else [])),
            special_tokens=[(name, backend.token_to_id(name)) for name in ("<s>", "</s>")],
        )
    settings.setdefault("model_max_length", 64)
    if ends:
        settings.setdefault("eos_token", "</s>")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)


def random_model(kind: str, vocabulary_size: int = 600, width: int = 32) -> PreTrainedModel:
    """A model of two blocks with random weights, large enough that vectors of different texts differ."""
    torch.manual_seed(7)
    shape = {
        "vocab_size": vocabulary_size,
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
    }
    makers: dict[str, Callable[[], PreTrainedModel]] = {
        "llama": lambda: LlamaModel(LlamaConfig(num_key_value_heads=2, **shape)),
        "qwen2": lambda: Qwen2Model(Qwen2Config(num_key_value_heads=2, **shape)),
        "bert": lambda: BertModel(BertConfig(**shape)),
        "roberta": lambda: RobertaModel(RobertaConfig(pad_token_id=1, **shape)),
    }
    for family in ("T5", "MT5", "UMT5", "LongT5"):
        own = {"vocab_size": vocabulary_size, "d_model": width, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        config = getattr(transformers, f"{family}Config")(**own, initializer_factor=3.0)
        makers[family.lower()] = partial(getattr(transformers, f"{family}ForConditionalGeneration"), config)
    model: PreTrainedModel = makers[kind]().eval()
    return model


def packed(model: Callable[..., torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Runs a tower of ours, which takes texts packed end to end, over ids [texts, tokens]; [texts, tokens, width]."""
    texts, tokens = ids.shape
    with torch.inference_mode():
        states = model(ids.reshape(-1), Texts(np.full(texts, tokens), ids.device))
    return states.view(texts, tokens, -1)


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """make_folder("llama", tokenizer, "lasttoken", [Dense(...), Normalize()]) -> a folder that anyone can load."""

    def make(
        kind: str,
        tokenizer: PreTrainedTokenizerFast,
        pooling: str | tuple[str, ...],
        steps: Sequence[nn.Module] = (),
        *,
        name: str = "model",
        **settings: Any,
    ) -> Path:
        plain, folder = tmp_path / f"{name}-plain", tmp_path / name
        model = random_model(kind, vocabulary_size=max(600, len(tokenizer)))
        model.save_pretrained(plain)
        tokenizer.save_pretrained(plain)
        transformer = Transformer(str(plain), **settings.pop("transformer", {}))
        width = model.config.hidden_size
        SentenceTransformer(modules=[transformer, Pooling(width, pooling), *steps], device="cpu", **settings).save(
            str(folder)
        )
        return folder

    return make


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory, small_vocabulary: Tokenizer) -> Path:
    """A small vocabulary (a real one takes a second for each load) with a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = wrapped(small_vocabulary, pad_token="<pad>", eos_token="<|endoftext|>")
    tokenizer.chat_template = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    return make_base(tmp_path_factory.mktemp("llama"), tokenizer_dir, 0)
