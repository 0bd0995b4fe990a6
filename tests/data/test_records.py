"""The text of a record: templates, normalisation, and rows without a text."""

from __future__ import annotations

import string
import unicodedata

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flipkd.data.records import as_text, normalise, render_texts, text_digests
from flipkd.data.template import template_fields, template_parts
from flipkd.errors import ConfigError


def rendered(template: str, **columns: object) -> list[str | None]:
    return render_texts(pa.table(columns), template).values.to_pylist()


def test_null_and_empty_are_both_missing() -> None:
    """dedupe#460, mteb#1043."""
    assert rendered("{text}", text=[None, "", " ", "\t\n", "a"]) == [None, None, None, None, "a"]
    assert rendered("{text}", text=pa.nulls(2)) == [None, None]


def test_a_template_joins_columns_and_writes_a_null_as_nothing() -> None:
    found = rendered("{name} | {street}", name=["Ann", None, "", None], street=["High St", "Low St", " ", None])
    assert found == ["Ann | High St", "| Low St", None, None]
    assert rendered("{{{a}}}: {a}", a=["x"]) == ["{x}: x"]


def test_values_with_one_plain_form_can_stand_in_a_template() -> None:
    found = rendered("{n}/{d}/{b}", n=[1], d=pa.array([0], pa.date32()), b=[True])
    assert found == ["1/1970-01-01/true"]
    with pytest.raises(ConfigError, match="column 'x' has type double"):
        rendered("{x}", x=[1.0])
    with pytest.raises(ConfigError, match="column 'x' has type list"):
        rendered("{x}", x=[[1]])


@pytest.mark.parametrize("template", ["{}", "no column", "{a", "a}", "{a} {", "{{a}}", "{a{b}}", ""])
def test_a_template_that_says_nothing_is_refused(template: str) -> None:
    with pytest.raises(ConfigError, match="--template"):
        template_fields(template)


@pytest.mark.parametrize("name", ["a.b", "a[0]", "a!r", "Name: full", "0.__class__", "a b", "ü"])
def test_a_template_reaches_nothing_but_columns(name: str) -> None:
    """Whatever a name looks like, it is the name of a column."""
    assert rendered(f"<{{{name}}}>", **{name: ["x", None]}) == ["<x>", None]
    assert template_fields(f"{{{name}}} {{{name}}} {{{{}}}}") == [name]


@given(st.lists(st.sampled_from(["{a}", "{b_2}", "{{", "}}", "x", " | ", "ß"]), max_size=8).map("".join))
def test_a_template_is_read_as_python_reads_it(template: str) -> None:
    expected = [(text, name) for text, name, _, _ in string.Formatter().parse(template)]
    found = template_parts(template)
    assert "".join(f"{text}<{name}>" if name else text for text, name in found) == "".join(
        f"{text}<{name}>" if name else text for text, name in expected
    )


def test_one_normal_form() -> None:
    """NFC and NFD of one name are one text: transformers#5738; a leading space: sentence-transformers#782."""
    names = ["Nguyễn Văn Ân", "مُحَمَّد", "😀 李小龙", "é"]
    composed = normalise(pa.array([unicodedata.normalize("NFC", name) for name in names], pa.large_string()))
    decomposed = normalise(pa.array([f" {unicodedata.normalize('NFD', name)}\n" for name in names], pa.large_string()))
    assert composed.to_pylist() == decomposed.to_pylist() == [unicodedata.normalize("NFC", name) for name in names]


@given(st.lists(st.one_of(st.none(), st.text(max_size=8))))
def test_normalise_is_what_it_says(texts: list[str | None]) -> None:
    texts = [text if text is None else text.encode("utf-8", "ignore").decode() for text in texts]
    found = normalise(pa.array(texts, pa.large_string())).to_pylist()
    for text, result in zip(texts, found, strict=True):
        if text is None or result is None:
            assert not (text or "").strip()
        else:
            assert result == result.strip()
            assert unicodedata.is_normalized("NFC", result)
    assert normalise(pa.array(found, pa.large_string())).to_pylist() == found


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.dictionary(pa.int8(), pa.string()),
    ],
)
def test_every_layout_of_text_reads_the_same(kind: pa.DataType) -> None:
    """arrow#47177, ray#33279."""
    column = pa.chunked_array([pa.array(["a", None, "ü"]), pa.array(["b", "a"])]).cast(kind)
    values, invalid = as_text(column, "x")
    assert values.to_pylist() == ["a", None, "ü", "b", "a"]
    assert not invalid.any()


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
def test_bytes_that_are_not_utf8_mark_their_row_alone(kind: pa.DataType) -> None:
    """arrow#29635."""
    raw = [b"good", b"he\xffllo", None, b"also good"]
    if pa.types.is_dictionary(kind):
        words = pa.Array.from_buffers(pa.string(), 4, pa.array(raw, pa.binary()).buffers(), 1)
        column = pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 3], pa.int32()), words)
    else:
        source = pa.array(raw, pa.large_binary() if pa.types.is_large_string(kind) else pa.binary())
        column = source if pa.types.is_binary(kind) else pa.Array.from_buffers(kind, 4, source.buffers(), 1)
    texts = render_texts(pa.table({"x": column}), "{x}")
    assert texts.values.to_pylist() == ["good", None, None, "also good"]
    assert texts.invalid.tolist() == [False, True, False, False]


def test_digests_tell_texts_apart_and_depend_on_the_key() -> None:
    texts = pa.array(["a", "b", "a", None, "a\0b", "a\0c"], pa.large_string())
    found = text_digests(texts, b"key").to_pylist()
    assert found[0] == found[2]
    assert found[3] is None
    assert len({found[0], found[1], found[4], found[5]}) == 4
    assert text_digests(texts, b"another").to_pylist()[0] != found[0]
    assert np.all([len(digest) == 16 for digest in found if digest is not None])
