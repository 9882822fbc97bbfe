"""Documents as JSON text."""

import enum
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gta_edge.support.json_text import json_text, plain

ENCODINGS = ("ascii", "latin-1", "cp1252", "utf-8", "utf-16", "shift_jis", "no such encoding", None)


def strictly(text: str) -> Any:
    return json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


TEXT = st.text(st.sampled_from('a"\\\n\0é日\udcff𝄞\x1b'), max_size=4)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(TEXT, JSON, max_size=3), st.sampled_from(ENCODINGS))
@settings(max_examples=100, deadline=None)
def test_any_document_is_json_in_any_encoding(content: dict[str, Any], encoding: str | None) -> None:
    text = json_text(content, encoding)
    assert "\n" not in text
    if encoding == "no such encoding":
        text.encode("ascii")
    else:
        text.encode(encoding or "ascii")
    assert strictly(text) == plain(content)


@pytest.mark.parametrize("text", ["é", "日本語", "\udcff", "a\udcffé", "𝄞", "\x1b[31m", "\x00"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_text_is_what_it_was(text: str, encoding: str | None) -> None:
    assert strictly(json_text({text: [text]}, encoding)) == {text: [text]}


def test_what_a_stream_can_say_is_not_escaped() -> None:
    assert json_text({"a": "é"}, "latin-1") == '{"a": "é"}'
    assert json_text({"a": "é"}, "utf-8") == '{"a": "é"}'
    assert json_text({"a": "é"}, "ascii") == '{"a": "\\u00e9"}'


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, np.float32("nan"), np.float64("inf"), np.float16("nan")]
)
def test_what_is_no_number_is_null(value: Any) -> None:
    assert strictly(json_text({"a": value, "b": [value], "c": {"d": (value,)}})) == {
        "a": None,
        "b": [None],
        "c": {"d": [None]},
    }


class Number(enum.IntEnum):
    TWO = 2


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (np.arange(3), [0, 1, 2]),
        (np.array([1.0, np.nan]), [1.0, None]),
        (np.str_("a"), "a"),
        (Number.TWO, 2),
        (Path("a/b"), "a/b"),
        ((1, 2), [1, 2]),
        ({1}, [1]),
        (10**30, 10**30),
    ],
)
def test_values_of_python_and_numpy(value: Any, expected: Any) -> None:
    assert strictly(json_text({"a": value})) == {"a": expected}


@pytest.mark.parametrize(
    ("key", "text"), [(1, "1"), (np.int64(2), "2"), (True, "true"), (Path("a"), "a"), (0.5, "0.5")]
)
def test_keys_are_text(key: Any, text: str) -> None:
    assert strictly(json_text({"inner": {key: 1}})) == {"inner": {text: 1}}


def test_what_json_has_nothing_for_is_an_error() -> None:
    with pytest.raises(TypeError, match="object is nothing that JSON has"):
        json_text({"a": object()})
