"""A student from its base, to a folder in PEFT's format, and back.

The base is known by a hash of its files: an adapter on another base of the same shape would load without a word and
give wrong vectors.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flipkd.data.json_files import parse_object
from flipkd.errors import ConfigError, ModelError
from flipkd.models.folder import absolute_model, files_fingerprint, find_folder
from flipkd.models.options import StudentOptions, saved_options
from flipkd.models.packed import ATTENTION, register
from flipkd.models.student import Student, cut_config
from flipkd.models.tokenizer import check_tokenizer
from flipkd.models.trust import check_code, check_weights
from flipkd.models.weights import check_finite

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text")
STUDENT_FILE = "student.json"
WEIGHTS_FILE = "adapter_model.safetensors"


def new_student(options: StudentOptions, device: str = "cpu", seed: int = 0, fingerprint: str | None = None) -> Student:
    """Loads the base and puts fresh LoRA on it: A random, B zero.

    Args:
        options: of the student.
        device: where to run.
        seed: of A.
        fingerprint: the base's (``base_fingerprint``), where the caller has it already; None makes it here.

    Raises:
        ConfigError: an option does not fit the base.
        ModelError: the base cannot be loaded, or is of another family.
    """
    base, tokenizer, layer = _load_base(options)
    fingerprint = fingerprint or base_fingerprint(options.folder)
    blocks = len(base.model.layers) if options.whole_tower else layer
    return Student(options, layer, _with_lora(base, options, layer, blocks, seed).to(device), tokenizer, fingerprint)


def _with_lora(base: Any, options: StudentOptions, layer: int, blocks: int, seed: int = 0) -> Any:
    """The base with fresh LoRA in its first ``blocks`` blocks, and in layer k's projection."""
    from peft import LoraConfig, TaskType, get_peft_model

    own = f"{options.projection}_proj"
    numbers = "|".join(str(number) for number in range(blocks))
    targets = "|".join(options.target_modules)
    head = rf"layers\.{layer}\.self_attn\.{own}"
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=rf".*layers\.({numbers})\.(self_attn|mlp)\.({targets})|.*{head}",
        # Layer k's A is the projection, and its rank the size of a vector; its own update keeps a factor of 1.
        rank_pattern={head: options.dimension},
        alpha_pattern={head: options.dimension},
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name that is on its way out
        torch.manual_seed(seed)
        return get_peft_model(base, config)


def save_student(student: Student, folder: str | Path) -> None:
    """Writes the adapter in PEFT's format, and ``student.json``: options, layer, the base's fingerprint."""
    path = Path(folder)
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    student.model.save_pretrained(str(path), safe_serialization=True)
    (path / "README.md").unlink(missing_ok=True)  # PEFT's model card: a form to fill in
    options = {**asdict(student.options), "folder": absolute_model(student.options.folder)}  # read from anywhere
    facts = {"format": 1, "options": options, "layer": student.layer}
    (path / STUDENT_FILE).write_text(json.dumps({**facts, "base_fingerprint": student.base_fingerprint}, indent=2))


def load_student(
    folder: str | Path, base: str | None = None, device: str = "cpu", trust_remote_code: bool = False
) -> Student:
    """Loads what ``save_student`` wrote.

    Args:
        folder: of the adapter.
        base: folder of the base, where it has moved since.
        device: where to run.
        trust_remote_code: whether Python code in the base's folder may run; what the adapter's file says of it does not
            count.

    Raises:
        ModelError: a file or a weight is missing, or the base is not the one that was trained.
    """
    options, _, weights, fingerprint = _read_adapter(Path(folder), base, trust_remote_code)
    student = new_student(options, device, fingerprint=fingerprint)
    load_adapter_weights(student, weights, str(Path(folder) / WEIGHTS_FILE))
    return student


def load_merged(
    folder: str | Path,
    base: str | None = None,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """The whole base with a student's adapter merged into it: what answers, where ``load_student`` encodes.

    Args:
        folder, base, trust_remote_code: as for ``load_student``.
        dtype: of its weights and arithmetic; the merge itself is float32.

    Returns:
        A plain transformers model on the CPU, and its tokenizer.

    Raises:
        ModelError: as ``load_student``.
    """
    path = Path(folder)
    options, layer, weights, _ = _read_adapter(path, base, trust_remote_code)
    whole = replace(options, layer=layer, whole_tower=True, dtype="float32")
    # Transformers' own choice: not every model has each (Gemma 2's soft caps are for eager alone).
    model, tokenizer, _ = _load_base(whole, attention=None)
    adapted = _with_lora(model, options, layer, len(model.model.layers) if options.whole_tower else layer)
    _put_weights(adapted, weights, str(path / WEIGHTS_FILE))
    return adapted.merge_and_unload().to(dtype).eval(), tokenizer


def _read_adapter(
    path: Path, base: str | None, trust_remote_code: bool
) -> tuple[StudentOptions, int, dict[str, Tensor], str]:
    """Options, layer k and weights of a student's folder, and the fingerprint of its base: the one that was trained."""
    from safetensors.torch import load_file

    try:
        facts = parse_object((path / STUDENT_FILE).read_bytes())
        values = saved_options(facts)
        values |= {"folder": base or values["folder"], "trust_remote_code": trust_remote_code}
        options = StudentOptions(**values)
        weights = load_file(path / WEIGHTS_FILE)
        wanted, layer = facts["base_fingerprint"], int(facts["layer"])
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise ModelError(f"{path} holds no whole student: {type(error).__name__}: {error}") from error
    except Exception as error:  # safetensors raises an exception class of its own
        raise ModelError(f"{path / WEIGHTS_FILE} cannot be read: {error}") from error
    found = base_fingerprint(options.folder)
    if found != wanted:
        raise ModelError(
            f"{path}: was trained on another base than {options.folder} (its fingerprint is {wanted[:12]}, not "
            f"{found[:12]}); name the folder of the right one"
        )
    return options, layer, weights, found


def adapter_weights(student: Student) -> dict[str, Tensor]:
    """LoRA's weights under the names that PEFT stores them by."""
    return _weights_of(student.model)


def _weights_of(model: Any) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    found: dict[str, Tensor] = get_peft_model_state_dict(model)
    return found


def load_adapter_weights(student: Student, weights: dict[str, Tensor], source: str) -> None:
    """Puts weights into a student.

    Raises:
        ModelError: one is missing, of another shape, or unknown.
    """
    _put_weights(student.model, weights, source)


def _put_weights(model: Any, weights: dict[str, Tensor], source: str) -> None:
    from peft import set_peft_model_state_dict

    wanted = {name: tuple(value.shape) for name, value in _weights_of(model).items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if wanted != found:
        differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise ModelError(
            f"{source}: {len(differing)} weights are missing, unknown or of another shape, first {differing[0]}"
        )
    set_peft_model_state_dict(model, weights)


def base_fingerprint(folder: str | Path) -> str:
    """Hash over the files of a decoder folder that decide what it computes."""
    return files_fingerprint(find_folder(folder))


def _load_base(options: StudentOptions, attention: str | None = ATTENTION) -> tuple[Any, Any, int]:
    import transformers
    from transformers.utils import logging as transformers_logging

    path = find_folder(options.folder)
    check_code(path, options.trust_remote_code)
    check_weights(path)
    remote = {"trust_remote_code": options.trust_remote_code, "local_files_only": True}
    register()
    shows_bar, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # else it lists every weight of the blocks that are left out
    try:
        config = transformers.AutoConfig.from_pretrained(str(path), **remote)
        if config.model_type not in FAMILIES:
            raise ModelError(f"{path}: a {config.model_type} model; students are of {', '.join(FAMILIES)}")
        depth = config.num_hidden_layers
        layer = options.layer if options.layer is not None else max(1, round(depth / 4))
        if layer >= depth:
            raise ConfigError(f"--layer {layer}: the base has {depth} blocks; choose at most {depth - 1}")
        windows = getattr(config, "sliding_window", None) is not None or "sliding_attention" in (
            getattr(config, "layer_types", None) or ()
        )
        if options.attention == "full" and (windows or config.model_type.startswith("gemma")):
            raise ConfigError(
                f"--attention full: {path} is a {config.model_type} model with attention in windows or soft caps; "
                "full attention is there for Llama, Qwen2 and Qwen3 models without them"
            )
        if not options.whole_tower:
            config = cut_config(config, layer + 1)  # blocks above are not even read
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(path), **remote)
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            str(path),
            config=config,
            dtype=torch.bfloat16 if options.dtype == "bf16" else torch.float32,
            attn_implementation=attention,
            use_safetensors=True,
            output_loading_info=True,
            **remote,
        )
    except (ModelError, ConfigError):
        raise
    except Exception as error:  # transformers raises whatever it meets
        raise ModelError(f"{path}: transformers cannot load this model: {type(error).__name__}: {error}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shows_bar:
            transformers_logging.enable_progress_bar()
    missing = sorted(name for name in report["missing_keys"] if name != "lm_head.weight")
    if missing or report.get("mismatched_keys"):
        raise ModelError(
            f"{path}: weights are missing or of the wrong shape, first {(missing or report['mismatched_keys'])[0]}"
        )
    check_finite(model.named_parameters(), path)
    check_tokenizer(tokenizer, path)
    return model.requires_grad_(False), tokenizer, layer
