"""Token vectors to one vector per text: pooling, Dense and Normalize, always in float32.

Texts are packed end to end without padding, so none of this needs a mask.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from flipkd.errors import ModelError
from flipkd.kernels.encoder_ops import Texts
from flipkd.kernels.packed_attention import runs
from flipkd.models.folder import ModelFolder
from flipkd.models.linear import linear_of_rows
from flipkd.models.settings import DenseSettings, NormalizeSettings

Head = Callable[[Tensor], Tensor]


def pool_packed(states: Tensor, texts: Texts, modes: tuple[str, ...], skip: int = 0) -> Tensor:
    """``pool`` for texts packed end to end, each with at least one token (``skip`` not counted); differentiable.

    Args:
        states: token vectors, [T, width].
        texts: where they lie.
        modes, skip: see ``pool``.

    Returns:
        float32 [texts, width * len(modes)].
    """
    if states.is_cuda:
        return torch.cat([pool_segments(states, texts, mode, skip) for mode in modes], dim=1)
    groups = runs(texts.lengths.tolist())
    parts = torch.split(states, [count * length for count, length in groups])
    return torch.cat([pool(part.view(*group, -1), modes, skip) for group, part in zip(groups, parts, strict=True)])


def pool_segments(states: Tensor, texts: Texts, mode: str, skip: int = 0) -> Tensor:
    """The same in a few launches, however many lengths there are: for a GPU, where ``pool`` takes a few for each.

    Each text is summed by itself in a fixed order, so a sum depends on nothing but the text.
    """
    starts = texts.starts.long()
    first, end = starts[:-1] + skip, starts[1:]
    is_left = (end > first)[:, None]
    if mode in ("cls", "lasttoken"):
        return states[first.clamp(max=len(states) - 1) if mode == "cls" else end - 1].float() * is_left
    values, counts = states.float(), (end - first).clamp(min=1).float()
    if mode == "weightedmean":
        weights = texts.positions.float() + 1
        counts = counts * (counts + 1 + 2 * skip) / 2
        values = values * weights[:, None]
    elif mode == "mean_sqrt_len_tokens":
        counts = counts.sqrt()
    elif mode not in ("mean", "max"):
        raise _unknown(mode)
    nothing = -torch.inf if mode == "max" else 0.0
    if skip:
        values = values.masked_fill((texts.positions < skip)[:, None], nothing)
    # the lengths are right, and a check of them would wait for the GPU
    reduced = torch.segment_reduce(
        values, "max" if mode == "max" else "sum", lengths=starts.diff(), unsafe=True, initial=nothing
    )
    return reduced.where(is_left, 0.0) if mode == "max" else reduced / counts[:, None]


def _unknown(mode: str) -> ModelError:
    return ModelError(f"pooling mode {mode!r} is not supported")


def pool(states: Tensor, modes: tuple[str, ...], skip: int = 0) -> Tensor:
    """Pools token vectors as sentence-transformers does for unpadded texts.

    Args:
        states: token vectors, [texts, tokens, width], any floating dtype.
        modes: pooling modes; several are concatenated in this order.
        skip: leading tokens (of a prompt) that are left out. They still count as positions in ``weightedmean``.

    Returns:
        float32 [texts, width * len(modes)]; zero where no token is left.
    """
    states = states[:, skip:]
    length = states.shape[1]
    if not length:
        return states.new_zeros(len(states), states.shape[2] * len(modes), dtype=torch.float32)
    parts = []
    for mode in modes:
        if mode == "cls":
            part = states[:, 0].float()
        elif mode == "lasttoken":
            part = states[:, -1].float()
        elif mode == "max":
            part = states.amax(dim=1).float()
        elif mode == "mean":
            part = states.sum(dim=1, dtype=torch.float32) / length
        elif mode == "mean_sqrt_len_tokens":
            part = states.sum(dim=1, dtype=torch.float32) / length**0.5
        elif mode == "weightedmean":
            weights = torch.arange(1 + skip, 1 + skip + length, dtype=torch.float32, device=states.device)
            part = (states.float() * weights[:, None]).sum(dim=1) / weights.sum()
        else:
            raise _unknown(mode)
        parts.append(part)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def load_head(folder: ModelFolder, device: torch.device) -> list[Head]:
    """Loads the steps after pooling, each a function float32 [texts, n] to float32 [texts, m]."""
    return [_normalize if isinstance(step, NormalizeSettings) else _load_dense(step, device) for step in folder.steps]


def load_projection(folder: ModelFolder, device: torch.device) -> Tensor | None:
    """A of a head that is ``A x`` at length 1, [dim, width] float32; None for any other head."""
    if len(folder.steps) != 2 or folder.truncate_dim is not None:
        return None
    dense, last = folder.steps
    if not isinstance(dense, DenseSettings) or not isinstance(last, NormalizeSettings):
        return None
    if dense.bias or dense.use_residual or dense.activation != "Identity":
        return None
    return _weights(dense, device)["linear.weight"]


def _normalize(vectors: Tensor) -> Tensor:
    return nn.functional.normalize(vectors, p=2.0, dim=-1)


def _weights(settings: DenseSettings, device: torch.device) -> dict[str, Tensor]:
    file = settings.path / "model.safetensors"
    weights = {name: value.to(device, torch.float32) for name, value in load_file(file).items()}
    wanted: dict[str, tuple[int, ...]] = {"linear.weight": (settings.out_features, settings.in_features)}
    if settings.bias:
        wanted["linear.bias"] = (settings.out_features,)
    if _projects_residual(settings):
        wanted["residual.weight"] = (settings.out_features, settings.in_features)
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if found != wanted:
        raise ModelError(f"{file}: holds {found}, but its config.json asks for {wanted}")
    return weights


def _projects_residual(settings: DenseSettings) -> bool:
    return settings.use_residual and settings.in_features != settings.out_features


def _load_dense(settings: DenseSettings, device: torch.device) -> Head:
    weights, projects_residual = _weights(settings, device), _projects_residual(settings)
    activation: nn.Module = getattr(nn, settings.activation)()

    def dense(vectors: Tensor) -> Tensor:
        output: Tensor = activation(linear_of_rows(vectors, weights["linear.weight"], weights.get("linear.bias")))
        if settings.use_residual:
            output = output + (
                linear_of_rows(vectors, weights["residual.weight"], None) if projects_residual else vectors
            )
        return output

    return dense
