"""Whatever goes wrong: the right exit status, one line that says what and what to do, and nothing left behind."""

import gc
import io
import os
import pickle
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.bundle_files import manifest_of, relist, write
from tests.helpers.commands import COMMAND, Result, environment, listing, run
from tests.helpers.limits import largest_file
from tests.helpers.pickles import Trap

Command = Callable[..., Result]


# --- wrong usage ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("", "Usage"),
        ("nonsense", "No such command"),
        ("--nonsense", "No such option"),
        ("inspect", "Missing argument"),
        ("inspect gta-1b more", "unexpected extra argument"),
        ("inspect gta-1b --nonsense", "No such option"),
        ("export checkpoint", "Missing argument"),
        ("verify bundle", "Missing option"),
        ("init gta-1b out --layers many", "--layers"),
        ("generate bundle --prompt a --ids 1", "exactly one of --prompt, --prompt-file and --ids"),
        ("generate bundle --prompt a --prompt-file b", "exactly one of --prompt, --prompt-file and --ids"),
        ("generate bundle --ids 1 --temperature hot", "--temperature"),
        ("generate bundle --ids 1 --max-new-tokens 1.5", "--max-new-tokens"),
        ("generate bundle --ids 1 --threads 0", "--threads"),
        ("generate bundle --ids 1 --threads -1", "--threads"),
        ("generate bundle --ids", "requires an argument"),
        ("init gta1-160m out --dtype int8", "'float32', 'float16', 'bfloat16'"),
        ("export checkpoint out --precision fp8", "'fp32', 'fp16', 'bf16'"),
        ("build bundle --engine onnx", "'tensorrt', 'tensorrt-rtx'"),
        ("build bundle --matmul cublas", "'plugin', 'native', 'auto'"),
        ("generate bundle --ids 1 --backend tpu", "'onnxruntime', 'torch'"),
        ("eval bundle --ids ids.npy --backend tpu", "'onnxruntime', 'torch'"),
        ("verify bundle --checkpoint c --backend tpu", "no backend is called 'tpu'; there are tensorrt, "),
        ("verify bundle --checkpoint c --backend onnxruntime,,torch", "no backend is called ''"),
        ("bench bundle --backend onnxruntim@python", "did you mean onnxruntime?"),
        ("plan gta-1b --device orin-nano-8g", "did you mean orin-nano-8gb?"),
        ("plan gta-1b --cache-dtype fp9", "'int8', 'fp8'"),
        ("serve bundle --speculate draft", "Invalid value for '--speculate': 'draft' is not one of 'lookup', 'off'."),
        ("serve bundle --alias=", "--alias is empty"),
        ("serve bundle --prompt-cache c --cache-policy window", "--prompt-cache needs every row of the cache"),
        ("generate bundle --ids 1 --prompt-cache c --cache-policy window", "leave out --cache-policy"),
        ("generate bundle --ids 1 --n 257", "256"),
        ("generate bundle --ids 1 --beams 65", "64"),
        ("plan gta-1b --devices", "leave out gta-1b, or --devices"),
        ("eval bundle", "one of --text and --ids"),
        ("eval bundle --text a --ids b", "one of --text and --ids"),
    ],
)
def test_wrong_usage(command: Command, arguments: str, reason: str) -> None:
    result = command(*arguments.split())
    if arguments:
        assert reason in result.usage
    else:
        assert result.status == 2
        assert reason in result.out + result.err


def test_wrong_usage_in_a_process_of_its_own() -> None:
    assert "No such option" in run("generate", "--nonsense").usage


# --- errors in general ---------------------------------------------------------------------------------------------


def test_an_error_is_one_line_and_a_traceback_with_debug(tmp_path: Path) -> None:
    message = run("inspect", tmp_path / "none").error
    assert str(tmp_path / "none") in message
    result = run("inspect", tmp_path / "none", "--debug")
    assert (result.status, result.out) == (1, "")
    assert result.err.startswith("Traceback (most recent call last):\n")
    assert message in result.err


def test_an_error_with_json_is_the_same_line(command: Command, tmp_path: Path) -> None:
    for verb in ("inspect", "doctor --nonsense"):
        result = command(*verb.split(), tmp_path / "none", "--json")
        assert result.out == ""
        assert result.status in (1, 2)
    assert command("inspect", tmp_path / "none", "--json").error == command("inspect", tmp_path / "none").error


def test_a_message_stays_one_line_whatever_is_in_a_name(command: Command, tmp_path: Path) -> None:
    for name in ("two\nlines", "a\rb", "\x1b[31mred", "x" * 300):
        assert command("inspect", tmp_path / name).error


@pytest.mark.parametrize("arguments", ["inspect gta-1b", "inspect gta-1b --json", "--version"])
def test_a_device_that_is_full(arguments: str) -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [*COMMAND, *arguments.split()], env=environment(), stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert result.returncode == 1
    assert re.fullmatch(rb"error: .*\n", result.stderr)


# --- presets, backends, precisions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("inspect gta-9b", "gta-1b"),
        ("init gta-9b {tmp}/out", "gta-1b"),
        ("init gta1-160m {tmp}/out --layers 0", "num_hidden_layers is 0"),
        ("init gta1-160m {tmp}/out --layers=-1", "num_hidden_layers is -1"),
        ("init gta1-160m {tmp}/out --layers 1000000000", "free"),
        ("init gta1-160m {tmp}/out --seed=-1", "seed is -1"),
        ("init gta1-160m {tmp}/out --max-length 0", "max_position_embeddings is 0"),
        ("export {tmp}/none {tmp}/out", "No such file"),
        ("export {bundle} {tmp}/out", "model.safetensors"),
        ("verify {bundle} --checkpoint {tmp}/none", "No such file"),
        ("verify {checkpoint} --checkpoint {checkpoint}", "gta-edge export"),
        ("generate {checkpoint} --ids 1", "gta-edge export"),
        ("generate {tmp}/none --ids 1", "does not exist"),
        ("eval {tmp}/none --ids {ids}", "does not exist"),
        ("inspect {ids}", "is a file"),
    ],
)
def test_names_of_what_there_is_not(
    failing: Callable[..., str],
    tiny_checkpoint: Path,
    tiny_bundle: Path,
    tmp_path: Path,
    arguments: str,
    expected: str,
) -> None:
    np.save(tmp_path / "ids.npy", np.arange(3))
    places = {"checkpoint": tiny_checkpoint, "bundle": tiny_bundle, "tmp": tmp_path, "ids": tmp_path / "ids.npy"}
    assert expected in failing(*(word.format(**places) for word in arguments.split()))


# --- generate and eval ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--ids", "300"], "300"),
        (["--ids=-1"], "-1"),
        (["--ids", "1,99999999999999999999999"], "token id a whole number of more than 20 digits"),
        (["--ids", "1,,2"], "1,,2"),
        (["--ids", ""], "whole numbers"),
        (["--ids", "1.5"], "1.5"),
        (["--ids", "one"], "one"),
        (["--ids", ",".join(["1"] * 129)], "129 tokens"),
        (["--prompt", "x" * 129], "129 tokens"),
        (["--prompt", ""], "no tokens"),
        (["--prompt", "a\udcffb"], "Unicode"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--prompt", "a", "--max-new-tokens=-1"], "max_new_tokens is -1"),
        (["--prompt", "a", "--temperature=-1"], "temperature is -1"),
        (["--prompt", "a", "--temperature", "nan"], "temperature is nan"),
        (["--prompt", "a", "--temperature", "inf"], "temperature is inf"),
        (["--prompt", "a", "--top-k=-1"], "top_k is -1"),
        (["--prompt", "a", "--top-p", "0"], "top_p is 0"),
        (["--prompt", "a", "--top-p", "1.01"], "top_p is 1.01"),
        (["--prompt", "a", "--min-p", "2"], "min_p is 2"),
        (["--prompt", "a", "--repetition-penalty", "0"], "repetition_penalty is 0"),
        (["--prompt", "a", "--seed=-1"], "seed is -1"),
        (["--prompt", "a", "--seed", str(2**63)], "seed is"),
        (["--prompt", "a", "--stop", ""], "stop string"),
        (["--prompt", "a", "--chat"], "no chat template"),
        (["--ids", "1", "--chat"], "chat"),
        (["--prompt-file", "{tmp}/missing"], "/missing"),
        (["--prompt-file", "/"], "Is a directory"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_prompts_and_options_that_make_no_sense(
    failing: Callable[..., str], tiny_bundle: Path, tmp_path: Path, options: list[str], expected: str
) -> None:
    assert expected in failing("generate", tiny_bundle, *(word.replace("{tmp}", str(tmp_path)) for word in options))


def test_values_that_make_no_sense_with_any_model_are_told_before_one_is_opened(failing: Callable[..., str]) -> None:
    for option, expected in (
        ("--temperature=-1", "temperature is -1"),
        ("--seed=-1", "seed is -1"),
        ("--max-new-tokens=0", "max_new_tokens is 0"),
        ("--stop=", "stop string"),
        ("--length-penalty=2", "there is no search"),
        ("--beams=2 --n=3", "n is 3 and there are 2 beams"),
        ("--beams=2 --top-p=0.5", "beam search draws nothing"),
    ):
        assert expected in failing("generate", "missing", "--ids", "1", *option.split())


@pytest.mark.parametrize(("content", "expected"), [(b"", "no tokens"), (b"a\xff", "not UTF-8")])
def test_prompt_files(
    failing: Callable[..., str], tiny_bundle: Path, tmp_path: Path, content: bytes, expected: str
) -> None:
    (tmp_path / "prompt").write_bytes(content)
    assert expected in failing("generate", tiny_bundle, "--prompt-file", tmp_path / "prompt")


def npy(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def npz(array: Any) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, ids=array)
    return stream.getvalue()


GOOD = npy(np.arange(20))
IDS = {
    "empty": (b"", "not a readable .npy"),
    "text": (b"1,2,3", "not a readable .npy"),
    "cut header": (GOOD[:40], "not a readable .npy"),
    "cut": (GOOD[:-1], "not a readable .npy"),
    "header that is no literal": (GOOD.replace(b"'shape': (20,)", b"'shape': (2*0)"), "not a readable .npy"),
    "header that does not end": (GOOD.replace(b"(20,), }", b"(20,), ("), "not a readable .npy"),
    "more than there is": (GOOD.replace(b"(20,)", b"(99,)"), "not a readable .npy"),
    "absurd shape": (GOOD.replace(b"(20,), }" + b" " * 20, b"(" + b"9" * 20 + b",), }"), "not a readable .npy"),
    "pickle": (pickle.dumps(Trap()), "not a readable .npy"),
    "pickle inside": (npy(np.array([Trap()], dtype=object)), "not a readable .npy"),
    "archive": (npz(np.arange(20)), "archive"),
    "damaged archive": (npz(np.arange(20))[:100], "not a readable .npy"),
    "no archive": (b"PK\x03\x04" + bytes(50), "not a readable .npy"),
    "floats": (npy(np.arange(20.0)), "float64"),
    "booleans": (npy(np.array([True, False])), "bool"),
    "two dimensions": (npy(np.zeros((2, 2), int)), "[2, 2]"),
    "no dimension": (npy(np.array(3)), "expected integers in one dimension"),
    "one token": (npy(np.array([1])), "at least two"),
    "no token": (npy(np.array([], int)), "at least two"),
    "above the vocabulary": (npy(np.array([1, 300])), "300"),
    "negative": (npy(np.array([1, -1])), "-1"),
    "far above": (npy(np.array([1, 2**64 - 1], np.uint64)), str(2**64 - 1)),
}


@pytest.mark.parametrize("name", IDS)
def test_files_of_ids(failing: Callable[..., str], tiny_bundle: Path, tmp_path: Path, name: str) -> None:
    content, expected = IDS[name]
    (tmp_path / "ids.npy").write_bytes(content)
    assert expected in failing("eval", tiny_bundle, "--ids", tmp_path / "ids.npy")
    gc.collect()  # a file that was left open is complained of here, and not in another test


@pytest.mark.parametrize(("content", "expected"), [(b"", "at least two"), (b"a", "at least two"), (b"\xff", "UTF-8")])
def test_texts(failing: Callable[..., str], tiny_bundle: Path, tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "text").write_bytes(content)
    assert expected in failing("eval", tiny_bundle, "--text", tmp_path / "text")


@pytest.mark.parametrize("window", ["0", "-1", "129"])
def test_windows(failing: Callable[..., str], tiny_bundle: Path, tmp_path: Path, window: str) -> None:
    np.save(tmp_path / "ids.npy", np.arange(3))
    assert "expected 1 to 128" in failing("eval", tiny_bundle, "--ids", tmp_path / "ids.npy", f"--window={window}")


def test_files_that_are_not_there(failing: Callable[..., str], tiny_bundle: Path, tmp_path: Path) -> None:
    for option in ("--ids", "--text"):
        for path in (tmp_path / "none", tmp_path):
            assert str(path) in failing("eval", tiny_bundle, option, path)


# --- damaged bundles -----------------------------------------------------------------------------------------------


def use(bundle: Path, checkpoint: Path) -> Iterator[list[object]]:
    """Every command that reads a bundle."""
    yield ["inspect", bundle]
    yield ["generate", bundle, "--ids", "1"]
    yield ["verify", bundle, "--checkpoint", checkpoint]


def test_a_damaged_bundle(failing: Callable[..., str], copied_bundle: Path, tiny_checkpoint: Path) -> None:
    path = copied_bundle / "model.onnx.data"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    for arguments in use(copied_bundle, tiny_checkpoint):
        assert "SHA-256 differs" in failing(*arguments)
    path.write_bytes(content[:-1])
    for arguments in use(copied_bundle, tiny_checkpoint):
        assert "bytes, recorded were" in failing(*arguments)


def test_a_newer_bundle(failing: Callable[..., str], copied_bundle: Path, tiny_checkpoint: Path) -> None:
    write(copied_bundle, manifest_of(copied_bundle) | {"format_version": 2})
    for arguments in use(copied_bundle, tiny_checkpoint):
        assert failing(*arguments).endswith("upgrade it")


@pytest.mark.parametrize("made_with", ["none", [], None, {"gta-edge": 1}])
def test_inspect_does_not_rely_on_what_made_a_bundle(command: Command, copied_bundle: Path, made_with: Any) -> None:
    manifest = manifest_of(copied_bundle)
    del manifest["made_with"]
    write(copied_bundle, manifest if made_with == "none" else manifest | {"made_with": made_with})
    for options in ([], ["--json"]):
        result = command("inspect", copied_bundle, *options)
        if result.status != 0:
            assert "gta_edge.json" in result.error


@pytest.mark.parametrize("backend", ["onnxruntime", "torch", "auto"])
def test_one_line_though_libraries_have_more_to_say(
    failing: Callable[..., str], copied_bundle: Path, backend: str
) -> None:
    os.truncate(copied_bundle / "model.onnx.data", 100)
    relist(copied_bundle)
    assert str(copied_bundle) in failing("generate", copied_bundle, "--ids", "1", "--backend", backend)


def test_weights_that_are_not_numbers(command: Command, copied_bundle: Path, tmp_path: Path) -> None:
    path = copied_bundle / "model.onnx.data"
    path.write_bytes(b"\xff" * path.stat().st_size)  # NaN in bf16
    relist(copied_bundle)
    result = command("generate", copied_bundle, "--ids", "1", "--json")
    assert "NaN" in result.error
    np.save(tmp_path / "ids.npy", np.arange(3))
    result = command("eval", copied_bundle, "--ids", tmp_path / "ids.npy", "--json")
    if result.status == 0:
        assert result.document["loss"] is None
        assert result.document["perplexity"] is None
    else:
        assert "NaN" in result.error


# --- outputs -------------------------------------------------------------------------------------------------------


def test_an_existing_output_is_refused(
    failing: Callable[..., str], tiny_checkpoint: Path, copied_bundle: Path, tmp_path: Path
) -> None:
    for arguments in (["export", tiny_checkpoint], ["init", "gta1-160m"]):
        assert "--force" in failing(*arguments, copied_bundle)
        (tmp_path / "notes").mkdir(exist_ok=True)
        (tmp_path / "notes" / "mine.txt").touch()
        (tmp_path / "file").touch()
        assert "is not replaced even with --force" in failing(*arguments, tmp_path / "notes", "--force")
        assert "no directory" in failing(*arguments, tmp_path / "file", "--force")


def test_outputs_that_cannot_be_made(failing: Callable[..., str], tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for arguments in (["export", tiny_checkpoint], ["init", "gta1-160m", "--layers", "1"]):
        assert "Not a directory" in failing(*arguments, tmp_path / "file" / "out")
        assert "parent directory does not exist" in failing(*arguments, tmp_path / "none" / "out")
        assert "too long" in failing(*arguments, tmp_path / ("x" * 300))


def test_a_bundle_in_the_place_of_its_checkpoint(
    failing: Callable[..., str], copied_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(copied_checkpoint)
    for target in (copied_checkpoint, tmp_path / "link"):
        assert "is the input" in failing("export", copied_checkpoint, target, "--force")


def test_force_does_not_remove_the_checkpoint_that_is_read(
    command: Command, tiny_checkpoint: Path, copied_bundle: Path
) -> None:
    checkpoint = shutil.copytree(tiny_checkpoint, copied_bundle / "original")
    before = listing(checkpoint)
    command("export", checkpoint, copied_bundle, "--force", "--no-verify")
    assert listing(checkpoint) == before


@pytest.mark.parametrize("size", [1000, 100_000])  # less than the graph, less than the weights
def test_a_bundle_that_is_larger_than_a_file_can_be(
    failing: Callable[..., str], copied_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, size: int
) -> None:
    assert (tiny_checkpoint / "model.safetensors").stat().st_size > 100_000
    with largest_file(size):
        for options in ([tmp_path / "out"], [copied_bundle, "--force"]):
            assert "cannot be written" in failing("export", tiny_checkpoint, *options, "--no-verify")


def test_a_checkpoint_that_is_larger_than_a_file_can_be(failing: Callable[..., str], tmp_path: Path) -> None:
    with largest_file(10_000):
        message = failing("init", "gta1-160m", tmp_path / "out", "--layers", "1", "--max-length", "64")
    assert "cannot be written" in message


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount, unmount = shutil.which("mount"), shutil.which("umount")
    options = ["-t", "tmpfs", "-o", "size=64k", "tmpfs", directory]
    if not (mount and unmount) or subprocess.run([mount, *options], capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here, which takes root")
    yield directory
    subprocess.run([unmount, directory], check=True)


def test_a_full_disk(command: Command, tiny_checkpoint: Path, small_disk: Path) -> None:
    assert "free some space" in command("export", tiny_checkpoint, small_disk / "out", "--no-verify").error
    assert "are free" in command("init", "gta1-160m", small_disk / "out", "--layers", "1").error
    assert list(small_disk.iterdir()) == []
