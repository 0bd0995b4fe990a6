"""Decoder blocks without a head, for towers that are plain Llama or Qwen2: what ``export`` writes, and many others.

As with BERT: transformers runs these too, slower. A folder that differs in anything goes the general way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding

from flipkd.kernels.encoder_ops import Heads, Norm, Product, Texts, activate, add_norm, attend
from flipkd.models.linear import Linear
from flipkd.models.plain import NotPlainError, check_shapes, plain_config, read_weights
from flipkd.models.settings import read_json
from flipkd.models.smoothing import Watched, one_thread, random_texts, smooth_block
from flipkd.models.weights import check_finite

_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
# What a config may say beside the shape, and the only value under which the forward below is right.
_PLAIN = {
    "auto_map": None,
    "quantization_config": None,
    "rope_scaling": None,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
}


@dataclass(frozen=True)
class _Block:
    attention_norm: Norm
    attention_input: Linear
    attention_output: Linear
    norm: Norm
    wide: Linear
    narrow: Linear

    def __call__(
        self, product: Product | None, state: Tensor, texts: Texts, heads: Heads, activation: str
    ) -> tuple[Product, Tensor]:
        """What the block before adds to the residual stream, and the stream; to this block's."""
        state, operand = add_norm(product, state, self.attention_norm, keeps_sum=True, dtype=self.attention_input.dtype)
        mixed = attend(self.attention_input(operand), texts, heads, self.attention_output.dtype)
        product = self.attention_output(mixed)
        state, operand = add_norm(product, state, self.norm, keeps_sum=True, dtype=self.wide.dtype)
        wide = activate(self.wide(operand), activation, gated=True, dtype=self.narrow.dtype)
        return self.narrow(wide), state


class Decoder:
    """A tower of decoder blocks and its last norm, over texts packed end to end.

    Args:
        config: of the folder.
        tensors: its weights, by name without "model.".
        dtype: what multiplications are computed in: float32, bf16 or int8. With int8 the rest is bf16, and so is the
            MLP's last multiplication: its input, a gate times a value, has components far above the others, and int8
            would double the error of a cosine, at 1.2 times the speed (SmolLM2 at k = 8). The weights are smoothed.
    """

    def __init__(self, config: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
        self._epsilon = float(config["rms_norm_eps"])
        states = torch.bfloat16 if dtype is torch.int8 else dtype
        self._activation = _ACTIVATIONS[config.get("hidden_act", "silu")]
        self._words = tensors["embed_tokens.weight"].to(states)
        self._norm = self._norm_of(tensors, "norm")
        heads, key_heads, width = _heads_of(config)
        self._theta = _rope_theta(config)
        causal = config.get("is_causal") is not False
        self._tables: list[tuple[Tensor, Tensor]] = []
        self._heads = self._reaching(512, Heads(heads, key_heads, width, causal=causal))
        count = int(config["num_hidden_layers"])
        blocks = [_below(tensors, f"layers.{number}.") for number in range(count)]
        if dtype is torch.int8:
            self._blocks = self._smoothed(blocks)
        else:
            self._blocks = [self._block(block, dtype) for block in blocks]

    def _norm_of(self, tensors: Mapping[str, Tensor], name: str) -> Norm:
        return Norm(tensors[f"{name}.weight"].float(), None, self._epsilon, is_rms=True)

    def _block(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, linear: type[Linear] = Linear) -> _Block:
        """A block of weights by transformers' names within it."""

        def joined(*names: str, dtype: torch.dtype = dtype) -> Linear:
            weight = torch.cat([tensors[f"{name}.weight"] for name in names])
            biases = [tensors[f"{name}.bias"] for name in names if f"{name}.bias" in tensors]
            return linear(weight, torch.cat(biases) if biases else None, dtype)

        return _Block(
            self._norm_of(tensors, "input_layernorm"),
            joined(*(f"self_attn.{part}_proj" for part in "qkv")),
            joined("self_attn.o_proj"),
            self._norm_of(tensors, "post_attention_layernorm"),
            joined("mlp.gate_proj", "mlp.up_proj"),
            joined("mlp.down_proj", dtype=torch.bfloat16 if dtype is torch.int8 else dtype),
        )

    def _smoothed(self, blocks: Sequence[Mapping[str, Tensor]]) -> list[_Block]:
        """int8 blocks. One at a time is there in float32, to see what its inputs are like."""
        made: list[_Block] = []
        ids, texts = random_texts(self._words)
        product: Product | None = None
        state = embedding(ids, self._words).float()
        with torch.no_grad(), one_thread():
            for tensors in blocks:
                exact = self._block(tensors, torch.float32, Watched)
                product, state = exact(product, state, texts, self._heads, self._activation)
                watched = (exact.attention_input, exact.attention_output, exact.wide)
                largest = [layer.largest for layer in watched if isinstance(layer, Watched)]
                made.append(self._block(smooth_block(tensors, self._heads, *largest), torch.int8))
        return made

    @property
    def width(self) -> int:
        """Size of a token vector."""
        return int(self._words.shape[1])

    @property
    def last_norm(self) -> Norm:
        """The norm after the last block."""
        return self._norm

    def __call__(self, ids: Tensor, texts: Texts) -> Tensor:
        """Token vectors [T, width]; see ``flipkd.models.backbone.Backbone``."""
        product, state = self._blocks_run(ids, texts)
        return add_norm(product, state, self._norm, keeps_sum=False, dtype=state.dtype)[0]

    def before_last_norm(self, ids: Tensor, texts: Texts) -> Tensor:
        """Token states [T, width] that ``last_norm`` has still to be applied to."""
        product, state = self._blocks_run(ids, texts)
        # An MLP's last multiplication is never int8, so its product is finished.
        return state if product is None else state + product.values

    def _blocks_run(self, ids: Tensor, texts: Texts) -> tuple[Product | None, Tensor]:
        """The residual stream, and what the last block adds to it."""
        heads = self._heads
        if heads.cosine is None or texts.longest > len(heads.cosine):
            # Another thread may do the same at the same time: each has a table that reaches, and one of them stays.
            self._heads = heads = self._reaching(2 * texts.longest, heads)
        product: Product | None = None
        state = embedding(ids, self._words)
        for block in self._blocks:
            product, state = block(product, state, texts, heads, self._activation)
        return product, state

    def _reaching(self, positions: int, heads: Heads) -> Heads:
        cosine, sine = _rotation(heads.width, self._theta, positions, self._words.device)
        if cosine.is_cuda:
            torch.cuda.current_stream().synchronize()  # threads have streams of their own
            self._tables.append((cosine, sine))  # what another stream still reads must not be given back
        return replace(heads, cosine=cosine, sine=sine)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _rope_theta(config: dict[str, Any]) -> float:
    parameters = config.get("rope_parameters") or {}
    return float(parameters.get("rope_theta") or config.get("rope_theta") or 10000.0)


def _rotation(width: int, theta: float, positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines float32 [positions, width / 2] of the angles position * theta^(-2 c / width)."""
    frequencies = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.int64, device=device).float() / width)
    angles = torch.arange(positions, device=device).float()[:, None] * frequencies
    return angles.cos(), angles.sin()


def _heads_of(config: dict[str, Any]) -> tuple[int, int, int]:
    """Number of heads, of heads of keys and values, and a head's width."""
    heads = int(config["num_attention_heads"])
    key_heads = int(config.get("num_key_value_heads") or heads)
    return heads, key_heads, int(config.get("head_dim") or int(config["hidden_size"]) // heads)


def _check_plain(config: dict[str, Any]) -> None:
    if config.get("model_type") not in ("llama", "qwen2"):
        raise NotPlainError(f"model_type is {config.get('model_type')!r}")
    if config.get("hidden_act", "silu") not in _ACTIVATIONS:
        raise NotPlainError(f"hidden_act is {config['hidden_act']!r}")
    if not set(config.get("layer_types") or ()) <= {"full_attention"}:
        raise NotPlainError("layer_types has others than full_attention")
    parameters = config.get("rope_parameters") or {}
    if not set(parameters) <= {"rope_theta", "rope_type"} or parameters.get("rope_type", "default") != "default":
        raise NotPlainError("rope_parameters are not the default ones")
    for name, value in _PLAIN.items():
        if config.get(name) not in (value, None):
            raise NotPlainError(f"{name} is {config[name]!r}")
    float(config["rms_norm_eps"])
    _rope_theta(config)


def _shapes(config: dict[str, Any], weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights, by name, that a config promises; a layer whose weights have a bias may have one."""
    width, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    heads, key_heads, head_width = _heads_of(config)
    if heads % key_heads:
        raise ValueError("heads cannot be shared out")
    queries, keys = heads * head_width, key_heads * head_width
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (int(config["vocab_size"]), width)}
    joined = (
        {"self_attn.q_proj": (queries, width), "self_attn.k_proj": (keys, width), "self_attn.v_proj": (keys, width)},
        {"self_attn.o_proj": (width, queries)},
        {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width)},
        {"mlp.down_proj": (width, inner)},
    )
    norms = ["norm"]
    for block in (f"layers.{number}" for number in range(int(config["num_hidden_layers"]))):
        norms += [f"{block}.input_layernorm", f"{block}.post_attention_layernorm"]
        for matrices in joined:
            has_bias = any(f"{block}.{name}.bias" in weights for name in matrices)
            for name, shape in matrices.items():
                shapes[f"{block}.{name}.weight"] = shape
                if has_bias:
                    shapes[f"{block}.{name}.bias"] = shape[:1]
    return shapes | {f"{name}.weight": (width,) for name in norms}


def load_decoder(path: Path, dtype: torch.dtype, device: torch.device) -> Decoder:
    """Loads a folder that holds a plain tower in one safetensors file.

    Raises:
        NotPlainError: it does not, or the file is not whole.
        ModelError: a weight is not finite.
    """
    config = read_json(path / "config.json")
    with plain_config():
        _check_plain(config)
    tensors = read_weights(path, device, _name_of)
    with plain_config():
        shapes = _shapes(config, tensors)
    check_shapes(tensors, shapes)
    check_finite(tensors.items(), path)
    return Decoder(config, tensors, dtype)


def _name_of(stored: str) -> str | None:
    return None if stored == "lm_head.weight" else stored.removeprefix("model.")
