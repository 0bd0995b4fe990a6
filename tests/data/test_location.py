"""Where files are: what stands behind the ? of a URL is not part of a name."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from flipkd.data.location import Location, open_location
from flipkd.errors import ConfigError
from flipkd.run.overlap import refuse_overlap

WAY = "?region=us-east-1&endpoint_override=127.0.0.1:9"  # nobody is asked where the bucket is


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_child_is_opened_again_where_it_is(slash: str) -> None:
    """Scores of a cascade, and texts joined on Ray, went into the parent folder."""
    child = open_location(f"s3://bucket/out{slash}{WAY}").child(".flipkd/scores")
    assert child.uri == f"s3://bucket/out/.flipkd/scores{WAY}"
    again: Location = pickle.loads(pickle.dumps(child))
    assert again.path == child.path == "bucket/out/.flipkd/scores"
    assert again.filesystem == child.filesystem


def test_a_question_mark_in_a_local_name_is_a_letter(tmp_path: Path) -> None:
    assert open_location(tmp_path / "a?b").child("c").path == str(tmp_path / "a?b" / "c")


@pytest.mark.parametrize("output", ["s3://b/pairs/scores", "s3://b/pairs/", "s3://b"])
def test_an_output_inside_an_input_is_seen_through_the_query(output: str) -> None:
    with pytest.raises(ConfigError, match="lie in one another"):
        refuse_overlap(open_location(output + WAY), [("--pairs", open_location(f"s3://b/pairs{WAY}"))])
    refuse_overlap(open_location(f"s3://b/scores{WAY}"), [("--pairs", open_location(f"s3://b/pairs{WAY}"))])


def test_a_key_travels_with_a_location_and_stands_in_no_message() -> None:
    output = open_location(f"s3://KEY:SECRET@bucket/out{WAY}").child("x")
    assert output.uri == f"s3://***@bucket/out/x{WAY}"
    again: Location = pickle.loads(pickle.dumps(output))
    assert again.filesystem == output.filesystem
    assert again.filesystem != open_location(f"s3://bucket/out{WAY}").filesystem
    with pytest.raises(ConfigError) as refused:
        open_location("s3://KEY:SEC/RET@bucket/out")
    assert "RET" not in str(refused.value)
    assert "s3://***@bucket/out" in str(refused.value)
    with pytest.raises(ConfigError, match="lie in one another"):
        refuse_overlap(output, [("--pairs", open_location(f"s3://bucket/out{WAY}"))])
