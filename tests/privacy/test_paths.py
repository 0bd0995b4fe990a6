"""No file that flipkd reads can lead it out of its folder, and ``--overwrite`` deletes what flipkd made and no more."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flipkd.config import EncodeConfig, EncoderOptions, RunOptions, ScoreConfig
from flipkd.data.calibration import read_calibration
from flipkd.data.find import find_shards
from flipkd.data.folders import SEAL, check_replaceable, is_whole, publish_folder, remove_unpublished
from flipkd.data.location import open_location
from flipkd.distill.run_folder import RUN_FILE, RunFolder
from flipkd.errors import FlipkdError, InputError, ModelError, OutputError
from flipkd.models.export import export
from flipkd.models.folder import read_folder
from flipkd.models.llm import read_llm
from flipkd.models.llm_options import LlmOptions
from flipkd.models.teacher import read_cross_encoder, teacher_kind
from flipkd.report.config import EvaluateConfig
from flipkd.report.evaluate import evaluate
from flipkd.run.combination import read_combination
from flipkd.run.encode import encode
from flipkd.run.lock import locked
from flipkd.run.manifest import MANIFEST, PLAN
from flipkd.run.output import list_outputs
from flipkd.run.score import score
from flipkd.run.status import status
from flipkd.vectors.layout import HEADER_FILE
from flipkd.vectors.store import VectorStore
from tests.privacy.canary import World, write

ESCAPES = ["../secret", "/etc/passwd", "a/../../secret", "..", "a\0b", "link", "~/x", "file:///etc/passwd"]
words = st.sampled_from([*ESCAPES, "fingerprint", "rows", "", "0"])
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
fuzz = settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def spoiled(draw: st.DrawFn, whole: dict[str, Any]) -> bytes:
    """A JSON file with some of its values replaced, dropped or added; or something that is not one."""
    found = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 3))):
        place = found
        while True:  # down to a value, or a level
            name = draw(st.sampled_from([*sorted(place), "more"]))
            if isinstance(place.get(name), dict) and draw(st.booleans()):
                place = place[name]
                continue
            break
        if draw(st.booleans()):
            place[name] = draw(values)
        else:
            place.pop(name, None)
    data = json.dumps(found).encode()
    return draw(st.sampled_from([data, data, data, data[:-3], b"[" * 100_000, b"\xff\xfe", b"[]", b"3", b""]))


@contextmanager
def only_inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing called ``secret`` or ``passwd`` is opened, mapped, asked for, or deleted."""
    opened: list[str] = []
    originals = {
        name: getattr(os, name) for name in ("open", "stat", "unlink", "rename", "replace", "rmdir", "scandir")
    }

    def watched(name: str) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            if any(word in str(path) for word in ("secret", "passwd")):
                opened.append(f"{name} {path}")
            return originals[name](path, *arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in originals:
            patch.setattr(os, name, watched(name))
        yield
    assert opened == []
    del folder


def ends_clearly(call: Callable[[], object], kind: type[FlipkdError], *names: str) -> None:
    """It ends well, or with an error of this kind that has one of the names in it."""
    try:
        call()
    except FlipkdError as error:
        said = str(error)
        if not isinstance(error, kind) or not any(name in said for name in names):
            raise


class TestSeals:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        publish_folder(tmp_path / "made", lambda folder: (folder / "a").write_text("x") and None)
        (tmp_path / "secret").write_text("x")
        (tmp_path / "made/link").symlink_to(tmp_path / "secret")
        return tmp_path / "made"

    def test_a_name_that_leads_out_is_not_looked_at(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        seal = json.loads((folder / SEAL).read_text())
        assert is_whole(folder)
        for name in ESCAPES:
            # Size and digest of the file outside are right: whoever follows the name finds it whole.
            (folder / SEAL).write_text(json.dumps({**seal, name: seal["a"]}))
            with only_inside(folder, monkeypatch):
                assert not is_whole(folder)

    @fuzz
    @given(data=spoiled({"a": [1, "0" * 64], "b": [0, "x"]}))
    def test_damage(self, folder: Path, data: bytes) -> None:
        (folder / SEAL).write_bytes(data)
        assert is_whole(folder) in (True, False)

    def test_only_what_was_published_is_replaced(self, folder: Path) -> None:
        (folder / "link").unlink()
        check_replaceable(folder, "a report")
        for foreign in ("mine.txt", "sub/mine.txt"):
            (folder / foreign).parent.mkdir(exist_ok=True)
            (folder / foreign).write_text("mine")
            with pytest.raises(
                OutputError, match=f"not a report that flipkd wrote, or holds more \\(such as {foreign}"
            ):
                check_replaceable(folder, "a report")
            (folder / foreign).unlink()
        (folder / SEAL).unlink()
        with pytest.raises(OutputError, match="such as a\\)"):
            check_replaceable(folder, "a report")

    def test_hidden_folders_of_others_stay(self, tmp_path: Path) -> None:
        ours, theirs = f".a.{'0' * 32}.tmp", [".git.tmp", ".tmp", ".a.tmp", f".a.{'0' * 31}.tmp", f"a.{'0' * 32}.tmp"]
        for name in (ours, *theirs):
            (tmp_path / name).mkdir()
        (tmp_path / "real").mkdir()
        (tmp_path / f".b.{'1' * 32}.tmp").symlink_to(tmp_path / "real")
        remove_unpublished(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*theirs, "real", f".b.{'1' * 32}.tmp"])

    def test_a_linked_target_is_replaced_where_it_lies(self, tmp_path: Path) -> None:
        publish_folder(tmp_path / "disk/made", lambda folder: (folder / "a").write_text("1") and None)
        (tmp_path / "link").symlink_to(tmp_path / "disk/made")
        publish_folder(tmp_path / "link", lambda folder: (folder / "a").write_text("2") and None)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "disk/made/a").read_text() == "2"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]
        assert [path.name for path in (tmp_path / "disk").iterdir()] == ["made"]


@pytest.fixture
def job(world: World, minilm_dir: Path, tmp_path: Path) -> ScoreConfig:
    """A finished score job over a store."""
    out = tmp_path / "out"
    encode(EncodeConfig(EncoderOptions(str(minilm_dir)), str(world.records), str(out / "store")))
    config = ScoreConfig(str(world.pairs), str(out / "scores"), store=str(out / "store"))
    score(config)
    return config


class TestJobs:
    @pytest.mark.parametrize("name", [MANIFEST, PLAN])
    def test_manifest_and_plan(self, job: ScoreConfig, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        path = Path(job.output) / name
        whole = json.loads(path.read_text())
        outputs = {file.name: file.read_bytes() for file in Path(job.output).glob("*.parquet")}

        @fuzz
        @given(data=spoiled(whole))
        def check(data: bytes) -> None:
            path.write_bytes(data)
            with only_inside(path, monkeypatch):
                ends_clearly(lambda: status(job.output), InputError, str(path), "not an output")
                score(job)  # neither decides what is done
            assert {file.name: file.read_bytes() for file in Path(job.output).glob("*.parquet")} == outputs
            assert json.loads(path.read_text())["fingerprint"] == whole["fingerprint"]

        check()

    def test_a_value_is_missing_in_a_manifest_or_plan(self, job: ScoreConfig) -> None:
        for name in (MANIFEST, PLAN):
            path = Path(job.output) / name
            whole = json.loads(path.read_text())
            for missing in whole:
                path.write_text(json.dumps({key: value for key, value in whole.items() if key != missing}))
                ends_clearly(lambda: status(job.output), InputError, str(path), "not an output")
            path.write_text(json.dumps(whole))

    def test_store_header(self, job: ScoreConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        path = Path(str(job.store)) / HEADER_FILE
        whole = json.loads(path.read_text())

        @fuzz
        @given(data=spoiled(whole))
        def check(data: bytes) -> None:
            path.write_bytes(data)
            with only_inside(path, monkeypatch):
                ends_clearly(lambda: VectorStore.open(path.parent), InputError, str(path.parent))

        check()

    def test_a_damaged_header_is_a_clear_error_and_is_made_again(
        self, job: ScoreConfig, world: World, minilm_dir: Path
    ) -> None:
        again = EncodeConfig(EncoderOptions(str(minilm_dir)), str(world.records), str(job.store))
        header = Path(str(job.store)) / HEADER_FILE
        for data in (b"{", b"[]", b'{"format_version": 1}'):
            header.write_bytes(data)
            with pytest.raises(InputError, match=r"store\.json"):
                score(job)
            assert encode(again)["complete"]  # flipkd has worked in this folder: what is damaged is its own
            assert score(job)["complete"]
        header.write_bytes(b'{"format_version": 9}')  # a newer flipkd's: not damaged
        for attempt in (lambda: score(job), lambda: encode(again)):
            with pytest.raises(InputError, match=r"store\.json is of format 9"):
                attempt()
        encode(replace(again, run=RunOptions(overwrite=True)))
        assert score(job)["complete"]

    def test_a_header_in_a_folder_that_is_not_ours_stays(
        self, job: ScoreConfig, world: World, minilm_dir: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "theirs").mkdir()
        (tmp_path / "theirs" / HEADER_FILE).write_text("{}")
        with pytest.raises(InputError, match=r"store\.json"):
            encode(EncodeConfig(EncoderOptions(str(minilm_dir)), str(world.records), str(tmp_path / "theirs")))
        assert (tmp_path / "theirs" / HEADER_FILE).read_text() == "{}"

    def test_footers(self, job: ScoreConfig, tmp_path: Path) -> None:
        (path,) = Path(job.output).glob("*.parquet")
        table = pq.read_table(path)

        @fuzz
        @given(data=spoiled({"rows_in": 1, "rows_out": 1, "reasons": {"a": 1}, "counts": {"b": 1}, "kind": "score"}))
        def check(data: bytes) -> None:
            pq.write_table(table.replace_schema_metadata({"flipkd.unit": data}), path)
            ends_clearly(lambda: status(job.output), InputError, path.name)

        check()


class TestOverwrite:
    def test_a_link_inside_an_output_is_not_followed(self, job: ScoreConfig, tmp_path: Path) -> None:
        outside = tmp_path / "outside"
        (path,) = Path(job.output).glob("*.parquet")
        outside.mkdir()
        shutil.copy(path, outside / path.name)
        (Path(job.output) / "linked").symlink_to(outside)
        other = replace(job, threshold=0.5, run=RunOptions(overwrite=True))
        for config in (job, other):
            with pytest.raises(OutputError, match="linked is a symbolic link inside an output folder"):
                score(config)
        assert (outside / path.name).exists()
        (Path(job.output) / "linked").unlink()
        (Path(job.output) / "file.parquet").symlink_to(outside / path.name)
        with pytest.raises(OutputError, match=r"file\.parquet is a symbolic link"):
            list_outputs(open_location(job.output))

    def test_a_linked_work_folder_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "out").mkdir()
        (tmp_path / "out/.flipkd").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(OutputError, match=r"\.flipkd is a symbolic link"), locked(open_location(tmp_path / "out")):
            pass
        assert list((tmp_path / "elsewhere").iterdir()) == []

    def test_an_output_folder_that_is_a_link_is_written_where_it_lies(self, job: ScoreConfig, tmp_path: Path) -> None:
        (tmp_path / "disk").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "disk")
        linked = replace(job, output=str(tmp_path / "link"))
        score(linked)
        score(replace(linked, threshold=0.5, run=RunOptions(overwrite=True)))
        assert (tmp_path / "link").is_symlink()
        assert len(list((tmp_path / "disk").glob("*.parquet"))) == 1

    def test_files_of_others_are_named_and_stay(self, job: ScoreConfig) -> None:
        foreign = Path(job.output) / "sub/mine.parquet"
        write(foreign, a=[1])
        with pytest.raises(
            OutputError, match=r"1 Parquet files that flipkd did not write \(such as sub/mine\.parquet\)"
        ):
            score(replace(job, threshold=0.5, run=RunOptions(overwrite=True)))
        (Path(job.output) / "notes.txt").write_text("mine")
        foreign.unlink()
        score(replace(job, threshold=0.5, run=RunOptions(overwrite=True)))
        assert (Path(job.output) / "notes.txt").read_text() == "mine"

    def test_a_store_takes_nobodys_place(self, world: World, minilm_dir: Path, tmp_path: Path) -> None:
        (tmp_path / "theirs").mkdir()
        (tmp_path / "theirs/vectors.bin").write_bytes(b"mine")
        config = EncodeConfig(EncoderOptions(str(minilm_dir)), str(world.records), str(tmp_path / "theirs"))
        for overwrite in (False, True):
            with pytest.raises(OutputError, match=r"vectors\.bin is there already and is not a store's"):
                encode(replace(config, run=RunOptions(overwrite=overwrite)))
        assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["vectors.bin"]

    def test_a_run_takes_nobodys_place(self, tmp_path: Path) -> None:
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter/mine.txt").write_text("mine")
        for overwrite in (False, True):
            with pytest.raises(OutputError, match="adapter is there already and no run is"):
                RunFolder(tmp_path, {"fingerprint": "a"}, overwrite)
        assert (tmp_path / "adapter/mine.txt").exists()

    @pytest.mark.parametrize("foreign", ["checkpoints/mine.txt", "checkpoints/step-00000001/mine.txt", "adapter/x"])
    def test_an_old_run_is_deleted_only_if_nothing_else_is_in_it(self, tmp_path: Path, foreign: str) -> None:
        RunFolder(tmp_path, {"fingerprint": "a"}, overwrite=False)
        for name in ("checkpoints/step-00000001", "best/step-00000001", "adapter"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            publish_folder(tmp_path / name, lambda folder: (folder / "w").write_text("x") and None)
        (tmp_path / "notes.txt").write_text("mine")
        (tmp_path / foreign).write_text("mine")
        with pytest.raises(OutputError, match=Path(foreign).name):
            RunFolder(tmp_path, {"fingerprint": "b"}, overwrite=True)
        assert is_whole(tmp_path / "best/step-00000001")
        (tmp_path / foreign).unlink()
        RunFolder(tmp_path, {"fingerprint": "b"}, overwrite=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", RUN_FILE]

    def test_reports_and_samples(self, tmp_path: Path) -> None:
        scores = write(tmp_path / "in/scores.parquet", left_id=[1, 2, 3, 4], right_id=[1, 2, 3, 4],
                       score=[0.1, 0.2, 0.8, 0.9], label=[0, 0, 1, 1])  # fmt: skip
        config = EvaluateConfig(str(scores), str(tmp_path / "report"), bootstrap=5)
        evaluate(config)
        (tmp_path / "report/notes.txt").write_text("mine")
        with pytest.raises(OutputError, match=r"not a report that flipkd wrote.*notes\.txt"):
            evaluate(replace(config, seed=1, overwrite=True))
        (tmp_path / "report/notes.txt").unlink()
        evaluate(replace(config, seed=1, overwrite=True))
        theirs = write(tmp_path / "theirs.parquet", a=[1])
        with pytest.raises(OutputError, match="no sample of flipkd's"):
            evaluate(replace(config, output=str(theirs), sample=2, label_column="asked", overwrite=True))
        assert pq.read_table(theirs).column_names == ["a"]

    def test_an_encoder_of_somebody_elses_is_not_replaced(self, tmp_path: Path) -> None:
        from flipkd.models.export import _target

        (tmp_path / "theirs").mkdir()
        (tmp_path / "theirs/modules.json").write_text("[]")
        with pytest.raises(OutputError, match=r"not an encoder that flipkd wrote.*modules\.json"):
            _target(tmp_path / "theirs", overwrite=True)


def test_a_link_in_the_text_cache_leads_nowhere(world: World, minilm_dir: Path, tmp_path: Path) -> None:
    """Neither a segment nor the times beside one are read or written where a link points to."""
    (tmp_path / "secret").write_bytes(b"mine")
    config = EncodeConfig(
        EncoderOptions(str(minilm_dir)), str(world.records), str(tmp_path / "one"), cache=str(tmp_path / "cache")
    )
    encode(config)
    (segment,) = (tmp_path / "cache/texts").rglob("*.segment")
    segment.with_suffix(".used").unlink(missing_ok=True)
    segment.with_suffix(".used").symlink_to(tmp_path / "secret")
    segment.with_name(f"{'0' * 32}.segment").symlink_to(tmp_path / "secret")
    again = encode(replace(config, output=str(tmp_path / "two")))
    assert again["counts"]["cached_texts"] == 24
    assert (tmp_path / "secret").read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["../../evil.parquet", "a/../../evil.parquet", "./evil.parquet"])
def test_names_of_an_object_store_cannot_lead_out(name: str) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"a": [1]}), sink)
    for key in ("/paths/in/good.parquet", f"/paths/in/{name}"):
        memory.store[key] = fsspec.implementations.memory.MemoryFile(memory, key, sink.getvalue().to_pybytes())
    found = [shard.name for shard in find_shards(open_location("memory://paths/in"))]
    assert "good.parquet" in found
    assert all(part not in ("..", ".", "") for shard in found for part in shard.split("/"))
    memory.store.clear()


def test_values_of_folder_names_are_data_and_no_path(world: World, job: ScoreConfig, tmp_path: Path) -> None:
    pairs = tmp_path / "in/hive"
    (pairs / "place=..%2F..%2Fsecret").mkdir(parents=True)
    shutil.copy(next(world.pairs.iterdir()), pairs / "place=..%2F..%2Fsecret/0.parquet")
    score(replace(job, pairs=str(pairs), output=str(tmp_path / "hive-out"), columns=("place", "score")))
    (written,) = (tmp_path / "hive-out").rglob("*.parquet")
    assert written.parent == tmp_path / "hive-out/place=..%2F..%2Fsecret"
    assert set(pq.read_table(written, partitioning=None).column("place").to_pylist()) == {"../../secret"}


class TestModelFolders:
    @pytest.fixture
    def model(self, minilm_dir: Path, tmp_path: Path) -> Path:
        copy = tmp_path / "model"
        shutil.copytree(minilm_dir, copy, ignore=shutil.ignore_patterns("*.safetensors"))
        (copy / "model.safetensors").symlink_to(minilm_dir / "model.safetensors")
        (tmp_path / "secret").mkdir()
        return copy

    @pytest.mark.parametrize(
        "name",
        ["config.json", "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json"],
    )
    def test_configurations(self, model: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        path = model / name
        whole = json.loads(path.read_text()) if path.exists() else {}

        @fuzz
        @given(data=spoiled(whole))
        def check(data: bytes) -> None:
            path.write_bytes(data)
            for read in (read_folder, teacher_kind, read_cross_encoder, lambda path: read_llm(LlmOptions(str(path)))):
                with only_inside(path, monkeypatch):
                    ends_clearly(partial(read, model), ModelError, str(model))

        check()

    @pytest.mark.parametrize("entry", [{}, 3, {"type": None}, {"type": "x"}, None, []])
    def test_modules_of_another_form(self, model: Path, entry: object) -> None:
        (model / "modules.json").write_text(json.dumps([entry]))
        with pytest.raises(ModelError, match=r"modules\.json"):
            read_folder(model)

    @pytest.mark.parametrize(
        "path", [escape for escape in ESCAPES if escape not in ("link", "~/x", "file:///etc/passwd")]
    )
    def test_modules_elsewhere(self, model: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        modules = json.loads((model / "modules.json").read_text())
        modules[1]["path"] = path
        (model / "modules.json").write_text(json.dumps(modules))
        with only_inside(model, monkeypatch), pytest.raises(ModelError, match="leaves the model folder"):
            read_folder(model)

    @pytest.mark.parametrize(
        "settings",
        [{"vocab_file": "/etc/passwd"}, {"tokenizer_file": "../secret"}, {"subfolder": ".."}, {"config": "../x"},
         {"tokenizer_class": "Evil"}, {"auto_map": {"AutoTokenizer": ["a.B", None]}}],
    )  # fmt: skip
    def test_settings_that_name_other_files(self, model: Path, settings: dict[str, Any]) -> None:
        path = model / "sentence_bert_config.json"
        for name in ("tokenizer_args", "processor_kwargs", "config_args"):
            path.write_text(json.dumps({"max_seq_length": 128, name: settings}))
            with pytest.raises(ModelError, match=f"{next(iter(settings))} not supported: all files must be"):
                read_folder(model)


def test_a_run_cannot_have_another_file_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The texts that ``export`` compares with come from where ``run.json`` says: from Parquet, or not at all."""
    from flipkd.models.export import _run_texts

    (tmp_path / "secret").write_text("x")
    opened: list[str] = []
    monkeypatch.setattr("flipkd.models.export.ShardReader", lambda _, shard: opened.append(shard.path))
    config = {"left_text": None, "right_text": None, "validation": None}
    for path in (str(tmp_path / "secret"), "../secret", "/etc/passwd", 3, None, "", "nowhere://x"):
        assert _run_texts({"config": {**config, "pairs": path}}) == []
    assert _run_texts({"config": {}}) == []
    assert opened == []


@pytest.mark.parametrize("read", [read_calibration, read_combination])
def test_calibrations(read: Callable[[str], object], tmp_path: Path) -> None:
    path = tmp_path / "c.json"

    @fuzz
    @given(data=spoiled({"slope": 1.0, "intercept": 0.0, "scores": [0.1], "probabilities": [0.5],
                         "kind": "flipkd.rescore.combination", "llm_logit": 1, "score": 10**400}))  # fmt: skip
    def check(data: bytes) -> None:
        path.write_bytes(data)
        ends_clearly(lambda: read(str(path)), FlipkdError, str(path))

    check()


def test_a_training_run_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / RUN_FILE
    (tmp_path / "adapter").mkdir()

    @fuzz
    @given(data=spoiled({"fingerprint": "x", "config": {"steps": 3, "pairs": "../secret"}}))
    def check(data: bytes) -> None:
        path.write_bytes(data)
        for call in (lambda: status(str(tmp_path)), lambda: export(tmp_path, tmp_path / "encoder")):
            ends_clearly(call, FlipkdError, str(tmp_path))

    check()
