"""No command loses what somebody has: not what it reads, and not what it did not make."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.commands import Result, listing

Command = Callable[..., Result]


@pytest.fixture
def place(copied_bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A directory with a checkpoint, in which its bundle lies, and links to both."""
    shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    copied_bundle.rename(tmp_path / "checkpoint" / "bundle")
    (tmp_path / "to-bundle").symlink_to("checkpoint/bundle")
    (tmp_path / "to-checkpoint").symlink_to("checkpoint")
    return tmp_path


OUTPUTS = [
    "checkpoint",
    "checkpoint/bundle",
    "checkpoint/bundle/new",
    "checkpoint/bundle/engines",
    "to-bundle",
    "to-bundle/new",
    "to-checkpoint",
    "to-checkpoint/bundle",
    "checkpoint/../to-checkpoint/bundle/new",
    ".",
]


@pytest.mark.parametrize("output", OUTPUTS)
def test_build_does_not_write_over_around_or_into_what_it_reads(place: Path, output: str, command: Command) -> None:
    before = listing(place)
    for bundle in ("checkpoint/bundle", "to-bundle"):
        arguments = ("build", place / bundle, "--onnx-only", "--engine", "tensorrt-rtx", "--output", place / output)
        assert "the input" in command(*arguments, "--force").error
    assert listing(place) == before


@pytest.mark.parametrize("output", [*OUTPUTS[:4], *OUTPUTS[6:], "checkpoint/new"])
def test_export_does_not_write_over_around_or_into_what_it_reads(place: Path, output: str, command: Command) -> None:
    before = listing(place)
    for checkpoint in ("checkpoint", "to-checkpoint"):
        assert "the input" in command("export", place / checkpoint, place / output, "--force").error
    assert listing(place) == before


def test_a_text_to_calibrate_with_is_an_input_too(place: Path, command: Command) -> None:
    (place / "texts").mkdir()
    (place / "texts" / "text").write_text("a text " * 100)
    options = ("--precision", "int4", "--calibrate", place / "texts" / "text", "--force")
    for output, told in (("texts", "holds the input"), ("texts/text", "is the input")):
        assert told in command("export", place / "checkpoint", place / output, *options).error
    assert (place / "texts" / "text").exists()


def test_force_replaces_bundles_and_checkpoints_of_ours_and_nothing_with_anything_else_in_it(
    tiny_checkpoint: Path, copied_bundle: Path, tmp_path: Path, command: Command
) -> None:
    (copied_bundle / "thesis.tex").write_text("years of work")
    before = listing(copied_bundle)
    message = command("export", tiny_checkpoint, copied_bundle, "--force", "--no-verify").error
    assert "thesis.tex" in message
    assert "not replaced even with --force" in message
    assert listing(copied_bundle) == before
    (copied_bundle / "thesis.tex").unlink()
    assert command("export", tiny_checkpoint, copied_bundle, "--force", "--no-verify").status == 0

    somebodys = shutil.copytree(tiny_checkpoint, tmp_path / "somebody's")
    (somebodys / "gta_edge_checkpoint.json").unlink()  # as one that was downloaded, or trained for weeks
    before = listing(somebodys)
    assert "not replaced" in command("init", "gta1-160m", somebodys, "--layers", 1, "--force").error
    assert listing(somebodys) == before
    ours = shutil.copytree(tiny_checkpoint, tmp_path / "ours")
    assert command("init", "gta1-160m", ours, "--layers", 1, "--force").status == 0


def test_what_cannot_be_written_is_said_before_the_work(
    copied_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The work would need TensorRT, PyTorch or time; none of them is reached."""

    def not_reached(*_: object, **__: object) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr("gta_edge.runtime.tensorrt.builder.build_plan", not_reached)
    monkeypatch.setattr("gta_edge.export.pipeline._write_model", not_reached)
    (tmp_path / "file").touch()
    (tmp_path / "deep").mkdir()
    (copied_bundle / "engines" / "tensorrt-rtx").mkdir(parents=True)
    (copied_bundle / "engines" / "tensorrt-rtx" / "notes").touch()
    build = ("build", copied_bundle, "--engine", "tensorrt-rtx", "--compute-capability", "8.6")
    assert "notes" in command(*build, "--force").error
    for output, told in ((tmp_path / "file", "no directory"), (tmp_path / "missing" / "out", "parent directory")):
        assert told in command("export", tiny_checkpoint, output, "--force").error
    monkeypatch.chdir(tmp_path / "deep")
    assert "working directory" in command("export", tiny_checkpoint, tmp_path / "deep", "--force").error
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 1000))
    (copied_bundle / "engines" / "tensorrt-rtx" / "notes").unlink()
    assert "GB are free" in command(*build, "--force").error
    assert "GB are free" in command("export", tiny_checkpoint, tmp_path / "out").error
    assert "GB are free" in command("init", "gta1-160m", tmp_path / "out").error
    assert not (tmp_path / "out").exists()


def test_a_name_with_terminal_escapes_is_shown_escaped(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "\x1b[31mred\x1b]0;title\x07"
    for arguments in (("inspect", path), ("generate", path, "--ids", "1"), ("export", path, tmp_path / "out")):
        assert command(*arguments).error.isprintable()
