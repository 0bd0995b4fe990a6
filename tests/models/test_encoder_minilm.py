"""The encoder on a real model: equal to sentence-transformers, and to itself whatever stands in the same batch."""

from __future__ import annotations

import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from flipkd.errors import ConfigError, ModelError
from flipkd.models.encoder import Encoder, load_encoder
from flipkd.models.folder import folder_fingerprint

Descriptions = list[tuple[str, str, str]]


@pytest.fixture(scope="module")
def encoder(minilm_dir: Path) -> Encoder:
    return load_encoder(minilm_dir)


@pytest.fixture(scope="module")
def peer(minilm_dir: Path) -> SentenceTransformer:
    return SentenceTransformer(str(minilm_dir), device="cpu")


@pytest.fixture(scope="module")
def texts(icd9: Descriptions) -> list[str]:
    """Real descriptions of mixed length, with scripts, emoji and accents, in no order of length."""
    chosen = random.Random(3).sample(icd9, 120)
    mixed = [long for _, long, _ in chosen[:60]] + [f"{short} | {long}" for _, long, short in chosen[60:110]]
    mixed.append("; ".join(long for _, long, _ in chosen))
    mixed += ["糖尿病 性 网膜症", "fièvre jaune 😀 🤒", "Nguyễn Văn Đức", "الكوليرا", "a", "..."]
    return [unicodedata.normalize("NFC", text) for text in mixed]


@pytest.fixture(scope="module")
def expected(peer: SentenceTransformer, texts: list[str]) -> np.ndarray:
    return np.asarray(peer.encode(texts, batch_size=16))


def cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    left, right = left.astype(np.float64), right.astype(np.float64)
    result: np.ndarray = (left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)
    return result


def test_equals_sentence_transformers_in_float32(encoder: Encoder, texts: list[str], expected: np.ndarray) -> None:
    encoded = encoder.encode_texts(texts)
    assert encoded.vectors.dtype == np.float32
    assert encoded.vectors.shape == (len(texts), encoder.dim) == expected.shape
    assert cosines(encoded.vectors, expected).min() >= 0.99999
    np.testing.assert_allclose(encoded.vectors, expected, atol=1e-5)


def test_close_to_sentence_transformers_in_bf16(minilm_dir: Path, texts: list[str], expected: np.ndarray) -> None:
    encoder = load_encoder(minilm_dir, dtype="bf16")
    assert encoder.dtype == "bf16"
    vectors = encoder.encode_texts(texts).vectors
    assert cosines(vectors, expected).min() >= 0.999
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)


@pytest.mark.parametrize("max_tokens", [1, 7, 64, 100_000])
def test_batch_size_and_order_do_not_matter(encoder: Encoder, texts: list[str], max_tokens: int) -> None:
    """sentence-transformers#3197, sentence-transformers#2312."""
    reference = encoder.encode_texts(texts)
    order = np.random.default_rng(max_tokens).permutation(len(texts))
    shuffled = encoder.encode_texts([texts[place] for place in order], max_tokens=max_tokens)
    np.testing.assert_allclose(shuffled.vectors, reference.vectors[order], atol=1e-5)
    np.testing.assert_array_equal(shuffled.tokens, reference.tokens[order])


def test_one_text_alone_equals_the_same_in_a_batch(encoder: Encoder, texts: list[str]) -> None:
    """sentence-transformers#3197, sentence-transformers#2312."""
    together = encoder.encode_texts(texts).vectors
    for place in (0, 30, 110, 111, 115):
        np.testing.assert_allclose(encoder.encode_texts([texts[place]]).vectors[0], together[place], atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_the_number_of_threads_does_not_change_a_bit(minilm_dir: Path, texts: list[str], dtype: str) -> None:
    one, three = (load_encoder(minilm_dir, dtype=dtype, threads=threads).encode(texts) for threads in (1, 3))
    np.testing.assert_array_equal(one, three)


def test_repeated_texts_come_back_in_place(encoder: Encoder, texts: list[str]) -> None:
    places = np.random.default_rng(1).integers(0, len(texts), 300)
    encoded = encoder.encode_texts([texts[place] for place in places])
    np.testing.assert_allclose(encoded.vectors, encoder.encode_texts(texts).vectors[places], atol=1e-5)


def test_more_texts_than_one_chunk_keep_their_order(encoder: Encoder) -> None:
    texts = [f"code {number}" for number in range(2500)]
    vectors = encoder.encode_texts(texts).vectors
    for place in (0, 1023, 1024, 2047, 2048, 2499):
        np.testing.assert_allclose(vectors[place], encoder.encode_texts([texts[place]]).vectors[0], atol=1e-5)


def test_truncation_is_counted_per_text(encoder: Encoder, peer: SentenceTransformer) -> None:
    """sentence-transformers#574, #929, #4060: a text beyond the maximum length is cut, and it shows."""
    texts = ["word " * 600, "word " * 5, "word " * 2000, "word " * 254, "word " * 255]
    encoded = encoder.encode_texts(texts)
    assert encoder.max_length == 256
    assert encoded.truncated.tolist() == [True, False, True, False, True]
    assert encoded.tokens.tolist() == [256, 7, 256, 256, 256]
    assert cosines(encoded.vectors, np.asarray(peer.encode(texts))).min() >= 0.99999


def test_shorter_max_length_equals_sentence_transformers(minilm_dir: Path, texts: list[str]) -> None:
    peer = SentenceTransformer(str(minilm_dir), device="cpu")
    peer.max_seq_length = 12
    encoder = load_encoder(minilm_dir, max_length=12)
    encoded = encoder.encode_texts(texts)
    assert encoded.tokens.max() == 12
    assert 0 < encoded.truncated.sum() < len(texts)
    assert cosines(encoded.vectors, np.asarray(peer.encode(texts))).min() >= 0.99999


def test_max_length_beyond_the_positions_is_refused(minilm_dir: Path) -> None:
    assert load_encoder(minilm_dir, max_length=512).max_length == 512
    with pytest.raises(ConfigError, match="512 positions"):
        load_encoder(minilm_dir, max_length=513)


def test_special_tokens_in_a_text_are_plain_text(encoder: Encoder, peer: SentenceTransformer) -> None:
    text = "[CLS] [SEP] [MASK] </s> <|im_end|>"
    encoded = encoder.encode_texts([text, "cls sep mask"])
    # [ cl ##s ] [ sep ] [ mask ] < / s > < | im _ end | > and the two that the template adds
    assert encoded.tokens[0] == 4 + 3 + 3 + 4 + 7 + 2
    spelled = np.asarray(peer.encode([text.replace("[", "[ ").replace("]", " ]")]))
    assert cosines(encoded.vectors[:1], spelled)[0] >= 0.99999


def test_empty_text_has_a_finite_vector(encoder: Encoder) -> None:
    encoded = encoder.encode_texts(["", "a"])
    assert encoded.tokens.tolist() == [2, 3]
    assert np.isfinite(encoded.vectors).all()


def test_no_texts_give_no_rows(encoder: Encoder) -> None:
    assert encoder.encode([]).shape == (0, encoder.dim)
    encoded = encoder.encode_texts([])
    assert encoded.vectors.shape == (0, encoder.dim)
    assert encoded.truncated.shape == encoded.tokens.shape == (0,)


def test_fingerprint_changes_with_what_decides_vectors(minilm_dir: Path, tmp_path: Path) -> None:
    first = folder_fingerprint(minilm_dir)
    assert first != folder_fingerprint(minilm_dir, 12)
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "1_Pooling").mkdir()
    for file in minilm_dir.rglob("*"):
        if file.is_file():
            (copy / file.relative_to(minilm_dir)).write_bytes(file.read_bytes())
    assert folder_fingerprint(copy) == first  # the place does not matter
    (copy / "README.md").write_text("hello")
    assert folder_fingerprint(copy) == first
    settings = copy / "sentence_bert_config.json"
    settings.write_text(settings.read_text().replace("256", "255"))
    assert folder_fingerprint(copy) != first


def test_wrong_arguments(minilm_dir: Path, encoder: Encoder) -> None:
    with pytest.raises(ConfigError, match="dtype"):
        load_encoder(minilm_dir, dtype="float16")
    with pytest.raises(ConfigError, match="device"):
        load_encoder(minilm_dir, device="tpu")
    with pytest.raises(ConfigError, match="max_length"):
        load_encoder(minilm_dir, max_length=0)
    with pytest.raises(ModelError, match="no room"):
        load_encoder(minilm_dir, max_length=2)
    with pytest.raises(ConfigError, match="max_tokens"):
        encoder.encode_texts(["a"], max_tokens=0)
