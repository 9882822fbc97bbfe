"""``--cache-policy`` and what belongs to it, as people give it."""

import functools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import typer.main

from gta_edge.cli.app import app
from gta_edge.evaluate.bench.settings import needs
from gta_edge.formats.bundle import Bundle
from gta_edge.runtime.cache_policies import OPTIONS, POLICIES
from gta_edge.runtime.cache_policies.budgets import LayerBudgets, budgets_output, write_budgets
from gta_edge.runtime.registry import BACKENDS
from tests.helpers.commands import Result

Command = Callable[..., Result]
BOARD = ("--device", "orin-nano-8gb")
WINDOW = ("--cache-policy", "window", "--cache-rows")


@pytest.mark.parametrize("verb", ["generate", "eval", "bench", "plan", "build"])
def test_the_options_are_those_of_the_table(verb: str) -> None:
    found = {name for each in typer.main.get_command(app).commands[verb].params for name in each.opts}
    expected = {f"--cache-{name.replace('_', '-')}" for name in OPTIONS}
    assert found >= {"--cache-policy", *expected}
    assert {name for name in found if name.startswith("--cache-")} - expected <= {"--cache-policy", "--cache-dtype"}


def test_help_names_every_policy(command: Command) -> None:
    text = " ".join(command("generate", "--help").out.split())
    assert f"Which rows of the cache stay: {', '.join(POLICIES)}; all by default." in text


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--cache-rows", 64], "--cache-rows is for a cache policy: give --cache-policy too"),
        (["--cache-rotate"], "--cache-rotate is for a cache policy: give --cache-policy too"),
        (["--cache-policy", "windows"], "no cache policy is called 'windows'; there are window, h2o,"),
        ([*WINDOW, "many"], "Invalid value for '--cache-rows'"),
    ],
)
def test_wrong_usage(command: Command, arguments: list[object], reason: str) -> None:
    assert reason in " ".join(command("plan", "gta-1b", *BOARD, *arguments).usage.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cache-policy", "h2o"], r"^cache policy h2o needs rows; say how many of each layer stay \(--cache-rows\)$"),
        ([*WINDOW, 4], "^cache policy window: rows is 4; give a whole number of at least 5$"),
        ([*WINDOW, 32769], "^cache policy window keeps 32769 rows, and the model has 32768 positions; give at most 3"),
        ([*WINDOW, 64, "--cache-decay", 0.9], "^cache policy window has no option 'decay'; it has rows, interval,"),
        ([*WINDOW, 64, "--cache-interval", 0], "^cache policy window: interval is 0; give a whole number of at least"),
        ([*WINDOW, 64, "--cache-residual-rows", 9], "residual_rows is 9; give a whole number from 0 to 8$"),
        ([*WINDOW, 64, "--cache-dtype", "int4"], "^cache policy window moves rows one by one, and a cache of int4 "),
        (["--cache-policy", "measured", "--cache-rows", 64], "^the budgets of cache policy measured are a bundle's; "),
    ],
)  # fmt: skip
def test_options_that_make_no_sense(command: Command, arguments: list[object], message: str) -> None:
    found = command("plan", "gta-1b", *BOARD, *arguments).error
    assert re.search(message, found), found


def test_a_text_with_a_policy(command: Command, tiny_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    text = tmp_path / "text"
    text.write_text("def main():\n    return 1\n" * 5)
    common, few, most = ("--backend", "onnxruntime", "--json"), (*WINDOW, 16, "--cache-interval", 4), (*WINDOW, 128)
    losses = [command("eval", tiny_bundle, "--text", text, *common, *some).document["loss"] for some in ((), most, few)]
    assert losses[0] == losses[1]  # a budget that is never reached
    told = command("eval", tiny_bundle, "--text", text, "--backend", "onnxruntime", *few).err
    assert told.startswith("note: the cache policy changed nothing: rows are evicted after each chunk of 256 tokens")
    prompt = "--ids", "1,2,3,4,5,6,7,8", "--max-new-tokens", 40, "--ignore-eos"
    made = [command("generate", tiny_bundle, *prompt, *common, *some).document["ids"] for some in ((), most, few)]
    assert made[0] == made[1]
    assert len(made[2]) == 40
    beyond = (*prompt[:2], "--max-new-tokens", 200, "--ignore-eos", *common, *WINDOW, 16, "--cache-sinks", 0)
    assert len(command("generate", tiny_bundle, *beyond).document["ids"]) == 121  # the model has 128 positions
    refused = command("generate", tiny_bundle, *beyond, "--cache-rotate").error
    assert "to rotate, rows, interval and a chunk (336 together) have to fit" in refused


def test_a_backend_that_holds_no_such_cache(
    command: Command, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(BACKENDS["onnxruntime"], "manages_cache", False)
    common = "--ids", "1,2", "--max-new-tokens", 2, *WINDOW, 16
    found = command("generate", tiny_bundle, *common, "--backend", "onnxruntime").error
    assert found == "onnxruntime cannot hold a cache with a policy; leave the policy out, or take torch"


def test_a_benchmark_with_a_policy(command: Command, tiny_bundle: Path) -> None:
    pytest.importorskip("onnxruntime")
    options = "--backend", "onnxruntime", "--contexts", 96, "--new-tokens", 4, "--rounds", 1, "--json"
    plain, managed = (command("bench", tiny_bundle, *options, *some).document for some in ((), (*WINDOW, 24)))
    rows = [report["results"][0] for report in (plain, managed)]
    assert all(row["tpot_ms"] for row in rows)
    per_token = plain["backends"][0]["cache_bytes_per_token"]
    assert (rows[0]["cache_bytes_per_step"], rows[1]["cache_bytes_per_step"]) == (96 * per_token, 28 * per_token)
    assert rows[1]["notes"]["agrees"] == "answers were not asked for"


def test_a_plan_counts_the_rows_that_stay(command: Command) -> None:
    common = "plan", "gta-1b", *BOARD, "--precision", "int4", "--json"
    h2o = "--cache-policy", "h2o", "--cache-rows", 2048
    plain, few = (command(*common, "--context", 32768, *some).document for some in ((), h2o))
    assert (plain["cache_rows"], few["cache_rows"]) == (None, [2048] * 54)
    fitting = 2048 + 64 + 512  # and an interval, and a chunk
    assert few["cache_bytes"] == 54 * fitting * (192 * 2 + 4)
    assert few["decode_ms"] < 0.7 * plain["decode_ms"]
    assert few["prefill_ms"] < plain["prefill_ms"]
    shorter = command(*common, "--context", 4096, *h2o).document
    assert (shorter["cache_bytes"], shorter["decode_ms"]) == (few["cache_bytes"], few["decode_ms"])
    text = command(*common[:-1], *h2o).out
    assert "fp16, 2,048 rows stay in a layer, 2,624 fit" in text


def test_a_benchmark_needs_room_for_the_rows_that_stay(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    few = {"name": "h2o", "rows": 8, "interval": 8}
    sizes = [needs(bundle, 10**5, 10, 2, answers=0, cache=cache).backend for cache in (None, few)]
    assert sizes[1] < 0.1 * sizes[0]


def test_a_text_on_a_cache_of_4_bits(command: Command, tiny_bundle: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("def main():\n    return 1\n" * 5)
    losses = {
        cache: command("eval", tiny_bundle, "--text", text, "--backend", "torch", "--cache-dtype", cache, "--json")
        for cache in ("fp32", "int4")
    }
    exact, found = (each.document["loss"] for each in losses.values())
    assert 0 < abs(found - exact) < 0.1 * exact
    words = ("--ids", "1,2,3", "--max-new-tokens", 40, "--ignore-eos", "--backend")
    made = command("generate", tiny_bundle, *words, "torch", "--cache-dtype", "int4v2", "--json").document["ids"]
    assert len(made) == 40
    assert command("generate", tiny_bundle, *words, "onnxruntime", "--cache-dtype", "int4").error == (
        "onnxruntime has no cache of int4 for GTAForCausalLM in fp32; "
        "expected fp32 or int8, or leave the type of the cache out"
    )


def test_what_makes_no_sense_is_said_before_what_lies_there(
    command: Command, copied_bundle: Path, tmp_path: Path
) -> None:
    opened, text = Bundle.open(copied_bundle), tmp_path / "text"
    text.write_text("some text")
    with budgets_output(opened) as directory:
        write_budgets(directory, opened, LayerBudgets((5, 5), {}))
    calibrate = functools.partial(command, "calibrate-cache", copied_bundle, "--text", text)
    assert calibrate("--share", 2).error.startswith("share is 2; give one from ")
    assert calibrate("--rule", "lru").error.startswith("no cache policy is called 'lru'")
    assert "exists" in calibrate().error
