"""Decoder blocks without a head, for towers that are plain Llama or Qwen2: what ``export`` writes, and many others.

As with BERT: transformers runs these too, slower. A folder that differs in anything goes the general way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import embedding

from flipkd.kernels.encoder_ops import Heads, Norm, Product, Texts, activate, add_norm, attend
from flipkd.models.linear import Linear
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
        heads = int(config["num_attention_heads"])
        key_heads = int(config.get("num_key_value_heads") or heads)
        width = int(config.get("head_dim") or self.width // heads)
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
            if biases and len(biases) < len(names):
                raise KeyError("bias")
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

    def fits(self, config: dict[str, Any]) -> bool:
        """Whether the weights have the shapes that the config promises."""
        width, inner = int(config["hidden_size"]), int(config["intermediate_size"])
        heads = self._heads
        found = {
            (block.attention_input.shape, block.attention_output.shape, block.wide.shape, block.narrow.shape)
            for block in self._blocks
        }
        queries = heads.heads * heads.width
        wanted = {
            ((queries + 2 * heads.key_heads * heads.width, width), (width, queries), (2 * inner, width), (width, inner))
        }
        return (
            found == wanted
            and heads.heads % heads.key_heads == 0
            and self._words.shape == (config["vocab_size"], width)
        )

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


def _is_plain(config: dict[str, Any]) -> bool:
    parameters = config.get("rope_parameters") or {}
    return (
        config.get("model_type") in ("llama", "qwen2")
        and config.get("hidden_act", "silu") in _ACTIVATIONS
        and set(config.get("layer_types") or ()) <= {"full_attention"}
        and set(parameters) <= {"rope_theta", "rope_type"}
        and parameters.get("rope_type", "default") == "default"
        and all(config.get(name) in (value, None) for name, value in _PLAIN.items())
    )


def load_decoder(path: Path, dtype: torch.dtype, device: torch.device) -> Decoder | None:
    """Loads a folder that holds a plain tower in one safetensors file; None where it does not, or is not whole.

    Raises:
        ModelError: a weight is not finite.
    """
    config = read_json(path / "config.json")
    if not _is_plain(config):
        return None
    try:
        with safe_open(path / "model.safetensors", framework="pt") as file:
            tensors = {
                name.removeprefix("model."): file.get_tensor(name).to(device)
                for name in file.keys()  # noqa: SIM118 (not a mapping)
                if name != "lm_head.weight"
            }
        decoder = Decoder(config, tensors, dtype)
        fits = decoder.fits(config)
    except (OSError, SafetensorError, KeyError, RuntimeError, TypeError, ValueError):
        return None  # the general way says what is wrong
    if not fits:
        return None
    check_finite(tensors.items(), path)
    return decoder
