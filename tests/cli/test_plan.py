"""``gta-edge plan`` as people and programs call it."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gta_edge.libraries.install import install_command
from gta_edge.machine.devices import MEASURED, device_names
from gta_edge.model.presets import PRESETS
from tests.helpers.commands import Result, environment, run

KEYS = {
    "device",
    "fits",
    "weight_bytes",
    "cache_bytes",
    "peak_bytes",
    "max_context",
    "decode_ms",
    "prefill_ms",
    "bound",
}
BOARD = ("--device", "orin-nano-8gb")
Command = Callable[..., Result]


def test_a_plan_in_json(command: Command) -> None:
    found = command("plan", "gta-1b", *BOARD, "--context", 32768, "--precision", "int4", "--json").document
    assert set(found) >= KEYS
    assert (found["device"], found["fits"], found["max_context"]) == ("orin-nano-8gb", True, 32768)
    assert found["cache_bytes"] == 32768 * 20736
    parts = ("weight_memory_bytes", "cache_bytes", "activation_bytes", "runtime_bytes")
    assert found["peak_bytes"] == sum(found[name] for name in parts)
    assert found["left_bytes"] == found["available_bytes"] - found["peak_bytes"]
    assert found["bound"] == {"decode": "bandwidth", "prefill": "compute"}
    for phase in ("decode", "prefill"):
        total = sum(operator["ms"] for operator in found["operators"][phase]) + found["overhead_ms"][phase]
        assert total == pytest.approx(found[f"{phase}_ms"])


def test_a_plan_for_a_person(command: Command) -> None:
    found = command("plan", "gta-1b", *BOARD, "--context", 32768, "--precision", "int4")
    assert (found.status, found.err) == (0, "")
    for line in ("weights", "cache", "activations", "peak", "engine build", "longest context", "largest batch"):
        assert re.search(rf"^{line} +\d", found.out, re.MULTILINE), line
    assert re.search(r"^result +fits, [\d.]+ GB left$", found.out, re.MULTILINE)
    assert re.search(r"^decode .*tokens/s\n +bound by bandwidth \(weights \d+%, cache \d+%", found.out, re.MULTILINE)
    assert "assumed" not in found.out
    assert "assumed" in command("plan", "gta-1b", *BOARD, "--sources").out


@pytest.mark.parametrize(
    "arguments",
    [
        ["gta-1b", *BOARD, "--context", 32768, "--precision", "int4"],
        ["gta-1b", "--device", "orin-nano-4gb", "--context", 32768, "--operators"],
        ["gta-1b", "gqa-1b", *BOARD, "--context", 32768],
        ["gta-1b", "gqa-1b", "gta1-160m", "gqa-160m", *BOARD],
        ["--devices"],
    ],
)
def test_lines_fit_80_columns(arguments: list[object], command: Command) -> None:
    result = command("plan", *arguments)
    assert result.status == 0
    assert max(map(len, result.out.splitlines())) <= 80


def test_the_devices_are_listed(command: Command) -> None:
    found = command("plan", "--devices")
    assert [line.split()[0] for line in found.out.split("\n\n")[0].splitlines()[1:]] == [
        name for name in device_names() if name not in MEASURED
    ]
    devices = command("plan", "--devices", "--json").document["devices"]
    (board,) = (entry for entry in devices if entry["name"] == BOARD[1])
    plan = command("plan", "gta-1b", *BOARD, "--json").document
    for key in ("memory_bytes", "available_bytes", "bandwidth_bytes_per_s", "rates_per_s", "source", "verified"):
        assert board[key] == plan[key], key


def test_words_have_colours_on_a_terminal() -> None:
    for context, word, style in ((4096, "fits", "32"), (32768, "does not fit", "31")):
        result = run(
            "plan", "gta-1b", "--device", "orin-nano-4gb", "--precision", "int4", "--batch", 1 if context < 9999 else 9,
            "--context", context, extra={"FORCE_COLOR": "1", "TERM": "xterm"},
        )  # fmt: skip
        assert f"\x1b[{style}m{word}\x1b[0m" in result.out


@pytest.mark.parametrize("name", PRESETS)
def test_weight_bytes_are_near_the_parameters(name: str, command: Command) -> None:
    plan = command("plan", name, *BOARD, "--context", 1, "--json").document
    weights = command("inspect", name, "--json").document["weight_bytes"]
    tables = 2 * 4 * 32768 * 32
    assert weights + tables <= plan["weight_bytes"] < 1.002 * weights + tables


def test_a_bundle_weighs_what_inspect_says(command: Command, tiny_bundle: Path) -> None:
    plan = command("plan", tiny_bundle, *BOARD, "--json").document
    described = command("inspect", tiny_bundle, "--json").document
    assert plan["weight_bytes"] == described["weight_bytes"]
    assert (plan["precision"], plan["context"]) == (described["precision"], described["max_length"])


def test_a_checkpoint_weighs_what_its_bundle_will(command: Command, tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    plans = [command("plan", path, *BOARD, "--json").document for path in (tiny_checkpoint, tiny_bundle)]
    assert plans[0].pop("model") != plans[1].pop("model")
    assert plans[0] == plans[1]


def test_a_bundle_as_it_would_be_in_another_precision(command: Command, tiny_bundle: Path) -> None:
    own, other = (
        command("plan", tiny_bundle, *BOARD, *options, "--json").document for options in ([], ["--precision", "int4"])
    )
    assert other["block_size"] == 32
    assert other["weight_bytes"] < own["weight_bytes"]


def test_several_models_in_a_table(command: Command) -> None:
    found = command("plan", "gta-1b", "gqa-1b", *BOARD, "--context", 32768, "--precision", "int4")
    assert found.status == 0
    lines = found.out.splitlines()
    assert re.fullmatch(r" +gta-1b +gqa-1b", lines[3])
    assert re.search(r"^  bytes a token +20,736 +69,120$", found.out, re.MULTILINE)
    (last,) = (line for line in lines if line.startswith("32,768 "))
    gta, gqa = (float(value) for value in last.split()[3:])
    assert gqa > 2 * gta


def test_several_models_in_json(command: Command) -> None:
    found = command("plan", "gta-1b", "gqa-1b", *BOARD, "--json").document
    assert found["device"] == "orin-nano-8gb"
    assert [plan["model"] for plan in found["plans"]] == ["gta-1b", "gqa-1b"]
    assert all(set(plan) >= KEYS for plan in found["plans"])


def test_operators_are_shown(command: Command) -> None:
    found = command("plan", "gta-1b", *BOARD, "--operators").out
    for name in ("q_proj", "attention", "v_b_proj", "mlp.down_proj", "lm_head"):
        assert len(re.findall(rf"^{re.escape(name)} .* (bandwidth|compute)$", found, re.MULTILINE)) == 2, name


@pytest.mark.parametrize("answers", [(), ("--prompt", 20000, "--n", 4)], ids=["", "answers"])
def test_what_does_not_fit_says_what_would(command: Command, answers: tuple[str | int, ...]) -> None:
    options = ("gta-1b", "--device", "orin-nano-4gb", "--context", 32768, *answers)
    found = command("plan", *options)
    assert found.status == 0
    assert re.search(r"^result +does not fit, [\d.]+ GB missing$", found.out, re.MULTILINE)
    (ways,) = re.findall(r"^To make it fit:\n((?:  --.*\n)+)", found.out, re.MULTILINE)
    for way in ways.splitlines():
        assert command("plan", *options, *way.split(), "--json").document["fits"] is True, way


def test_the_build_says_which_length_it_has_room_for(command: Command) -> None:
    options = ("gta-1b", *BOARD, "--precision", "int4", "--json")
    found = command("plan", *options, "--context", 32768).document
    assert found["build_fits"] is False
    longest = found["build_max_length"]
    assert command("plan", *options, "--context", longest).document["build_fits"] is True
    assert command("plan", *options, "--context", longest + 1).document["build_fits"] is False


def test_this_machine_is_measured(command: Command) -> None:
    found = command("plan", "gta1-160m", "--device", "this-cpu", "--json").document
    assert (found["device"], found["backend"], found["cache_dtype"]) == ("this-cpu", "onnxruntime", "fp32")
    assert found["build_peak_bytes"] is None
    assert found["bandwidth_bytes_per_s"] > 0


def test_efficiency_is_taken(command: Command) -> None:
    times = [
        command("plan", "gta-1b", *BOARD, "--efficiency", value, "--json").document["decode_ms"] for value in (0.4, 0.8)
    ]
    assert times[0] == pytest.approx(2 * times[1])


# --- a drawing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "start"), [("plan.png", b"\x89PNG"), ("plan.svg", b"<?xml")])
def test_a_drawing(name: str, start: bytes, command: Command, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = command("plan", "gta-1b", *BOARD, "--plot", tmp_path / name)
    assert found.status == 0
    assert (tmp_path / name).read_bytes().startswith(start)
    assert found.err == f"drawn: {tmp_path / name}\n"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_drawing_without_matplotlib(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['matplotlib'] = None; sys.argv[0] = 'gta-edge'; from gta_edge.cli import main; main()"
    )
    words = [sys.executable, "-c", script, "plan", "gta-1b", *BOARD, "--plot", tmp_path / "plan.png"]
    process = subprocess.run(words, capture_output=True, text=True, check=False, env=environment())
    found = Result(process.returncode, process.stdout, process.stderr)
    assert install_command("plot") in found.error
    assert list(tmp_path.iterdir()) == []


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gta-1b", *BOARD, "--context", "0"], "--context is 0; gta-1b has positions for 1 to 32768"),
        (["gta-1b", *BOARD, "--batch", "0"], "--batch is 0; expected 1 to 256"),
        (["no/such/path", *BOARD], "no/such/path is neither a directory nor a preset; presets are gta1-160m,"),
        (["gta-1b", "gta-2b", *BOARD], "gta-2b is neither"),
        (["gta-1b", *BOARD, "--block-size", "32"], "precision is bf16, which has no blocks"),
        (["gqa-1b", *BOARD, "--cache-dtype", "fp16"], "a cache of fp16 is not possible for LlamaForCausalLM"),
        (["gta-1b", *BOARD, "--efficiency", "0"], "--efficiency is 0.0; expected a number above 0"),
        (["gta-1b", *BOARD, "--efficiency", "nan"], "--efficiency is nan"),
        (["gta-1b", *BOARD, "--prompt", "5000"], "--prompt is 5000; expected 1 to the context, 4096"),
        (["gta-1b", *BOARD, "--plot", "no/such/plan.png"], "no/such/plan.png: its directory does not exist"),
        (["gta-1b", *BOARD, "--plot", "plan.docx"], "plan.docx: expected a name that ends in .png, .svg, .pdf"),
    ],
)
def test_one_clear_line(arguments: list[str], message: str, command: Command) -> None:
    assert message in command("plan", *arguments).error


def test_a_directory_that_is_nothing(command: Command, tmp_path: Path) -> None:
    assert "config.json" in command("plan", tmp_path, *BOARD).error


def test_a_damaged_bundle(command: Command, copied_bundle: Path) -> None:
    (copied_bundle / "config.json").write_text("{}")
    assert "config.json" in command("plan", copied_bundle, *BOARD).error


def test_no_model_is_wrong_usage(command: Command) -> None:
    assert "PRESET_OR_PATH" in command("plan").usage


def test_names_of_what_there_is_not_are_wrong_usage(command: Command) -> None:
    assert (
        "no device is called 'jetson'; there are orin-nano-4gb,"
        in command("plan", "gta-1b", "--device", "jetson").usage
    )
    assert "'fp32'" in command("plan", "gta-1b", *BOARD, "--precision", "int3").usage


def test_nothing_heavy_is_loaded() -> None:
    script = (
        "import sys, json; sys.argv = ['gta-edge', 'plan', 'gta-1b', '--device', 'h100', '--quiet']\n"
        "from gta_edge.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(json.dumps(list(sys.modules)))"
    )
    process = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment()
    )
    loaded = set(json.loads(process.stdout.splitlines()[-1]))
    assert loaded & {"torch", "onnx", "onnx_ir", "onnxruntime", "matplotlib", "cuda", "tensorrt"} == set()


def test_a_long_context_in_4_bits(command: Command) -> None:
    """A preset has as many positions as are asked for, as ``init --max-length`` makes it; a cache has whole blocks."""
    words = ["plan", "gta-1b", *BOARD, "--precision", "int4", "--json"]
    found = command(*words, "--context", 131072, "--cache-dtype", "int4").document
    opened = 32 * 54 * (64 + 128) * 2  # keys and latents as they are
    assert (found["cache_dtype"], found["fits"]) == ("int4", True)
    assert (
        found["cache_bytes"]
        == 131072 * 5832 + opened
        == command(*words, "--context", 131041, "--cache-dtype", "int4").document["cache_bytes"]
    )
    wide = command(*words, "--context", 131072).document
    assert wide["cache_bytes"] == 131072 * 20736
    assert found["decode_ms"] < 0.6 * wide["decode_ms"]
