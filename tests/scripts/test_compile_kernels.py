"""Kernels that are compiled ahead of time are those that the package looks for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gta_edge.cuda import compiler
from gta_edge.model.config import GTAConfig
from gta_edge.model.presets import PRESETS, preset
from gta_edge.plugins.attention.definition import Sizes
from gta_edge.plugins.attention.launches import programs_for
from gta_edge.plugins.attention.tiling import Variant
from gta_edge.plugins.domain import KERNELS
from scripts import compile_kernels
from tests.helpers.nvrtc import needs_nvrtc

ROOT = Path(__file__).parents[2]
FEW = ("--models", "gta-1b", "--ops", "attention", "--compute", "bf16", "--cache-dtypes", "int8")


def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/compile_kernels.py", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


@needs_nvrtc
def test_the_package_finds_what_was_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = call("sm_87", *FEW, "--output", str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    *lines, last = done.stdout.splitlines()
    assert [line.split(",")[0] for line in lines] == ["1/3 decode.cu", "2/3 prefill.cu", "3/3 prefill.cu"]
    assert all("compute bf16, cache int8" in line for line in lines)
    assert last == f"3 programs for sm_87 in {tmp_path}/kernels, 3 of them new"

    def compiles(*arguments: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setenv("GTA_EDGE_CACHE", str(tmp_path))
    monkeypatch.setattr(compiler, "_compile", compiles)
    for program in programs_for(Variant(Sizes(5, 1, 1, 64, 128, 1280), "bf16", "int8"), "sm_87").all:
        assert compiler.compile_program(program, "sm_87", KERNELS).cubin.startswith(b"\x7fELF")
    again = call("sm_87", *FEW, GTA_EDGE_CACHE=str(tmp_path))
    assert again.stdout.splitlines()[-1].endswith("3 programs for sm_87 in " + str(tmp_path / "kernels, 0 of them new"))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_s_attention_is_compiled(name: str) -> None:
    options = compile_kernels._parser().parse_args(["sm_87", "--models", name, "--ops", "attention"])
    programs = list(compile_kernels._programs(options))
    assert len(programs) == 6 * 3  # types of the computation and the cache; decode, two tiles for prompts
    assert len(set(programs)) == len(programs)
    config = preset(name)
    widths = {(each.variant.sizes.key_dim, each.variant.sizes.latent_dim) for each in programs}
    assert widths == {tuple(cache.width for cache in config.caches)}
    assert {each.variant.sizes.has_value_decoder for each in programs} == {isinstance(config, GTAConfig)}


@needs_nvrtc
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["sm_12"], "NVRTC .* does not compile for sm_12"),
        (["sm_87", "--models", "gta-9b"], "gta-9b is neither a directory nor a preset; presets are "),
        (["sm_87", "--ops", "attention,softmax"], "--ops got 'softmax'; expected some of attention, matmul"),
        (["sm_87", "--cache-dtypes", "int2"], "--cache-dtypes got 'int2'"),
        (["sm_87", "--output", "/proc/nowhere"], "/proc/nowhere/kernels cannot be made"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments: list[str], expected: str, tmp_path: Path) -> None:
    done = call(*arguments, GTA_EDGE_CACHE=str(tmp_path / "cache"))
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert re.search(expected, line)
