"""Real pairs, a real encoder: score, evaluate on one half, score the other half with the calibration written."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner
from matplotlib import image

from flipkd.cli import main
from flipkd.demo.pair_sets import icd9_pairs, pair_table
from flipkd.report.calibrate import calibration_error, losses, reliability
from jobs.nightly import nightly

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
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH")
WIDTHS = (390, 1200)


def browse(profile: Path, page: Path, *options: str) -> str:
    """Opens a page without a window; what the browser prints."""
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
        f"--user-data-dir={profile}", "--allow-file-access-from-files", "--hide-scrollbars", *options, f"file://{page}",
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.fixture(scope="module")
def pages(halves: Path, minilm_dir: Path) -> dict[str, Path]:
    """The report of an evaluation, and that of a night that a gate holds back, compared with the night before."""
    run(
        "evaluate", "--scores", str(halves / "first-scores"), "--output", str(halves / "report-seen"), "--bootstrap",
        "20", "--slice", "group", "--precision", "0.7", "--cost-ratio", "3",
    )  # fmt: skip
    for date, half in (("2026-11-24", "first"), ("2026-11-25", "second")):
        (halves / "pairs" / date).mkdir(parents=True)
        pairs = pq.read_table(halves / half / "a.parquet").slice(0, 200)
        pq.write_table(pairs, halves / "pairs" / date / "a.parquet")
    values = {
        "output": "nights",
        "score": {"pairs": "pairs/{date}", "encoder": str(minilm_dir), "threshold": 0.6},
        "evaluate": {"bootstrap": 20},
        "gates": {"max_score_psi": 0.0},
    }
    (halves / "nightly.yaml").write_text(yaml.safe_dump(values))
    for date, code in (("2026-11-24", 0), ("2026-11-25", 3)):
        done = CliRunner().invoke(nightly, [str(halves / "nightly.yaml"), "--date", date, "--no-progress"])
        assert done.exit_code == code, done.output
    night = halves / "nights/_held/2026-11-25/report/night.html"
    return {"evaluation": halves / "report-seen/report.html", "night": night}


@pytest.mark.slow
@in_a_browser
@pytest.mark.parametrize(("name", "pictures"), [("evaluation", 4), ("night", 2)])
def test_a_browser_lays_a_report_out(pages: dict[str, Path], tmp_path: Path, name: str, pictures: int) -> None:
    """At both widths: the page is no wider than the window, every picture has a size, nothing is loaded or logged."""
    # The page forbids scripts, so a frame of the wanted width measures it from outside.
    frame = '<iframe src="file://{}" style="width:{}px;height:900px;border:0"></iframe>'
    measuring = f"""<body>{"".join(frame.format(pages[name], width) for width in WIDTHS)}
    <script>
    window.onload = function () {{
      document.title = JSON.stringify([...document.querySelectorAll("iframe")].map(frame => {{
        const inside = frame.contentDocument, wide = inside.documentElement.scrollWidth;
        const sizes = [...inside.querySelectorAll("figure svg")].map(one => one.getBoundingClientRect());
        const words = [...inside.querySelectorAll("figure svg text")].map(one => one.getBoundingClientRect().height);
        return {{wide: wide, pictures: sizes.map(one => [one.width, one.height]),
          smallest: Math.min(...words), height: inside.documentElement.scrollHeight}};
      }}));
    }};</script></body>"""
    (tmp_path / "measure.html").write_text(measuring)
    told = browse(
        tmp_path, tmp_path / "measure.html", "--window-size=1400,1000", "--virtual-time-budget=5000", "--dump-dom"
    )
    measured = json.loads(told.split("<title>")[1].split("</title>")[0].replace("&quot;", '"'))
    for width, found in zip(WIDTHS, measured, strict=True):
        assert found["wide"] <= width
        assert len(found["pictures"]) == pictures  # the last one is the time line: a bar a stage
        assert all(wide > 280 and 100 < high < 500 for wide, high in found["pictures"])
        assert found["smallest"] >= 8
        assert found["height"] > 1_000
    page = pages[name].read_text()
    assert "http" not in page.replace("http://www.w3.org/", "").replace("http-equiv", "")


@pytest.mark.slow
@in_a_browser
@pytest.mark.parametrize("name", ["evaluation", "night"])
def test_a_browser_shows_a_report_on_a_phone(pages: dict[str, Path], tmp_path: Path, name: str) -> None:
    browse(tmp_path, pages[name], "--window-size=390,2000", f"--screenshot={tmp_path / 'page.png'}")
    seen = image.imread(tmp_path / "page.png")[..., :3]
    assert seen.shape[:2] == (2000, 390)
    assert len(np.unique(seen.reshape(-1, 3), axis=0)) > 100  # with the soft edges of letters
    assert 0.05 < np.mean((seen < 1).any(axis=-1)) < 0.9
    colours = {tuple(colour) for colour in np.round(255 * seen.reshape(-1, 3)).astype(int)}
    for wanted in ("1c2024", "0b6bcb", "dde2e7"):  # text, a curve or bars, lines
        assert tuple(bytes.fromhex(wanted)) in colours, wanted
    # Text stands in the upper and in the lower half, and no column of pixels at the right edge is cut through.
    dark = seen.mean(axis=-1) < 0.5
    assert dark[:1000].any()
    assert dark[1000:].any()
    assert not dark[:, -4:].any()


def printed(folder: Path, page: Path) -> tuple[set[str], int]:
    """The colours and the number of pages of a page that is printed."""
    path = folder / "page.pdf"
    browse(folder, page, "--no-pdf-header-footer", f"--print-to-pdf={path}")
    data, colours = path.read_bytes(), set()
    for stream in re.findall(rb"stream\r?\n(.*?)endstream", data, re.DOTALL):
        with contextlib.suppress(zlib.error):  # a stream that is not compressed
            for colour in re.findall(rb"([\d.]+) ([\d.]+) ([\d.]+) (?:rg|RG)\b", zlib.decompress(stream)):
                colours.add("".join(f"{round(255 * float(part)):02x}" for part in colour))
    return colours, len(re.findall(rb"/Type /Page\b", data))


@pytest.mark.slow
@in_a_browser
def test_a_report_is_printed_in_black_on_white_and_in_fewer_pages(pages: dict[str, Path], tmp_path: Path) -> None:
    """Its rules for print are what does it: without them it looks as on the screen."""
    screen, paper = {"1c2024", "0b6bcb", "5b646e"}, {"000000", "0b4f9c", "444444"}
    page = pages["evaluation"].read_text()
    start = page.index("@media print")
    (tmp_path / "unruled.html").write_text(page[:start] + page[page.index("</style>") :])
    colours, sheets = printed(tmp_path, tmp_path / "unruled.html")
    assert screen <= colours
    for name in ("evaluation", "night"):
        found, count = printed(tmp_path, pages[name])
        assert paper <= found
        assert not screen & found
        assert count >= 2
        assert name == "night" or count < sheets
