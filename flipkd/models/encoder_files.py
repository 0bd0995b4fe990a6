"""Writes a student as a sentence-transformers folder that needs no code of ours, without sentence-transformers.

::

    config.json, model.safetensors, tokenizer*   blocks 0..k-1 with LoRA merged; last norm = layer k's input norm
    1_Pooling/config.json                        mean, or last token
    2_Dense/config.json, model.safetensors       A of layer k: no bias, identity
    3_Normalize/config.json
    modules.json, config_sentence_transformers.json, sentence_bert_config.json

The formats are those of sentence-transformers 6.2; vLLM reads them too. There is no chat template anywhere:
sentence-transformers 6 would take it as the wish to wrap every text as a chat message, and vectors would be others.
"""

from __future__ import annotations

import copy
import json
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from flipkd.errors import ModelError
from flipkd.models.options import STUDENT_POOLINGS
from flipkd.models.student import Student, cut_config

# The release whose formats these are: sentence-transformers warns if it is older than the release named here.
_FORMAT_VERSION = "6.2.0"
_MODULES = (
    ("", "base.modules.transformer.Transformer"),
    ("1_Pooling", "sentence_transformer.modules.pooling.Pooling"),
    ("2_Dense", "base.modules.dense.Dense"),
    ("3_Normalize", "base.modules.normalize.Normalize"),
)
_EMBEDDING = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}


def merged_weights(student: Student) -> dict[str, Tensor]:
    """Weights of the cut decoder, float32 on the CPU, by the names that its bare model class has.

    W' = W + (alpha / r) B A for each linear layer with LoRA in blocks 0..k-1, computed in float32. The last norm is
    layer k's input norm: within a family both are of one class, so its weight means the same in either place.
    """
    decoder, layer = student.decoder, student.layer
    weights: dict[str, Tensor] = {}
    for name, value in decoder.state_dict().items():
        if _is_below(name, layer) and ".lora_" not in name and not name.startswith("norm."):
            weights[name.replace(".base_layer.", ".")] = value.float().cpu()
    for name, value in decoder.layers[layer].input_layernorm.state_dict().items():
        weights[f"norm.{name}"] = value.float().cpu()
    for name, module in decoder.named_modules():
        if hasattr(module, "lora_A") and _is_below(name, layer):
            down, up = (getattr(module, part)["default"].weight.detach().float() for part in ("lora_A", "lora_B"))
            update = module.scaling["default"] * (up @ down)
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + update.cpu()
    return weights


def write_transformer(student: Student, folder: Path) -> None:
    """Writes the cut decoder's config and weights, stored as float32.

    Raises:
        ModelError: the decoder's class is not one of transformers' own.
    """
    kind = type(student.decoder)
    if not kind.__module__.startswith("transformers."):
        raise ModelError(f"{kind.__name__} is code of the base's own; only classes of transformers can be exported")
    config = cut_config(student.decoder.config, student.layer)
    config.architectures, config.dtype = [kind.__name__], torch.float32
    if student.options.attention == "full":
        config.is_causal = False
    config.save_pretrained(str(folder))
    values = json.loads((folder / "config.json").read_text())
    for key in ("_name_or_path", "_attn_implementation", "auto_map"):
        values.pop(key, None)
    _write_json(folder / "config.json", values)
    _save(merged_weights(student), folder / "model.safetensors")


def write_tokenizer(student: Student, folder: Path) -> None:
    """Writes the base's tokenizer with the student's maximum length, with a pad token, without its chat template."""
    tokenizer = copy.deepcopy(student.tokenizer)
    tokenizer.chat_template = None
    tokenizer.model_max_length = student.options.max_length
    if tokenizer.pad_token is None:  # who pads needs one; which one it is makes no difference under the mask
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token or tokenizer.unk_token
    tokenizer.save_pretrained(str(folder))
    values = json.loads((folder / "tokenizer_config.json").read_text())
    for key in ("chat_template", "backend", "is_local", "local_files_only", "name_or_path"):
        values.pop(key, None)
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"  # the same, by the name that older releases know too
    _write_json(folder / "tokenizer_config.json", values)
    for left in folder.glob("*chat_template*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def write_modules(student: Student, folder: Path) -> None:
    """Writes pooling, the projection A of layer k, normalisation, and the files that tie them together."""
    projection = student.projection.detach().float().cpu()
    dimension, width = projection.shape
    _write_json(
        folder / "1_Pooling" / "config.json",
        {
            "embedding_dimension": width,
            "pooling_mode": STUDENT_POOLINGS[student.options.pooling],
            "include_prompt": True,
        },
    )
    _write_json(
        folder / "2_Dense" / "config.json",
        {
            "in_features": width,
            "out_features": dimension,
            "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
            **_EMBEDDING,
        },
    )
    _save({"linear.weight": projection}, folder / "2_Dense" / "model.safetensors")
    _write_json(folder / "3_Normalize" / "config.json", _EMBEDDING)
    _write_json(
        folder / "modules.json",
        [
            {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.{kind}"}
            for place, (path, kind) in enumerate(_MODULES)
        ],
    )
    _write_json(
        folder / "config_sentence_transformers.json",
        {
            "__version__": {
                "sentence_transformers": _FORMAT_VERSION,
                "transformers": metadata.version("transformers"),
                "pytorch": metadata.version("torch"),
            },
            "model_type": "SentenceTransformer",
            "prompts": {},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )
    _write_json(
        folder / "sentence_bert_config.json",
        {
            "max_seq_length": student.options.max_length,
            "transformer_task": "feature-extraction",
            "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
            "module_output_name": "token_embeddings",
        },
    )


def copy_licenses(base: Path, folder: Path) -> None:
    """Copies the base's licence and notice, which most licences ask for."""
    for file in base.iterdir():
        if file.is_file() and file.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE")):
            shutil.copyfile(file, folder / file.name)


def _is_below(name: str, layer: int) -> bool:
    """Whether a weight or module of the decoder stands outside the blocks, or in a block below ``layer``."""
    parts = name.split(".")
    return parts[0] != "layers" or (len(parts) > 1 and int(parts[1]) < layer)


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    save_file({name: value.contiguous() for name, value in tensors.items()}, file, metadata={"format": "pt"})


def _write_json(file: Path, values: Any) -> None:
    file.parent.mkdir(mode=0o700, exist_ok=True)
    file.write_text(json.dumps(values, indent=2) + "\n")
