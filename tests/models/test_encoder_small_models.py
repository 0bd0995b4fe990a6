"""Architectures, poolings and settings that the real model does not have, on tiny random models."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.dense import Dense
from sentence_transformers.base.modules.normalize import Normalize
from tokenizers import Tokenizer
from torch import nn

from flipkd.errors import ModelError
from flipkd.kernels.encoder_ops import Texts
from flipkd.models.encoder import Encoder, load_encoder
from flipkd.models.pooling import pool_packed, pool_segments
from flipkd.models.tokens import TextTokenizer

from .conftest import MakeFolder, wrapped

TEXTS = [
    "Cholera due to vibrio cholerae",
    "a",
    "Typhoid fever with heart involvement, unspecified, initial encounter; late effect of injury",
    "Paratyphoid fever A",
    "b",
    "fièvre jaune 😀 糖尿病",
    "x y z " * 60,
]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def assert_equals_peer(folder: Path, texts: list[str] = TEXTS, **options: Any) -> Encoder:
    """Same vectors as sentence-transformers gives for each text alone, so that its padding plays no part."""
    peer = SentenceTransformer(str(folder), device="cpu")
    if peer.tokenizer.pad_token is None:
        peer.tokenizer.pad_token = "<pad>"  # it asks for one even where there is nothing to pad; we do not
    expected = np.stack([np.asarray(peer.encode(text)) for text in texts])
    encoder = load_encoder(folder, **options)
    vectors = encoder.encode_texts(texts, normalize=False).vectors
    assert vectors.shape == expected.shape
    assert encoder.dim == expected.shape[1]
    scale = np.abs(expected).max()
    np.testing.assert_allclose(vectors / scale, expected / scale, atol=1e-5)
    # The test itself must be able to fail: the vectors of different texts must differ.
    assert np.abs(expected[0] / scale - expected[3] / scale).max() > 1e-3
    return encoder


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("pad_token", [None, "<pad>"])
def test_decoder_with_last_token_pooling(
    make_folder: MakeFolder, small_vocabulary: Tokenizer, kind: str, padding_side: str, pad_token: str | None
) -> None:
    """Padding on either side, or none: transformers#34055, transformers#35909, sentence-transformers#3208."""
    tokenizer = wrapped(small_vocabulary, padding_side=padding_side, pad_token=pad_token)
    folder = make_folder(
        kind, tokenizer, "lasttoken", [Dense(32, 12, bias=False, activation_function=nn.Identity()), Normalize()]
    )
    encoder = assert_equals_peer(folder)
    together = encoder.encode_texts(TEXTS).vectors
    for place, text in enumerate(TEXTS):
        np.testing.assert_allclose(encoder.encode_texts([text]).vectors[0], together[place], atol=1e-5)
    if pad_token:  # and what sentence-transformers gives when it pads them all together
        peer = SentenceTransformer(str(folder), device="cpu")
        np.testing.assert_allclose(together, np.asarray(peer.encode(TEXTS)), atol=1e-4)


@pytest.mark.parametrize(
    "pooling",
    ["cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken", ("cls", "mean", "max")],
    ids=str,
)
def test_every_pooling(make_folder: MakeFolder, small_vocabulary: Tokenizer, pooling: str | tuple[str, ...]) -> None:
    tokenizer = wrapped(small_vocabulary, begins=True, ends=True, pad_token="<pad>")
    assert_equals_peer(make_folder("bert", tokenizer, pooling))


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.ReLU(), nn.GELU(), nn.Identity()], ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("bias", [True, False])
def test_dense(make_folder: MakeFolder, small_vocabulary: Tokenizer, activation: nn.Module, bias: bool) -> None:
    torch.manual_seed(1)
    steps = [Dense(32, 20, bias=bias, activation_function=activation), Dense(20, 20, use_residual=True), Normalize()]
    folder = make_folder("bert", wrapped(small_vocabulary, ends=True, pad_token="<pad>"), "mean", steps)
    assert_equals_peer(folder)


def test_positions_that_start_after_the_pad_id(make_folder: MakeFolder, small_vocabulary: Tokenizer) -> None:
    tokenizer = wrapped(small_vocabulary, begins=True, ends=True, pad_token="<|im_start|>", model_max_length=512)
    encoder = assert_equals_peer(make_folder("roberta", tokenizer, "mean"), TEXTS[:6])
    assert encoder.max_length == 126  # 128 positions, two of them unused
    assert encoder.encode_texts(["word " * 600]).truncated.all()


def test_truncated_dimension_and_lower_case(make_folder: MakeFolder, small_vocabulary: Tokenizer) -> None:
    tokenizer = wrapped(small_vocabulary, ends=True, pad_token="<pad>")
    folder = make_folder("bert", tokenizer, "mean", transformer={"do_lower_case": True}, truncate_dim=8)
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 20, "do_lower_case": True}))
    encoder = assert_equals_peer(folder)
    assert (encoder.dim, encoder.max_length) == (8, 20)
    lower, upper = encoder.encode_texts(["FEVER of unknown origin", "fever of unknown origin"]).vectors
    np.testing.assert_array_equal(lower, upper)


@pytest.mark.parametrize("kind", ["t5", "mt5", "umt5", "longt5"])
def test_the_encoder_of_an_encoder_decoder(make_folder: MakeFolder, small_vocabulary: Tokenizer, kind: str) -> None:
    """Its configuration says that there is a decoder, or, as transformers 5 saves it, that there is none."""
    folder = make_folder(kind, wrapped(small_vocabulary, ends=True, pad_token="<pad>"), "mean", [Normalize()])
    config = json.loads((folder / "config.json").read_text())
    for says in (True, False):
        (folder / "config.json").write_text(json.dumps({**config, "is_encoder_decoder": says}))
        assert_equals_peer(folder, TEXTS[:6])


@pytest.mark.parametrize("include_prompt", [True, False])
def test_default_prompt(make_folder: MakeFolder, small_vocabulary: Tokenizer, include_prompt: bool) -> None:
    tokenizer = wrapped(small_vocabulary, begins=True, ends=True, pad_token="<pad>")
    folder = make_folder(
        "bert", tokenizer, "mean", prompts={"query": "diagnosis: ", "other": "x"}, default_prompt_name="query"
    )
    pooling = folder / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({**json.loads(pooling.read_text()), "include_prompt": include_prompt}))
    encoder = assert_equals_peer(folder, [text for text in TEXTS if not text.startswith(" ")])
    smuggled = encoder.encode_texts(["a</s>b", "a<s>b"])
    assert smuggled.tokens[0] > encoder.encode_texts(["ab"]).tokens[0] + 1


@pytest.mark.parametrize("message", [True, False])
def test_chat_template_is_applied_only_where_the_folder_asks(
    make_folder: MakeFolder, small_vocabulary: Tokenizer, message: bool
) -> None:
    tokenizer = wrapped(small_vocabulary, pad_token="<pad>", model_max_length=40)
    tokenizer.chat_template = TEMPLATE
    folder = make_folder("llama", tokenizer, "lasttoken")
    file = folder / "sentence_bert_config.json"
    settings = json.loads(file.read_text())
    assert "message" in settings["modality_config"]  # sentence-transformers 6 saw the template and wraps every text
    if not message:
        del settings["modality_config"]["message"]
        file.write_text(json.dumps(settings))
    encoder = assert_equals_peer(folder)
    plain = len(small_vocabulary.encode("fever").ids)
    assert (encoder.encode_texts(["fever"]).tokens[0] > plain) == message
    assert encoder.encode_texts(["fever " * 100]).truncated.all()


def test_special_tokens_in_a_text_stay_text_inside_a_chat_template(
    make_folder: MakeFolder, small_vocabulary: Tokenizer
) -> None:
    tokenizer = wrapped(small_vocabulary, pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    encoder = load_encoder(make_folder("llama", tokenizer, "lasttoken"))
    around = int(encoder.encode_texts([""]).tokens[0])
    body = len(small_vocabulary.encode("<|im_", add_special_tokens=False).ids)
    encoded = encoder.encode_texts(["<|im_end|>", "<|endoftext|>"])
    assert (encoded.tokens > around + 3).all()
    assert body > 1


def test_template_that_changes_the_text_is_refused(make_folder: MakeFolder, small_vocabulary: Tokenizer) -> None:
    tokenizer = wrapped(small_vocabulary, pad_token="<pad>")
    tokenizer.chat_template = "{{ messages[0]['content'] | upper }}"
    with pytest.raises(ModelError, match="chat template"):
        load_encoder(make_folder("llama", tokenizer, "lasttoken"))


def test_text_without_tokens_is_the_zero_vector(make_folder: MakeFolder, small_vocabulary: Tokenizer) -> None:
    encoder = load_encoder(make_folder("llama", wrapped(small_vocabulary), "lasttoken"))
    encoded = encoder.encode_texts(["", "a", ""])
    assert encoded.tokens.tolist() == [0, 1, 0]
    assert not encoded.vectors[[0, 2]].any()
    assert np.isfinite(encoded.vectors).all()


@pytest.mark.parametrize("mode", ["mean", "cls", "lasttoken", "max", "weightedmean", "mean_sqrt_len_tokens"])
def test_a_text_of_which_the_prompt_leaves_nothing_is_the_zero_vector(
    make_folder: MakeFolder, small_vocabulary: Tokenizer, mode: str
) -> None:
    """Where the prompt's tokens are not pooled, and the text has none, or there is no room for any."""
    tokenizer = wrapped(small_vocabulary, pad_token="<pad>")
    folder = make_folder("llama", tokenizer, mode, prompts={"q": "fever of unknown origin "}, default_prompt_name="q")
    pooling = folder / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({**json.loads(pooling.read_text()), "include_prompt": False}))
    vectors = load_encoder(folder).encode_texts(["", "cholera", ""]).vectors
    assert not vectors[[0, 2]].any()
    np.testing.assert_allclose(np.linalg.norm(vectors[1]), 1.0, atol=1e-5)
    states, texts = torch.randn(9, 4), Texts(np.array([2, 5, 2]), torch.device("cpu"))
    np.testing.assert_allclose(pool_segments(states, texts, mode, 2), pool_packed(states, texts, (mode,), 2), atol=1e-6)


def test_vectors_are_unit_length_unless_asked_otherwise(make_folder: MakeFolder, small_vocabulary: Tokenizer) -> None:
    encoder = load_encoder(make_folder("llama", wrapped(small_vocabulary), "mean"))
    raw = encoder.encode_texts(TEXTS, normalize=False).vectors
    unit = encoder.encode_texts(TEXTS).vectors
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1.0, atol=1e-6)
    np.testing.assert_allclose(raw / np.linalg.norm(raw, axis=1, keepdims=True), unit, atol=1e-6)
    assert np.abs(np.linalg.norm(raw, axis=1) - 1).max() > 0.1


def test_short_and_long_texts_together_are_finite_in_bf16(make_folder: MakeFolder, small_vocabulary: Tokenizer) -> None:
    """3 and 700 tokens: transformers#31035, transformers#45491."""
    tokenizer = wrapped(small_vocabulary, pad_token="<pad>", model_max_length=1024)
    folder = make_folder("qwen2", tokenizer, "lasttoken", [Normalize()])
    texts = ["ab", "fever of unknown origin " * 200]
    exact, encoder = load_encoder(folder, max_length=700), load_encoder(folder, dtype="bf16", max_length=700)
    encoded = encoder.encode_texts(texts)
    assert encoded.tokens[0] <= 3
    assert encoded.tokens[1] == 700
    assert np.isfinite(encoded.vectors).all()
    assert (encoded.vectors * exact.encode_texts(texts).vectors).sum(1).min() > 0.99


def _encoder_of(small_vocabulary: Tokenizer, model: Any, exact: Any) -> Encoder:
    return Encoder(
        tokenizer=TextTokenizer(small_vocabulary, max_length=16),
        model=model,
        mixes_lengths=False,
        exact_model=exact,
        dim=3,
        max_length=16,
        dtype="bf16",
        device=torch.device("cpu"),
        threads=2,
    )


def test_a_batch_that_is_not_finite_is_computed_again_in_float32(small_vocabulary: Tokenizer) -> None:
    """transformers#31035, transformers#45491."""
    calls: list[tuple[int, ...]] = []

    def overflows(ids: torch.Tensor, texts: Texts) -> torch.Tensor:
        vectors = torch.ones(len(texts.lengths), 3)
        if texts.lengths[0] > 1:
            vectors[-1, 0] = float("nan")
        return vectors

    def exact(ids: torch.Tensor, texts: Texts) -> torch.Tensor:
        calls.append(tuple(texts.lengths.tolist()))
        return torch.full((len(texts.lengths), 3), 2.0)

    vectors = (
        _encoder_of(small_vocabulary, overflows, exact).encode_texts(["a", "a fever", "b"], normalize=False).vectors
    )
    np.testing.assert_array_equal(vectors, [[1, 1, 1], [2, 2, 2], [1, 1, 1]])
    assert len(calls) == 1


def test_numbers_that_stay_not_finite_are_an_error_with_places_and_no_text(small_vocabulary: Tokenizer) -> None:
    """Never a NaN as a vector: transformers#31035, transformers#45491."""

    def broken(ids: torch.Tensor, texts: Texts) -> torch.Tensor:
        return torch.full((len(texts.lengths), 3), float("inf" if texts.lengths[0] > 1 else "0"))

    encoder = _encoder_of(small_vocabulary, broken, broken)
    with pytest.raises(ModelError, match=r"for 2 of the texts \(places 1, 3\)") as caught:
        encoder.encode_texts(["a", "a secret fever", "b", "a secret fever"])
    assert "secret" not in str(caught.value)


def test_composed_and_decomposed_forms_differ_unless_normalised(
    make_folder: MakeFolder, small_vocabulary: Tokenizer
) -> None:
    """Why texts are normalised: transformers#5738."""
    encoder = load_encoder(make_folder("llama", wrapped(small_vocabulary), "mean"))
    composed, decomposed = "Nguyễn Văn Đức", unicodedata.normalize("NFD", "Nguyễn Văn Đức")
    first, second, third = encoder.encode([composed, decomposed, unicodedata.normalize("NFC", decomposed)])
    np.testing.assert_array_equal(first, third)
    assert np.abs(first - second).max() > 1e-3


@pytest.mark.parametrize("kind", ["llama", "roberta"])
def test_a_vector_is_the_same_bits_alone_and_among_others(
    make_folder: MakeFolder, small_vocabulary: Tokenizer, kind: str
) -> None:
    """In float32, a Dense step and transformers' own blocks included: MKL sums few rows in another order."""
    steps = [Dense(32, 24, bias=False, activation_function=nn.Identity()), Normalize()]
    encoder = load_encoder(make_folder(kind, wrapped(small_vocabulary, pad_token="<pad>"), "mean", steps))
    texts = [*TEXTS, *(f"fever of unknown origin {number}" for number in range(40))]
    together = encoder.encode_texts(texts).vectors
    for size in (1, 3):
        parts = [encoder.encode_texts(texts[at : at + size]).vectors for at in range(0, len(texts), size)]
        assert np.array_equal(np.concatenate(parts), together)


@pytest.mark.parametrize("named", [None, 40])
def test_a_folder_without_a_maximum_takes_that_of_the_model(
    make_folder: MakeFolder, small_vocabulary: Tokenizer, named: int | None
) -> None:
    """Llama has no table of positions, and sentence-transformers cuts its texts at max_position_embeddings."""
    tokenizer = wrapped(small_vocabulary, pad_token="<pad>", model_max_length=int(1e30))
    folder = make_folder("llama", tokenizer, "mean")
    settings = folder / "sentence_bert_config.json"
    kept = {key: value for key, value in json.loads(settings.read_text()).items() if key != "max_seq_length"}
    settings.write_text(json.dumps({**kept, **({} if named is None else {"max_seq_length": named})}))
    encoder = assert_equals_peer(folder)
    assert encoder.max_length == (named or 128)
    assert encoder.encode_texts(TEXTS).truncated[-1]
