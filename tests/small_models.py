"""Small decoders with random weights from a fixed seed, and a real tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def make_base(folder: Path, tokenizer_dir: Path, seed: int, family: str = "Llama", **settings: Any) -> Path:
    """A decoder of 3 small blocks with random weights."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tokenizer_dir))
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "pad_token_id": None,
    }
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**{**shape, **settings})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder
