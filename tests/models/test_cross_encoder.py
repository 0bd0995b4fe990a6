"""Cross-encoders: the scores of sentence-transformers and transformers, pair by pair, on tiny seeded models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import CrossEncoder as PeerCrossEncoder
from tokenizers import Tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from flipkd.errors import ConfigError, ModelError
from flipkd.models.cross_encoder import CrossEncoder, load_cross_encoder
from flipkd.models.pair_tokens import PairTokenizer, shares
from flipkd.models.teacher import read_cross_encoder, teacher_kind

from .conftest import wrapped

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 66,
    "initializer_range": 0.3,
}
LONG = "fracture of the left wrist and hand, initial encounter; "
PAIRS = [
    ("Cholera due to vibrio cholerae", "cholera"),
    ("cholera", "Cholera due to vibrio cholerae"),
    ("a", "b"),
    ("b", "a"),
    (LONG * 9, LONG * 7 + "unspecified"),
    ("short", LONG * 30),
    (LONG * 30, "short"),
    (LONG * 30, LONG * 30),
    ("fièvre jaune 😀", "糖尿病 typhoid"),
    ("Typhoid fever", "Typhoid fever"),
]


def save_bert(folder: Path, tokenizer_folder: Path, labels: int = 1) -> Path:
    """A plain Hugging Face folder of a small BERT with a random head, and MiniLM's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(3)
    config = BertConfig(vocab_size=len(tokenizer), num_labels=labels, **SHAPE)
    BertForSequenceClassification(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def edit(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, **changes}))


def peer_scores(folder: Path, pairs: list[tuple[str, str]] = PAIRS) -> np.ndarray:
    return np.asarray(PeerCrossEncoder(str(folder), device="cpu").predict(pairs))


def scores_of(encoder: CrossEncoder, pairs: list[tuple[str, str]] = PAIRS, **options: Any) -> np.ndarray:
    return encoder.score_pairs(*zip(*pairs, strict=True), **options).scores  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def plain(minilm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("cross") / "plain", minilm_dir)


@pytest.fixture
def copy(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("activation", "scale"), [(None, "probability"), ("Sigmoid", "probability"), ("Identity", "logit")]
)
def test_one_logit_scores_as_sentence_transformers_does(
    plain: Path, tmp_path: Path, activation: str | None, scale: str
) -> None:
    """The scale of a score is known with it: sentence-transformers#1004, sentence-transformers#1058."""
    folder = plain
    if activation is not None:
        folder = tmp_path / "saved"
        made = PeerCrossEncoder(str(plain), device="cpu", activation_fn=getattr(torch.nn, activation)(), max_length=40)
        made.save_pretrained(str(folder))
    encoder = load_cross_encoder(folder)
    assert (encoder.scale, encoder.activation) == (scale, activation or "Sigmoid")
    assert encoder.max_length == (66 if activation is None else 40)
    expected = peer_scores(folder)
    np.testing.assert_allclose(scores_of(encoder), expected, atol=2e-6)
    assert np.ptp(expected) > 0.01  # the model tells pairs apart
    assert teacher_kind(folder) == "cross-encoder"


def test_the_order_in_a_pair_matters(plain: Path) -> None:
    """A cross-encoder reads (left, right) as it stands: sentence-transformers#799."""
    scores = scores_of(load_cross_encoder(plain))
    assert abs(scores[0] - scores[1]) > 1e-4
    assert abs(scores[2] - scores[3]) > 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"},
        {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity", "version": "4.1.0"}},
    ],
    ids=["version 3", "version 4"],
)
def test_the_activation_of_older_folders(copy: Path, changes: dict[str, object]) -> None:
    edit(copy / "config.json", **changes)
    encoder = load_cross_encoder(copy)
    assert encoder.scale == "logit"
    np.testing.assert_allclose(scores_of(encoder), peer_scores(copy), atol=1e-5)


def test_of_two_logits_the_second_probability(minilm_dir: Path, tmp_path: Path) -> None:
    folder = save_bert(tmp_path / "two", minilm_dir, labels=2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    expected = []
    for left, right in PAIRS:
        tokens = tokenizer(left, right, truncation="longest_first", max_length=66, return_tensors="pt")
        with torch.inference_mode():
            expected.append(float(torch.softmax(model(**tokens).logits, dim=1)[0, 1]))
    encoder = load_cross_encoder(folder)
    assert (encoder.scale, encoder.activation) == ("probability", "Softmax")
    np.testing.assert_allclose(scores_of(encoder), expected, atol=2e-6)
    assert np.ptp(expected) > 0.01


def test_both_texts_stay_and_cuts_are_told(plain: Path) -> None:
    """sentence-transformers#574, #929, #4060: neither text is lost to the other's length."""
    encoder = load_cross_encoder(plain)
    pairs = [("short", LONG * 30), (LONG * 30, "other"), ("short", "other"), (LONG * 30, LONG * 30 + "end")]
    found = encoder.score_pairs(*zip(*pairs, strict=True))
    assert found.truncated.tolist() == [True, True, False, True]
    assert found.tokens.tolist()[:2] == [66, 66]
    # The short text is kept whole beside the long one, on either side.
    swapped = [("other", LONG * 30), (LONG * 30, "short")]
    assert (np.abs(scores_of(encoder, swapped) - found.scores[:2]) > 1e-4).all()


@pytest.mark.parametrize("max_tokens", [1, 100, 5000])
def test_batches_and_neighbours_do_not_matter(plain: Path, max_tokens: int) -> None:
    """sentence-transformers#3197, sentence-transformers#2312."""
    encoder = load_cross_encoder(plain, threads=2)
    together = scores_of(encoder, PAIRS * 2, max_tokens=max_tokens)
    alone = [scores_of(encoder, [pair])[0] for pair in PAIRS]
    np.testing.assert_allclose(together, alone * 2, atol=1e-6)
    np.testing.assert_allclose(scores_of(encoder, PAIRS[::-1], max_tokens=max_tokens), alone[::-1], atol=1e-6)


def test_each_distinct_pair_is_scored_once(plain: Path) -> None:
    encoder = load_cross_encoder(plain, threads=1)
    seen: list[int] = []
    model = encoder._model

    def counting(ids: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        seen.append(len(ids))
        return model(ids, types)

    encoder._model = counting
    scores_of(encoder, PAIRS * 5)
    assert sum(seen) == len(PAIRS)
    assert encoder.score_pairs([], []).scores.shape == (0,)


def test_special_tokens_in_a_text_are_plain_text(plain: Path) -> None:
    encoder = load_cross_encoder(plain)
    tricky = [("pain [SEP] in the knee", "knee"), ("pain", "[CLS] knee [PAD] [MASK]")]
    spelled = [("pain [ sep ] in the knee", "knee"), ("pain", "[ cls ] knee [ pad ] [ mask ]")]
    np.testing.assert_array_equal(scores_of(encoder, tricky), scores_of(encoder, spelled))
    assert (np.abs(scores_of(encoder, tricky) - peer_scores(plain, tricky)) > 1e-5).all()  # sentence-transformers obeys


@pytest.mark.parametrize("pad_token_id", [None, 5])
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("labels", [1, 2])
def test_a_decoder_without_padding_token(
    small_vocabulary: Tokenizer, tmp_path: Path, pad_token_id: int | None, padding_side: str, labels: int
) -> None:
    """transformers#34055, transformers#35909, sentence-transformers#3208."""
    torch.manual_seed(5)
    config = Qwen2Config(vocab_size=600, num_key_value_heads=2, num_labels=labels, pad_token_id=pad_token_id, **SHAPE)
    Qwen2ForSequenceClassification(config).eval().save_pretrained(tmp_path)
    tokenizer = wrapped(
        small_vocabulary, padding_side=padding_side, pad_token=None if pad_token_id is None else "<pad>"
    )
    tokenizer.save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    expected = []
    for left, right in PAIRS:  # one by one, as transformers asks without a padding token
        tokens = tokenizer(left, right, truncation="longest_first", max_length=64, return_tensors="pt")
        with torch.inference_mode():
            logits = model(input_ids=tokens["input_ids"]).logits
        expected.append(float(torch.sigmoid(logits)[0, 0] if labels == 1 else torch.softmax(logits, 1)[0, 1]))
    encoder = load_cross_encoder(tmp_path)
    # A budget that puts equal lengths into one batch: more than one pair at a time.
    np.testing.assert_allclose(scores_of(encoder, max_tokens=10_000), expected, atol=1e-5)
    assert np.ptp(expected) > 0.01
    if pad_token_id is not None and labels == 1:
        np.testing.assert_allclose(peer_scores(tmp_path), expected, atol=1e-4)


def test_a_model_without_token_types(small_vocabulary: Tokenizer, tmp_path: Path) -> None:
    tokenizer = roberta_like(small_vocabulary)
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(5)
    config = RobertaConfig(vocab_size=600, num_labels=1, pad_token_id=5, type_vocab_size=1, **SHAPE)
    RobertaForSequenceClassification(config).eval().save_pretrained(tmp_path)
    encoder = load_cross_encoder(tmp_path)
    assert encoder.max_length == 60  # 66 positions, counted from the padding token's number on
    expected = PeerCrossEncoder(str(tmp_path), device="cpu", max_length=60).predict(PAIRS)
    np.testing.assert_allclose(scores_of(encoder), expected, atol=1e-5)


def roberta_like(vocabulary: Tokenizer) -> PreTrainedTokenizerFast:
    """<s> left </s></s> right </s>."""
    from tokenizers import processors

    tokenizer = wrapped(vocabulary, pad_token="<pad>", eos_token="</s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[(name, vocabulary.token_to_id(name)) for name in ("<s>", "</s>")],
    )
    return tokenizer


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("max_length", [5, 6, 17, 18, 64])
def test_truncation_is_that_of_the_tokenizers_library(minilm_dir: Path, side: str, max_length: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(minilm_dir, truncation_side=side)
    ours = PairTokenizer(
        tokenizer.backend_tokenizer,
        max_length=max_length,
        lower_case=False,
        cuts_left=side == "left",
        unknown=tokenizer.unk_token_id,
    )
    found = ours.tokenize(PAIRS)
    for place, (left, right) in enumerate(PAIRS):
        expected = tokenizer(left, right, truncation="longest_first", max_length=max_length)
        ids = found.tokens.ids[place]
        assert ids == expected["input_ids"]
        assert ours.type_ids([found.left_tokens[place]], len(ids))[0].tolist() == expected["token_type_ids"]
        assert found.tokens.truncated[place] == (len(tokenizer(left, right)["input_ids"]) > max_length)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(2, 60))
def test_shares_keep_both_texts_and_fill_the_room(left: int, right: int, room: int) -> None:
    kept = shares(left, right, room)
    assert sum(kept) == min(left + right, room)
    assert kept[0] <= left
    assert kept[1] <= right
    assert min(kept) >= min(left, right, room // 2)  # nobody is cut for the longer one's sake


def broken(value: float) -> Callable[..., torch.Tensor]:
    return lambda ids, types=None: torch.where(ids[:, :1] > 0, torch.full((len(ids), 1), value), 0.0)


def test_what_is_not_finite_is_computed_again_or_fails_loudly(plain: Path) -> None:
    """transformers#31035, transformers#45491."""
    encoder = load_cross_encoder(plain)
    expected = scores_of(encoder)
    encoder._exact_model = encoder._model
    encoder._model = broken(float("inf"))  # its sigmoid would be 1.0, and look like a score
    np.testing.assert_array_equal(scores_of(encoder), expected)
    encoder._exact_model = broken(float("nan"))
    with pytest.raises(ModelError, match=r"cross-encoder gives numbers that are not finite.*for 4 of the pairs"):
        scores_of(encoder)


def test_bf16_is_near_float32(plain: Path) -> None:
    exact, rough = load_cross_encoder(plain), load_cross_encoder(plain, dtype="bf16")
    difference = np.abs(scores_of(exact) - scores_of(rough))
    assert 0 < difference.max() < 0.05


def refusals() -> Iterator[tuple[str, Callable[[Path], None], str]]:
    def weights(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    def labels(count: int, **more: object) -> Callable[[Path], None]:
        return lambda folder: edit(
            folder / "config.json", id2label={str(place): f"L{place}" for place in range(count)}, **more
        )

    def config(**changes: object) -> Callable[[Path], None]:
        return lambda folder: edit(folder / "config.json", **changes)

    def modality(folder: Path) -> None:
        edit(
            folder / "sentence_bert_config.json",
            modality_config={"message": {"method": "forward", "method_output_name": "logits", "format": "flat"}},
        )

    def prompt(folder: Path) -> None:
        edit(folder / "config_sentence_transformers.json", prompts={"q": "query: "}, default_prompt_name="q")

    def activation(name: str) -> Callable[[Path], None]:
        return lambda folder: edit(folder / "config_sentence_transformers.json", activation_fn=name)

    yield "three logits", labels(3), "gives 3 logits"
    yield "weights", weights, "only pytorch_model.bin"
    yield "activation", activation("torch.nn.modules.activation.Tanh"), "activation torch.nn.modules.activation.Tanh"
    yield "code", activation("evil.Sigmoid"), "activation evil.Sigmoid"
    yield "two with sigmoid", labels(2, sbert_ce_default_activation_function="torch.nn.Sigmoid"), "not alternatives"
    yield "multi label", labels(2, problem_type="multi_label_classification"), "not alternatives"
    yield "no head", config(architectures=["BertModel"]), "BertModel cannot be a teacher"
    yield "encoder-decoder", config(is_encoder_decoder=True), "encoder-decoder"
    yield "chat template", modality, "chat template"
    yield "prompt", prompt, "default prompt"


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in refusals()], ids=[case[0] for case in refusals()])
def test_what_is_not_supported_is_refused_by_name(copy: Path, change: Callable[[Path], None], message: str) -> None:
    assert read_cross_encoder(copy).logits == 1
    change(copy)
    with pytest.raises(ModelError, match=message):
        read_cross_encoder(copy)


def test_a_head_that_is_not_there_is_refused(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"weights are missing.*classifier\.weight"):
        load_cross_encoder(copy)


def test_arguments_out_of_range(plain: Path) -> None:
    with pytest.raises(ConfigError, match="dtype 'int8'"):
        load_cross_encoder(plain, dtype="int8")
    with pytest.raises(ConfigError, match="max_length 67 is more than the 66 positions"):
        load_cross_encoder(plain, max_length=67)
    with pytest.raises(ModelError, match="max_length 4 leaves no room"):
        load_cross_encoder(plain, max_length=4)
    with pytest.raises(ConfigError, match="max_tokens"):
        load_cross_encoder(plain).score_pairs(["a"], ["b"], max_tokens=0)


def test_kinds_of_folders(minilm_dir: Path, plain: Path, tmp_path: Path) -> None:
    assert teacher_kind(minilm_dir) == "bi-encoder"
    assert teacher_kind(plain) == "cross-encoder"
    with pytest.raises(ModelError, match="no such folder"):
        teacher_kind(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no config\.json"):
        teacher_kind(tmp_path / "empty")
    (tmp_path / "llm").mkdir()
    edit(tmp_path / "llm/config.json", architectures=["Qwen2ForCausalLM"])
    with pytest.raises(ModelError, match="Qwen2ForCausalLM cannot be a teacher"):
        teacher_kind(tmp_path / "llm")


def test_the_fingerprint_follows_files_and_length(plain: Path, copy: Path) -> None:
    before = read_cross_encoder(plain).fingerprint(None)
    assert read_cross_encoder(copy).fingerprint(None) == before
    assert read_cross_encoder(copy).fingerprint(12) != before
    edit(copy / "config_sentence_transformers.json", activation_fn="torch.nn.Identity")
    assert read_cross_encoder(copy).fingerprint(None) != before
