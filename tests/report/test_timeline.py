"""The time line, from manifests."""

from __future__ import annotations

import json
import re
from pathlib import Path

from flipkd.config import EncoderOptions, ScoreConfig
from flipkd.report.pictures import time_line
from flipkd.report.timeline import Span, job_spans, span_rows
from flipkd.run.score import score
from tests.conftest import WriteParquet


def test_stages_stand_in_the_order_in_which_they_ran(
    minilm_dir: Path, write_parquet: WriteParquet, tmp_path: Path
) -> None:
    """Also from a JSON file, whose keys are sorted."""
    pairs = write_parquet("pairs/a.parquet", {"left_text": ["a cat", "a dog"], "right_text": ["a dog", "a fish"]})
    output = tmp_path / "out"
    config = ScoreConfig(str(pairs.parent), str(output), encoder=EncoderOptions(str(minilm_dir)), top_k=1)
    spans = job_spans(score(config))
    assert [span.name for span in spans] == ["texts", "encode", "candidates", "score"]
    assert job_spans(json.loads((output / "_manifest.json").read_text())) == spans
    encode = spans[1]
    assert encode.rows == 3
    assert encode.seconds >= encode.parts["encode"] > 0
    assert encode.parts["seal"] > 0
    rows = span_rows(spans)
    assert [row[0] for row in rows] == ["texts", "encode", "candidates", "score"]
    assert re.fullmatch(r"[a-z_]+ \d+ %?.*", rows[1][4].replace("%", " %"))


def test_a_bar_begins_where_the_one_before_it_ends() -> None:
    picture = time_line([Span("encode", 30.0), Span("score", 60.0), Span("rescore", 7200.0)])
    for words in ("encode, 30.0 s", "score, 60.0 s", "rescore, 2.0 h", 'aria-label="Seconds of each stage"'):
        assert words in picture
    bars = re.findall(r'd="M ([\d.]+) [\d.]+ \nL ([\d.]+) [\d.]+ \nL [^"]*z\n*" clip-path', picture)
    assert len(bars) == 3
    (_, first), (second, end), (third, _) = ([float(place) for place in bar] for bar in bars)
    assert first == second
    assert end == third
    assert time_line([]).startswith("<svg")
    assert "nan" not in time_line([Span("encode", 0.0)])


def test_rows_tell_rates_and_shares() -> None:
    span = Span("score", 2.0, 4_000_000, {"read": 1.0, "score": 2.9, "plan": 0.001, "write": 0.1})
    assert span_rows([span, Span("compare", 0.0)]) == [
        ["score", "4\u202f000\u202f000", "2.0", "2\u202f000\u202f000", "score 72%, read 25%, write 2%"],
        ["compare", "–", "0.0", "–", "–"],
    ]
