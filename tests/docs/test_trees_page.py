"""What ``docs/trees.md`` says is read of the cache, from the models' sizes and the kernels' tiles."""

import re
from pathlib import Path

import pytest

from gta_edge.model.kv_cache import TREES, bytes_per_token
from gta_edge.model.presets import preset
from gta_edge.plugins.attention.launches import choose_decode, programs_for
from gta_edge.plugins.attention.tiling import Variant, row_blocks

PAGE = Path(__file__).parents[2] / "docs" / "trees.md"
BRANCHES, TOKENS = 20, 400
OTHERS = {"Llama-3.1-8B": 32 * 32 * 2 * 128 * 2}
"""Layers, query heads, keys and values, their width, bytes."""


def table() -> list[list[str]]:
    numbers = [r"([\d,]+)"] * 2 + [r"([\d,.]+) GB"] * 2 + [r"([\d.]+)"]
    line = r" \| ".join([r"^\| (\S+)", *numbers])
    rows = re.findall(line, PAGE.read_text(), re.MULTILINE)
    return [[cell.replace(",", "") for cell in row] for row in rows]


@pytest.mark.parametrize("row", table(), ids=lambda row: row[0])
def test_the_figures_are_those_of_the_sizes(row: list[str]) -> None:
    model, prompt, width, alone, together, ratio = row
    size = OTHERS.get(model) or bytes_per_token(preset(model.lower()), "bf16")
    assert int(width) == size
    steps = range(1, TOKENS + 1)
    apart = sum(BRANCHES * (int(prompt) + step) for step in steps) * size
    once = sum(int(prompt) + BRANCHES * step for step in steps) * size
    assert (alone, together) == (f"{apart / 1e9:.1f}", f"{once / 1e9:.1f}")
    assert ratio == f"{apart / once:.1f}"


def test_there_is_a_line_for_each_model() -> None:
    assert [row[0] for row in table()] == ["GTA-1B", "GQA-1B", "Llama-3.1-8B"]


@pytest.mark.parametrize(("model", "tokens"), [("gta-1b", 25), ("gqa-1b", 32)])
@pytest.mark.parametrize("architecture", ["sm_87", "sm_90"])
def test_so_many_new_tokens_read_the_cache_once(model: str, tokens: int, architecture: str) -> None:
    programs = programs_for(Variant(preset(model).attention, "bf16", "bf16", TREES), architecture)
    blocks = [row_blocks(choose_decode(programs.decodes, count), count) for count in (BRANCHES, tokens, tokens + 1)]
    assert blocks == [1, 1, 2]
    assert f"up to {tokens} new tokens in" in PAGE.read_text() or f"{tokens} in GQA-1B" in PAGE.read_text()
