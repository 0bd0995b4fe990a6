"""BERT itself, for the encoders that are one: MiniLM, BGE, E5, GTE and their like.

transformers runs these too, but importing its model code takes two seconds of every worker's start. This forward is
also a little faster: query, key and value are one multiplication, and nothing is masked. Any folder that differs from
plain BERT in anything goes the general way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import embedding, gelu, layer_norm, linear, relu, scaled_dot_product_attention

from flipkd.models.settings import read_json

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_new": partial(gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(gelu, approximate="tanh"),
    "relu": relu,
}
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
class _Affine:
    """Weight and bias of a linear layer or of a layer norm."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class _Block:
    attention_input: _Affine
    attention_output: _Affine
    attention_norm: _Affine
    wide: _Affine
    narrow: _Affine
    norm: _Affine


class Bert:
    """A BERT encoder without pooler. Called with ids int64 [texts, tokens], gives vectors [texts, tokens, width]."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        def affine(name: str) -> _Affine:
            return _Affine(tensors[f"{name}.weight"], tensors[f"{name}.bias"])

        def block(name: str) -> _Block:
            parts = [affine(f"{name}.attention.self.{part}") for part in ("query", "key", "value")]
            joined = _Affine(torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts]))
            return _Block(
                joined,
                affine(f"{name}.attention.output.dense"),
                affine(f"{name}.attention.output.LayerNorm"),
                affine(f"{name}.intermediate.dense"),
                affine(f"{name}.output.dense"),
                affine(f"{name}.output.LayerNorm"),
            )

        self._heads = int(config["num_attention_heads"])
        self._epsilon = float(config.get("layer_norm_eps", 1e-12))
        self._activation = _ACTIVATIONS[config.get("hidden_act", "gelu")]
        self._words = tensors["embeddings.word_embeddings.weight"]
        # A text has one segment, so its segment vector is the same at every position.
        self._positions = tensors["embeddings.position_embeddings.weight"]
        self._segment = tensors["embeddings.token_type_embeddings.weight"][0]
        self._norm = affine("embeddings.LayerNorm")
        self._blocks = [block(f"encoder.layer.{number}") for number in range(int(config["num_hidden_layers"]))]

    def fits(self, config: dict[str, Any]) -> bool:
        """Whether the weights have the shapes that the config promises."""
        width, inner = int(config["hidden_size"]), int(config["intermediate_size"])
        found = {
            shape
            for block in self._blocks
            for shape in (
                ("attention", *block.attention_input.weight.shape, *block.attention_output.weight.shape),
                ("wide", *block.wide.weight.shape, *block.narrow.weight.shape),
            )
        }
        wanted = {("attention", 3 * width, width, width, width), ("wide", inner, width, width, inner)}
        return (
            found == wanted
            and width % self._heads == 0
            and self._words.shape == (config["vocab_size"], width)
            and self._positions.shape == (config["max_position_embeddings"], width)
        )

    @property
    def width(self) -> int:
        """Size of a token vector."""
        return len(self._segment)

    @property
    def position_limit(self) -> int:
        """Most tokens per text."""
        return len(self._positions)

    def __call__(self, ids: Tensor) -> Tensor:
        texts, tokens = ids.shape
        states = embedding(ids, self._words) + self._segment + self._positions[:tokens]
        states = self._normalized(states, self._norm).view(texts * tokens, -1)
        for block in self._blocks:
            joined = linear(states, block.attention_input.weight, block.attention_input.bias)
            # [texts, tokens, 3, heads, head width] -> three times [texts, heads, tokens, head width]
            query, key, value = joined.view(texts, tokens, 3, self._heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            mixed = scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(texts * tokens, -1)
            mixed = linear(mixed, block.attention_output.weight, block.attention_output.bias)
            states = self._normalized(mixed.add_(states), block.attention_norm)
            wide = self._activation(linear(states, block.wide.weight, block.wide.bias))
            narrow = linear(wide, block.narrow.weight, block.narrow.bias)
            states = self._normalized(narrow.add_(states), block.norm)
        return states.view(texts, tokens, -1)

    def _normalized(self, states: Tensor, norm: _Affine) -> Tensor:
        return layer_norm(states, norm.weight.shape, norm.weight, norm.bias, self._epsilon)


def load_bert(path: Path, dtype: torch.dtype, device: torch.device) -> Bert | None:
    """Loads a folder that holds a plain BERT in one safetensors file; None where it does not, or is not whole."""
    config = read_json(path / "config.json")
    if config.get("model_type") != "bert" or config.get("hidden_act", "gelu") not in _ACTIVATIONS:
        return None
    if any(config.get(name, value) != value for name, value in _PLAIN.items()):
        return None
    try:
        with safe_open(path / "model.safetensors", framework="pt") as file:
            # Older files have the names of a model with a head ("bert."), or of TensorFlow's layer norm.
            names = {
                name.removeprefix("bert.").replace(".gamma", ".weight").replace(".beta", ".bias"): name
                for name in file.keys()  # noqa: SIM118 (not a mapping)
            }
            tensors = {
                name: file.get_tensor(stored).to(device, dtype)
                for name, stored in names.items()
                if name.startswith(("embeddings.", "encoder.layer.")) and name != "embeddings.position_ids"
            }
        bert = Bert(config, tensors)
        fits = bert.fits(config)
    except (OSError, SafetensorError, KeyError, RuntimeError):
        return None  # the general way says what is wrong
    return bert if fits else None
