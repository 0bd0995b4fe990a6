"""The question that a decoder is asked about a pair, in its own tokens: training and scoring ask the same one.

A prompt is ``before + first text + between + second text + after``, each piece tokenised by itself, so that no text can
change how another piece is read; the answer is one of two labels. The paper (arXiv 2507.05617) names the label's term
of the loss; prompt and label words are our choice, as is that a user's own prompt may replace them. Imports no torch.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flipkd.data.json_files import read_option_file
from flipkd.errors import ConfigError, ModelError
from flipkd.models.pair_tokens import PairTexts
from flipkd.models.tokens import PROBES, TextTokenizer, plain_copy

_FIELDS = ("left", "right")
# What stands for the texts while a chat template is filled in; no template changes such words.
_MARKS = ("flipkdFirstText", "flipkdSecondText")


@dataclass(frozen=True)
class PromptText:
    """A prompt in words.

    Args:
        before, between, after: what stands around the two texts.
        labels: the answers, first that of no match, then that of a match, as they follow the prompt (with a space in
            front, where the prompt does not end with one).
        right_first: whether the right text stands first.
        is_chat: whether all this is a user's message in the model's chat template, and the answer the assistant's.
    """

    before: str
    between: str
    after: str
    labels: tuple[str, str]
    right_first: bool = False
    is_chat: bool = False


# What training asks, by version; a run keeps the version that it was trained with. In version 2 the question stands
# before the texts, so that pairs with one left text have all but the right text and the cue in common.
TRAINED_PROMPTS = {
    1: PromptText(
        "First record: ", "\nSecond record: ", "\nDo both name the same thing, yes or no? Answer:", (" no", " yes")
    ),
    2: PromptText("Do both lines name the same thing, yes or no?\n", "\n", "\nAnswer:", (" no", " yes")),
}


def read_prompt(path: str | Path, labels: tuple[str, str], is_chat: bool) -> PromptText:
    """A prompt from a text file with ``{left}`` and ``{right}``, each once; ``{{`` and ``}}`` are braces.

    Line ends at the end of the file are dropped, since editors put them there.

    Args:
        path: of the file.
        labels: see ``PromptText``.
        is_chat: see ``PromptText``.

    Raises:
        ConfigError: the file cannot be read, or has other placeholders; names the file.
    """
    data = read_option_file("--prompt-file", path)
    try:
        template = data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n").rstrip("\n")
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"--prompt-file {path}: {type(error).__name__}: {error}") from error
    pieces, fields = [""], []
    for literal, name, specification, conversion in parts:
        pieces[-1] += literal
        if name is None:
            continue
        if name not in _FIELDS or specification or conversion:
            # Attributes, indices and conversions are other names here, so that a template reaches nothing but texts.
            raise ConfigError(f"--prompt-file {path}: a placeholder is not known; write {{left}} and {{right}}")
        fields.append(name)
        pieces.append("")
    if sorted(fields) != sorted(_FIELDS):
        raise ConfigError(f"--prompt-file {path}: must hold {{left}} and {{right}}, each once")
    return PromptText(pieces[0], pieces[1], pieces[2], labels, fields[0] == "right", is_chat)


@dataclass(frozen=True)
class PairPrompt:
    """A prompt in tokens: the pieces around the texts (special tokens in them included) and both labels."""

    before: list[int]
    between: list[int]
    after: list[int]
    labels: tuple[tuple[int, ...], tuple[int, ...]]
    right_first: bool

    @property
    def tokens(self) -> int:
        """Tokens of everything but the texts and the label."""
        return len(self.before) + len(self.between) + len(self.after)

    @property
    def longest(self) -> int:
        """Tokens of everything but the texts, with the longer label."""
        return self.tokens + max(map(len, self.labels))

    def shared(self, left: Sequence[int], right: Sequence[int]) -> list[int]:
        """The prompt up to the end of its first text, which many pairs may have in common."""
        return [*self.before, *(right if self.right_first else left)]

    def own(self, left: Sequence[int], right: Sequence[int]) -> list[int]:
        """The rest of the prompt."""
        return [*self.between, *(left if self.right_first else right), *self.after]

    def ids(self, left: Sequence[int], right: Sequence[int]) -> list[int]:
        """The prompt around two texts, given without special tokens."""
        return [*self.shared(left, right), *self.own(left, right)]


def pair_prompt(text: PromptText, tokenizer: Any) -> PairPrompt:
    """A prompt in the tokens of a model.

    Special tokens that the prompt's own words hold count as such: whoever wrote the prompt wants them. What the
    tokenizer puts before a text (a beginning of sequence) stands before the prompt, but for a chat template, which
    writes its own.

    Args:
        text: the prompt.
        tokenizer: fast, as transformers loads it.

    Raises:
        ModelError: there is no chat template, or it changes the texts; or one label's tokens begin the other's, so that
            their probabilities are not those of alternatives.
    """
    backend = plain_copy(tokenizer.backend_tokenizer, lower_case=False)
    backend.encode_special_tokens = False

    def ids(piece: str) -> list[int]:
        found: list[int] = backend.encode(piece, add_special_tokens=False).ids
        return found

    pieces = _chat_pieces(text, tokenizer) if text.is_chat else (text.before, text.between, text.after)
    head = [] if text.is_chat else TextTokenizer(backend, max_length=None, unknown=tokenizer.unk_token_id).head
    before, between, after = (ids(piece) for piece in pieces)
    no, yes = (tuple(ids(label)) for label in text.labels)
    if not after:
        raise ModelError("--prompt-file: words must follow the two texts, which ask for the answer")
    shorter = min(len(no), len(yes))
    if no[:shorter] == yes[:shorter]:
        raise ModelError(
            f"--labels {text.labels[1]!r} and {text.labels[0]!r}: in this model's tokens one begins the other, or has "
            "none; choose other words"
        )
    return PairPrompt([*head, *before], between, after, (no, yes), text.right_first)


def _chat_pieces(text: PromptText, tokenizer: Any) -> tuple[str, str, str]:
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            "--chat-template: this model has no chat template; leave the option out, or name another model"
        )

    def pieces(first: str, second: str) -> tuple[str, ...]:
        message = f"{text.before}{first}{text.between}{second}{text.after}"
        try:
            whole: str = tokenizer.apply_chat_template(
                [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program; whatever it raises means that it cannot be used
            raise ModelError(f"--chat-template: the model's chat template fails: {type(error).__name__}") from error
        start, found, rest = whole.partition(first)
        middle, found_too, end = rest.partition(second)
        return (start, middle, end) if found and found_too else ()

    found = pieces(*_MARKS)
    if not found or found != pieces(*PROBES):
        raise ModelError(
            "--chat-template: the model's chat template does more than put something before and after a message"
        )
    return found[0], found[1], found[2]


@dataclass(frozen=True)
class PromptedPairs:
    """Prompts of N pairs, in their order.

    Args:
        shared: what stands before and in the first text.
        own: what follows.
        truncated: whether a text was cut.
    """

    shared: list[list[int]]
    own: list[list[int]]
    truncated: list[bool]


class PromptTokenizer:
    """Pairs of texts to prompts. What looks like a special token in a text is plain text.

    Args:
        prompt: in the model's tokens.
        tokenizer: fast, as transformers loads it.
        max_length: most tokens of a prompt with one label; the longer text is cut first (``pair_tokens.shares``).

    Raises:
        ModelError: the prompt leaves no room for two texts.
    """

    def __init__(self, prompt: PairPrompt, tokenizer: Any, max_length: int) -> None:
        self.prompt = prompt
        texts = TextTokenizer(
            tokenizer.backend_tokenizer, max_length=None, adds_special_tokens=False, unknown=tokenizer.unk_token_id
        )
        self.max_length = max_length
        room = max_length - prompt.longest
        if room < 2:
            raise ModelError(
                f"--max-length {max_length} leaves no room for two texts: the prompt alone has {prompt.tokens} tokens"
            )
        self._texts = PairTexts(texts, room, tokenizer.truncation_side == "left")

    def tokenize(self, pairs: Sequence[tuple[str, str]]) -> PromptedPairs:
        """Tokenises pairs (left, right); each distinct text once."""
        shared, own, truncated = [], [], []
        for left, right, cut in self._texts.tokenize(pairs):
            truncated.append(cut)
            shared.append(self.prompt.shared(left, right))
            own.append(self.prompt.own(left, right))
        return PromptedPairs(shared, own, truncated)
