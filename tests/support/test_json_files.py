"""JSON files that are not trusted: damage of every kind is one error of the caller's class."""

import json
import os
from pathlib import Path

import pytest

from gta_edge.errors import BundleError, ConfigError
from gta_edge.support.json_files import read_json


def test_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": [1, "ü"]}).encode())
    assert read_json(path, ConfigError, "copy it anew") == {"a": [1, "ü"]}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b"\xff\xfe{}", "is not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"1" * 5000, "is not valid JSON"),
        (b'{"a": 1, "a": 2}', "the key 'a' comes twice"),
        (b" " * 2000 + b"{}", "expected at most 1000"),
    ],
)
def test_damage_is_an_error_of_the_callers_class(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    limit = 1000 if content.startswith(b" ") else 10**6
    with pytest.raises(BundleError, match=problem) as found:
        read_json(path, BundleError, "copy it anew", max_bytes=limit, unique_keys=True)
    assert str(found.value).endswith("copy it anew")
    assert "\n" not in str(found.value)


def test_a_key_that_comes_twice_has_its_last_value_unless_that_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1, "a": 2}')
    assert read_json(path, ConfigError, "copy it anew") == {"a": 2}


def test_a_sparse_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.touch()
    os.truncate(path, 3 * 2**30)
    with pytest.raises(ConfigError, match="has 3221225472 bytes"):
        read_json(path, ConfigError, "copy it anew")


def test_no_file_a_directory_and_a_pipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read") as found:
        read_json(tmp_path / "a.json", ConfigError, "copy it anew")
    assert isinstance(found.value.__cause__, FileNotFoundError)
    os.mkfifo(tmp_path / "pipe")
    for path, said in ((tmp_path, r"cannot be read \(Is a directory\)"), (tmp_path / "pipe", "is not a regular file")):
        with pytest.raises(ConfigError, match=said):
            read_json(path, ConfigError, "copy it anew")
