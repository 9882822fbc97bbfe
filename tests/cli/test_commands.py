"""What the commands do and print when all is well: results on stdout, the rest on stderr, JSON as documented."""

import json
import math
import os
import pty
import re
import select
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import gta_edge
from gta_edge.cli import doctor_checks
from gta_edge.cli.app import VERBS as COMMANDS
from gta_edge.machine import info as machine
from tests.helpers.commands import COMMAND, ROOT, Result, environment, listing, run
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
DIFFERENCE = {"max_abs_error", "max_rel_error", "top1_agreement"}
OF_A_BACKEND = DIFFERENCE | {"bound_fraction", "place"}
TIMINGS = {"ttft_ms", "tpot_ms", "prompt_tokens_per_s", "decode_tokens_per_s", "total_ms"}
TIMINGS |= {"drafted", "accepted", "tokens_per_step"}
GENERATE = {"text", "ids", "finish_reason", "prompt_tokens", "timings", "seed", "backend"}

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


# --- verify and eval -----------------------------------------------------------------------------------------------


def test_verify(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    document = run("verify", tiny_bundle, "--checkpoint", tiny_checkpoint, "--json").content
    assert document.keys() == {
        "backends",
        "int8_activations",
        "quantisation",
        "passed",
        "precision",
        "compute",
        "absent",
        "unavailable",
        "weights",
        "failures",
    }
    assert document["passed"] is True
    assert document["backends"].keys() >= {"onnxruntime", "torch"}
    assert all(difference.keys() == OF_A_BACKEND for difference in document["backends"].values())
    assert document["quantisation"].keys() == DIFFERENCE | {"mean_kl_divergence", "tokens"}
    assert document["weights"]["equal"] == document["weights"]["compared"] > 0
    assert document["failures"] == []
    assert document["quantisation"]["max_abs_error"] == 0  # bf16 as in the checkpoint


def test_verify_for_people_and_by_name(command: Command, tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    result = command("verify", tiny_bundle, "--checkpoint", tiny_checkpoint, "--backend", "onnxruntime")
    assert (result.status, result.err) == (0, "")
    assert result.out.rstrip().endswith("passed")
    assert "onnxruntime" in result.out
    assert "torch" not in result.out


def test_verify_that_fails(command: Command, tiny_bundle: Path, copied_checkpoint: Path) -> None:
    tensors = load_file(copied_checkpoint / "model.safetensors")
    save_file({name: (tensor * 2).astype(tensor.dtype) for name, tensor in tensors.items()},
              copied_checkpoint / "model.safetensors")  # fmt: skip
    options = ("verify", tiny_bundle, "--checkpoint", copied_checkpoint, "--backend", "onnxruntime")
    result = command(*options, "--json")
    assert result.status == 1
    document = json.loads(result.out)
    assert document["passed"] is False
    assert document["quantisation"]["max_rel_error"] > 0.08
    assert document["failures"][0].startswith("weights stored in bf16 are not the checkpoint's: model.embed_tokens")
    assert re.fullmatch(r"error: weights stored in bf16 .*\n", result.err)
    result = command(*options)
    assert (result.status, result.out.splitlines()[-1]) == (1, "failed")
    assert re.fullmatch(r"error: .*\n", result.err)


def test_eval_of_a_text(tiny_bundle: Path, tmp_path: Path) -> None:
    text = "Ein Text, länger als das Fenster. " * 10
    (tmp_path / "text").write_text(text, encoding="utf-8")
    document = run("eval", tiny_bundle, "--text", tmp_path / "text", "--json").content
    assert document.keys() == {"tokens", "loss", "perplexity", "backend", "bits_per_byte"}
    size = len(text.encode())
    assert (document["tokens"], document["backend"]) == (size - 1, "onnxruntime")  # a token is a byte
    assert document["perplexity"] == pytest.approx(math.exp(document["loss"]))
    assert document["bits_per_byte"] == pytest.approx(document["loss"] / math.log(2) * (size - 1) / size)
    assert document["loss"] == pytest.approx(math.log(300), abs=1)  # random weights know nothing


def test_eval_of_ids(command: Command, tiny_bundle: Path, tmp_path: Path) -> None:
    text = "as text or as ids"
    (tmp_path / "text").write_text(text)
    np.save(tmp_path / "ids.npy", np.frombuffer(text.encode(), np.uint8))
    by_ids = command("eval", tiny_bundle, "--ids", tmp_path / "ids.npy", "--json").content
    assert by_ids.keys() == {"tokens", "loss", "perplexity", "backend"}
    assert by_ids["loss"] == command("eval", tiny_bundle, "--text", tmp_path / "text", "--json").content["loss"]
    result = command("eval", tiny_bundle, "--ids", tmp_path / "ids.npy", "--backend", "torch", "--window", 4)
    assert (result.status, result.err) == (0, "")
    assert re.search(r"^perplexity +\d+\.\d+$", result.out, re.MULTILINE)


# --- generate ------------------------------------------------------------------------------------------------------


def generate(command: Command, bundle: Path, *options: object) -> dict[str, Any]:
    return command("generate", bundle, "--max-new-tokens", 20, "--ignore-eos", "--json", *options).content


def test_generate_in_a_process_of_its_own(command: Command, tiny_bundle: Path) -> None:
    options = ("generate", tiny_bundle, "--prompt", "Grüße", "--max-new-tokens", 9, "--ignore-eos")
    document = run(*options, "--json").content
    assert document.keys() == GENERATE
    assert document["timings"].keys() == TIMINGS
    assert (document["finish_reason"], document["prompt_tokens"]) == ("length", len("Grüße".encode()))
    assert len(document["ids"]) == 9
    assert document["timings"]["ttft_ms"] > 0
    assert document["timings"]["tpot_ms"] > 0
    streamed = run(*options)
    assert (streamed.status, streamed.out) == (0, document["text"] + "\n")
    assert re.fullmatch(r"\[onnxruntime\] 7 prompt tokens, .* 9 tokens .*; ended by length\n", streamed.err)
    quiet = command(*options, "--quiet")
    assert (quiet.status, quiet.out, quiet.err) == (0, streamed.out, "")


def test_prompts_of_every_kind(command: Command, tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text("Hello")
    documents = [
        generate(command, tiny_bundle, "--prompt", "Hello"),
        generate(command, tiny_bundle, "--prompt-file", tmp_path / "prompt"),
        generate(command, tiny_bundle, "--ids", ",".join(map(str, b"Hello"))),
        generate(command, tiny_bundle, "--prompt", "Hello", "--backend", "torch", "--threads", 1),
        generate(command, tiny_bundle, "--prompt", "Hello", "--temperature", 0, "--seed", 5),
        generate(command, tiny_bundle, "--prompt", "Hello", "--temperature", 3, "--top-k", 1),
    ]
    assert [document["ids"] for document in documents[1:]] == [documents[0]["ids"]] * 5  # all of them are greedy
    assert [document["backend"] for document in documents] == ["onnxruntime"] * 3 + ["torch"] + ["onnxruntime"] * 2


def test_a_prompt_may_be_piped(command: Command, tiny_bundle: Path) -> None:
    expected = generate(command, tiny_bundle, "--prompt", "Hello")["ids"]
    options = ("generate", tiny_bundle, "--max-new-tokens", 20, "--ignore-eos", "--json")
    for more in ((), ("--prompt-file", "-")):
        assert run(*options, *more, input="Hello").content["ids"] == expected
    assert "or pipe a text in" in run(*options, input="").usage
    assert "or pipe a text in" in run(*options, "--prompt", "a", "--ids", "1", input="Hello").usage


def test_top_k_of_0_is_off(command: Command, tiny_bundle: Path) -> None:
    hot = ("--prompt", "Hello", "--temperature", 2, "--seed", 1)
    assert generate(command, tiny_bundle, *hot, "--top-k", 0)["ids"] == generate(command, tiny_bundle, *hot)["ids"]


def test_a_seed_gives_the_same_text_again(command: Command, tiny_bundle: Path) -> None:
    hot = ("--prompt", "Hello", "--temperature", 2)
    first = generate(command, tiny_bundle, *hot, "--seed", 1)
    assert first["seed"] == 1
    assert generate(command, tiny_bundle, *hot, "--seed", 1)["ids"] == first["ids"]
    assert generate(command, tiny_bundle, *hot, "--seed", 2)["ids"] != first["ids"]
    unseeded = generate(command, tiny_bundle, *hot)
    assert generate(command, tiny_bundle, *hot, "--seed", unseeded["seed"])["ids"] == unseeded["ids"]


@pytest.mark.parametrize(
    "option", [("--top-k", 1), ("--top-p", 1e-9), ("--min-p", 1), ("--temperature", 0), ("--temperature", 1e-6)]
)
def test_options_that_leave_no_choice(command: Command, tiny_bundle: Path, option: tuple[str, float]) -> None:
    greedy = generate(command, tiny_bundle, "--ids", "1,2,3")
    assert generate(command, tiny_bundle, "--ids", "1,2,3", *option)["ids"] == greedy["ids"]


def test_a_repetition_penalty_forbids_repetition(command: Command, tiny_bundle: Path) -> None:
    ids = generate(command, tiny_bundle, "--ids", "1,2,3", "--repetition-penalty", 1e6)["ids"]
    assert len({*ids, 1, 2, 3}) == 23


def test_speculation(command: Command, tiny_bundle: Path) -> None:
    plain = generate(command, tiny_bundle, "--ids", "1,2,3,1,2,3,1,2")
    assert {plain["timings"][key] for key in ("drafted", "accepted", "tokens_per_step")} == {None}
    for options in (
        ["--speculate", "lookup"],
        ["--draft", tiny_bundle],
        ["--speculate", "draft", "--draft", tiny_bundle],
    ):
        document = generate(command, tiny_bundle, "--ids", "1,2,3,1,2,3,1,2", *options)
        assert document["ids"] == plain["ids"]
        assert document["timings"]["tokens_per_step"] >= 1
    shown = command("generate", tiny_bundle, "--ids", "1,2,3", "--speculate", "lookup")
    assert re.search(r" tokens at .*/s \(\d\.\d a step\); ended by", shown.err)
    for options, message in (
        (["--speculate", "draft"], "--speculate draft needs a model: give --draft BUNDLE"),
        (["--speculate", "lookup", "--draft", tiny_bundle], "--draft is for --speculate draft"),
        (["--speculate", "guess"], "guess"),
    ):
        assert message in command("generate", tiny_bundle, "--ids", "1", *options).usage


def test_several_answers(command: Command, tiny_bundle: Path) -> None:
    hot = ("--ids", "1,2,3", "--temperature", 2)
    document = generate(command, tiny_bundle, *hot, "--seed", 7, "--n", 3)
    assert document.keys() == {"answers", "prompt_tokens", "backend", "timings"}
    assert [each["seed"] for each in document["answers"]] == [7, 8, 9]
    alone = generate(command, tiny_bundle, *hot, "--seed", 8)
    assert document["answers"][1] == {key: alone[key] for key in ("text", "ids", "finish_reason", "seed")} | {
        "score": None
    }
    options = ("generate", tiny_bundle, *hot, "--seed", 7, "--max-new-tokens", 20, "--ignore-eos")
    shown = command(*options, "--n", 3)
    texts = [each["text"] for each in document["answers"]]
    assert shown.out == "".join(
        f"--- {i} of 3, seed {6 + i}, ended by length\n{text}\n" for i, text in enumerate(texts, 1)
    )
    # a cache that drops rows has no branches
    dropped = generate(
        command, tiny_bundle, *hot, "--seed", 7, "--n", 2, "--cache-policy", "window", "--cache-rows", 64
    )
    assert [each["ids"] for each in dropped["answers"]] == [each["ids"] for each in document["answers"][:2]]
    guessed = generate(command, tiny_bundle, *hot, "--seed", 7, "--n", 2, "--speculate", "lookup")
    assert [each["ids"] for each in guessed["answers"]] == [each["ids"] for each in document["answers"][:2]]
    assert guessed["timings"]["drafted"] >= guessed["timings"]["accepted"] >= 0
    usage = command("generate", tiny_bundle, "--ids", "1", "--n", 2, "--draft", tiny_bundle).usage
    assert "for one answer: leave out --n and --beams" in usage
    assert (
        "--beams guesses nothing"
        in command("generate", tiny_bundle, "--ids", 1, "--beams", 2, "--speculate", "lookup").usage
    )


def test_beam_search(command: Command, tiny_bundle: Path) -> None:
    document = generate(command, tiny_bundle, "--ids", "1,2,3", "--beams", 4, "--n", 2)
    scores = [each["score"] for each in document["answers"]]
    assert len(scores) == 2
    assert scores == sorted(scores, reverse=True)
    best = command("generate", tiny_bundle, "--ids", "1,2,3", "--max-new-tokens", 20, "--ignore-eos", "--beams", 4)
    assert best.out == document["answers"][0]["text"] + "\n"
    short = generate(command, tiny_bundle, "--ids", "1,2,3", "--beams", 4, "--length-penalty", 0)
    assert short["answers"][0]["score"] < scores[0]


def test_stop_strings(command: Command, tiny_bundle: Path) -> None:
    options = ("--prompt", "Hello", "--temperature", 2, "--seed", 4)
    whole = generate(command, tiny_bundle, *options)["text"]
    stop = next(part for i in range(5, len(whole)) if (part := whole[i : i + 2]).isprintable() and "\ufffd" not in part)
    document = generate(command, tiny_bundle, *options, "--stop", "not in the text", "--stop", stop)
    assert document["finish_reason"] == "stop"
    assert document["text"] == whole[: whole.index(stop)]
    result = command("generate", tiny_bundle, *options, "--max-new-tokens", 20, "--ignore-eos", "--stop", stop)
    assert result.out == document["text"] + "\n"  # no part of it was shown before it was complete


def test_generation_ends_with_the_positions(command: Command, tiny_bundle: Path) -> None:
    full = generate(command, tiny_bundle, "--ids", ",".join(["1"] * 128))
    assert (full["finish_reason"], len(full["ids"]), full["prompt_tokens"]) == ("context", 1, 128)
    assert len(generate(command, tiny_bundle, "--ids", ",".join(["1"] * 120))["ids"]) == 9


def test_an_end_token_ends_the_text(command: Command, copied_checkpoint: Path, tiny_bundle: Path) -> None:
    ids = generate(command, tiny_bundle, "--ids", "1,2,3")["ids"]
    entries = json.loads((copied_checkpoint / "config.json").read_text())
    (copied_checkpoint / "config.json").write_text(json.dumps(entries | {"eos_token_id": ids[0]}))
    bundle = copied_checkpoint.with_name("other")
    assert command("export", copied_checkpoint, bundle, "--no-verify").status == 0
    document = command("generate", bundle, "--ids", "1,2,3", "--json").content
    assert (document["finish_reason"], document["ids"], document["text"]) == ("stop", [], "")


def test_a_model_without_a_tokenizer(command: Command, copied_checkpoint: Path, tiny_bundle: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copied_checkpoint / name).unlink()
    bundle = copied_checkpoint.with_name("other")
    assert command("export", copied_checkpoint, bundle, "--no-verify").status == 0
    document = generate(command, bundle, "--ids", "1,2,3")
    assert document["text"] is None
    assert document["ids"] == generate(command, tiny_bundle, "--ids", "1,2,3")["ids"]
    result = command("generate", bundle, "--ids", "1,2,3", "--max-new-tokens", 20, "--ignore-eos")
    assert result.out == ",".join(map(str, document["ids"])) + "\n"
    (bundle.parent / "text").write_text("text")
    for options in (
        ("generate", bundle, "--prompt", "text"),
        ("generate", bundle, "--ids", "1", "--stop", "text"),
        ("eval", bundle, "--text", bundle.parent / "text"),
    ):
        assert "tokenizer" in command(*options).error


# --- doctor --------------------------------------------------------------------------------------------------------


def test_doctor() -> None:
    document = run("doctor", "--json").content
    assert document.keys() == {
        *("gta_edge", "machine", "gpu", "packages", "kernels", "tensorrt", "onnxruntime_providers", "backends"),
        "features",
    }
    assert list(document["backends"]) == ["tensorrt", "tensorrt-rtx", "onnxruntime-cuda", "onnxruntime", "torch"]
    assert document["gta_edge"] == gta_edge.__version__
    assert document["packages"].keys() >= {"numpy", "onnxruntime", "torch", "onnx", "onnx-ir", "onnxscript"}
    assert "CPUExecutionProvider" in document["onnxruntime_providers"]
    kernels = document["kernels"]
    assert kernels["works"] == (kernels["reason"] is None) == (kernels["gpu"] is not None)
    for name in ("onnxruntime", "torch"):
        assert document["backends"][name] == {"works": True, "reason": None, "remedy": None}
    assert document["features"].keys() == {"export", "plot"}
    assert document["features"]["export"] == {"works": True, "reason": None, "remedy": None}
    for name in ("tensorrt", "tensorrt-rtx"):
        entry = document["backends"][name]
        assert entry["works"] == (entry["reason"] is None)
        assert entry["works"] <= (kernels["works"] and document["tensorrt"][name] is not None)


def test_doctor_for_people(command: Command) -> None:
    result = command("doctor")
    assert (result.status, result.err) == (0, "")
    for name in ("onnxruntime", "torch", "export"):
        assert re.search(rf"^✓ {name}\b", result.out, re.MULTILINE), name
    lines = result.out.splitlines()
    assert re.fullmatch(r"Best backend here: \S+\. Next: gta-edge (build|export) .*", lines[-1])


def test_doctor_shows_a_jetsons_clocks(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    clock = {"min": 306000000, "max": 918000000, "now": 306000000}
    found = machine.describe() | {"clocks_hz": {"gpu": clock, "cpu": clock, "memory": None}, "clocks_fixed": False}
    found |= {"jetpack": None, "jetson_linux": None}
    monkeypatch.setattr(machine, "describe", lambda: dict(found))
    answers = doctor_checks.run(list(doctor_checks.CHECKS))
    monkeypatch.setattr(doctor_checks, "run", lambda names: answers)  # once is enough: it is the clocks that differ
    for board in (None, "Radxa ROCK 5B", "NVIDIA Jetson Orin Nano Developer Kit"):
        found["board"] = board
        text = command("doctor").out
        assert command("doctor", "--json").content["machine"]["clocks_hz"] == found["clocks_hz"]
        assert ("sudo jetson_clocks" in text) is ("memory not known" in text) is ("Jetson" in (board or ""))
    assert re.search(r"^· clocks +GPU 306 to 918 MHz, now 306; CPU 306 to 918", text, re.MULTILINE)


# --- terminals and pipes -------------------------------------------------------------------------------------------


def on_a_terminal(arguments: list[object], tmp_path: Path) -> tuple[Result, str]:
    """Run a command whose stderr is a terminal; return its result, and what the terminal was sent."""
    ours, theirs = pty.openpty()
    with (tmp_path / "out").open("w+") as out:
        process = subprocess.Popen(
            [*COMMAND, *map(str, arguments)], env=environment(TERM="xterm", COLUMNS="100"), stdout=out, stderr=theirs
        )
        os.close(theirs)
        sent = b""
        while select.select([ours], [], [], 60)[0]:
            try:
                sent += os.read(ours, 4096)
            except OSError:  # Linux's way to say that nobody has it open any more
                break
        os.close(ours)
        status = process.wait(60)
        out.seek(0)
        return Result(status, out.read(), ""), sent.decode()


def test_a_bar_on_a_terminal(tiny_bundle: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(300))
    arguments = ["eval", tiny_bundle, "--ids", tmp_path / "ids.npy"]
    result, sent = on_a_terminal(arguments, tmp_path)
    assert result.status == 0
    assert "evaluating" in sent
    assert "100%" in sent
    assert "perplexity" in result.out
    assert "\x1b" not in result.out
    for option in ("--quiet", "--json"):
        result, sent = on_a_terminal([*arguments, option], tmp_path)
        assert (result.status, sent) == (0, "")
        assert "perplexity" in result.out


def test_a_spinner_for_what_cannot_count(tiny_checkpoint: Path, tmp_path: Path) -> None:
    result, sent = on_a_terminal(["export", tiny_checkpoint, tmp_path / "bundle", "--no-verify"], tmp_path)
    assert result.status == 0
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", sent)
    assert re.search(r"[⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏] +tracing the model", shown)
    assert "writing weights" in shown


def test_no_progress_where_there_is_no_terminal(
    command: Command, tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "ids.npy", np.arange(300))
    for arguments in (
        ("eval", tiny_bundle, "--ids", tmp_path / "ids.npy"),
        ("verify", tiny_bundle, "--checkpoint", tiny_checkpoint),
        ("export", tiny_checkpoint, tmp_path / "bundle"),
        ("inspect", tiny_bundle, "--verify-hashes"),
    ):
        result = command(*arguments)
        assert (result.status, result.err) == (0, "")


@pytest.mark.parametrize(
    "arguments",
    [
        "inspect gta-1b",
        "inspect gta-1b --json",
        "generate {} --ids 1 --ignore-eos",
        "generate {} --ids 1 --ignore-eos --json",
        "generate --help",
    ],
)
def test_a_reader_that_goes_away(tiny_bundle: Path, arguments: str) -> None:
    words = [word.format(tiny_bundle) for word in arguments.split()]
    ours, theirs = os.pipe()
    os.close(ours)  # as `| head -c 0` does, but for sure before anything is written
    result = subprocess.run(
        [*COMMAND, *words], env=environment(), stdout=theirs, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(theirs)
    assert "Traceback" not in result.stderr
    assert "Exception" not in result.stderr
    assert "error" not in result.stderr


def test_head_gets_what_it_wants(tiny_bundle: Path) -> None:
    head = shutil.which("head")
    assert head is not None
    with subprocess.Popen(
        [*COMMAND, "generate", tiny_bundle, "--ids", "1", "--ignore-eos"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        taken = subprocess.run([head, "-c", "10"], stdin=process.stdout, capture_output=True, check=True).stdout
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()
    assert len(taken) == 10
