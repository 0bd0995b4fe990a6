"""How many numbers an encoder's vectors have, by what its folder says. Loads nothing."""

from __future__ import annotations

from flipkd.errors import ModelError
from flipkd.models.folder import ModelFolder
from flipkd.models.settings import DenseSettings, read_json


def output_width(folder: ModelFolder, width: int) -> int:
    """Size of the final vector, for token vectors of ``width``."""
    width *= len(folder.pooling_modes)
    for step in folder.steps:
        if isinstance(step, DenseSettings):
            if step.in_features != width:
                raise ModelError(
                    f"{step.path}/config.json: in_features is {step.in_features}, but its input has {width}"
                )
            width = step.out_features
    return min(width, folder.truncate_dim or width)


def vector_size(folder: ModelFolder) -> int | None:
    """Numbers in a vector, by the configuration alone; None where that does not say."""
    width = read_json(folder.transformer_path / "config.json").get("hidden_size")
    return output_width(folder, width) if isinstance(width, int) else None
