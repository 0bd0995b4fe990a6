"""The walk-through is run as it stands: every block of docs/walk-through.md, in order, in one folder.

What it leaves is compared with docs/columns-and-reasons.md, and links of all documents are followed.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from flipkd.cli import main
from jobs.nightly import nightly
from tests.documents import DOCS, Block, blocks, sections, table

DOC = DOCS / "walk-through.md"


# How a line begins that runs in this process, which has PyTorch already, and what it runs.
COMMANDS: dict[str, click.Command] = {"flipkd-batch ": main, "python $FLIPKD/jobs/nightly.py ": nightly}


def run_shell(block: Block, encoder: Path, output: list[str]) -> None:
    """Commands of flipkd run in this process, anything else in a shell; a comment tells another exit code than 0."""
    if not block.text.startswith(tuple(COMMANDS)):
        environment = {**os.environ, "ENCODER": str(encoder)}
        subprocess.run(["bash", "-euo", "pipefail", "-c", block.text], check=True, timeout=60, env=environment)
        return
    for line in block.text.replace("\\\n", " ").splitlines():
        start = next((start for start in COMMANDS if line.startswith(start)), None)
        assert start is not None, f"line {block.line}: a block holds commands of flipkd, or none"
        words = shlex.split(line.removeprefix(start).replace("$ENCODER", shlex.quote(str(encoder))), comments=True)
        found = CliRunner().invoke(COMMANDS[start], words, catch_exceptions=False)
        told = re.search(r"# exit code (\d)$", line)
        assert found.exit_code == (int(told[1]) if told else 0), (block.line, line, found.output)
        output.append(found.output)


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory, minilm_dir: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """The folder in which all blocks have run, the names that the Python ones left, and what the commands printed."""
    folder = tmp_path_factory.mktemp("walk-through")
    names: dict[str, Any] = {}
    output: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in blocks(DOC):
            if block.language == "sh":
                run_shell(block, minilm_dir, output)
            else:
                assert block.language == "python", f"line {block.line}: nothing runs {block.language} blocks"
                # Blank lines in front: a traceback then tells the line of the document.
                exec(compile("\n" * (block.line - 1) + block.text, str(DOC), "exec"), names)
    return folder, names, output


Walked = tuple[Path, dict[str, Any], list[str]]


def test_customers_are_matched(walked: Walked) -> None:
    folder, names, _ = walked
    assert names["candidates"].num_rows == 100  # five by five in each of four cities
    labelled = pq.read_table(folder / "labelled.parquet")
    assert 40 <= labelled.num_rows <= 60
    assert labelled["label"].null_count == 0
    assert {"metrics.json", "calibration.json", "report.html"} <= {path.name for path in (folder / "report").iterdir()}
    found = set(zip(names["matches"]["left_id"].to_pylist(), names["matches"]["right_id"].to_pylist(), strict=True))
    truth = {(f"01{n:02d}", f"91{n:02d}") for n in range(1, 20) if n % 5 != 0}
    assert len(found & truth) >= 14
    assert len(found - truth) <= 1
    assert pq.read_table(folder / "scores")["reason"].null_count == 100


def _code(word: str) -> str:
    """The Python block that holds the word."""
    return next(block.text for block in blocks(DOC) if block.language == "python" and word in block.text)


def test_labels_come_back_by_the_ids(walked: Walked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, names, _ = walked
    expected = pq.read_table(folder / "labelled.parquet")
    monkeypatch.chdir(tmp_path)
    put_back = _code("label_of = ")

    head, *lines = (folder / "labelled.csv").read_text().splitlines()
    Path("labelled.csv").write_text("\n".join([head, *sorted(lines, key=lambda line: line[::-1])][:-3]))
    exec(put_back, dict(names))
    found = pq.read_table("labelled.parquet")
    assert found.drop_columns(["label"]).equals(expected.drop_columns(["label"]))
    assert found["label"].null_count == 3  # the rows that were dropped
    pairs = zip(found["label"].to_pylist(), expected["label"].to_pylist(), strict=True)
    assert all(label in (None, before) for label, before in pairs)

    Path("labelled.csv").write_text("\n".join([head, *lines]).replace('"01', '"1'))
    with pytest.raises(ValueError, match="changed the ids"):
        exec(put_back, dict(names))


def test_csv_files_of_all_kinds_are_read(walked: Walked, tmp_path: Path) -> None:
    _, names, _ = walked
    path = tmp_path / "odd.csv"
    path.write_bytes('code;more;text\n001.0;x;"Caf\xe9\nnoir"\nNA;y;null\n;z;\n'.encode("latin-1"))
    found = names["read"](path, {"text": pa.string(), "code": pa.string()}, delimiter=";", encoding="latin-1")
    assert found.to_pydict() == {"text": ["Caf\xe9\nnoir", "null", None], "code": ["001.0", "NA", None]}


def test_nights_are_released_but_for_the_one_with_half_its_pairs(walked: Walked) -> None:
    folder, _, _ = walked
    nights = folder / "nights"
    assert {path.name for path in nights.glob("2026*")} == {"2026-11-25", "2026-11-26"}
    assert json.loads((nights / "current.json").read_text())["date"] == "2026-11-26"
    encoded = json.loads((nights / "2026-11-26/report/night.json").read_text())["encoded"]
    assert [encoded[f"encode {side}"].get("encoded_texts", 0) for side in ("left", "right")] == [0, 1]
    gates = json.loads((nights / "_held/2026-11-27/report/night.json").read_text())["gates"]
    assert "max_pairs_change" in {gate["name"] for gate in gates if gate["verdict"] == "tripped"}
    assert (nights / "_held/2026-11-27/report/night.html").exists()


def test_notes_get_their_codes(walked: Walked) -> None:
    folder, names, _ = walked
    suggested = pq.read_table(folder / "suggested")
    assert suggested.num_rows == 36
    assert {"note_id", "code", "score"} <= set(suggested.schema.names)
    assert names["right_answers"] >= 11


def test_both_ways_give_the_same_best_code(walked: Walked) -> None:
    folder, names, _ = walked
    best: dict[int, tuple[float, str]] = {}
    for row in pq.read_table(folder / "suggested").to_pylist():
        best[row["note_id"]] = max(best.get(row["note_id"], (-2.0, "")), (row["score"], row["code"]))
    assert {note: code for note, (_, code) in best.items()} == names["answers"]


def test_outputs_have_the_columns_and_types_that_the_document_says(walked: Walked) -> None:
    folder, _, _ = walked
    told = sections(DOCS / "columns-and-reasons.md")
    for output, heading in (("matches", "`score`"), ("sample.parquet", "`evaluate --sample`")):
        found = pq.read_schema(next((folder / output).glob("*.parquet"), folder / output))
        documented = {name: pa.type_for_alias(kind) for name, kind, _ in table(told[heading])}
        assert {name: found.field(name).type for name in documented} == documented
        assert {*found.names} - {*documented} >= {"left_id", "right_id"}
    store = json.loads((folder / "codes-store" / "store.json").read_text())
    assert set(store["counts"]) == {row[0] for row in table(told["`encode`"])}


def test_the_first_example_of_the_readme_runs_as_it_stands(tmp_path: Path) -> None:
    block = next(block for block in blocks(DOCS.parent / "README.md") if "minilm_folder" in block.text)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    near, far = (ast.literal_eval(line) for line in done.stdout.splitlines()[-2:])
    assert (near["right_id"], near["reason"], far["right_id"], far["reason"]) == ("b", None, "c", None)
    assert near["score"] > 0.8 > 0.5 > far["score"]


@pytest.mark.parametrize(
    "path",
    [DOCS.parent / "README.md", DOCS.parent / "SECURITY.md", *sorted(DOCS.glob("*.md"))],
    ids=lambda path: path.name,
)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target
