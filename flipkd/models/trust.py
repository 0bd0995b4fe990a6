"""What in a model folder could run code, and when it may.

Weights are read from safetensors alone: pickles beside them (``pytorch_model.bin``, ``training_args.bin``,
``optimizer.pt`` ...) are never opened, and a folder with nothing else is refused. Python code of a folder runs only
where the user says so for this very call; a file can never say it for him.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flipkd.errors import ModelError
from flipkd.models.settings import read_json

# Where transformers and vLLM look for the key that names classes in a folder's own Python files.
_CONFIGS = (
    "config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "generation_config.json",
    "adapter_config.json",
)
_CODE_KEY = "auto_map"


def check_code(path: Path, trust_remote_code: bool) -> None:
    """Refuses a folder that asks for Python code of its own, unless that is allowed.

    Also where transformers has a class of the same name and would take that in its place, without a word: its vectors
    need not be those that the folder's author means.

    Args:
        path: the folder with ``config.json``.
        trust_remote_code: what the user has said.

    Raises:
        ModelError: names the file and both ways out.
    """
    for name in () if trust_remote_code else _CONFIGS:
        if _names_code(read_json(path / name)):
            raise ModelError(
                f"{path / name}: {_CODE_KEY} asks for Python code of the folder's own, which runs only with "
                "trust_remote_code (--trust-remote-code). Read the code first; or delete the entry, if the model is "
                "one that transformers itself knows"
            )


def check_weights(path: Path) -> None:
    """Refuses a folder that does not hold a whole model as safetensors.

    Raises:
        ModelError: names the folder, what it holds and the way out.
    """
    if (path / "adapter_config.json").exists():
        raise ModelError(f"{path}: holds an adapter; merge it (merge_and_unload) and save the whole model")
    if not any(path.glob("*.safetensors")):
        pickles = sorted(
            file.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl") for file in path.glob(kind)
        )
        raise ModelError(
            f"{path}: has {'only ' + pickles[0] if pickles else 'no weights'}, and only safetensors are read, as other "
            "formats can run code; load it where you trust it and save it again with "
            "save_pretrained(..., safe_serialization=True)"
        )


@contextmanager
def known_form(path: Path) -> Iterator[None]:
    """Turns what a configuration of an unforeseen form does to the code that reads it into a ModelError."""
    try:
        yield
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        raise ModelError(
            f"{path}: its configuration files are damaged, or of a form that is not known ({type(error).__name__})"
        ) from error


def _names_code(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value.get(_CODE_KEY)) or any(map(_names_code, value.values()))
    return isinstance(value, list) and any(map(_names_code, value))
