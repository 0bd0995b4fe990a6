"""The student: a decoder whose LoRA matrix A of layer k is read as an encoder.

Paper (arXiv 2507.05617): LoRA's A compresses, B decodes; the cosine of two compressed representations is what is
trained. Our choices, since the paper's text leaves them open: x is the input of layer k's attention projections, that
is the normed hidden state after k blocks; pool x over the text's tokens, z = A x with A of layer k's ``q_proj``
(``k_proj``, ``v_proj``), e = z / |z|. A is linear, so pooling first and projecting once gives the same z.

Blocks k and above are not needed for e: they are not even loaded, unless the language model's own loss is trained too.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from flipkd.errors import ConfigError, ModelError
from flipkd.models.folder import files_fingerprint, find_folder
from flipkd.models.packed import ATTENTION, pack, pool_packed, register
from flipkd.models.tokens import TextTokenizer, TokenizedTexts

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text")
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STUDENT_FILE = "student.json"
_WEIGHTS = "adapter_model.safetensors"
_PACK_TOKENS = 4096


@dataclass(frozen=True)
class StudentOptions:
    """What a student is made of. Defaults are our choices, by the experiments in the README.

    Args:
        folder: a Hugging Face decoder folder, or the name of one on the hub.
        layer: k; blocks 0..k-1 are run. None: a third of the depth.
        dimension: rank of layer k's A, the size of a vector.
        rank: LoRA rank of the linear layers below.
        alpha: LoRA's alpha; the update is (alpha / rank) B A.
        dropout: of LoRA's input.
        target_modules: linear layers of blocks 0..k-1 that have LoRA.
        projection: whose A is read at layer k: ``q``, ``k`` or ``v``.
        pooling: over a text's tokens, ``mean`` or ``last``.
        max_length: most tokens per text.
        dtype: what the blocks compute in; LoRA's weights, pooling and the projection are float32.
        whole_tower: load all blocks, with LoRA in each, so that the language model's loss can be trained too.
        trust_remote_code: whether Python code in the folder may run.
    """

    folder: str
    layer: int | None = None
    dimension: int = 128
    rank: int = 64
    alpha: float = 64.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = LINEAR_LAYERS
    projection: Literal["q", "k", "v"] = "q"
    pooling: Literal["mean", "last"] = "mean"
    max_length: int = 128
    dtype: Literal["float32", "bf16"] = "float32"
    whole_tower: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name in ("dimension", "rank", "max_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.layer is not None and self.layer < 1:
            raise ConfigError(f"--layer must be at least 1, not {self.layer}")
        if self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ConfigError("--alpha must be greater than 0, and --dropout from 0 to less than 1")
        for name, known in _KNOWN.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"--{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        unknown = set(self.target_modules) - set(LINEAR_LAYERS)
        if unknown or not self.target_modules:
            raise ConfigError(f"--target-modules must be some of {', '.join(LINEAR_LAYERS)}")


_KNOWN = {"projection": ("q", "k", "v"), "pooling": ("mean", "last"), "dtype": ("float32", "bf16")}


class Student(nn.Module):
    """A decoder with LoRA. Use ``new_student`` or ``load_student`` to get one.

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

    def autocast(self) -> Any:
        """The context in which blocks compute in ``options.dtype``."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.options.dtype == "bf16" else nullcontext()

    def states(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Pooled x of N texts, float32 [N, hidden width]; differentiable. Runs blocks 0..k-1 once over all tokens."""
        packed = pack(ids, self.device)
        if not packed.groups:
            return torch.zeros(len(ids), self.projection.shape[1], device=self.device)
        with self.autocast():
            output = self._encoder[0](
                input_ids=packed.ids, position_ids=packed.positions, use_cache=False, groups=packed.groups
            )
        return pool_packed(output.last_hidden_state, packed, self.options.pooling)

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


def new_student(options: StudentOptions, device: str = "cpu", seed: int = 0) -> Student:
    """Loads the base and puts fresh LoRA on it: A random, B zero.

    Raises:
        ConfigError: an option does not fit the base.
        ModelError: the base cannot be loaded, or is of another family.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    base, tokenizer, layer, fingerprint = _load_base(options)
    own = f"{options.projection}_proj"
    blocks = len(base.model.layers) if options.whole_tower else layer
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(base, config).to(device)
    return Student(options, layer, model, tokenizer, fingerprint)


def save_student(student: Student, folder: str | Path) -> None:
    """Writes the adapter in PEFT's format, and ``student.json``: options, layer, the base's fingerprint."""
    path = Path(folder)
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    student.model.save_pretrained(str(path), safe_serialization=True)
    (path / "README.md").unlink(missing_ok=True)  # PEFT's model card: a form to fill in
    facts = {"format": 1, "options": asdict(student.options), "layer": student.layer}
    (path / STUDENT_FILE).write_text(json.dumps({**facts, "base_fingerprint": student.base_fingerprint}, indent=2))


def load_student(folder: str | Path, base: str | None = None, device: str = "cpu") -> Student:
    """Loads what ``save_student`` wrote.

    Args:
        folder: of the adapter.
        base: folder of the base, where it has moved since.
        device: where to run.

    Raises:
        ModelError: a file or a weight is missing, or the base is not the one that was trained.
    """
    from safetensors.torch import load_file

    path = Path(folder)
    try:
        facts = json.loads((path / STUDENT_FILE).read_text())
        values = {**facts["options"], "target_modules": tuple(facts["options"]["target_modules"])}
        options = StudentOptions(**{**values, "folder": base or values["folder"]})
        weights = load_file(path / _WEIGHTS)
        wanted = facts["base_fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} holds no whole student: {type(error).__name__}: {error}") from error
    except Exception as error:  # safetensors raises an exception class of its own
        raise ModelError(f"{path / _WEIGHTS} cannot be read: {error}") from error
    found = base_fingerprint(options.folder)
    if found != wanted:
        raise ModelError(
            f"{path}: was trained on another base than {options.folder} (its fingerprint is {wanted[:12]}, not "
            f"{found[:12]}); name the folder of the right one"
        )
    student = new_student(options, device)
    load_adapter_weights(student, weights, str(path / _WEIGHTS))
    return student


def adapter_weights(student: Student) -> dict[str, Tensor]:
    """LoRA's weights under the names that PEFT stores them by."""
    from peft import get_peft_model_state_dict

    found: dict[str, Tensor] = get_peft_model_state_dict(student.model)
    return found


def load_adapter_weights(student: Student, weights: dict[str, Tensor], source: str) -> None:
    """Puts weights into a student.

    Raises:
        ModelError: one is missing, of another shape, or unknown.
    """
    from peft import set_peft_model_state_dict

    wanted = {name: tuple(value.shape) for name, value in adapter_weights(student).items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if wanted != found:
        differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise ModelError(
            f"{source}: {len(differing)} weights are missing, unknown or of another shape, first {differing[0]}"
        )
    set_peft_model_state_dict(student.model, weights)


def base_fingerprint(folder: str | Path) -> str:
    """Hash over the files of a decoder folder that decide what it computes."""
    return files_fingerprint(find_folder(folder))


def _load_base(options: StudentOptions) -> tuple[Any, Any, int, str]:
    import transformers
    from transformers.utils import logging as transformers_logging

    path = find_folder(options.folder)
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
        layer = options.layer if options.layer is not None else max(1, round(depth / 3))
        if layer >= depth:
            raise ConfigError(f"--layer {layer}: the base has {depth} blocks; choose at most {depth - 1}")
        if not options.whole_tower:
            config = cut_config(config, layer + 1)  # blocks above are not even read
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(path), **remote)
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            str(path),
            config=config,
            dtype=torch.bfloat16 if options.dtype == "bf16" else torch.float32,
            attn_implementation=ATTENTION,
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
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{path}: has no fast tokenizer (tokenizer.json); save it with a fast one")
    return model.requires_grad_(False), tokenizer, layer, base_fingerprint(path)
