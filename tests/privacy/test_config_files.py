"""A configuration file holds options, and can do nothing else."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flipkd.cli import main
from flipkd.cli.config_file import read_config_file

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 10)}]}}\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
REFUSED = {
    "objects": ("output: !!python/object/apply:os.mkdir [ran]\n", "python/object"),
    "names": ("output: !!python/name:os.system\n", "python/name"),
    "modules": ("output: !!python/module:os\n", "python/module"),
    "new objects": ("!!python/object/new:os.mkdir [ran]\n", "python/object"),
    "a tag of its own": ("output: !evil x\n", "!evil"),
    "laughs": (LAUGHS, "aliases"),
    "merges": (MERGES, "aliases"),
    "one alias": ("output: &a x\npairs: *a\n", "aliases"),
    "itself": ("output: &a [*a]\n", "aliases"),
    "depth": ("output: " + "[" * 100_000, "nested too deeply"),
    "a mapping": ("output: {a: 1}\n", "option 'output': a value must be text"),
    "lists of lists": ("output: [[a]]\n", "option 'output': a value must be text"),
    "a date": ("output: 2026-01-01\n", "option 'output': a value must be text"),
    "bytes": ("output: !!binary aGVsbG8=\n", "option 'output': a value must be text"),
    "a list": ("- a\n", "must hold options"),
    "a key twice": ("output: a\noutput: b\n", "line 2 is not YAML that is read: the key 'output' stands twice"),
    "a key in two ways": ("top-k: 1\ntop_k: 2\n", "'top_k' stands twice"),
    "a key that is a list": ("[a, b]: 1\n", "a key must be a plain value"),
    "a key that cannot be one": ("!!set a: 1\n", "not of the type that its tag says"),
    "a merge without an alias": ("<<: {output: x}\n", "merges (<<) are not read"),
    "no date": ("output: 2026-13-01\n", "month must be in 1..12"),
    "no number": ("output: !!int ''\n", "not of the type that its tag says"),
    "no truth": ("output: !!bool x\n", "not of the type that its tag says"),
    "no moment": ("output: !!timestamp x\n", "not of the type that its tag says"),
    "two documents": ("a: 1\n---\nb: 2\n", "not YAML"),
    "another option": ("outputs: x\n", "unknown option 'outputs'"),
    "config": ("config: x.yaml\n", "unknown option 'config'"),
    "no text": ("output: \udcff\n", "can't decode"),
    "too much": ("#" * (1 << 20) + "\n", "more than 1048576 bytes"),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_yaml_that_is_refused(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "options.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    started = time.monotonic()
    tracemalloc.start()
    done = CliRunner().invoke(main, ["score", "--config", str(path)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert done.exit_code == 2, done.output
    assert message in done.output.replace("\n", " ")
    assert "Traceback" not in done.output
    assert len(done.output) < 3000
    assert not (tmp_path / "ran").exists()
    assert peak < 100e6
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "text", ["output = {a = 1}\n", "output = [[1]]\n", "output = 2026-01-01\n", "x = " + "[" * 10_000]
)
def test_toml_that_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "options.toml"
    path.write_text(text)
    done = CliRunner().invoke(main, ["score", "--config", str(path)])
    assert done.exit_code == 2
    assert "Traceback" not in done.output


def test_plain_files_are_read(tmp_path: Path) -> None:
    wanted = {"pairs": "p", "top-k": 3, "threshold": 0.5, "overwrite": True, "columns": ["a", "b"], "cache": None}
    yaml = tmp_path / "o.yaml"
    yaml.write_text("pairs: p\ntop-k: 3\nthreshold: 0.5\noverwrite: true\ncolumns: [a, b]\ncache: null\n")
    assert read_config_file(yaml) == wanted
    toml = tmp_path / "o.TOML"
    toml.write_text('pairs = "p"\ntop-k = 3\nthreshold = 0.5\noverwrite = true\ncolumns = ["a", "b"]\n')
    assert read_config_file(toml) == {name: value for name, value in wanted.items() if value is not None}
    (tmp_path / "empty.yml").write_text("")
    assert read_config_file(tmp_path / "empty.yml") == {}


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(st.sampled_from("ab:&*!<>{}[]-?|#'\"%@`\n\t ,0.e~\\u"), max_size=60),
    suffix=st.sampled_from(["yaml", "toml"]),
)
def test_any_text_is_options_or_a_clear_error(text: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"o.{suffix}"
    path.write_text(text)
    done = CliRunner().invoke(main, ["status", "nowhere", "--config", str(path)])
    assert done.exit_code in (1, 2)
    assert "Traceback" not in done.output
    assert "should not happen" not in done.output
