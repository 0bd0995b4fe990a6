"""BERT itself, for the encoders that are one: MiniLM, BGE, E5, GTE and their like.

transformers runs these too, but importing its model code takes two seconds of every worker's start, and what stands
between the multiplications takes a third of its time. Any folder that differs from plain BERT in anything goes the
general way.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding

from flipkd.kernels.encoder_ops import Heads, Norm, Texts, activate, add_norm, attend
from flipkd.models.linear import Linear
from flipkd.models.plain import NotPlainError, check_shapes, plain_config, read_weights
from flipkd.models.settings import read_json
from flipkd.models.weights import check_finite

_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
# What a config may say beside the shape, and the only value under which the forward below is right.
_PLAIN = {
    "is_decoder": False,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "position_embedding_type": "absolute",
    "chunk_size_feed_forward": 0,
    "auto_map": None,
    "quantization_config": None,
}


@dataclass(frozen=True)
class _Block:
    attention_input: Linear
    attention_output: Linear
    attention_norm: Norm
    wide: Linear
    narrow: Linear
    norm: Norm


class Bert:
    """A BERT encoder without pooler, over texts packed end to end.

    Args:
        config: of the folder.
        tensors: its weights, by name.
        dtype: what multiplications are computed in: float32, bf16 or int8 (the rest is then bf16).
    """

    def __init__(self, config: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
        def norm(name: str) -> Norm:
            return Norm(tensors[f"{name}.weight"].float(), tensors[f"{name}.bias"].float(), epsilon, is_rms=False)

        def joined(*names: str) -> Linear:
            weight, bias = (torch.cat([tensors[f"{name}.{kind}"] for name in names]) for kind in ("weight", "bias"))
            return Linear(weight, bias, dtype)

        def block(name: str) -> _Block:
            return _Block(
                joined(*(f"{name}.attention.self.{part}" for part in ("query", "key", "value"))),
                joined(f"{name}.attention.output.dense"),
                norm(f"{name}.attention.output.LayerNorm"),
                joined(f"{name}.intermediate.dense"),
                joined(f"{name}.output.dense"),
                norm(f"{name}.output.LayerNorm"),
            )

        epsilon = float(config.get("layer_norm_eps", 1e-12))
        states = torch.bfloat16 if dtype is torch.int8 else dtype
        self._dtype = dtype
        self._activation = _ACTIVATIONS[config.get("hidden_act", "gelu")]
        self._words = tensors["embeddings.word_embeddings.weight"].to(states)
        # A text has one segment, so its segment vector is the same at every position.
        self._positions = tensors["embeddings.position_embeddings.weight"].to(states)
        self._segment = tensors["embeddings.token_type_embeddings.weight"][0].to(states)
        self._norm = norm("embeddings.LayerNorm")
        self._blocks = [block(f"encoder.layer.{number}") for number in range(int(config["num_hidden_layers"]))]
        heads = int(config["num_attention_heads"])
        self._heads = Heads(heads, heads, self.width // heads, causal=False)

    @property
    def width(self) -> int:
        """Size of a token vector."""
        return len(self._segment)

    @property
    def position_limit(self) -> int:
        """Most tokens per text."""
        return len(self._positions)

    def __call__(self, ids: Tensor, texts: Texts) -> Tensor:
        """Token vectors [T, width]; see ``flipkd.models.backbone.Backbone``."""
        state = embedding(ids, self._words) + self._segment + embedding(texts.positions, self._positions)
        state, operand = add_norm(None, state, self._norm, keeps_sum=False, dtype=self._dtype)
        for block in self._blocks:
            mixed = attend(block.attention_input(operand), texts, self._heads, self._dtype)
            product = block.attention_output(mixed)
            state, operand = add_norm(product, state, block.attention_norm, keeps_sum=False, dtype=self._dtype)
            wide = activate(block.wide(operand), self._activation, gated=False, dtype=self._dtype)
            state, operand = add_norm(block.narrow(wide), state, block.norm, keeps_sum=False, dtype=self._dtype)
        return state


def load_bert(path: Path, dtype: torch.dtype, device: torch.device) -> Bert:
    """Loads a folder that holds a plain BERT in one safetensors file.

    Raises:
        NotPlainError: it does not, or the file is not whole.
        ModelError: a weight is not finite.
    """
    config = read_json(path / "config.json")
    with plain_config():
        _check_plain(config)
        shapes = _shapes(config)
    tensors = read_weights(path, device, _name_of)
    check_shapes(tensors, shapes)
    check_finite(tensors.items(), path)
    return Bert(config, tensors, dtype)


def _check_plain(config: dict[str, Any]) -> None:
    if config.get("model_type") != "bert":
        raise NotPlainError(f"model_type is {config.get('model_type')!r}")
    if config.get("hidden_act", "gelu") not in _ACTIVATIONS:
        raise NotPlainError(f"hidden_act is {config['hidden_act']!r}")
    for name, value in _PLAIN.items():
        if config.get(name, value) != value:
            raise NotPlainError(f"{name} is {config[name]!r}")


def _name_of(stored: str) -> str | None:
    # Older files have the names of a model with a head ("bert."), or of TensorFlow's layer norm.
    name = stored.removeprefix("bert.").replace(".gamma", ".weight").replace(".beta", ".bias")
    is_ours = name.startswith(("embeddings.", "encoder.layer.")) and name != "embeddings.position_ids"
    return name if is_ours else None


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int | None, ...]]:
    """Shapes of the weights, by name, that a config promises."""
    width, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    if width % int(config["num_attention_heads"]):
        raise ValueError("a head has no whole number of components")
    shapes: dict[str, tuple[int | None, ...]] = {
        "embeddings.word_embeddings.weight": (int(config["vocab_size"]), width),
        "embeddings.position_embeddings.weight": (int(config["max_position_embeddings"]), width),
        "embeddings.token_type_embeddings.weight": (None, width),
    }
    matrices = {
        "attention.self.query": (width, width),
        "attention.self.key": (width, width),
        "attention.self.value": (width, width),
        "attention.output.dense": (width, width),
        "intermediate.dense": (inner, width),
        "output.dense": (width, inner),
    }
    norms = ["embeddings.LayerNorm"]
    for block in (f"encoder.layer.{number}" for number in range(int(config["num_hidden_layers"]))):
        norms += [f"{block}.attention.output.LayerNorm", f"{block}.output.LayerNorm"]
        for name, shape in matrices.items():
            shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
    return shapes | {f"{name}.{kind}": (width,) for name in norms for kind in ("weight", "bias")}
