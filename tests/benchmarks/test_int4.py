"""The benchmark of the quantised matmuls, as far as it goes without a GPU: what it counts, its tables, its errors."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gta_edge.errors import InputError
from gta_edge.model.config import GTAConfig
from gta_edge.model.presets import PRESETS, preset
from tests.helpers.benchmarks import BENCHMARKS, GPU


@pytest.fixture
def int4(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("int4")


def test_the_products_of_gta_1b(int4):
    found = [(each.in_features, each.output_sizes, each.count) for each in int4.matmuls(preset("gta-1b"))]
    assert found == [
        (1280, (320, 64, 128, 1280), 54),
        (1280, (1280,), 54),
        (1280, (3584, 3584), 54),
        (3584, (1280,), 54),
        (1280, (128256,), 1),
    ]


@pytest.mark.parametrize("name", PRESETS)
def test_the_products_are_the_models_matrices(int4, name):
    """All parameters but the norms, the value decoders and, where it is not the head's, the embedding."""
    config = preset(name)
    counted = sum(each.count * each.in_features * each.out_features for each in int4.matmuls(config))
    shapes = config.parameter_shapes()
    others = sum(math.prod(shape) for shape in shapes.values() if len(shape) == 1)
    if isinstance(config, GTAConfig):
        others += config.num_hidden_layers * math.prod(config.value_decoder_shape)
    untied = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    assert counted == config.parameters - others - untied


def test_the_bytes_of_a_matrix(int4):
    matmul = int4.MatMul("", 1280, (1280,), 1)
    sizes = {key: contender.weight_bytes(matmul) for key, contender in int4.CONTENDERS.items()}
    values = 1280 * 1280
    assert sizes == {
        "int4": values // 2 + 2 * values // 32,
        "int8": values + 2 * 1280,
        "fp16": 2 * values,
        "torch-int4": values // 2 + 4 * values // 32,
    }
    assert int4.traffic_bytes("int8", matmul, 3) == sizes["int8"] + 2 * 3 * (1280 + 1280)
    assert matmul.flops(3) == 2 * 3 * values


def test_ratios_are_taken_within_a_round(int4):
    found = int4.ratios({"int4": [1.0, 2.0], "int8": [2.0, 2.0], "fp16": [4.0, 8.0]})
    assert found["int4"] == {"fp16": {"median": 4, "min": 4, "max": 4}}
    assert found["int8"] == {"fp16": {"median": 3, "min": 2, "max": 4}}


@pytest.fixture
def document(int4: ModuleType) -> dict[str, Any]:
    times = {"int4": [1e-5, 2e-5, 3e-5], "int8": [2e-5] * 3, "fp16": [4e-5, 8e-5, 12e-5]}
    contenders: dict[str, Any] = {
        key: {"bytes": 1_000_000, "time_s": int4.spread(values), "copy_fraction": 0.5} for key, values in times.items()
    }
    contenders["torch-int4"] = {"bytes": 1, "failed": "no such thing"}
    row = {
        "model": "gta-1b",
        "matmul": "down",
        "rows": 1,
        "flops": 2e7,
        "contenders": contenders,
        "ratios": int4.ratios(times),
    }
    return {
        "command": "python benchmarks/int4.py",
        "date": "2026-01-02T03:04:05+00:00",
        "models": ["gta-1b"],
        "gpu": GPU,
        "versions": {"torch": "1.2"},
        "rounds": 3,
        "matmuls": [row],
    }


def test_the_page_has_every_figure(int4, document, capsys):
    page = int4.markdown(document)
    assert "| down | 54 | 3584 | 1280 | 9.2 | 2.58 | 4.59 | 9.18 |" in page
    assert "| gta-1b | down | 1 | gta-edge int4, blocks of 32 | 20.0 (10.0..30.0) | 1.00 | 0.50 | 1.00 |" in page
    assert "| gta-1b | down | 1 | torch int4, blocks of 32 | n/a | n/a | n/a | n/a |" in page
    assert "| gta-1b | down | 1 | gta-edge int4, blocks of 32 | 4.00 (4.00..4.00) | n/a |" in page
    assert "torch int4, blocks of 32, gta-1b, down, 1 rows: no such thing" in page
    for block in page.split("\n\n"):
        lines = block.splitlines()
        if lines[0].startswith("|"):
            assert len({line.count("|") for line in lines}) == 1
    int4.show(document)
    assert "20.0 (10.0..30.0)" in capsys.readouterr().out


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "int4.py"), *arguments]
    environment = {"PATH": "", "CUDA_VISIBLE_DEVICES": ""}  # no GPU, also where there is one
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    done = call("--json", str(tmp_path / "result.json"))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "GPU" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_directory_that_is_not_there_is_refused_in_one_line() -> None:
    done = call("--markdown", "nowhere/page.md")
    assert done.returncode == 1
    assert done.stderr.startswith("error: nowhere/page.md cannot be written")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--rows", "1,x"], "--rows got '1,x'; expected numbers from 1 on"),
        (["--rows", "0"], "--rows got '0'"),
        (["--rounds", "3,4"], "--rounds got '3,4'; expected one number"),
        (["--models", "gta-1b,gta-9b"], "--models got 'gta-9b'; expected some of gta1-160m"),
        (["--products", "up"], "--products got 'up'; expected some of attention-in"),
    ],
)
def test_options_that_cannot_be_are_refused(int4, arguments, expected):
    with pytest.raises(InputError) as caught:
        int4.parse(arguments)
    assert str(caught.value).startswith(expected)


def test_what_is_measured_can_be_chosen(int4):
    options = int4.parse(
        ["--models", "gta1-160m,gqa-1b", "--products", "down,step", "--rows", "1,512", "--rounds", "2"]
    )
    assert (options.models, options.products) == (("gta1-160m", "gqa-1b"), ("down", "step"))
    assert (options.rows, options.rounds) == ((1, 512), 2)
    assert int4.parse([]).rounds == int4.ROUNDS
    assert int4.parse(["--quick"]).rounds == int4.QUICK_ROUNDS


def test_every_matmul_has_a_name_on_the_command_line(int4):
    for name in PRESETS:
        assert {each.name for each in int4.matmuls(preset(name))} < set(int4.PRODUCTS.values())


def test_each_row_is_written_when_it_is_there(int4, tmp_path, monkeypatch):
    """Times are made up; the third row ends the run, as a hang or a kill would."""
    written = []

    def row(matmul, number, place, rounds):
        written.append(json.loads(path.read_text()) if path.exists() else {"matmuls": []})
        if len(written) == 3:
            raise KeyboardInterrupt
        return {"matmul": matmul.name, "rows": number, "contenders": {}}

    path = tmp_path / "rows.json"
    for name, stand_in in {"gpu": lambda: dict(GPU), "rates": lambda quick: {}, "measure_matmul": row}.items():
        monkeypatch.setattr(int4, name, stand_in)
    for contender in int4.CONTENDERS.values():
        monkeypatch.setattr(contender, "check", lambda *arguments: None, raising=False)
    with pytest.raises(KeyboardInterrupt):
        int4.run(int4.parse(["--json", str(path), "--products", "down,head", "--rows", "1,8"]))
    assert [[(row["model"], row["matmul"], row["rows"]) for row in each["matmuls"]] for each in written] == [
        [],
        [("gta-1b", "down", 1)],
        [("gta-1b", "down", 1), ("gta-1b", "head", 1)],
    ]
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
