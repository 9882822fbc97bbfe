"""What help, inspect, init and export print when all is well: results on stdout, the rest on stderr."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file

import gta_edge
from gta_edge.cli.app import VERBS as COMMANDS
from tests.helpers.commands import ROOT, Result, environment, listing, run
from tests.helpers.tiny import TINY

VERBS = sorted(COMMANDS)
OPTIONS = {
    "init": ["PRESET", "DIR", "--layers", "--seed", "--dtype", "--max-length"],
    "export": ["--precision", "--no-verify", "--force"],
    "inspect": ["PATH_OR_PRESET"],
    "verify": ["--checkpoint", "--backend"],
    "eval": ["--text", "--ids"],
    "calibrate-cache": ["BUNDLE", "--text", "--share", "--rule", "--windows", "--tokens", "--backend", "--force"],
    "generate": [
        "--prompt",
        "--prompt-file",
        "--ids",
        "--max-new-tokens",
        "--temperature",
        "--top-k",
        "--top-p",
        "--min-p",
        "--repetition-penalty",
        "--stop",
        "--seed",
        "--json-schema",
        "--regex",
        "--grammar",
        "--backend",
    ],
    "chat": ["BUNDLE", "--system", "--load", "--max-new-tokens", "--temperature", "--seed", "--backend"],
    "serve": ["BUNDLE", "--host", "--port", "--api-key-file", "--parallel", "--queue", "--timeout", "--unit"],
    "build": [
        "--engine",
        "--compute",
        "--cache-dtype",
        "--max-length",
        "--max-batch",
        "--onnx-only",
        "--matmul",
    ],
    "plan": ["--device", "--devices", "--sources", "--context", "--batch", "--precision", "--cache-dtype", "--plot"],
    "bench": [
        "BUNDLE",
        "--backend",
        "--contexts",
        "--new-tokens",
        "--batch",
        "--prompt-file",
        "--plot",
        "--markdown",
        "--wide",
    ],
    "doctor": [],
}

INSPECT = {
    "architecture",
    "parameters",
    "layers",
    "hidden_size",
    "query_heads",
    "key_heads",
    "latent_heads",
    "key_dim",
    "latent_dim",
    "cache_values_per_token_per_layer",
    "cache_bytes_per_token",
    "weight_bytes",
    "precision",
    # and what others do not rely on
    "attention_heads",
    "vocab_size",
    "max_length",
    "cache_dtype",
    "attention_flops_per_pair",
    "kind",
}


Command = Callable[..., Result]


# --- help ----------------------------------------------------------------------------------------------------------


def test_the_verbs_are_those_that_are_documented() -> None:
    assert set(VERBS) >= OPTIONS.keys()


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(command: Command, verb: str) -> None:
    result = command(verb, "--help")
    assert (result.status, result.err) == (0, "")
    assert f"gta-edge {verb}" in result.out
    for option in [*OPTIONS.get(verb, []), "--json", "--quiet", "--debug", "-h, --help"]:
        assert option in result.out


def test_help_and_version(command: Command) -> None:
    result = command("--help")
    assert (result.status, result.err) == (0, "")
    assert all(re.search(rf"^\W*{verb}\b", result.out, re.MULTILINE) for verb in VERBS)
    result = command("--version")
    assert (result.status, result.out, result.err) == (0, f"gta-edge {gta_edge.__version__}\n", "")


def test_help_is_as_the_page_has_it() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^\$ gta-edge --help\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    for option in ("--help", "-h"):
        result = run(option, extra={"COLUMNS": "80"})
        assert (result.status, result.out, result.err) == (0, shown, "")
    assert max(map(len, shown.splitlines())) <= 80


def test_summaries_are_short_and_whole(command: Command) -> None:
    lines = command("--help").out.splitlines()
    for name, verb in COMMANDS.items():
        assert len(verb.summary) <= 45
        assert f"  {name:<15}  {verb.summary}" in lines
        assert command(name, "-h").out == command(name, "--help").out


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_load_little(option: str) -> None:
    script = (
        "import atexit, sys\n"
        "atexit.register(lambda: print(*sys.modules, file=sys.stderr))\n"
        f"sys.argv = ['gta-edge', {option!r}]\n"
        "from gta_edge.cli import main; main()"
    )
    process = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=True
    )
    loaded = {name.partition(".")[0] for name in process.stderr.split()}
    assert loaded & {"numpy", "rich", "tomllib", "tomli", "safetensors", "jinja2", "torch", "onnx"} == set()
    assert not any(f"gta_edge.cli.{verb.replace('-', '_')}" in process.stderr.split() for verb in VERBS)


# --- inspect -------------------------------------------------------------------------------------------------------


def test_inspect_a_preset(command: Command) -> None:
    document = command("inspect", "gta-1b", "--json").content
    assert document.keys() == INSPECT
    assert document["kind"] == "preset"
    shape = ("layers", "hidden_size", "query_heads", "key_heads", "latent_heads", "key_dim", "latent_dim")
    assert [document[key] for key in shape] == [54, 1280, 5, 1, 1, 64, 128]
    assert document["cache_values_per_token_per_layer"] == 192
    assert document["cache_bytes_per_token"] == 54 * 192 * 2  # bf16
    assert (document["precision"], document["weight_bytes"]) == ("bf16", 2 * document["parameters"])


def test_inspect_a_baseline(command: Command) -> None:
    document = command("inspect", "gqa-160m", "--json").content
    assert document.keys() == INSPECT
    assert (document["architecture"], document["latent_heads"], document["latent_dim"]) == (
        "LlamaForCausalLM",
        None,
        None,
    )
    assert document["cache_values_per_token_per_layer"] == 2 * document["key_heads"] * document["key_dim"]


def test_inspect_a_checkpoint(command: Command, tiny_checkpoint: Path) -> None:
    document = command("inspect", tiny_checkpoint, "--json").content
    assert document.keys() == INSPECT
    assert (document["kind"], document["parameters"]) == ("checkpoint", TINY.parameters)
    assert document["weight_bytes"] == sum(
        tensor.nbytes for tensor in load_file(tiny_checkpoint / "model.safetensors").values()
    )
    assert document["cache_bytes_per_token"] == 2 * (8 + 16) * 2  # layers, key and latent, bf16


def test_inspect_a_bundle(tiny_bundle: Path) -> None:
    document = run("inspect", tiny_bundle, "--json").content
    assert document.keys() == INSPECT | {"files", "made_with", "weight_bytes_by_part", "sampling"}
    parts = document["weight_bytes_by_part"]
    assert sum(parts.values()) == document["weight_bytes"]
    assert min(parts["mlp"], parts["embedding"], parts["tables"]) > 0
    assert (document["kind"], document["precision"], document["parameters"]) == ("bundle", "bf16", TINY.parameters)
    assert document["weight_bytes"] == (tiny_bundle / "model.onnx.data").stat().st_size
    assert document["cache_bytes_per_token"] == 2 * (8 + 16) * 4  # a bundle computes in float32


def test_inspect_shows_labels_and_units(command: Command, tiny_bundle: Path) -> None:
    found = command("inspect", tiny_bundle).out
    assert re.search(r"^bundle +GTAForCausalLM in bf16 *$", found, re.MULTILINE)
    assert re.search(r"^KV cache +192 bytes per token in float32 *$", found, re.MULTILINE)
    assert re.search(rf"^vocabulary +{TINY.vocab_size} tokens *$", found, re.MULTILINE)
    shares = re.findall(r"^  \w+ +[\d.]+ [kM]?B +(\d+)%", found, re.MULTILINE)
    assert sum(map(int, shares)) == pytest.approx(100, abs=len(shares))
    assert "_" not in found.partition("files")[0]


def test_inspect_for_people(command: Command, tiny_bundle: Path) -> None:
    for target in ("gta-1b", tiny_bundle):
        result = command("inspect", target)
        assert (result.status, result.err) == (0, "")
        assert "GTAForCausalLM" in result.out
        assert not result.out.lstrip().startswith("{")


# --- init and export -----------------------------------------------------------------------------------------------


def test_init_then_export_from_the_command_line(command: Command, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    options = ["--layers", 1, "--max-length", 64, "--dtype", "float16", "--seed", 3]
    document = command("init", "gta1-160m", checkpoint, *options, "--json").content
    assert document.keys() == {"checkpoint", "parameters", "dtype", "seed"}
    assert (document["checkpoint"], document["dtype"], document["seed"]) == (str(checkpoint), "float16", 3)
    described = command("inspect", checkpoint, "--json").content
    assert (described["layers"], described["max_length"], described["precision"]) == (1, 64, "fp16")
    assert described["parameters"] == document["parameters"]


def test_export_in_a_process_of_its_own(tiny_checkpoint: Path, tmp_path: Path) -> None:
    before = listing(tiny_checkpoint)
    document = run("export", tiny_checkpoint, "bundle", "--precision", "fp32", "--json", cwd=tmp_path).content
    assert document.keys() == {"bundle", "precision", "bytes", "verification"}
    assert (document["bundle"], document["precision"]) == ("bundle", "fp32")
    assert document["bytes"] == sum(
        path.stat().st_size for path in (tmp_path / "bundle").iterdir() if path.name != "gta_edge.json"
    )
    verification = document["verification"]
    assert verification.keys() >= {"backends", "int8_activations", "quantisation", "precision", "compute", "passed"}
    assert verification["passed"] is True
    assert verification["backends"].keys() == {"onnxruntime"}
    assert listing(tiny_checkpoint) == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize(("precision", "changed"), [("bf16", False), ("int4", True)])
def test_export_says_what_it_changed(
    command: Command, tiny_checkpoint: Path, tmp_path: Path, precision: str, changed: bool
) -> None:
    out = command("export", tiny_checkpoint, tmp_path / "bundle", "--precision", precision).out
    assert re.search(r"^agrees with PyTorch: largest error \S+ of the logits' standard deviation$", out, re.MULTILINE)
    verified = command(
        "verify", tmp_path / "bundle", "--checkpoint", tiny_checkpoint, "--backend", "onnxruntime", "--json"
    ).content["quantisation"]
    if changed:
        share, divergence = f"{verified['top1_agreement']:.1%}", f"{verified['mean_kl_divergence']:.2g}"
        assert f"\n  {share} equal top-1 tokens, mean KL divergence {divergence} nats\n" in out
        assert 0 < verified["mean_kl_divergence"] < 1
    else:
        assert out.endswith("weights in bf16: the checkpoint's own values\n")
        assert verified["mean_kl_divergence"] == 0


def test_export_replaces_with_force(command: Command, tiny_checkpoint: Path, copied_bundle: Path) -> None:
    (copied_bundle / "model.onnx").write_text("broken")
    result = command("export", tiny_checkpoint, copied_bundle, "--force", "--no-verify")
    assert (result.status, result.err) == (0, "")
    assert result.out.startswith(f"{copied_bundle}: GTAForCausalLM in bf16")
    assert command("inspect", copied_bundle, "--verify-hashes").status == 0
    assert [path.name for path in copied_bundle.parent.iterdir()] == ["bundle"]
