"""The command line: options, files of options, exit codes, and what is imported."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from flipkd.cli import main
from flipkd.run.progress import progress_bar
from tests.run.conftest import World

MakePairs = Callable[..., Path]


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_importing_flipkd_is_quick_and_light() -> None:
    heavy = "print([name for name in ('torch', 'ray', 'transformers') if name in sys.modules])"
    code = f"import sys, flipkd, flipkd.cli; {heavy}"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    timing = "import time; start = time.perf_counter(); import flipkd; print(time.perf_counter() - start)"
    seconds = [
        float(subprocess.run([sys.executable, "-c", timing], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(seconds) < 0.3


def test_score_with_a_store_loads_neither_torch_nor_ray(world: World, make_pairs: MakePairs, tmp_path: Path) -> None:
    code = (
        "import sys; from flipkd.cli import main; main(sys.argv[1:], standalone_mode=False);"
        "print([name for name in ('torch', 'ray', 'transformers') if name in sys.modules])"
    )
    options = ["--pairs", str(make_pairs()), "--output", str(tmp_path / "out"), "--store", world.left_store]
    done = subprocess.run([sys.executable, "-c", code, "score", *options], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_encode_score_status_end_to_end(world: World, make_pairs: MakePairs, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    code, out, err = run("encode", "--encoder", world.encoder, "--records", world.left, "--output", store, "--json")
    assert code == 0, err
    assert json.loads(out)["rows_in"] == 60
    pairs, output = str(make_pairs()), str(tmp_path / "out")
    code, out, err = run("score", "--pairs", pairs, "--store", store, "--output", output)
    assert code == 0, err
    assert out.startswith("score: 120 rows in, 120 out; ")
    code, out, _ = run("status", output, "--json")
    assert json.loads(out)["state"] == "finished"
    code, out, _ = run("status", store)
    assert "state: finished" in out


def test_exit_codes(world: World, make_pairs: MakePairs, tmp_path: Path) -> None:
    """A skipped file ends in another exit code than success: Spark PR#16474."""
    pairs = make_pairs()
    common = ["score", "--pairs", str(pairs), "--output", str(tmp_path / "out")]
    code, _, err = run(*common)
    assert code == 2
    assert "--store STORE" in err
    code, _, err = run(*common, "--store", str(tmp_path / "none"))
    assert code == 2
    assert "no vector store" in err
    code, _, err = run(*common, "--store", world.left_store, "--workers", "0")
    assert code == 2
    (pairs / "part-001.parquet").write_bytes(b"PAR1")
    code, _, err = run(*common, "--store", world.left_store)
    assert code == 1
    assert "part-001.parquet" in err
    assert "Traceback" not in err
    code, _, err = run(*common, "--store", world.left_store, "--on-bad-shard", "skip")
    assert code == 3
    assert "partial: 1 files or units were skipped" in err


@pytest.mark.parametrize("suffix", ["yaml", "toml"])
def test_options_from_a_file_and_a_flag_that_wins(
    world: World, make_pairs: MakePairs, tmp_path: Path, suffix: str
) -> None:
    values = {"pairs": str(make_pairs()), "store": world.left_store, "min-score": 0.99, "columns": ["n", "score"]}
    lines = {
        "yaml": [f"{key}: {json.dumps(value)}" for key, value in values.items()],
        "toml": [f"{key} = {json.dumps(value)}" for key, value in values.items()],
    }
    path = tmp_path / f"options.{suffix}"
    path.write_text("\n".join(lines[suffix]))
    code, out, err = run("score", "--config", str(path), "--output", str(tmp_path / "a"))
    assert code == 0, err
    assert "120 rows in, 2 out" in out
    code, out, _ = run("score", "--config", str(path), "--output", str(tmp_path / "b"), "--min-score", "-1")
    assert "120 rows in, 120 out" in out
    path.write_text("pears: 1\n" if suffix == "yaml" else "pears = 1\n")
    code, _, err = run("score", "--config", str(path), "--output", str(tmp_path / "c"))
    assert code == 2
    assert "unknown option 'pears'; did you mean pairs? known are " in err
    path.write_text("min-score: high\n" if suffix == "yaml" else 'min-score = "high"\n')
    code, _, err = run("score", "--config", str(path), "--output", str(tmp_path / "c"))
    assert code == 2
    assert f"{path}: min-score: must be a number, not 'high'" in " ".join(err.split())
    path.write_text("[" if suffix == "yaml" else "=")
    code, _, err = run("score", "--config", str(path), "--output", str(tmp_path / "c"))
    assert code == 2


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("rows-per-unit: 1.5", "rows-per-unit: must be a whole number, not 1.5"),
        ("top-k: true", "top-k: must be a whole number, not True"),
        ("threshold: true", "threshold: must be a number, not True"),
        ("overwrite: 2", "overwrite: must be true or false, not 2"),
        ("output: yes", "output: must be text, not True; put it in quotes"),
        ("output: [a, b]", "output: takes one value, not a list"),
        ("columns: [score, null]", "columns: must be text, not None; put it in quotes"),
    ],
)
def test_values_of_another_type_in_a_file(tmp_path: Path, line: str, told: str) -> None:
    """click makes 1 of 1.9, and takes whatever it is given for text."""
    path = tmp_path / "options.yaml"
    path.write_text(line + "\n")
    code, _, err = run("score", "--config", str(path), "--pairs", "p", "--store", "s")
    assert code == 2
    assert told in " ".join(err.split())


def test_a_number_may_name_a_folder(world: World, make_pairs: MakePairs, tmp_path: Path) -> None:
    """A date, say."""
    path = tmp_path / "options.yaml"
    path.write_text(f"pairs: {make_pairs()}\nstore: {world.left_store}\noutput: 20261125\noverwrite: false\n")
    with contextlib.chdir(tmp_path):
        code, _, err = run("score", "--config", str(path))
    assert code == 0, err
    assert (tmp_path / "20261125" / "_manifest.json").exists()


def test_progress_in_a_log_is_plain_lines(world: World, make_pairs: MakePairs, tmp_path: Path) -> None:
    """ray#50890, ray#57734."""
    command = [
        sys.executable, "-m", "flipkd.cli", "score", "--pairs", str(make_pairs(files=3)), "--store", world.left_store,
        "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "\r" not in done.stderr
    assert "\x1b" not in done.stderr
    assert done.stderr.count("score: 90.0 of 90.0 pairs") == 1


def test_the_rest_is_estimated_from_rows_within_the_first_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """ray#42782."""
    seconds = 0.0
    monkeypatch.setattr("tqdm.std.time", lambda: seconds)
    told: list[tuple[float, str]] = []
    with progress_bar("score", 1000, "pairs", shown=True) as bar:
        for _ in range(10):
            seconds += 20  # a unit of 100 pairs takes so long
            bar.update(100)
            told += [(seconds, line) for line in capsys.readouterr().err.splitlines()]
    assert told[0][0] <= 60
    assert len(told) >= 4
    for at, line in told:
        found = re.fullmatch(r"score: (\S+) of 1.00k pairs, .*, about (\d\d):(\d\d) left", line)
        assert found is not None, line
        assert float(found[1].replace("k", "e3")) == 5 * at
        assert int(found[2]) * 60 + int(found[3]) == pytest.approx(200 - at, abs=2)
