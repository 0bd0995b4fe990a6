"""An exported encoder is the student: for us, for sentence-transformers, in float32 and bf16."""

from __future__ import annotations

import json
import random
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from flipkd.cli import main
from flipkd.config import RunOptions
from flipkd.distill.config import TrainConfig
from flipkd.distill.train import train
from flipkd.errors import ConfigError, InputError, ModelError, OutputError
from flipkd.models.adapter import FAMILIES, load_student, new_student, save_student
from flipkd.models.encoder import load_encoder
from flipkd.models.export import MIN_COSINE, export, export_student
from flipkd.models.folder import folder_fingerprint
from flipkd.models.options import StudentOptions
from flipkd.models.student import Student
from tests.conftest import WriteParquet
from tests.models.test_packed import CLASSES, WINDOWED, shaken
from tests.small_models import make_base

Descriptions = list[tuple[str, str, str]]
TEXTS = [
    "renal failure",
    "x",
    "acute kidney failure, " * 9,
    "chronic kidney disease stage four",
    "sépsis 糖尿病",
    "b 12",
]


def cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    left, right = left.astype(np.float64), right.astype(np.float64)
    result: np.ndarray = (left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)
    return result


def make_student(base: Path, **options: Any) -> Student:
    usual = {"layer": 2, "dimension": 8, "rank": 4, "max_length": 40}
    return shaken(new_student(StudentOptions(str(base), **{**usual, **options})))


@pytest.fixture(scope="module")
def pairs(icd9: Descriptions) -> list[tuple[str, str]]:
    """200 real pairs of a long and a short description; every second one is of neighbouring codes."""
    places = random.Random(5).sample(range(len(icd9) - 1), 200)
    return [(icd9[place][1], icd9[place + number % 2][2]) for number, place in enumerate(places)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_students_vectors(family: str, tmp_path: Path, tokenizer_dir: Path) -> None:
    window: dict[str, Any] = {"sliding_window": 7} if family in WINDOWED else {}
    base = make_base(tmp_path / "base", tokenizer_dir, 0, CLASSES[family], num_hidden_layers=4, **window)
    projections = ("q", "k", "v")
    for number, pooling in enumerate(("mean", "last", "weighted")):
        attention = "full" if number and family in ("llama", "qwen2", "qwen3") else "causal"
        projection = projections[(len(family) + number) % 3]
        student = make_student(base, pooling=pooling, projection=projection, attention=attention)
        wanted = student.encode(TEXTS)
        found = export_student(student, tmp_path / pooling, TEXTS)
        assert found["tolerance"]["float32"] >= 0.999999
        encoder = load_encoder(tmp_path / pooling)
        assert (encoder.dim, encoder.max_length) == (8, 40)
        np.testing.assert_allclose(encoder.encode(TEXTS), wanted, atol=1e-5)
        np.testing.assert_array_equal(encoder.encode_texts(TEXTS).truncated, student.tokenize(TEXTS).truncated)

        peer = SentenceTransformer(str(tmp_path / pooling), device="cpu")
        assert peer.max_seq_length == 40
        alone = np.stack([np.asarray(peer.encode(text)) for text in TEXTS])
        assert cosines(alone, wanted).min() >= 0.99999
        together = np.asarray(peer.encode(TEXTS, batch_size=len(TEXTS)))  # it pads them
        assert cosines(together, wanted).min() >= MIN_COSINE

        # The test must be able to fail: without LoRA, and one block lower or higher, the vectors are others.
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                if "lora_B" in name:
                    parameter.zero_()
        assert cosines(student.encode(TEXTS), wanted).min() < 0.999


def test_the_folder_holds_the_cut_model_and_no_chat_template(llama_dir: Path, tmp_path: Path) -> None:
    assert (llama_dir / "chat_template.jinja").exists()
    student = make_student(llama_dir)
    output = tmp_path / "encoder"
    found = export_student(student, output, TEXTS, {"run": 7}, template="{name} | {address}")
    config = json.loads((output / "config.json").read_text())
    assert (config["architectures"], config["num_hidden_layers"], config["dtype"]) == (["LlamaModel"], 2, "float32")
    assert not {"_name_or_path", "_attn_implementation", "attn_implementation"} & set(config)
    weights = load_file(output / "model.safetensors")
    assert {name.split(".")[1] for name in weights if name.startswith("layers.")} == {"0", "1"}
    assert len(weights) == 2 * 9 + 2
    assert not [name for name in weights if "lora" in name or "base_layer" in name]
    torch.testing.assert_close(weights["norm.weight"], student.decoder.layers[2].input_layernorm.weight)
    assert not [file for file in output.rglob("*") if "chat_template" in file.name]
    assert "chat_template" not in (output / "tokenizer_config.json").read_text()
    settings = json.loads((output / "sentence_bert_config.json").read_text())
    assert list(settings["modality_config"]) == ["text"]
    assert student.tokenizer.chat_template  # the student's own is as it was

    facts = json.loads((output / "flipkd.json").read_text())
    assert facts == {key: found[key] for key in facts}
    assert facts["template"] == "{name} | {address}"
    assert (facts["layer"], facts["dimension"], facts["max_length"], facts["calibration"]) == (2, 8, 40, None)
    assert facts["provenance"]["run"] == {"run": 7}
    assert facts["provenance"]["base_fingerprint"] == student.base_fingerprint
    assert facts["provenance"]["student"]["rank"] == 4
    assert not [text for text in TEXTS if len(text) > 5 and text in (output / "flipkd.json").read_text()]
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 for path in [output, *output.rglob("*")])
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]

    before = folder_fingerprint(output)
    assert before == facts["fingerprint"]
    (output / "flipkd.json").write_text(json.dumps({**facts, "calibration": {"slope": 2.0, "intercept": 1.0}}))
    assert folder_fingerprint(output) == before


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_base_without_a_pad_token_on_both_padding_sides(
    tmp_path: Path, tokenizer_dir: Path, padding_side: str, pooling: str
) -> None:
    """transformers#34055, transformers#35909, sentence-transformers#3208."""
    base = make_base(tmp_path / "base", tokenizer_dir, 0)
    file = base / "tokenizer_config.json"
    values = json.loads(file.read_text())
    del values["pad_token"]
    file.write_text(json.dumps({**values, "padding_side": padding_side}))
    student = make_student(base, pooling=pooling)
    assert student.tokenizer.pad_token is None
    export_student(student, tmp_path / "encoder", TEXTS)
    peer = SentenceTransformer(str(tmp_path / "encoder"), device="cpu")
    assert peer.tokenizer.padding_side == padding_side
    assert cosines(np.asarray(peer.encode(TEXTS)), student.encode(TEXTS)).min() >= MIN_COSINE
    assert student.tokenizer.pad_token is None


def check_merged_against_unmerged(
    base: Path, output: Path, pairs: list[tuple[str, str]], float32: float, bf16: float, **options: Any
) -> None:
    """Scores of the adapter unmerged (the student) and merged (the encoder), in both number formats."""
    student = make_student(base, **options)
    texts = [text for pair in pairs for text in pair]
    found = export_student(student, output, texts)
    assert found["tolerance"]["float32"] >= float32 >= MIN_COSINE
    assert found["tolerance"]["bf16"] >= bf16
    unmerged = student.encode(texts)
    half = new_student(StudentOptions(**{**vars(student.options), "dtype": "bf16"}))
    half.load_state_dict(student.state_dict())
    vectors = {
        ("unmerged", "float32"): unmerged,
        ("unmerged", "bf16"): half.encode(texts),
        ("merged", "float32"): load_encoder(output).encode(texts),
        ("merged", "bf16"): load_encoder(output, dtype="bf16").encode(texts),
    }
    for (_, dtype), rows in vectors.items():
        lowest = float(cosines(rows, unmerged).min())
        assert lowest >= (float32 if dtype == "float32" else bf16)
        # A score moves by at most what its two vectors move.
        scores, wanted = ((v[0::2] * v[1::2]).sum(1) for v in (rows, unmerged))
        assert np.abs(scores - wanted).max() <= 2 * np.sqrt(2 * (1 - min(lowest, 1))) + 1e-5
    for dtype in ("float32", "bf16"):  # what is published is what anyone measures
        published = found["tolerance"][dtype]
        assert cosines(vectors["merged", dtype], unmerged).min() >= published - 1e-6


def test_merged_equals_unmerged(llama_dir: Path, tmp_path: Path, pairs: list[tuple[str, str]]) -> None:
    """peft#2502, peft#1388."""
    check_merged_against_unmerged(llama_dir, tmp_path / "encoder", pairs, float32=0.999999, bf16=0.95)


@pytest.mark.slow
def test_merged_equals_unmerged_with_the_real_model(
    smollm2_dir: Path, tmp_path: Path, pairs: list[tuple[str, str]]
) -> None:
    """peft#2502, peft#1388."""
    shape = {"layer": 10, "dimension": 128, "rank": 64, "max_length": 128}
    check_merged_against_unmerged(smollm2_dir, tmp_path / "encoder", pairs, float32=0.99999, bf16=0.99, **shape)
    texts = [text for pair in pairs[:20] for text in pair]
    peer = SentenceTransformer(str(tmp_path / "encoder"), device="cpu")
    assert cosines(np.asarray(peer.encode(texts)), load_encoder(tmp_path / "encoder").encode(texts)).min() >= MIN_COSINE


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_the_real_model_and_the_student_is_left_as_it_was(tmp_path: Path, smollm2_dir: Path, dtype: str) -> None:
    student = make_student(smollm2_dir, dtype=dtype, dimension=32)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    options, vectors = student.options, student.encode(TEXTS)
    found = export_student(student, tmp_path / "encoder", TEXTS)
    assert found["tolerance"]["float32"] >= 0.999999
    assert 0.99 <= found["tolerance"]["bf16"] < 1
    # Its own weights are bfloat16, and others compute in what is stored.
    assert {value.dtype for value in load_file(tmp_path / "encoder/model.safetensors").values()} == {torch.float32}
    assert json.loads((tmp_path / "encoder/config.json").read_text())["dtype"] == "float32"
    assert "Apache License" in (tmp_path / "encoder/LICENSE").read_text()
    after = student.state_dict()
    assert all(value.dtype == before[name].dtype and torch.equal(value, before[name]) for name, value in after.items())
    assert student.options is options
    np.testing.assert_array_equal(student.encode(TEXTS), vectors)
    peer = SentenceTransformer(str(tmp_path / "encoder"), device="cpu")
    assert cosines(np.asarray(peer.encode(TEXTS)), load_encoder(tmp_path / "encoder").encode(TEXTS)).min() >= MIN_COSINE


def test_an_encoder_that_is_not_the_student_is_not_published(llama_dir: Path, tmp_path: Path) -> None:
    """Beyond the tolerance nothing is exported: peft#2502, peft#1388."""
    student = make_student(llama_dir)
    export_student(student, tmp_path / "encoder", TEXTS)
    before = folder_fingerprint(tmp_path / "encoder")
    # What the student computes is no longer what its weights say, as with a module that the export does not know.
    student.decoder.layers[1].mlp.register_forward_hook(lambda _, __, output: output * 1.3)
    for name in ("other", "encoder"):
        with pytest.raises(ModelError, match=r"lowest cosine 0\.\d+ over \d+ texts"):
            export_student(student, tmp_path / name, TEXTS, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]
    assert folder_fingerprint(tmp_path / "encoder") == before


def test_what_is_there_is_not_overwritten(llama_dir: Path, tmp_path: Path) -> None:
    student = make_student(llama_dir)
    export_student(student, tmp_path / "encoder", TEXTS)
    (tmp_path / "encoder" / "stale").write_text("")
    with pytest.raises(OutputError, match="--overwrite"):
        export_student(student, tmp_path / "encoder", TEXTS)
    assert (tmp_path / "encoder" / "stale").exists()
    with pytest.raises(OutputError, match=r"not an encoder that flipkd wrote, or holds more \(such as stale\)"):
        export_student(student, tmp_path / "encoder", TEXTS, overwrite=True)
    (tmp_path / "encoder" / "stale").unlink()
    before = (tmp_path / "encoder" / "flipkd.json").stat().st_ino
    export_student(student, tmp_path / "encoder", TEXTS, overwrite=True)
    assert (tmp_path / "encoder" / "flipkd.json").stat().st_ino != before
    assert not (tmp_path / "encoder" / "stale").exists()

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("kept")
    (tmp_path / "file").write_text("kept")
    for name in ("mine", "file"):
        with pytest.raises(OutputError, match="is not an encoder"):
            export_student(student, tmp_path / name, TEXTS, overwrite=True)
    assert (tmp_path / "mine" / "letter.txt").read_text() == (tmp_path / "file").read_text() == "kept"
    with pytest.raises(ConfigError):
        export_student(student, tmp_path / "other", TEXTS, template="{name")
    with pytest.raises(OutputError, match="local disk"):
        export_student(student, "memory://bucket/encoder", TEXTS)


def test_only_our_own_texts_and_a_text_without_tokens(llama_dir: Path, tmp_path: Path) -> None:
    student = make_student(llama_dir)
    assert export_student(student, tmp_path / "one", [])["checked_texts"] >= 5
    assert export_student(student, tmp_path / "two", [""])["checked_texts"] >= 5
    encoded = load_encoder(tmp_path / "two").encode_texts(["", "a"])
    assert not encoded.vectors[0].any()


def test_sentence_transformers_is_not_needed(llama_dir: Path, tmp_path: Path) -> None:
    student = make_student(llama_dir)
    save_student(student, tmp_path / "adapter")
    code = (
        "import sys; sys.modules['sentence_transformers'] = None\n"
        "from flipkd.models.adapter import load_student\n"
        "import flipkd\n"
        "from flipkd.models.export import export_student\n"
        "export_student(load_student(sys.argv[1]), sys.argv[2], ['a fever'])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "adapter"), str(tmp_path / "encoder")], check=True)
    np.testing.assert_allclose(load_encoder(tmp_path / "encoder").encode(TEXTS), student.encode(TEXTS), atol=1e-5)


@pytest.fixture
def run_dir(llama_dir: Path, write_parquet: WriteParquet, pairs: list[tuple[str, str]], tmp_path: Path) -> Path:
    """A real run of two steps."""
    labels = [1 - number % 2 for number in range(len(pairs))]
    path = write_parquet(
        "pairs/part-0.parquet",
        {
            "a": [left for left, _ in pairs],
            "b": [right for _, right in pairs],
            "label": labels,
            "teacher_score": pa.array([0.2 + 0.6 * label for label in labels], pa.float32()),
        },
    )
    student = StudentOptions(str(llama_dir), layer=2, dimension=8, rank=4)
    config = TrainConfig(
        str(path.parent), str(tmp_path / "run"), student, left_text="a", right_text="b", steps=2, batch_pairs=16,
        device="cpu", run=RunOptions(threads=1, progress=False),
    )  # fmt: skip
    train(config)
    return tmp_path / "run"


def test_export_of_a_run(run_dir: Path, tmp_path: Path, pairs: list[tuple[str, str]]) -> None:
    call = ["export", "--run", str(run_dir), "--output", str(tmp_path / "encoder")]
    result = CliRunner().invoke(main, [*call, "--json", "--template", "{name}"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["checked_texts"] > 200  # of the run's own data
    assert found["template"] == "{name}"
    facts = json.loads((run_dir / "run.json").read_text())
    assert found["provenance"]["run"]["fingerprint"] == facts["fingerprint"]
    assert found["provenance"]["base_fingerprint"] == facts["base_fingerprint"]
    texts = [left for left, _ in pairs]
    wanted = load_student(run_dir / "adapter").encode(texts)
    np.testing.assert_allclose(load_encoder(tmp_path / "encoder").encode(texts), wanted, atol=1e-5)

    again = CliRunner().invoke(main, call)
    assert again.exit_code == 1
    assert "pass --overwrite" in again.output
    again = CliRunner().invoke(main, [*call, "--overwrite"])
    assert again.exit_code == 0
    assert "lowest cosine to the student over" in again.output


def test_export_when_the_data_has_gone_or_the_run_is_not_finished(
    run_dir: Path, llama_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "pairs/part-0.parquet").unlink()
    moved = make_base(tmp_path / "moved", llama_dir, 0)
    assert export(run_dir, tmp_path / "encoder", base=str(moved))["checked_texts"] < 10
    other = make_base(tmp_path / "other", llama_dir, 1)
    with pytest.raises(ModelError, match="another base"):
        export(run_dir, tmp_path / "second", base=str(other))
    (run_dir / "adapter").rename(run_dir / "gone")
    with pytest.raises(InputError, match="not finished"):
        export(run_dir, tmp_path / "second")
    with pytest.raises(InputError, match="not the local folder of a training run"):
        export(tmp_path, tmp_path / "second")
    assert not (tmp_path / "second").exists()
