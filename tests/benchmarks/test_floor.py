"""The floor counts what a token reads, and nothing else."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from gta_edge.formats.bundle import WEIGHTS, Bundle
from gta_edge.model.config import ModelConfig
from tests.helpers.tiny import TINY

FILE_BYTES = 1_000_000


def bundle(precision: str, config: ModelConfig = TINY, block_size: int | None = None) -> Bundle:
    return Bundle(Path(), config, precision, {"files": {WEIGHTS: {"bytes": FILE_BYTES}}, "block_size": block_size})


@pytest.fixture
def floor(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("floor")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_floats_are_read_as_float32(floor: ModuleType, precision: str) -> None:
    assert floor.token_bytes(bundle(precision)) == 4 * TINY.parameters


def test_an_embedding_table_of_its_own_is_not_read(floor: ModuleType) -> None:
    untied = TINY.replace(tie_word_embeddings=False)
    assert untied.parameters == TINY.parameters + TINY.vocab_size * TINY.hidden_size
    assert floor.token_bytes(bundle("bf16", untied)) == 4 * TINY.parameters


ROPE_BYTES = 4 * TINY.max_position_embeddings * TINY.key_width
VALUES = TINY.vocab_size * TINY.hidden_size


@pytest.mark.parametrize("tied", [True, False])
def test_int8_reads_the_file_without_its_tables(floor: ModuleType, tied: bool) -> None:
    embedding = 0 if tied else VALUES + 2 * TINY.vocab_size  # a tied table lies once
    config = TINY.replace(tie_word_embeddings=tied)
    assert floor.token_bytes(bundle("int8", config)) == FILE_BYTES - ROPE_BYTES - embedding


@pytest.mark.parametrize("tied", [True, False])
def test_int4_reads_the_file_without_its_tables(floor: ModuleType, tied: bool) -> None:
    embedding = VALUES // 2 + (0 if tied else 2 * VALUES // 32)
    config = TINY.replace(tie_word_embeddings=tied)
    assert floor.token_bytes(bundle("int4", config, block_size=32)) == FILE_BYTES - ROPE_BYTES - embedding


def test_pytorch_reads_float32_whatever_is_stored(floor: ModuleType) -> None:
    assert floor.token_bytes(bundle("int4", block_size=32), backend="torch") == 4 * TINY.parameters


def test_the_floor_is_bytes_by_bandwidth(floor: ModuleType) -> None:
    assert floor.floor_ms(3e9, 1e9, 8e9) == 500
