"""Values of a type that an option does not take are refused when a configuration is made; paths are taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flipkd.config import EncodeConfig, EncoderOptions, RunOptions, ScoreConfig, TeachConfig
from flipkd.distill.config import LossOptions, TrainConfig
from flipkd.errors import ConfigError
from flipkd.models.llm_options import LlmOptions
from flipkd.models.options import StudentOptions
from flipkd.report.config import EvaluateConfig
from flipkd.run.rescore_config import RescoreConfig
from flipkd.run.score import score
from tests.run.conftest import World
from tests.run.test_score import MakePairs


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"top_k": 1.5}, "top_k must be a whole number, not 1.5"),
        ({"rows_per_unit": True}, "rows_per_unit must be a whole number, not True"),
        ({"threshold": "0.5"}, "threshold must be a number, not '0.5'"),
        ({"columns": "score"}, "columns must be a tuple, as in .*, not 'score'"),
        ({"columns": ("score", 1)}, r"columns\[1\] must be text, not 1"),
        ({"pairs": b"pairs"}, "pairs must be text, not of type bytes"),
        ({"run": {"threads": 1}}, r"run must be RunOptions\(\.\.\.\), not of type dict"),
    ],
)
def test_values_of_another_type_are_named(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        ScoreConfig(**{"pairs": "p", "output": "o", "store": "s", **options})


def test_configurations_of_every_kind_are_checked() -> None:
    made: list[tuple[Any, dict[str, Any], str]] = [
        (
            EncodeConfig,
            {"encoder": EncoderOptions("e"), "records": "r", "output": "o", "rows_per_unit": 1.5},
            "rows_per_unit",
        ),
        (EncoderOptions, {"folder": 1}, "folder"),
        (EvaluateConfig, {"scores": "s", "output": "o", "slices": "country"}, "slices"),
        (LlmOptions, {"folder": "f", "max_length": "9"}, "max_length"),
        (LossOptions, {"temperature": "0.1"}, "temperature"),
        (RescoreConfig, {"llm": LlmOptions("f"), "scores": "s", "output": "o", "band": (0.1,)}, "band"),
        (RunOptions, {"overwrite": 1}, "overwrite"),
        (StudentOptions, {"folder": "f", "target_modules": "q_proj"}, "target_modules"),
        (TeachConfig, {"teacher": "t", "pairs": "p", "output": "o"}, "teacher"),
        (TrainConfig, {"pairs": "p", "output": "o", "student": StudentOptions("f"), "steps": 1.5}, "steps"),
    ]
    for kind, options, field in made:
        with pytest.raises(ConfigError, match=f"{field} must be"):
            kind(**options)


def test_paths_and_numbers_of_numpy_are_as_good_as_plain_ones(
    world: World, make_pairs: MakePairs, tmp_path: Path
) -> None:
    """A path as the encoder's folder ended as "not JSON serializable", after all texts had been encoded."""
    pairs = make_pairs(files=1)
    encoder = EncoderOptions(Path(world.encoder), max_length=np.int64(20))  # type: ignore[arg-type]
    assert encoder == EncoderOptions(world.encoder, max_length=20)
    assert type(encoder.max_length) is int
    odd: Any = {"threshold": np.float32(0.5), "columns": ["left_id", "score", "match"]}
    config = ScoreConfig(
        pairs=pairs,
        output=tmp_path / "out",
        encoder=encoder,
        records=Path(world.left),
        **odd,  # type: ignore[arg-type]
    )
    plain: dict[str, Any] = {"pairs": str(pairs), "output": str(tmp_path / "out"), "records": world.left}
    assert config == ScoreConfig(**plain, encoder=encoder, threshold=0.5, columns=("left_id", "score", "match"))
    assert score(config)["complete"]
    assert EvaluateConfig(Path("scores"), Path("out")) == EvaluateConfig("scores", "out")  # type: ignore[arg-type]
