"""Stop texts in text that arrives in pieces."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gta_edge.errors import InputError
from gta_edge.runtime.stopping import StopTexts

words = st.text("abc", max_size=30)


def cut(text, borders):
    places = sorted(border % (len(text) + 1) for border in borders)
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@settings(deadline=None, max_examples=400)
@given(
    text=words,
    borders=st.lists(st.integers(0, 100), max_size=8),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=4),
)
def test_output_is_the_text_before_the_first_stop_text_however_it_is_cut(text, borders, stops):
    # by brute force: the shortest beginning that ends with a stop text, less the longest such one
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    expected, found = text, None
    if ends:
        found = max((stop for stop in stops if text[: ends[0]].endswith(stop)), key=len)
        expected = text[: ends[0]].removesuffix(found)

    stopping, output = StopTexts(stops), ""
    for piece in cut(text, borders):
        output += stopping.feed(piece)
        assert expected.startswith(output)
    assert output + stopping.flush() == expected
    assert stopping.found == found


@settings(deadline=None, max_examples=200)
@given(pieces=st.lists(words, max_size=6), stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=3))
def test_only_what_could_still_become_a_stop_text_is_held(pieces, stops):
    stopping, given_, output = StopTexts(stops), "", ""
    for piece in pieces:
        given_ += piece
        output += stopping.feed(piece)
        held = given_.removeprefix(output)
        assert stopping.found or held == "" or any(stop.startswith(held) and stop != held for stop in stops)


def test_a_disproved_beginning_is_released_at_once():
    stopping = StopTexts(["\n\nUser:"])
    assert [stopping.feed(piece) for piece in ("Hi\n", "\n", "U", "h")] == ["Hi", "", "", "\n\nUh"]


def test_nothing_follows_a_stop_text():
    stopping = StopTexts("END")
    assert stopping.feed("a EN") == "a "
    assert stopping.feed("D of it") == ""
    assert stopping.feed("more") == ""
    assert stopping.flush() == ""
    assert stopping.found == "END"


@pytest.mark.parametrize("texts", [[""], "", ["a", ""], [3], [None]])
def test_stop_texts_that_are_none_are_refused(texts):
    if texts == "":
        texts = ("",)
    with pytest.raises(InputError, match="a stop text is"):
        StopTexts(texts)
