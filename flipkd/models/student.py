"""The student: a decoder whose LoRA matrix A of layer k is read as an encoder.

Paper (arXiv 2507.05617): LoRA's A compresses, B decodes; the cosine of two compressed representations is what is
trained. Our choices, since the paper's text leaves them open: x is the input of layer k's attention projections, that
is the normed hidden state after k blocks; pool x over the text's tokens, z = A x with A of layer k's ``q_proj``
(``k_proj``, ``v_proj``), e = z / |z|. A is linear, so pooling first and projecting once gives the same z.

Blocks k and above are not needed for e: they are not even loaded, unless the language model's own loss is trained too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from flipkd.models.options import StudentOptions
from flipkd.models.packed import pack, pool_texts
from flipkd.models.tokens import TextTokenizer, TokenizedTexts

_PACK_TOKENS = 4096


class Student(nn.Module):
    """A decoder with LoRA. Use ``flipkd.models.adapter`` to get one.

    Args:
        options: what it was made of.
        layer: k.
        model: the PEFT model over blocks 0..k (or all).
        tokenizer: the base's, as transformers loads it.
        base_fingerprint: of the base's files.
    """

    def __init__(self, options: StudentOptions, layer: int, model: Any, tokenizer: Any, base_fingerprint: str) -> None:
        super().__init__()
        self.options, self.layer, self.base_fingerprint = options, layer, base_fingerprint
        self.model, self.tokenizer = model, tokenizer
        self._texts = TextTokenizer(
            tokenizer.backend_tokenizer,
            max_length=options.max_length,
            cuts_left=tokenizer.truncation_side == "left",
            unknown=tokenizer.unk_token_id,
        )
        if options.dtype == "bf16":
            for module in model.modules():
                if hasattr(module, "cast_input_dtype_enabled"):
                    # Autocast takes care of it; PEFT's own cast to LoRA's float32 would only be undone again.
                    module.cast_input_dtype_enabled = False
        # A view of the decoder that ends where x is: its blocks 0..k-1, and layer k's input norm for its last norm.
        # Kept in a list, so that its modules, which are the decoder's own, are not registered twice.
        decoder = model.get_base_model().model
        encoder = copy.copy(decoder)
        encoder.config = cut_config(decoder.config, layer)
        encoder._modules = {
            **decoder._modules,
            "layers": nn.ModuleList(decoder.layers[:layer]),
            "norm": decoder.layers[layer].input_layernorm,
        }
        self._encoder = [encoder]

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.projection.device

    @property
    def decoder(self) -> Any:
        """The bare decoder, blocks 0..k or all, with LoRA in its linear layers."""
        return self.model.get_base_model().model

    @property
    def projection(self) -> Tensor:
        """A of layer k, float32 [dimension, hidden width]."""
        module = getattr(self.decoder.layers[self.layer].self_attn, f"{self.options.projection}_proj")
        weight: Tensor = module.lora_A["default"].weight
        return weight

    def tokenize(self, texts: Sequence[str]) -> TokenizedTexts:
        """Token ids; what looks like a special token in a text is plain text."""
        return self._texts.tokenize(texts)

    @property
    def frame(self) -> tuple[list[int], list[int]]:
        """Special tokens that the tokenizer puts before and after every text."""
        return self._texts.head, self._texts.tail

    def body(self, ids: Sequence[int]) -> list[int]:
        """A tokenised text without them."""
        head, tail = self.frame
        return list(ids[len(head) : len(ids) - len(tail)])

    def autocast(self) -> Any:
        """The context in which blocks compute in ``options.dtype``."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.options.dtype == "bf16" else nullcontext()

    def states(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Pooled x of N texts, float32 [N, hidden width]; differentiable. Runs blocks 0..k-1 once over all tokens."""
        packed = pack(ids, self.device)
        if not packed.groups:
            return torch.zeros(len(ids), self.projection.shape[1], device=self.device)
        with self.autocast():
            output = self._encoder[0](**packed.arguments, is_causal=self.options.attention == "causal")
        return pool_texts(output.last_hidden_state, packed, self.options.pooling)

    def encode_ids(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """e of N texts, unit rows, float32 [N, dimension]; differentiable. A text without tokens gives zeros."""
        return normalize(linear(self.states(ids), self.projection), dim=-1)

    def encode(self, texts: Sequence[str], max_tokens: int = _PACK_TOKENS) -> np.ndarray[Any, Any]:
        """e of any number of normalised texts without gradients, float32 [N, dimension]."""
        return self.encode_tokens(self.tokenize(texts).ids, max_tokens).cpu().numpy()

    def encode_tokens(self, ids: Sequence[Sequence[int]], max_tokens: int = _PACK_TOKENS) -> Tensor:
        """``encode_ids`` in passes of at most ``max_tokens`` tokens, without gradients and dropout."""
        training = self.training
        self.eval()
        vectors = torch.zeros(len(ids), self.options.dimension, device=self.device)
        with torch.no_grad():
            for places in token_chunks(ids, max_tokens):
                vectors[places] = self.encode_ids([ids[place] for place in places])
        self.train(training)
        return vectors


def token_chunks(ids: Sequence[Sequence[int]], max_tokens: int) -> Iterator[list[int]]:
    """Places of texts, shortest first, in chunks of at most ``max_tokens`` tokens (one text may have more)."""
    chunk: list[int] = []
    tokens = 0
    for place in sorted(range(len(ids)), key=lambda place: len(ids[place])):
        if chunk and tokens + len(ids[place]) > max_tokens:
            yield chunk
            chunk, tokens = [], 0
        chunk.append(place)
        tokens += len(ids[place])
    if chunk:
        yield chunk


def cut_config(config: Any, blocks: int) -> Any:
    """A copy of a decoder's config with the first ``blocks`` blocks only."""
    cut = copy.deepcopy(config)
    cut.num_hidden_layers = blocks
    if getattr(cut, "layer_types", None) is not None:
        cut.layer_types = list(cut.layer_types[:blocks])
    if getattr(cut, "max_window_layers", None) is not None:
        cut.max_window_layers = min(cut.max_window_layers, blocks)
    return cut
