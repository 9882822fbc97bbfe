"""What a message may quote of an untrusted text or value."""

from hypothesis import given
from hypothesis import strategies as st

from gta_edge.support.text import brief, one_line, printable


@given(st.text())
def test_nothing_reaches_the_terminal_that_it_would_obey(text: str) -> None:
    for shown in (printable(text), one_line(text), brief(text)):
        assert shown.isprintable()


def test_what_people_write_stays_as_it_is() -> None:
    assert printable("modèle 模型.json") == "modèle 模型.json"
    assert printable("a\x1b[31mb\r\n\u202e") == "a\\x1b[31mb\\r\\n\\u202e"


def test_values_of_any_size_are_quoted_in_a_few_hundred_characters() -> None:
    values = ["x" * 10**7, b"x" * 10**7, [0] * 10**6, [["y" * 10**6] * 20] * 20, 10**5000, {"k" * 10**6: "v" * 10**6}]
    values += ["\U000e0001" * 1000, "\x1b" * 200, {"\u202e" * 50: ["\x07" * 300] * 9}]
    for value in values:
        assert len(brief(value)) < 300
    assert len(one_line("x" * 10**7)) < 500


def test_small_values_are_quoted_whole() -> None:
    assert brief("a'b") == '"a\'b"'
    assert brief([1, "two", None]) == "[1, 'two', None]"
    assert brief({"a": 1}) == "{'a': 1}"
    assert brief(1.5) == "1.5"


def test_one_line_of_an_error_without_text_is_its_type() -> None:
    assert one_line(ValueError()) == "ValueError"
    assert one_line("a\n  b\tc") == "a b c"
