"""Folders that must be refused, each by name and with the way out."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from flipkd.errors import ModelError
from flipkd.models.encoder import load_encoder
from flipkd.models.folder import find_folder, read_folder

from .conftest import MakeFolder, wrapped

Change = Callable[[Path], None]


@pytest.fixture
def folder(minilm_dir: Path, tmp_path: Path) -> Path:
    """A copy of the real folder that a test may spoil; its weights are linked."""
    copy = tmp_path / "model"
    shutil.copytree(minilm_dir, copy, copy_function=shutil.copyfile, ignore=shutil.ignore_patterns("*.safetensors"))
    (copy / "model.safetensors").symlink_to(minilm_dir / "model.safetensors")
    return copy


def edit(file: str, **changes: object) -> Change:
    def change(folder: Path) -> None:
        path = folder / file
        content = json.loads(path.read_text()) if path.exists() else {}
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**content, **changes}))

    return change


def module(number: int, kind: str, path: str | None = None) -> Change:
    def change(folder: Path) -> None:
        file = folder / "modules.json"
        modules = json.loads(file.read_text())
        modules[number:] = [
            {**modules[number], "type": kind, "path": path or modules[number]["path"]},
            *modules[number + 1 :],
        ]
        file.write_text(json.dumps(modules))

    return change


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def broken_json(folder: Path) -> None:
    (folder / "sentence_bert_config.json").write_text("{")


REFUSED: dict[str, tuple[Change, str]] = {
    "word embeddings": (module(0, "sentence_transformers.models.WordEmbeddings"), "WordEmbeddings is not supported"),
    "own module": (module(2, "custom_code.Normalize"), "custom_code.Normalize is not supported"),
    "path outside": (module(1, "sentence_transformers.models.Pooling", "../1_Pooling"), "leaves the model folder"),
    "no pooling": (module(1, "sentence_transformers.models.Normalize"), "second module must be Pooling"),
    "cross-encoder": (edit("config_sentence_transformers.json", model_type="CrossEncoder"), "CrossEncoder"),
    "sparse": (edit("config_sentence_transformers.json", model_type="SparseEncoder"), "SparseEncoder"),
    "prompt": (
        edit("config_sentence_transformers.json", default_prompt_name="query"),
        "'query' is not among its prompts",
    ),
    "task": (edit("sentence_bert_config.json", transformer_task="fill-mask"), "fill-mask"),
    "image": (edit("sentence_bert_config.json", modality_config={"image": {}}), "neither text nor message"),
    "method": (
        edit("sentence_bert_config.json", modality_config={"text": {"method": "get_text_features"}}),
        "only method forward",
    ),
    "model setting": (edit("sentence_bert_config.json", model_args={"rotary_scale": 2}), "rotary_scale not supported"),
    "text setting": (
        edit("sentence_bert_config.json", processing_kwargs={"text": {"stride": 2}}),
        "stride not supported",
    ),
    "pooling": (edit("1_Pooling/config.json", pooling_mode="attention"), "'attention' is not supported"),
    "no pooling settings": (
        lambda folder: (folder / "1_Pooling" / "config.json").write_text("{}"),
        "so how to pool is not known",
    ),
    "lost pooling settings": (
        lambda folder: (folder / "1_Pooling" / "config.json").unlink(),
        "how to pool is not known",
    ),
    "token vectors": (edit("2_Normalize/config.json", module_input_name="token_embeddings"), "token_embeddings"),
    "pickle": (pickled, "only pytorch_model.bin.*safe_serialization"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
    "no modules": (lambda folder: (folder / "modules.json").unlink(), "no modules.json"),
    "bad json": (broken_json, "cannot be read as JSON"),
    "adapter": (edit("adapter_config.json", base_model_name_or_path="x"), "adapter"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_by_name(folder: Path, change: Change, message: str) -> None:
    read_folder(folder)  # the copy itself is fine
    change(folder)
    with pytest.raises(ModelError, match=f"(?s){message}"):
        read_folder(folder)


def test_unknown_activation_is_refused_not_replaced(folder: Path) -> None:
    edit("3_Dense/config.json", in_features=384, out_features=4, activation_function="my_code.Swish")(folder)
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelError, match=r"my_code\.Swish is not supported; known are Identity, Tanh"):
        read_folder(folder)


def test_truncated_weights_are_a_model_error(folder: Path, minilm_dir: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes((minilm_dir / "model.safetensors").read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"model"):
        load_encoder(folder)


def test_missing_weights_are_not_filled_with_random_numbers(folder: Path) -> None:
    edit("config.json", num_hidden_layers=7)(folder)
    with pytest.raises(ModelError, match=r"weights are missing.*layer\.6"):
        load_encoder(folder)


@pytest.mark.parametrize("kind", ["bert", "llama", "roberta"])
@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_weights_that_are_not_numbers_are_refused(
    make_folder: MakeFolder, small_vocabulary: Tokenizer, kind: str, number: float
) -> None:
    """A query of NaN gives finite vectors: PyTorch's attention takes it for one that sees nothing."""
    folder = make_folder(kind, wrapped(small_vocabulary, pad_token="<pad>"), "mean")
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith(("query.weight", "q_proj.weight")))
    weights[name][3, 5] = number
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"the weight {re.escape(name)} holds NaN or infinite numbers"):
        load_encoder(folder)


def test_a_folder_without_a_vocabulary_is_refused(folder: Path) -> None:
    """transformers makes a tokenizer of the special tokens alone: every text would be the same."""
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(ModelError, match=r"its tokenizer knows no word; tokenizer\.json"):
        load_encoder(folder)


def test_code_in_the_folder_is_not_run(folder: Path) -> None:
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    edit("config.json", model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"})(folder)
    with pytest.raises(ModelError, match="trust_remote_code"):
        load_encoder(folder)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "nowhere", "a/b/c", "~/nowhere-at-all", Path("a/b")])
def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(name: str | Path) -> None:
    with pytest.raises(ModelError, match="no such folder; give"):
        find_folder(name)


def test_a_hub_name_without_network_says_so() -> None:
    with pytest.raises(ModelError, match=r"the hub cannot be reached.* copy the model's folder"):
        find_folder("nobody/no-such-model")  # HF_HUB_OFFLINE is set for all tests


def test_a_name_that_the_hub_does_not_know_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError("a gated model")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelError, match=r"did not give a model of this name \(PermissionError\); is the name"):
        find_folder("nobody/no-such-model")
