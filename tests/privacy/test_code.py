"""No file that flipkd is given runs code: not a pickle, not a module of a model folder, not a template."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import pickle
import re
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner

import flipkd
from flipkd.cli import main
from flipkd.config import EncoderOptions, RunOptions, TeachConfig
from flipkd.data.calibration import read_calibration
from flipkd.data.records import render_texts
from flipkd.data.template import template_fields
from flipkd.distill.config import LossOptions, TrainConfig
from flipkd.distill.train import train
from flipkd.errors import ConfigError, ModelError
from flipkd.models.adapter import STUDENT_FILE, load_merged, load_student, new_student, save_student
from flipkd.models.cross_encoder import load_cross_encoder
from flipkd.models.encoder import load_encoder
from flipkd.models.llm import read_llm
from flipkd.models.llm_options import LlmOptions
from flipkd.models.llm_prompt import read_prompt
from flipkd.models.options import StudentOptions
from flipkd.models.trust import check_code
from flipkd.run.encode import encoder_fingerprint
from flipkd.run.plan_teach import plan_teach
from tests.privacy.canary import World

# What trainers leave beside a model. Each would write a file if it were read.
PICKLES = ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.pkl",
           "adapter_model.bin", "calibration.joblib", "calibration.skops", "new_embeddings.bin")  # fmt: skip


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.mark),))


def plant(folder: Path, mark: Path) -> None:
    """Pickles, and Python files with the names that libraries import."""
    for name in PICKLES:
        if name.endswith((".bin", ".pt", ".pth")):
            torch.save({"x": Evil(mark)}, folder / name)
        else:
            (folder / name).write_bytes(pickle.dumps(Evil(mark)))
    code = f"import os\nos.mkdir({str(mark)!r})\nclass Model: pass\nclass Config: pass\n"
    for name in ("evil.py", "modeling.py", "configuration.py", "tokenization.py", "sitecustomize.py", "__init__.py"):
        (folder / name).write_text(code)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What stands here after code ran."""
    return tmp_path / "ran"


@pytest.fixture
def encoder(minilm_dir: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "encoder"
    shutil.copytree(minilm_dir, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    (copy / "model.safetensors").symlink_to(minilm_dir / "model.safetensors")
    return copy


@pytest.fixture
def base(base_dir: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "base"
    shutil.copytree(base_dir, copy)
    return copy


@pytest.fixture(scope="module")
def cross_encoder(minilm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of random weights."""
    import transformers

    folder = tmp_path_factory.mktemp("teacher")
    config = transformers.BertConfig(
        vocab_size=30522, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=1
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(minilm_dir).save_pretrained(folder)
    return folder


@pytest.fixture
def teacher(cross_encoder: Path, tmp_path: Path) -> Path:
    shutil.copytree(cross_encoder, tmp_path / "teacher")
    return tmp_path / "teacher"


def loaders(encoder: Path, teacher: Path, base: Path, trusts: bool) -> dict[str, tuple[Path, Callable[[], object]]]:
    """Everything that loads a model: its folder, and the call."""
    student = StudentOptions(str(base), layer=1, dimension=4, rank=2, trust_remote_code=trusts)
    llm = LlmOptions(str(base), trust_remote_code=trusts)
    return {
        "encoder": (encoder, lambda: load_encoder(encoder, trust_remote_code=trusts)),
        "encode": (encoder, lambda: encoder_fingerprint(EncoderOptions(str(encoder), trust_remote_code=trusts))),
        "teacher": (teacher, lambda: load_cross_encoder(teacher, trust_remote_code=trusts)),
        "student": (base, lambda: new_student(student)),
        "llm": (base, lambda: read_llm(llm)),
    }


KINDS = ("encoder", "encode", "teacher", "student", "llm")


@pytest.mark.parametrize("kind", KINDS)
def test_pickles_and_code_beside_the_weights_are_never_opened(
    encoder: Path, teacher: Path, base: Path, mark: Path, kind: str
) -> None:
    folder, load = loaders(encoder, teacher, base, False)[kind]
    plant(folder, mark)
    load()
    assert not mark.exists()
    pickle.loads((folder / "model.pkl").read_bytes())
    assert mark.exists(), "the trap works"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pkl"])
def test_a_folder_of_pickles_alone_is_refused(
    encoder: Path, teacher: Path, base: Path, mark: Path, kind: str, name: str
) -> None:
    folder, load = loaders(encoder, teacher, base, False)[kind]
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    torch.save({"x": Evil(mark)}, folder / name)
    with pytest.raises(ModelError, match=rf"has only {name}, and only safetensors are read.*safe_serialization=True"):
        load()
    assert not mark.exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_the_folders_own_is_refused_unless_it_is_trusted(
    encoder: Path, teacher: Path, base: Path, mark: Path, kind: str, file: str
) -> None:
    """Also where transformers has a class of its own for the model, which it would take without a word."""
    folder, load = loaders(encoder, teacher, base, False)[kind]
    plant(folder, mark)
    classes = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoTokenizer": ["evil.Model", "evil.Model"]}
    edit(folder / file, auto_map=classes)
    with pytest.raises(ModelError, match=rf"{file}: auto_map asks for Python code.*--trust-remote-code"):
        load()
    assert not mark.exists()
    check_code(folder, trust_remote_code=True)
    config = json.loads((folder / file).read_text())
    del config["auto_map"]
    (folder / file).write_text(json.dumps(config))
    load()


def test_code_in_a_nested_configuration(encoder: Path) -> None:
    edit(encoder / "config.json", text_config={"inner": [{"auto_map": {"AutoConfig": "a.B"}}]})
    with pytest.raises(ModelError, match="auto_map"):
        load_encoder(encoder)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "run/adapter"
    save_student(new_student(StudentOptions(str(base), layer=1, dimension=4, rank=2, whole_tower=True)), folder)
    return folder


def test_an_adapter_cannot_allow_the_code_of_its_base(adapter: Path, base: Path, mark: Path) -> None:
    """``student.json`` keeps what the trainer allowed; whoever loads it must allow it himself."""
    from flipkd.models.adapter import base_fingerprint

    plant(base, mark)
    edit(base / "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    facts = json.loads((adapter / STUDENT_FILE).read_text())
    facts["options"]["trust_remote_code"] = True
    facts["base_fingerprint"] = base_fingerprint(base)
    (adapter / STUDENT_FILE).write_text(json.dumps(facts))
    for load in (
        lambda: load_student(adapter),
        lambda: load_merged(adapter),
        lambda: read_llm(LlmOptions(str(adapter.parent))),
    ):
        with pytest.raises(ModelError, match="auto_map asks for Python code"):
            load()
    (adapter.parent / "run.json").write_text(json.dumps({"config": {}}))
    done = CliRunner().invoke(main, ["export", "--run", str(adapter.parent), "--output", str(adapter.parent / "x")])
    assert done.exit_code == 1
    assert "auto_map asks for Python code" in done.output
    assert not mark.exists()


def test_an_adapter_of_pickles_is_refused(adapter: Path, mark: Path) -> None:
    plant(adapter, mark)
    load_student(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    for load in (
        lambda: load_student(adapter),
        lambda: load_merged(adapter),
        lambda: read_llm(LlmOptions(str(adapter))),
    ):
        with pytest.raises(ModelError, match=r"adapter_model\.safetensors|holds no whole student"):
            load()
    assert not mark.exists()


def test_a_base_that_is_an_adapter_is_refused(base: Path) -> None:
    (base / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/somewhere/else"}))
    for load in (lambda: new_student(StudentOptions(str(base), layer=1)), lambda: read_llm(LlmOptions(str(base)))):
        with pytest.raises(ModelError, match="holds an adapter; merge it"):
            load()


def test_teach_refuses_before_any_work(teacher: Path, world: World, tmp_path: Path) -> None:
    edit(teacher / "config.json", auto_map={"AutoConfig": "evil.Config"})
    with pytest.raises(ModelError, match="auto_map"):
        plan_teach(TeachConfig(EncoderOptions(str(teacher)), str(world.inline), str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", ["pkl", "joblib", "skops", "json"])
def test_a_pickled_calibration_is_refused(tmp_path: Path, mark: Path, suffix: str) -> None:
    path = tmp_path / f"calibration.{suffix}"
    path.write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(ConfigError, match="expected a JSON object"):
        read_calibration(str(path))
    assert not mark.exists()


def test_what_train_writes_is_safetensors_and_json(base: Path, world: World, tmp_path: Path) -> None:
    options = StudentOptions(str(base), layer=1, dimension=4, rank=2)
    usual: dict[str, Any] = {"steps": 2, "batch_pairs": 8, "checkpoint_every": 1, "evaluate_every": 1, "device": "cpu"}
    usual["run"] = RunOptions(threads=1)
    config = TrainConfig(
        student=options, loss=LossOptions("cosent"), pairs=str(world.inline), output=str(tmp_path / "run"), **usual
    )
    train(config)
    written = {path for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {path.suffix for path in written} <= {".safetensors", ".json", ".jsonl", ".png", ""}
    assert {path.name for path in written if not path.suffix} <= {"lock"}
    tensors = [path for path in written if path.suffix == ".safetensors"]
    assert {path.name for path in tensors} == {
        "adapter.safetensors", "optimizer.safetensors", "adapter_model.safetensors"
    }  # fmt: skip
    for path in tensors:
        header_bytes = int.from_bytes(path.read_bytes()[:8], "little")
        json.loads(path.read_bytes()[8 : 8 + header_bytes])


# What runs what a file says. Ray moves work units between flipkd's own processes as pickles: that module alone.
_FORBIDDEN = {"load", "loads", "Unpickler"}
_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "skops", "shelve", "marshal", "torch"}
_CALLS = {"eval", "exec", "compile", "__import__"}
_YAML = {"load", "load_all", "unsafe_load", "full_load", "Loader", "UnsafeLoader", "FullLoader"}


def dangerous(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            if (node.value.id in _MODULES and node.attr in _FORBIDDEN) or (
                node.value.id == "yaml" and node.attr in _YAML
            ):
                found.append(name)
            if name in ("os.system", "os.popen", "subprocess.getoutput", "tempfile.mktemp"):
                found.append(name)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _CALLS:
            found.append(node.func.id)
        elif isinstance(node, ast.ImportFrom) and node.module in _MODULES:
            found += [f"{node.module}.{alias.name}" for alias in node.names if alias.name in _FORBIDDEN]
        elif isinstance(node, ast.keyword) and node.arg == "shell":
            found.append("shell=")
        elif isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only"):
            found.append(f"{node.arg}=")
    return found


def test_nothing_in_flipkd_can_load_a_pickle_or_run_a_text() -> None:
    root = Path(flipkd.__file__).parent
    found = {path.relative_to(root).as_posix(): dangerous(path.read_text()) for path in root.rglob("*.py")}
    assert {name: calls for name, calls in found.items() if calls} == {
        "data/yaml_files.py": ["yaml.load"],  # with a subclass of SafeLoader: test_config_files.py
        "run/cluster.py": ["pickle.loads", "pickle.loads"],
    }
    assert len(found) > 100
    trap = "import torch\ntorch.load('x')\nfrom pickle import loads\neval('1')\nf(shell=True)"
    assert sorted(dangerous(trap)) == ["eval", "pickle.loads", "shell=", "torch.load"]


class TestTemplates:
    EVIL = (
        "{name.__class__}", "{name[0]}", "{name!r}", "{name!r:>{width}}", "{name:>99999999999}", "{}", "{name:{name}}",
        "{name.__init__.__globals__}", "{0.__class__}", "{name", "}", "{name!}", "{{name}}", "{a:%s}",
    )  # fmt: skip

    @pytest.mark.parametrize("template", EVIL)
    def test_it_reaches_columns_alone(self, template: str) -> None:
        """What looks like more than a name is a name; what is none is refused."""
        if not re.fullmatch(r"\{[^{}]+\}", template):
            with pytest.raises(ConfigError, match="--template"):
                template_fields(template)
            return
        (field,) = template_fields(template)
        assert template == f"{{{field}}}"
        with pytest.raises(KeyError):
            render_texts(pa.table({"name": ["x"], "a": ["y"]}), template)
        assert render_texts(pa.table({"name": ["x"], field: ["y"]}), template).values.to_pylist() == ["y"]

    def test_a_number_is_the_name_of_a_column(self) -> None:
        assert template_fields("{0}") == ["0"]
        with pytest.raises(KeyError):
            render_texts(pa.table({"name": ["x"]}), "{0}")

    @pytest.mark.parametrize("template", [template for template in EVIL if "left" not in template])
    def test_a_prompt_reaches_the_two_texts_alone(self, template: str, tmp_path: Path) -> None:
        path = tmp_path / "prompt.txt"
        for name in ("left", "right", "name"):
            path.write_text("{left} {right}? " + template.replace("name", name))
            if template == "{{name}}":  # braces, and no placeholder
                assert read_prompt(path, ("no", "yes"), False).after == f"? {{{name}}}"
                continue
            with pytest.raises(ConfigError, match="--prompt-file"):
                read_prompt(path, ("no", "yes"), False)

    def test_neither_width_nor_length_costs_memory_or_time(self, tmp_path: Path) -> None:
        started = time.monotonic()
        tracemalloc.start()
        path = tmp_path / "prompt.txt"
        for template in (
            "{name:>999999999999}",
            "{name!r:" + "{w}" * 10_000 + "}",
            "{" * 200_001,
            "{name:" + "x" * 10**6 + "}",
        ):
            with contextlib.suppress(ConfigError):
                template_fields(template)
            path.write_text(template)
            with pytest.raises(ConfigError):
                read_prompt(path, ("no", "yes"), False)
        assert tracemalloc.get_traced_memory()[1] < 50e6
        tracemalloc.stop()
        assert time.monotonic() - started < 5

    def test_values_are_not_templates(self) -> None:
        table = pa.table({"name": ["{city}", "{0.__class__}", "%s{"], "city": ["x", "y", "z"]})
        assert render_texts(table, "{name}|{city}").values.to_pylist() == ["{city}|x", "{0.__class__}|y", "%s{|z"]
