"""Texts to token ids.

A text's tokens are ``head + body + tail``: head and tail are the special tokens that the tokenizer's own template adds,
the body is the text alone, cut so that the whole has at most ``max_length`` tokens. Doing this ourselves, instead of
through the tokenizer's truncation, tells exactly which texts were cut, and lets us see (and undo) a special token that
the text itself smuggled in: "</s>" inside a record is four characters of text, not an end.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.normalizers import Lowercase
from tokenizers.normalizers import Sequence as NormalizerSequence

from flipkd.errors import ModelError

_Item = TypeVar("_Item", bound=Hashable)

PROBES = ("flipkd probe 0", "Wholly different: 17 | b")


def _use_one_thread() -> None:
    # A forked child has none of its parent's threads, and would wait for them for ever: the tokenizer library's if
    # TOKENIZERS_PARALLELISM=true stayed in force, OpenMP's as soon as torch starts a parallel loop (to copy weights).
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


os.register_at_fork(after_in_child=_use_one_thread)


@dataclass(frozen=True)
class TokenizedTexts:
    """Token ids of N texts, and which of them were cut to the maximum length.

    One array, not a list per text: a GPU is soon done with a text, and whatever Python does for each one holds it up.

    Args:
        flat: int32 [T], the ids of all texts end to end.
        lengths: int64 [N], tokens of each text.
        truncated: bool [N].
    """

    flat: NDArray[np.int32]
    lengths: NDArray[np.int64]
    truncated: NDArray[np.bool_]

    @classmethod
    def of_lists(cls, ids: Sequence[Sequence[int]], truncated: Sequence[bool]) -> TokenizedTexts:
        """The same of a list of ids per text."""
        return cls(*_end_to_end(ids), np.array(truncated, np.bool_))

    @property
    def ids(self) -> list[list[int]]:
        """A list of ids per text."""
        ends = np.cumsum(self.lengths).tolist()
        flat = self.flat.tolist()
        return [flat[end - length : end] for end, length in zip(ends, self.lengths.tolist(), strict=True)]

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass(frozen=True)
class Frame:
    """What stands around every text as the folder's own configuration asks: a prompt, or a rendered chat template."""

    prefix: str = ""
    suffix: str = ""


class TextTokenizer:
    """Tokenises records for one encoder.

    Args:
        backend: the fast tokenizer as transformers loads it; copied, never changed.
        max_length: most tokens per text, special tokens included.
        frame: text around every record; special tokens in it do count as such, since the folder wrote it.
        adds_special_tokens: whether the tokenizer's template (``[CLS] ... [SEP]``) is applied.
        lower_case: lower-case before anything else, as ``do_lower_case`` asks.
        cuts_left: drop the start of a text that is too long instead of its end.
        restores_suffix: write the frame's closing tokens over the end of a text that was cut (chat templates).
        unknown: the id of the unknown token, which plain text may well give; None if there is none.
    """

    def __init__(
        self,
        backend: Tokenizer,
        *,
        max_length: int | None,
        frame: Frame | None = None,
        adds_special_tokens: bool = True,
        lower_case: bool = False,
        cuts_left: bool = False,
        restores_suffix: bool = False,
        unknown: int | None = None,
    ) -> None:
        self._plain = plain_copy(backend, lower_case)
        self._plain.encode_special_tokens = True
        self._framed = plain_copy(backend, lower_case)
        self._framed.encode_special_tokens = False
        self._frame = frame or Frame()
        self._has_frame = self._frame != Frame()
        self._cuts_left = cuts_left
        self.head, self.tail = _template(self._framed) if adds_special_tokens else ([], [])
        self._room = None if max_length is None else max_length - len(self.head) - len(self.tail)
        if self._room is not None and self._room < 1:
            raise ModelError(f"max_length {max_length} leaves no room for text beside the special tokens; raise it")
        added = self._framed.get_added_tokens_decoder()
        self._contents = {
            number: token.content for number, token in added.items() if token.special and number != unknown
        }
        self._special = np.array(sorted(self._contents), dtype=np.int32)
        self._own_specials = self._count_special(*_end_to_end([self._frame_ids(PROBES[0])]))[0]
        self._suffix = self._closing() if restores_suffix else []

    @property
    def prompt_tokens(self) -> int:
        """Tokens before the text proper: the template's head and the frame's prefix."""
        return len(self.head) + len(self._framed.encode(self._frame.prefix, add_special_tokens=False).ids)

    def tokenize(self, texts: Sequence[str]) -> TokenizedTexts:
        """Tokenises texts. Ids in the order of the texts; a text may have no token at all."""
        if self._has_frame:
            batch: list[str] = [f"{self._frame.prefix}{text}{self._frame.suffix}" for text in texts]
            encodings = self._framed.encode_batch_fast(batch, add_special_tokens=False)
        else:
            encodings = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        bodies: list[list[int]] = [encoding.ids for encoding in encodings]
        flat, lengths = _end_to_end(bodies)
        smuggling = np.flatnonzero(self._count_special(flat, lengths) != self._own_specials).tolist()
        if smuggling:
            for place in smuggling:
                bodies[place] = self._without_smuggled(texts[place])
            flat, lengths = _end_to_end(bodies)
        flat, lengths, truncated = self._cut(flat, lengths)
        return TokenizedTexts(*self._between_specials(flat, lengths), truncated)

    def _cut(
        self, flat: NDArray[np.int32], lengths: NDArray[np.int64]
    ) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.bool_]]:
        """Bodies of at most the length that there is room for, their lengths, and which were longer."""
        if self._room is None or not (truncated := lengths > self._room).any():
            return flat, lengths, np.zeros(len(lengths), np.bool_)
        kept = np.minimum(lengths, self._room)
        offsets = offsets_in_texts(lengths)
        first = np.repeat(lengths - kept if self._cuts_left else np.zeros_like(kept), lengths)
        flat = flat[(offsets >= first) & (offsets < first + np.repeat(kept, lengths))]
        if self._suffix:
            ends = np.cumsum(kept)
            for place in np.flatnonzero(truncated).tolist():
                count = min(len(self._suffix), int(kept[place]))
                flat[ends[place] - count : ends[place]] = self._suffix[-count:]
        return flat, kept, truncated

    def _between_specials(
        self, flat: NDArray[np.int32], lengths: NDArray[np.int64]
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Each body between the template's head and tail."""
        head, tail = self.head, self.tail
        if not head and not tail:
            return flat, lengths
        whole = lengths + len(head) + len(tail)
        ends = np.cumsum(whole)
        made = np.empty(int(whole.sum()), np.int32)
        added = np.arange(len(lengths)) * (len(head) + len(tail)) + len(head)
        made[np.arange(len(flat)) + np.repeat(added, lengths)] = flat
        for offset, number in enumerate(head):
            made[ends - whole + offset] = number
        for offset, number in enumerate(reversed(tail)):
            made[ends - 1 - offset] = number
        return made, whole

    def _count_special(self, flat: NDArray[np.int32], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Special tokens in each body, int64 [texts]."""
        found = np.isin(flat, self._special)
        if not found.any():
            return np.zeros(len(lengths), np.int64)
        total = np.concatenate(([0], np.cumsum(found)))
        ends = np.cumsum(lengths)
        counts: NDArray[np.int64] = total[ends] - total[ends - lengths]
        return counts

    def _frame_ids(self, text: str) -> list[int]:
        whole = f"{self._frame.prefix}{text}{self._frame.suffix}"
        ids: list[int] = self._framed.encode(whole, add_special_tokens=False).ids
        return ids

    def _without_smuggled(self, text: str) -> list[int]:
        """Frame and text tokenised apart, so that the text cannot use special tokens."""
        before, after = (
            self._framed.encode(part, add_special_tokens=False).ids if part else []
            for part in (self._frame.prefix, self._frame.suffix)
        )
        middle: list[int] = []
        for number in self._plain.encode(text, add_special_tokens=False).ids:
            if number not in self._contents:
                middle.append(number)
                continue
            # Some vocabularies hold "</s>" as an ordinary word too: spell it, one character at a time.
            for character in self._contents[number]:
                spelled = self._plain.encode(character, add_special_tokens=False).ids
                middle.extend(piece for piece in spelled if piece not in self._contents)
        return [*before, *middle, *after]

    def _closing(self) -> list[int]:
        """The tokens that end every framed text: the longest common end of two different ones."""
        first, second = self._frame_ids("0"), self._frame_ids("1 2 3 4")
        count = 0
        while count < min(len(first), len(second)) and first[-1 - count] == second[-1 - count]:
            count += 1
        return first[len(first) - count :] if 0 < count < min(len(first), len(second)) else []


def distinct_of(items: Sequence[_Item]) -> tuple[list[_Item], NDArray[np.int64]]:
    """The different ones of N texts or pairs, in the order of their first places, and the place there of each, [N]."""
    first_places: dict[_Item, int] = {}
    places = np.fromiter((first_places.setdefault(item, len(first_places)) for item in items), np.int64, len(items))
    return list(first_places), places


def offsets_in_texts(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The place of each token in its text, int64 [T], of texts that stand end to end."""
    starts = np.cumsum(lengths) - lengths
    offsets: NDArray[np.int64] = np.arange(int(lengths.sum())) - np.repeat(starts, lengths)
    return offsets


def _end_to_end(ids: Sequence[Sequence[int]]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """All ids, int32 [T], and how many each text has, int64 [N]."""
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    return np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum())), lengths


def listed_texts(texts: Any) -> Sequence[str]:
    """The texts, as they are; of an Arrow array, or of what has no length, as a list.

    Raises:
        TypeError: they are one string, or an item is no string; names its place.
    """
    if isinstance(texts, str):
        raise TypeError("texts must be a list of strings, not one string: give [text]")
    if hasattr(texts, "to_pylist"):
        texts = texts.to_pylist()
    elif not hasattr(texts, "__len__"):
        texts = list(texts)
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"item {place} of the texts is of type {type(text).__name__}, not a string")
    found: Sequence[str] = texts
    return found


def plain_copy(backend: Tokenizer, lower_case: bool) -> Tokenizer:
    """A copy that neither pads nor truncates, and lower-cases first where asked."""
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_padding()
    copy.no_truncation()
    if lower_case and "Lowercase" not in str(copy.normalizer) and "lowercase=True" not in str(copy.normalizer):
        copy.normalizer = NormalizerSequence([Lowercase(), *([copy.normalizer] if copy.normalizer is not None else [])])
    return copy


def _template(backend: Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens before and after a single text, as the tokenizer's own template adds them.

    Raises:
        ModelError: the template does more than to add tokens before and after.
    """
    encoding = backend.encode(PROBES[0])
    mask = encoding.special_tokens_mask
    start = next((place for place, added in enumerate(mask) if not added), len(mask))
    stop = next((len(mask) - place for place, added in enumerate(reversed(mask)) if not added), start)
    head, tail = encoding.ids[:start], encoding.ids[stop:]
    for probe in PROBES:
        whole = backend.encode(probe)
        if whole.ids != [*head, *backend.encode(probe, add_special_tokens=False).ids, *tail] or any(whole.type_ids):
            raise ModelError(
                "this tokenizer's template does more than add tokens before and after a text; not supported"
            )
    return head, tail
