"""flipkd: score billions of record pairs a night with an encoder distilled from a small model into an LLM.

The names below are loaded on first use: ``import flipkd`` itself loads neither torch nor Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flipkd.api import score_pairs as score_pairs
    from flipkd.config import EncodeConfig as EncodeConfig
    from flipkd.config import EncoderOptions as EncoderOptions
    from flipkd.config import RunOptions as RunOptions
    from flipkd.config import ScoreConfig as ScoreConfig
    from flipkd.config import TeachConfig as TeachConfig
    from flipkd.distill.config import LossOptions as LossOptions
    from flipkd.distill.config import TrainConfig as TrainConfig
    from flipkd.distill.train import train as train
    from flipkd.models.encoder import load_encoder as load_encoder
    from flipkd.models.export import export as export
    from flipkd.models.llm import load_llm as load_llm
    from flipkd.models.llm_options import LlmOptions as LlmOptions
    from flipkd.models.options import StudentOptions as StudentOptions
    from flipkd.report.config import EvaluateConfig as EvaluateConfig
    from flipkd.report.evaluate import evaluate as evaluate
    from flipkd.run.cascade import score_and_rescore as score_and_rescore
    from flipkd.run.encode import encode as encode
    from flipkd.run.rescore import rescore as rescore
    from flipkd.run.rescore_config import RescoreConfig as RescoreConfig
    from flipkd.run.score import score as score
    from flipkd.run.teach import teach as teach
    from flipkd.vectors.rows import VectorRows as VectorRows
    from flipkd.vectors.rows import quantise as quantise
    from flipkd.vectors.store import VectorStore as VectorStore

__version__ = "0.1.0"

_HOMES = {
    "EncodeConfig": ("flipkd.config", "EncodeConfig"),
    "EncoderOptions": ("flipkd.config", "EncoderOptions"),
    "EvaluateConfig": ("flipkd.report.config", "EvaluateConfig"),
    "LlmOptions": ("flipkd.models.llm_options", "LlmOptions"),
    "LossOptions": ("flipkd.distill.config", "LossOptions"),
    "RescoreConfig": ("flipkd.run.rescore_config", "RescoreConfig"),
    "RunOptions": ("flipkd.config", "RunOptions"),
    "ScoreConfig": ("flipkd.config", "ScoreConfig"),
    "StudentOptions": ("flipkd.models.options", "StudentOptions"),
    "TeachConfig": ("flipkd.config", "TeachConfig"),
    "TrainConfig": ("flipkd.distill.config", "TrainConfig"),
    "VectorRows": ("flipkd.vectors.rows", "VectorRows"),
    "VectorStore": ("flipkd.vectors.store", "VectorStore"),
    "encode": ("flipkd.run.encode", "encode"),
    "evaluate": ("flipkd.report.evaluate", "evaluate"),
    "export": ("flipkd.models.export", "export"),
    "load_encoder": ("flipkd.models.encoder", "load_encoder"),
    "load_llm": ("flipkd.models.llm", "load_llm"),
    "quantise": ("flipkd.vectors.rows", "quantise"),
    "rescore": ("flipkd.run.rescore", "rescore"),
    "score": ("flipkd.run.score", "score"),
    "score_and_rescore": ("flipkd.run.cascade", "score_and_rescore"),
    "score_pairs": ("flipkd.api", "score_pairs"),
    "teach": ("flipkd.run.teach", "teach"),
    "train": ("flipkd.distill.train", "train"),
}
__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'flipkd' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
