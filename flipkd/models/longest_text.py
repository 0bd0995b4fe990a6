"""Whether a maximum length is more than a model can take, as far as its config.json tells. Loads nothing."""

from __future__ import annotations

from pathlib import Path

from flipkd.errors import ConfigError
from flipkd.models.settings import read_json

# Whose positions are rows of a table: there is nothing beyond its end. Others count on.
_WITH_A_TABLE = ("bert", "camembert", "distilbert", "electra", "mpnet", "roberta", "xlm-roberta")


def check_max_length(transformer_path: Path, wanted: int | None) -> None:
    """Refuses a ``--max-length`` that loading the model would refuse, long before it is loaded.

    Args:
        transformer_path: folder of the transformer.
        wanted: tokens, special tokens included; None for what the folder says.

    Raises:
        ConfigError: it is more than the model has positions.
    """
    if wanted is None:
        return
    config = read_json(transformer_path / "config.json")
    positions = config.get("max_position_embeddings")
    is_limit = config.get("model_type") in _WITH_A_TABLE
    if is_limit and isinstance(positions, int) and 0 < positions < wanted:
        raise ConfigError(f"--max-length {wanted} is more than the {positions} positions of this model")
