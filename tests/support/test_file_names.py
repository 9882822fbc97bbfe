"""Which names stay in their directory, and which links lead out of a bundle."""

import os
from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gta_edge.errors import BundleError
from gta_edge.support.files import bundle_file, plain_name
from tests.helpers.outputs import one_line

# --- a bundle's files ------------------------------------------------------------------------------------------------


def _hub(tmp_path):
    snapshot = tmp_path / "models--someone--model" / "snapshots" / "0123"
    blobs = tmp_path / "models--someone--model" / "blobs"
    for path in (snapshot, blobs):
        path.mkdir(parents=True)
    (blobs / "abc").write_text("x")
    (snapshot / "file").symlink_to(Path("../../blobs/abc"))
    return snapshot, blobs


def test_a_link_into_the_blobs_of_the_same_model_is_the_bundles(tmp_path):
    snapshot, blobs = _hub(tmp_path)
    assert bundle_file(snapshot, "file") == blobs / "abc"
    (tmp_path / "bundle").symlink_to(snapshot)
    assert bundle_file(tmp_path / "bundle", "file") == blobs / "abc"


def test_other_links_are_not(tmp_path):
    snapshot, blobs = _hub(tmp_path)
    other = tmp_path / "models--other" / "blobs"
    other.mkdir(parents=True)
    (other / "abc").touch()
    (blobs / "deep").mkdir()
    (blobs / "deep" / "abc").touch()
    (tmp_path / "secret").touch()
    plain = tmp_path / "plain"
    plain.mkdir()
    for number, (directory, leads_to) in enumerate(
        [
            (snapshot, other / "abc"),
            (snapshot, blobs / "deep" / "abc"),
            (snapshot, tmp_path / "secret"),
            (snapshot, "/etc/passwd"),
            (plain, blobs / "abc"),
        ]
    ):
        (directory / f"link{number}").symlink_to(leads_to)
        with pytest.raises(BundleError, match="leads out of the bundle"):
            bundle_file(directory, f"link{number}")
    (plain / "loop").symlink_to("loop")
    for name, told in (
        ("loop", "cannot be read"),
        ("none", "is missing"),
        ("../secret", "outside"),
        ("a\x1bb", "outside"),
    ):
        with pytest.raises(BundleError, match=told) as caught:
            bundle_file(plain, name)
        assert one_line(caught).isprintable()


# --- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "a", ".hidden", "...", "with space", "é.json", "x" * 255])
def test_plain_names(name):
    assert plain_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "a/b",
        "/a",
        "a/",
        "../a",
        "a\\b",
        "\\\\host\\share",
        "C:a",
        "C:\\a",
        "a:b",
        "a\0b",
        "a\nb",
        "\ud800",
        "x" * 256,
        "é" * 128,
        None,
        3,
        b"a",
        ["a"],
    ],
)
def test_names_that_are_not_plain(name):
    assert not plain_name(name)


@given(st.text(alphabet=st.one_of(st.sampled_from("./\\:\0ab"), st.characters()), max_size=8))
def test_a_plain_name_stays_in_its_directory(name):
    if plain_name(name):
        assert PurePosixPath("/base", name).parent == PurePosixPath("/base")
        assert PurePosixPath(name).name == PureWindowsPath(name).name == name
        os.fsencode(name)
