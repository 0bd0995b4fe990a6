"""Pairs of texts to token ids, both texts kept under truncation.

A pair's tokens are ``head + left + separator + right + tail``: head, separator and tail are the special tokens that the
tokenizer's own template for pairs adds. As for single texts (``flipkd.models.tokens``) a special token that a text
smuggles in is plain text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from flipkd.errors import ModelError
from flipkd.models.tokens import PROBES, TextTokenizer, TokenizedTexts, distinct_of, plain_copy


@dataclass(frozen=True)
class TokenizedPairs:
    """Token ids of some pairs, which of them were cut, and how many tokens of each are the left text's."""

    tokens: TokenizedTexts
    left_tokens: list[int]


@dataclass(frozen=True)
class _Template:
    """The special tokens of a pair with their type ids, and the type id of each text's tokens."""

    head: list[int]
    separator: list[int]
    tail: list[int]
    head_types: list[int]
    left_type: int
    separator_types: list[int]
    right_type: int
    tail_types: list[int]

    @property
    def tokens(self) -> int:
        return len(self.head) + len(self.separator) + len(self.tail)

    def ids(self, left: list[int], right: list[int]) -> list[int]:
        return [*self.head, *left, *self.separator, *right, *self.tail]

    def types(self, left_tokens: int, length: int) -> list[int]:
        return [
            *self.head_types,
            *[self.left_type] * left_tokens,
            *self.separator_types,
            *[self.right_type] * (length - self.tokens - left_tokens),
            *self.tail_types,
        ]


class PairTexts:
    """Both texts of each pair to token ids, cut so that both together have room.

    Args:
        texts: tokenises a text alone.
        room: most tokens of both; None for no limit.
        cuts_left: drop the starts of texts that are too long instead of their ends.
    """

    def __init__(self, texts: TextTokenizer, room: int | None, cuts_left: bool) -> None:
        self._texts, self._room, self._cuts_left = texts, room, cuts_left

    def tokenize(self, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[list[int], list[int], bool]]:
        """Left ids, right ids and whether a text was cut, of each pair; each distinct text is tokenised once."""
        texts, places = distinct_of([text for pair in pairs for text in pair])
        bodies = self._texts.tokenize(texts).ids
        for left_place, right_place in places.reshape(-1, 2).tolist():
            left, right = bodies[left_place], bodies[right_place]
            whole = len(left), len(right)
            kept = whole if self._room is None else shares(*whole, self._room)
            yield self._cut(left, kept[0]), self._cut(right, kept[1]), kept != whole

    def _cut(self, body: list[int], room: int) -> list[int]:
        return body[len(body) - room :] if self._cuts_left else body[:room]


class PairTokenizer:
    """Tokenises pairs for one cross-encoder.

    Args:
        backend: the fast tokenizer as transformers loads it; copied, never changed.
        max_length: most tokens of a pair, special tokens included; None for no limit.
        lower_case: lower-case before anything else.
        cuts_left: drop the starts of texts that are too long instead of their ends.
        unknown: the id of the unknown token; None if there is none.
    """

    def __init__(
        self, backend: Tokenizer, *, max_length: int | None, lower_case: bool, cuts_left: bool, unknown: int | None
    ) -> None:
        texts = TextTokenizer(
            backend, max_length=None, adds_special_tokens=False, lower_case=lower_case, unknown=unknown
        )
        self._template = _template(plain_copy(backend, lower_case))
        room = None if max_length is None else max_length - self._template.tokens
        if room is not None and room < 2:
            raise ModelError(
                f"max_length {max_length} leaves no room for two texts beside the special tokens; raise it"
            )
        self._texts = PairTexts(texts, room, cuts_left)

    def tokenize(self, pairs: Sequence[tuple[str, str]]) -> TokenizedPairs:
        """Tokenises pairs; each distinct text once. Ids in the order of the pairs."""
        ids, truncated, left_tokens = [], [], []
        for left, right, cut in self._texts.tokenize(pairs):
            ids.append(self._template.ids(left, right))
            truncated.append(cut)
            left_tokens.append(len(left))
        return TokenizedPairs(TokenizedTexts.of_lists(ids, truncated), left_tokens)

    def type_ids(self, left_tokens: Sequence[int], length: int) -> np.ndarray:
        """Token type ids int64 [pairs, length] of pairs of ``length`` tokens."""
        return np.array([self._template.types(count, length) for count in left_tokens], dtype=np.int64)


def shares(left: int, right: int, room: int) -> tuple[int, int]:
    """Tokens that each of two texts keeps when both together may have ``room``: the longer one is cut first.

    The rule of the tokenizers library ("longest_first"), tie and odd token included: a text of at most half the room is
    kept whole; of two longer ones each keeps half, and the longer one (the right one, where they are equal) keeps the
    odd token.
    """
    if left + right <= room:
        return left, right
    shorter, longer = sorted((left, right))
    if 2 * shorter > room:
        shorter, longer = room // 2, room - room // 2
    else:
        longer = room - shorter
    return (longer, shorter) if left > right else (shorter, longer)


def _template(backend: Tokenizer) -> _Template:
    """What the tokenizer's own template adds to a pair.

    Raises:
        ModelError: the template does more than to add tokens before, between and after.
    """
    backend.encode_special_tokens = False
    left, right = (backend.encode(probe, add_special_tokens=False).ids for probe in PROBES)
    whole = backend.encode(*PROBES)
    mask = whole.special_tokens_mask
    start = next((place for place, added in enumerate(mask) if not added), 0)
    end = len(mask) - next((place for place, added in enumerate(reversed(mask)) if not added), 0)
    between, right_start = start + len(left), end - len(right)
    ids, types = whole.ids, whole.type_ids
    template = _Template(
        head=ids[:start],
        separator=ids[between:right_start],
        tail=ids[end:],
        head_types=types[:start],
        left_type=types[start],
        separator_types=types[between:right_start],
        right_type=types[right_start],
        tail_types=types[end:],
    )
    for first, second in (PROBES, PROBES[::-1]):
        left, right = (backend.encode(probe, add_special_tokens=False).ids for probe in (first, second))
        whole = backend.encode(first, second)
        if whole.ids != template.ids(left, right) or whole.type_ids != template.types(len(left), len(whole.ids)):
            raise ModelError(
                "this tokenizer's template for pairs does more than add tokens before, between and after; not supported"
            )
    return template
