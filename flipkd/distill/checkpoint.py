"""Checkpoints: everything that the next step depends on, published whole or not at all.

A checkpoint holds LoRA's weights, AdamW's moments, and the step. The step is also the place in the data, the learning
rate and the seed of dropout: these are functions of it (``BatchOrder`` in ``flipkd.distill.training_pairs``), so no
generator's state has to be kept, and an unbroken run and a resumed one take the same numbers whoever the workers are.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flipkd.data.folders import is_whole, publish_folder, remove_published
from flipkd.errors import InputError
from flipkd.models.adapter import adapter_weights, load_adapter_weights
from flipkd.models.student import Student

logger = logging.getLogger(__name__)

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    Args:
        step: optimizer steps done.
        best_value: best validation value so far; None before the first.
        best_step: its step.
        waited: validations since then.
        stopped: whether training stopped early.
        seconds: of training so far, over all starts.
    """

    step: int = 0
    best_value: float | None = None
    best_step: int | None = None
    waited: int = 0
    stopped: bool = False
    seconds: float = 0.0


def save_checkpoint(
    folder: Path, student: Student, optimizer: torch.optim.Optimizer, progress: Progress, keep: int
) -> None:
    """Publishes ``folder/step-NNNNNNNN``; then all but the newest ``keep`` checkpoints up to it are deleted.

    Later ones are those that the run could not go on from, and went back before.
    """

    def write(target: Path) -> None:
        save_file(
            {name: _plain(value) for name, value in adapter_weights(student).items()}, target / "adapter.safetensors"
        )
        save_file(_moments(student, optimizer), target / "optimizer.safetensors")
        (target / "progress.json").write_text(json.dumps(asdict(progress), indent=1))

    newest = _checkpoint(folder, progress.step)
    publish_folder(newest, write)
    found = _checkpoints(folder)
    own = found.index(newest)
    for other in found[:own] + found[own + keep :]:
        remove_published(other)


def newest_checkpoint(folder: Path, has_best: Callable[[int], bool]) -> int:
    """Step of the newest checkpoint that a run can go on from; 0, the start, where there is none.

    A checkpoint that is damaged, or whose best student is lost, is passed over with a warning.

    Args:
        folder: of the checkpoints.
        has_best: whether the best student of a step is there, whole.
    """
    for path in _checkpoints(folder):
        if not is_whole(path):
            logger.warning("%s is damaged; going back to the one before", path)
            continue
        progress = _progress(path)
        if progress.best_step is not None and not has_best(progress.best_step):
            logger.warning(
                "%s: its best student, of step %d, is lost; going back to the one before", path, progress.best_step
            )
            continue
        return progress.step
    return 0


def load_checkpoint(folder: Path, step: int, student: Student, optimizer: torch.optim.Optimizer) -> Progress:
    """Restores the checkpoint of a step, which ``newest_checkpoint`` gave (maybe another worker); step 0 is the start.

    Raises:
        InputError: this worker finds no whole one.
    """
    if not step:
        return Progress()
    path = _checkpoint(folder, step)
    if not is_whole(path):
        raise InputError(f"{path} cannot be read by this training worker; all nodes must see the run's folder")
    load_adapter_weights(student, load_file(path / "adapter.safetensors"), str(path))
    _restore(student, optimizer, load_file(path / "optimizer.safetensors"))
    return _progress(path)


def _progress(path: Path) -> Progress:
    return Progress(**json.loads((path / "progress.json").read_text()))


def _checkpoint(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-????????"), reverse=True)


def _trained(student: Student) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}


def _moments(student: Student, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{moment}/{name}": _plain(torch.as_tensor(optimizer.state[parameter][moment]))
        for name, parameter in _trained(student).items()
        for moment in _MOMENTS
        if parameter in optimizer.state
    }


def _restore(student: Student, optimizer: torch.optim.Optimizer, moments: Mapping[str, Tensor]) -> None:
    """Gives the moments to the optimizer, which knows on what device it needs each: a fused one also ``step``."""
    names = {parameter: name for name, parameter in _trained(student).items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        place: {moment: moments[f"{moment}/{names[parameter]}"] for moment in _MOMENTS}
        for place, parameter in enumerate(parameters)
        if f"step/{names[parameter]}" in moments
    }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()
