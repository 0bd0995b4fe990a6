"""Token ids, batches without padding, and tokenising before and after a fork."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from flipkd.errors import ModelError
from flipkd.models.tokens import Frame, TextTokenizer

from .conftest import wrapped


def word_tokenizer() -> Tokenizer:
    """A vocabulary in which "</s>" is an ordinary word too, as in many SentencePiece models."""
    vocabulary = {"<unk>": 0, "</s>": 1, "fever": 2, "of": 3, "<": 4, "/": 5, "s": 6, ">": 7}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True), AddedToken("<unk>", special=True)])
    return tokenizer


def test_a_special_token_that_is_also_a_word_is_spelled_out() -> None:
    tokenizer = TextTokenizer(word_tokenizer(), max_length=None, unknown=0)
    assert tokenizer.tokenize(["fever </s> of", "fever of", "what"]).ids == [[2, 4, 5, 6, 7, 3], [2, 3], [0]]


def test_special_tokens_of_a_prompt_count_and_those_of_the_text_do_not(small_vocabulary: Tokenizer) -> None:
    tokenizer = TextTokenizer(small_vocabulary, max_length=None, frame=Frame("<s>query ", "</s>"))
    begin, end = small_vocabulary.token_to_id("<s>"), small_vocabulary.token_to_id("</s>")
    for ids in tokenizer.tokenize(["fever", "fever</s>", "<s>", "</s><s>"]).ids:
        assert ids[0] == begin
        assert ids[-1] == end
        assert ids.count(begin) == ids.count(end) == 1


def test_truncation_keeps_the_template(small_vocabulary: Tokenizer) -> None:
    backend = wrapped(small_vocabulary, begins=True, ends=True).backend_tokenizer
    whole = backend.encode("one two three four five six seven").ids
    right = TextTokenizer(backend, max_length=6).tokenize(["one two three four five six seven", "on"])
    left = TextTokenizer(backend, max_length=6, cuts_left=True).tokenize(["one two three four five six seven"])
    assert right.ids[0] == [*whole[:5], whole[-1]]
    assert left.ids[0] == [whole[0], *whole[-5:]]
    assert right.truncated.tolist() == [True, False]


def test_exact_length_is_not_truncated(small_vocabulary: Tokenizer) -> None:
    backend = wrapped(small_vocabulary, begins=True, ends=True).backend_tokenizer
    length = len(backend.encode("fever of unknown origin").ids)
    for room, is_cut in ((length, False), (length - 1, True)):
        tokenizer = TextTokenizer(backend, max_length=room)
        assert tokenizer.tokenize(["fever of unknown origin"]).truncated.tolist() == [is_cut]


def test_no_room_for_text(small_vocabulary: Tokenizer) -> None:
    backend = wrapped(small_vocabulary, begins=True, ends=True).backend_tokenizer
    with pytest.raises(ModelError, match="max_length 2 leaves no room"):
        TextTokenizer(backend, max_length=2)


FORKS = """
    import os, sys
    import numpy as np
    from flipkd.models.encoder import load_encoder

    texts = [f"code {number} fever" for number in range(3000)]
    encoder = load_encoder(sys.argv[1], max_length=8, threads=2)
    before = encoder.encode_texts(texts[:200]).vectors
    encoder._tokenizer.tokenize(texts)
    child = os.fork()
    if child == 0:
        after = load_encoder(sys.argv[1], max_length=8).encode_texts(texts[:200]).vectors
        same = encoder.encode_texts(texts[:200]).vectors
        encoder._tokenizer.tokenize(texts)
        good = np.allclose(before, same, atol=1e-5) and np.allclose(before, after, atol=1e-5)
        os._exit(0 if good else 3)
    assert os.waitpid(child, 0)[1] == 0
    encoder._tokenizer.tokenize(texts)
    print("done")
"""


@pytest.mark.parametrize("parallel", ["true", None])
def test_forked_children_tokenise_and_encode(minilm_dir: Path, parallel: str | None) -> None:
    """tokenizers#187."""
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    if parallel:
        environment["TOKENIZERS_PARALLELISM"] = parallel
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FORKS), str(minilm_dir)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "done"


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.lists(st.sampled_from(["fever", "of", "unknown", "origin", "12"]), max_size=9).map(" ".join)),
    max_length=st.integers(3, 12),
    begins=st.booleans(),
    ends=st.booleans(),
    cuts_left=st.booleans(),
)
def test_ids_are_those_of_the_tokenizer_that_cuts_by_itself(
    small_vocabulary: Tokenizer, texts: list[str], max_length: int, begins: bool, ends: bool, cuts_left: bool
) -> None:
    backend = wrapped(small_vocabulary, begins=begins, ends=ends).backend_tokenizer
    whole = [len(encoding.ids) for encoding in backend.encode_batch(texts)]
    found = TextTokenizer(backend, max_length=max_length, cuts_left=cuts_left).tokenize(texts)
    backend.enable_truncation(max_length, direction="left" if cuts_left else "right")
    assert found.ids == [encoding.ids for encoding in backend.encode_batch(texts)]
    assert found.truncated.tolist() == [length > max_length for length in whole]
    assert found.lengths.tolist() == [min(length, max_length) for length in whole]
