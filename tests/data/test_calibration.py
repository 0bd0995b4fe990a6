"""Calibration files: both forms, what is refused, and that a probability is one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flipkd.data.calibration import Knots, Sigmoid, as_json, kernel_arguments, probabilities, read_calibration
from flipkd.errors import ConfigError


def written(folder: Path, values: object) -> str:
    path = folder / "calibration.json"
    path.write_text(json.dumps(values))
    return str(path)


def test_both_forms_are_read_back(tmp_path: Path) -> None:
    for curve in (Sigmoid(8.0, -4.0), Knots((0.1, 0.5), (0.25, 1.0))):
        found = read_calibration(written(tmp_path, {"method": "any", "encoder_fingerprint": "e", **as_json(curve)}))
        assert found.calibration == curve
        assert found.encoder_fingerprint == "e"
    assert read_calibration(written(tmp_path, {"slope": 1, "intercept": 0})).encoder_fingerprint is None


def test_hand_made_values() -> None:
    curve = Knots((0.0, 0.5, 0.6), (0.1, 0.1, 0.9))
    np.testing.assert_allclose(probabilities(curve, [-1, 0, 0.25, 0.55, 0.6, 1]), [0.1, 0.1, 0.1, 0.5, 0.9, 0.9])
    assert np.isnan(probabilities(curve, [np.nan])).all()
    assert probabilities(curve, [0.5]).dtype == np.float32
    assert probabilities(Knots((0.3,), (0.4,)), [-1, 1]).tolist() == [np.float32(0.4)] * 2
    np.testing.assert_allclose(probabilities(Sigmoid(2.0, -1.0), [0.5, 1.0]), [0.5, 1 / (1 + np.exp(-1))], rtol=1e-6)
    assert probabilities(Sigmoid(1e30, 0.0), [-1, 0, 1]).tolist() == [0, 0.5, 1]
    assert kernel_arguments(Sigmoid(2.0, -1.0)) == (2.0, -1.0)
    assert kernel_arguments(curve) is kernel_arguments(None) is None


@pytest.mark.parametrize("column", ["probability", "llm_probability", "", None, 1])
@pytest.mark.parametrize("curve", [Sigmoid(8.0, -4.0), Knots((0.1, 0.5), (0.25, 1.0))])
def test_a_curve_of_another_column_is_refused_and_the_way_out_named(
    tmp_path: Path, curve: Sigmoid | Knots, column: object
) -> None:
    values = {"encoder_fingerprint": None, **as_json(curve)}
    assert read_calibration(written(tmp_path, values | {"score_column": "score"})).calibration == curve
    with pytest.raises(ConfigError, match=r"calibration\.json was fitted to another column than score; run"):
        read_calibration(written(tmp_path, values | {"score_column": column}))


@pytest.mark.parametrize(
    "values",
    [
        [1, 2],
        {},
        {"slope": 1},
        {"slope": "x", "intercept": 0},
        {"slope": 1e39, "intercept": 0},
        {"slope": float("nan"), "intercept": 0},
        {"scores": [0.1]},
        {"scores": [], "probabilities": []},
        {"scores": [0.1, 0.2], "probabilities": [0.1]},
        {"scores": [0.2, 0.1], "probabilities": [0.1, 0.2]},
        {"scores": [0.1, 0.1], "probabilities": [0.1, 0.2]},
        {"scores": [0.1, 0.2], "probabilities": [0.2, 0.1]},
        {"scores": [0.1, 0.2], "probabilities": [0.2, 1.1]},
        {"scores": [0.1, 0.2], "probabilities": [float("nan"), 0.1]},
        {"scores": [0.1, float("inf")], "probabilities": [0.2, 0.3]},
        {"scores": [0.1, None], "probabilities": [0.2, 0.3]},
    ],
)
def test_what_is_no_calibration_is_refused_and_named(tmp_path: Path, values: object) -> None:
    with pytest.raises(ConfigError, match=r"calibration\.json"):
        read_calibration(written(tmp_path, values))


@given(
    points=st.dictionaries(st.floats(-1, 1, width=32), st.floats(0, 1), min_size=1, max_size=20),
    scores=st.lists(st.floats(-2, 2, width=32), max_size=30),
)
def test_lines_between_knots_never_decrease_and_stay_in_range(points: dict[float, float], scores: list[float]) -> None:
    curve = Knots(tuple(sorted(points)), tuple(sorted(points.values())))
    found = probabilities(curve, sorted(scores))
    assert np.all((found >= 0) & (found <= 1))
    assert np.all(np.diff(found) >= 0)
