"""What verify and eval print when all is well."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers.commands import Result, run

DIFFERENCE = {"max_abs_error", "max_rel_error", "top1_agreement"}
OF_A_BACKEND = DIFFERENCE | {"bound_fraction", "place"}


Command = Callable[..., Result]


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
        "cache_policy",
    }
    assert document["passed"] is True
    assert document["cache_policy"] is None
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
    managed = ("--backend", "onnxruntime", "--cache-policy", "window", "--cache-rows", 64, "--json")
    document = command("verify", tiny_bundle, "--checkpoint", tiny_checkpoint, *managed).content
    assert document["cache_policy"] == {"name": "window", "rows": 64}


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
