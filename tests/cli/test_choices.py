"""Closed sets: the command line's enums are the package's own names, and the shell completes them."""

from collections.abc import Callable
from enum import Enum
from typing import Any, get_args

import pytest
import typer.main

from gta_edge.cli import choices
from gta_edge.cli.app import app
from gta_edge.machine.devices import device_names
from gta_edge.model.presets import PRESETS
from gta_edge.numerics.dtypes import CACHE_TYPES, CHECKPOINT_DTYPES, FLOAT_TYPES, PRECISIONS
from gta_edge.numerics.quantization import BITS
from gta_edge.runtime.generation.speculating import Speculate
from gta_edge.runtime.registry import BACKENDS
from gta_edge.runtime.tensorrt.engine import CHOICES
from gta_edge.runtime.tensorrt.engine_kind import ENGINES
from tests.helpers.commands import Result, run

Command = Callable[..., Result]


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        (choices.Precision, PRECISIONS),
        (choices.EmbeddingPrecision, BITS),
        (choices.Dtype, CHECKPOINT_DTYPES),
        (choices.Compute, FLOAT_TYPES),
        (choices.CacheDtype, ("fp32", *CACHE_TYPES)),
        (choices.Backend, ("auto", *BACKENDS)),
        (choices.Engine, ENGINES),
        (choices.Matmul, CHOICES),
        (choices.Speculate, get_args(Speculate)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_enums_are_the_packages_names(choice: type[Enum], names: Any) -> None:
    assert sorted(each.value for each in choice) == sorted(names)


def completions(words: str) -> list[str]:
    """What bash is told of the last word."""
    count = len(words.split()) - 1 + words.endswith(" ")
    extra = {"_GTA_EDGE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(count)}
    result = run(extra=extra)
    assert (result.status, result.err) == (0, "")
    return result.out.splitlines()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("gta-edge ex", ["export"]),
        ("gta-edge export --prec", ["--precision"]),
        ("gta-edge export --precision b", ["bf16"]),
        ("gta-edge generate bundle --backend tensorrt", ["tensorrt", "tensorrt-rtx"]),
        ("gta-edge bench bundle --backend torch,onnx", ["torch,onnxruntime-cuda", "torch,onnxruntime"]),
        ("gta-edge plan --device orin-nx", [name for name in device_names() if name.startswith("orin-nx")]),
        ("gta-edge init gqa", [name for name in PRESETS if name.startswith("gqa")]),
    ],
)
def test_the_shell_completes(words: str, expected: list[str]) -> None:
    assert completions(words) == expected


def test_the_group_has_completion_for_shells(command: Command) -> None:
    out = command("--help").out
    assert "--install-completion" in out
    assert "--show-completion" in out
    assert typer.main.get_command(app).name == "gta-edge"
