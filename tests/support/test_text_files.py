"""Text files that a user names: their text, or one line."""

import io
import os
import sys
from pathlib import Path

import pytest

from gta_edge.errors import BundleError, InputError
from gta_edge.support.text_files import read_text, read_text_or_stdin


def test_text_without_its_byte_order_mark(tmp_path):
    path = tmp_path / "text"
    for content, text in (
        (b"", ""),
        ("né\r\n中\n".encode(), "né\r\n中\n"),
        ("né".encode("utf-8-sig"), "né"),
        (b"\xef\xbb\xbf", ""),
        ("a\ufeffb".encode(), "a\ufeffb"),  # elsewhere it is a character
        (b"a\0b", "a\0b"),
    ):
        path.write_bytes(content)
        assert read_text(path) == read_text_or_stdin(path) == text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("Größe".encode("latin-1"), r"is not UTF-8 text \(byte 2\)"),
        ("text".encode("utf-16"), "is UTF-16 text"),
        ("text".encode("utf-16-be"), None),
        (b"\xfe\xff\0t", "is UTF-16 text"),
        (b"\xed\xa0\x80", "is not UTF-8 text"),
        (b"x" * 101, "has 101 bytes; expected at most 100"),
    ],
)
def test_what_is_no_text(tmp_path, content, reason):
    path = tmp_path / "text"
    path.write_bytes(content)
    if reason is None:  # without a mark it is text with NULs
        assert read_text(path) == "\0t\0e\0x\0t"
        return
    with pytest.raises(BundleError, match=f"text: {reason}.*; copy it anew$"):
        read_text(path, BundleError, "copy it anew", max_bytes=100)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, reason in {
        "none": "cannot be read",
        ".": "cannot be read .Is a directory",
        "none/at/all": "cannot be read.*or - to read standard input",
        "a\0b": "is no path",
        "\x1b[31m": "cannot be read",
        "x" * 300: "cannot be read",
    }.items():
        with pytest.raises(InputError, match=reason) as caught:
            read_text_or_stdin(tmp_path / name)
        assert str(caught.value).isprintable()
    with pytest.raises(InputError, match="is not a regular file"):
        read_text(tmp_path / "pipe")
    with pytest.raises(InputError, match="cannot be read") as caught:
        read_text(tmp_path / "none")
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_a_pipe_that_a_user_names(tmp_path):
    reading, writing = os.pipe()
    os.write(writing, "né".encode("utf-8-sig"))
    os.close(writing)
    try:
        assert read_text_or_stdin(Path(f"/dev/fd/{reading}")) == "né"
    finally:
        os.close(reading)


def stdin_of(monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_standard_input(monkeypatch):
    stdin_of(monkeypatch, "né\n".encode("utf-8-sig"))
    assert read_text_or_stdin(Path("-")) == "né\n"
    stdin_of(monkeypatch, b"\xff")
    with pytest.raises(InputError, match=r"standard input: is not UTF-8 text \(byte 0\); pipe a text"):
        read_text_or_stdin(Path("-"))
    stdin_of(monkeypatch, b"")
    sys.stdin.close()
    with pytest.raises(InputError, match="standard input cannot be read"):
        read_text_or_stdin(Path("-"))
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="standard input is closed"):
        read_text_or_stdin(Path("-"))
