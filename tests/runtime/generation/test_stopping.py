"""Stop strings in text that arrives in pieces."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gta_edge.errors import InputError
from gta_edge.runtime.generation.stopping import StopStrings

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
    # by brute force: the shortest beginning that ends with a stop string, less the longest such one
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    expected, found = text, None
    if ends:
        found = max((stop for stop in stops if text[: ends[0]].endswith(stop)), key=len)
        expected = text[: ends[0]].removesuffix(found)

    stopping, output = StopStrings(stops), ""
    for piece in cut(text, borders):
        output += stopping.feed(piece)
        assert expected.startswith(output)
    assert output + stopping.flush() == expected
    assert stopping.found == found


@settings(deadline=None, max_examples=200)
@given(pieces=st.lists(words, max_size=6), stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=3))
def test_only_what_could_still_become_a_stop_text_is_held(pieces, stops):
    stopping, given_, output = StopStrings(stops), "", ""
    for piece in pieces:
        given_ += piece
        output += stopping.feed(piece)
        held = given_.removeprefix(output)
        assert stopping.found or held == "" or any(stop.startswith(held) and stop != held for stop in stops)


def test_a_disproved_beginning_is_released_at_once():
    stopping = StopStrings(["\n\nUser:"])
    assert [stopping.feed(piece) for piece in ("Hi\n", "\n", "U", "h")] == ["Hi", "", "", "\n\nUh"]


def test_nothing_follows_a_stop_string():
    stopping = StopStrings("END")
    assert stopping.feed("a EN") == "a "
    assert stopping.feed("D of it") == ""
    assert stopping.feed("more") == ""
    assert stopping.flush() == ""
    assert stopping.found == "END"


@pytest.mark.parametrize("texts", [[""], "", ["a", ""], [3], [None]])
def test_stop_strings_that_are_none_are_refused(texts):
    if texts == "":
        texts = ("",)
    with pytest.raises(InputError, match="a stop string is"):
        StopStrings(texts)


# --- special tokens, which have no part in the text ------------------------------------------------------------------

NAMES = {0: "<a>", 1: "<ab>", 2: "b"}


def feed_all(stopping, items):
    """Feed texts and special tokens (numbers), and return what was passed on."""
    output = "".join(stopping.feed("", item) if isinstance(item, int) else stopping.feed(item) for item in items)
    return output + stopping.flush()


@settings(deadline=None, max_examples=500)
@given(
    items=st.lists(st.text("ab<>", max_size=3) | st.integers(0, 2), max_size=12),
    stops=st.lists(
        st.lists(st.sampled_from(["a", "b", "<a>", "<ab>", "<", ">"]), min_size=1, max_size=3).map("".join), max_size=3
    ),
)
def test_special_tokens_by_brute_force(items, stops):
    units = [unit for item in items for unit in ([item] if isinstance(item, int) else item)]

    def ends_with(end, stop):
        """Whether the units up to here end with a stop string: in what shows, or with names for whole tokens."""
        if "".join(unit for unit in units[:end] if isinstance(unit, str)).endswith(stop) and (
            end and isinstance(units[end - 1], str)
        ):
            return True
        form = stop
        for id_, name in sorted(NAMES.items(), key=lambda each: -len(each[1])):
            form = form.replace(name, chr(0xE000 + id_))
        spelled = "".join(unit if isinstance(unit, str) else chr(0xE000 + unit) for unit in units[:end])
        return form != stop and spelled.endswith(form)

    stopping = StopStrings(stops, NAMES)
    output = feed_all(stopping, items)
    ends = [end for end in range(len(units) + 1) if any(ends_with(end, stop) for stop in stops)]
    shown = "".join(unit for unit in (units[: ends[0]] if ends else units) if isinstance(unit, str))
    if not ends:
        assert (output, stopping.found) == (shown, None)
    else:
        assert stopping.found is not None
        assert ends_with(ends[0], stopping.found)
        assert shown.startswith(output)


@pytest.mark.parametrize(
    ("stop", "items", "expected"),
    [
        ("<a>", ["x", 0, "y"], "x"),
        ("<a>", ["x<", "a>y"], "x"),  # spelled in ordinary text
        ("x<a>", ["wx", 0, "y"], "w"),
        ("<a>x", ["w", 0, "xy"], "w"),
        ("<a><ab>", ["w", 0, 1, "y"], "w"),
        ("x<a>y", ["x", 0, 1, "y"], None),  # another token between
        ("xy", ["x", 0, "y"], ""),  # what shows is xy
        ("a>", [0, "y"], None),  # a part of a name is none
        ("😀<a>", ["中😀", 0], "中"),
    ],
)
def test_special_tokens_in_stop_strings(stop, items, expected):
    stopping = StopStrings([stop], NAMES)
    output = feed_all(stopping, items)
    shown = "".join(item for item in items if isinstance(item, str))
    assert (output, stopping.found) == ((shown, None) if expected is None else (expected, stop))


def test_tokens_that_are_stop_strings_by_themselves():
    assert StopStrings(["<a>", "x<ab>"], NAMES).token_ids == {0}
    assert StopStrings([], NAMES).token_ids == frozenset()
    assert StopStrings("<ab>", NAMES).token_ids == {1}


@pytest.mark.parametrize("text", ["\ud800", "a\udcff"])
def test_what_is_no_unicode_is_refused(text):
    with pytest.raises(InputError, match="expected Unicode text"):
        StopStrings([text])
