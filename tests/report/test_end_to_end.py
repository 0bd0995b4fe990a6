"""Real pairs, a real encoder: score, evaluate on one half, score the other half with the calibration written."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from flipkd.cli import main
from flipkd.demo.pair_sets import icd9_pairs, pair_table
from flipkd.report.calibrate import calibration_error, losses, reliability

PAIRS = 1_600


def run(*arguments: str) -> None:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == 0, result.stderr


@pytest.fixture(scope="module")
def halves(minilm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``first`` and ``second`` of ICD-9 pairs of other categories, and ``first-scores``."""
    folder = tmp_path_factory.mktemp("icd9")
    pairs = icd9_pairs().test
    groups = sorted(set(pairs.group))
    names = {"first": set(groups[::2]), "second": set(groups[1::2])}
    for name, chosen in names.items():
        rows = [row for row, group in enumerate(pairs.group) if group in chosen][: PAIRS // 2]
        (folder / name).mkdir()
        pq.write_table(pair_table(pairs.take(rows)), folder / name / "a.parquet")
    encoder, output = str(minilm_dir), str(folder / "first-scores")
    run("score", "--pairs", str(folder / "first"), "--encoder", encoder, "--output", output)
    return folder


def test_a_calibration_of_one_half_says_the_truth_of_the_other(halves: Path, minilm_dir: Path) -> None:
    report, output = halves / "report", halves / "second-scores"
    run("evaluate", "--scores", str(halves / "first-scores"), "--output", str(report), "--precision", "0.7")
    facts = json.loads((report / "metrics.json").read_text())
    assert 0.6 < facts["metrics"]["roc_auc"]["value"] < 0.9  # an untuned encoder
    assert facts["warnings"] == []
    assert len(facts["encoder_fingerprint"]) == 64
    threshold = facts["thresholds"]["probability"]["precision"]["estimate"]["threshold"]
    run(
        "score", "--pairs", str(halves / "second"), "--encoder", str(minilm_dir), "--output", str(output),
        "--calibration", str(report / "calibration.json"), "--threshold", repr(threshold),
    )  # fmt: skip
    found = pq.read_table(output)
    label, score = np.asarray(found.column("label")) == 1, found.column("score").to_numpy()
    probability, ones = found.column("probability").to_numpy(), np.ones(found.num_rows)
    assert np.all((probability >= 0) & (probability <= 1))
    calibrated = calibration_error(reliability(probability, label, ones))
    raw = calibration_error(reliability(np.clip(score, 0, 1), label, ones))  # the cosine taken for a probability
    assert calibrated < 0.08 < 0.2 < raw
    share = np.full(len(label), label.mean())
    assert losses(probability, label, ones)["log_loss"] < losses(share, label, ones)["log_loss"]
    match = np.asarray(found.column("match"))
    assert label[match].mean() == pytest.approx(0.7, abs=0.12)
    assert 0 < np.count_nonzero(match) < len(match)


def test_the_threshold_takes_the_same_pairs_on_score_and_run(halves: Path, minilm_dir: Path) -> None:
    """A threshold of the report, given to ``score``, gives the confusion that the report says."""
    report, again = halves / "again-report", halves / "again"
    run("evaluate", "--scores", str(halves / "first-scores"), "--output", str(report), "--bootstrap", "10")
    facts = json.loads((report / "metrics.json").read_text())
    row = facts["thresholds"]["probability"]["best_f1"]
    run(
        "score", "--pairs", str(halves / "first"), "--encoder", str(minilm_dir), "--output", str(again),
        "--calibration", str(report / "calibration.json"), "--threshold", repr(row["threshold"]),
    )  # fmt: skip
    found = pq.read_table(again)
    match, label = np.asarray(found.column("match")), np.asarray(found.column("label")) == 1
    assert np.count_nonzero(match & label) == row["true_matches"]
    assert np.count_nonzero(match & ~label) == row["false_matches"]


BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in BROWSERS if (path := shutil.which(name))), None)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_lays_the_report_out(halves: Path, tmp_path: Path, width: int) -> None:
    """At both widths: the page is no wider than the window, every picture has a size, nothing is loaded or logged."""
    report = tmp_path / "report"
    run(
        "evaluate", "--scores", str(halves / "first-scores"), "--output", str(report), "--bootstrap", "20",
        "--slice", "group", "--precision", "0.7", "--cost-ratio", "3",
    )  # fmt: skip
    page = (report / "report.html").read_text()
    # The page forbids scripts, so a frame of the wanted width measures it from outside.
    measuring = f"""<body><iframe id="page" src="report.html" style="width:{width}px;height:900px;border:0"></iframe>
    <script>
    document.getElementById("page").onload = function () {{
      const inside = this.contentDocument, wide = inside.documentElement.scrollWidth;
      const sizes = [...inside.querySelectorAll("figure svg")].map(one => one.getBoundingClientRect());
      const words = [...inside.querySelectorAll("figure svg text")].map(one => one.getBoundingClientRect().height);
      document.title = JSON.stringify({{wide: wide, pictures: sizes.map(one => [one.width, one.height]),
        smallest: Math.min(...words), height: inside.documentElement.scrollHeight}});
    }};</script></body>"""
    (report / "measure.html").write_text(measuring)
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
        f"--user-data-dir={tmp_path / 'profile'}", "--allow-file-access-from-files", "--window-size=1400,1000",
        "--virtual-time-budget=5000", "--dump-dom", f"file://{report / 'measure.html'}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    measured = json.loads(done.stdout.split("<title>")[1].split("</title>")[0].replace("&quot;", '"'))
    assert measured["wide"] <= width
    assert len(measured["pictures"]) == 4  # the last one is the time line: a bar a stage
    assert all(wide > 280 and 100 < high < 500 for wide, high in measured["pictures"])
    assert measured["smallest"] >= 8
    assert measured["height"] > 1_000
    assert "http" not in page.replace("http://www.w3.org/", "").replace("http-equiv", "")
