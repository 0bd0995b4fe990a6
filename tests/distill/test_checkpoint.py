"""What a checkpoint gives back to the optimizer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flipkd.distill.checkpoint import _moments, _restore


def student_of(*parameters: torch.nn.Parameter) -> Any:
    named = [(f"weight{number}", parameter) for number, parameter in enumerate(parameters)]
    return SimpleNamespace(named_parameters=lambda: iter(named))


def parameters_on(device: str) -> list[torch.nn.Parameter]:
    trained = [torch.nn.Parameter(torch.ones(size, device=device)) for size in (3, 5)]
    return [trained[0], torch.nn.Parameter(torch.ones(2, device=device), requires_grad=False), trained[1]]


@pytest.mark.parametrize("kind", ["fused", "capturable", "plain"])
def test_moments_go_where_the_optimizer_needs_them(kind: str) -> None:
    """A fused kernel reads the number of its step where the weights are."""
    values = {name: torch.arange(float(size)) for name, size in (("weight0", 3), ("weight2", 5))}
    moments = {f"{moment}/{name}": value for moment in ("exp_avg", "exp_avg_sq") for name, value in values.items()}
    moments |= {f"step/{name}": torch.tensor(7.0) for name in values}
    every = parameters_on("meta")
    trained = [parameter for parameter in every if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained[::-1])  # in another order than the student's
    optimizer.param_groups[0] |= {kind: True} if kind != "plain" else {}
    _restore(student_of(*every), optimizer, moments)
    for parameter in trained:
        state = optimizer.state[parameter]
        assert {name: value.device.type for name, value in state.items()} == {
            "exp_avg": "meta", "exp_avg_sq": "meta", "step": "cpu" if kind == "plain" else "meta"
        }  # fmt: skip
        assert state["exp_avg"].shape == parameter.shape


def test_a_restored_optimizer_takes_the_same_steps() -> None:
    def step(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator) if parameter.requires_grad else None
        optimizer.step()

    every = parameters_on("cpu")
    optimizer = torch.optim.AdamW([one for one in every if one.requires_grad], lr=0.1, fused=True)
    step(optimizer, every, 0)
    again = [torch.nn.Parameter(one.detach().clone(), one.requires_grad) for one in every]
    other = torch.optim.AdamW([one for one in again if one.requires_grad], lr=0.1, fused=True)
    moments = {name: value.clone() for name, value in _moments(student_of(*every), optimizer).items()}
    _restore(student_of(*again), other, moments)
    assert other.param_groups[0]["lr"] == 0.1
    for seed in (1, 2):
        step(optimizer, every, seed)
        step(other, again, seed)
    for one, two in zip(every, again, strict=True):
        assert torch.equal(one, two)
