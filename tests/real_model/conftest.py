"""Bundles of the real model."""

from pathlib import Path

import numpy as np
import pytest

from gta_edge.export.pipeline import export_model
from gta_edge.formats.tokenizer import Tokenizer
from tests.helpers.real_model import CHAT


@pytest.fixture(scope="session")
def tokenizer(smollm2: Path) -> Tokenizer:
    tokenizer = Tokenizer.load(smollm2)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="session")
def chat_ids(tokenizer: Tokenizer) -> np.ndarray:
    """Ids [1, T] of a question in the model's chat format."""
    return np.array([tokenizer.encode(tokenizer.apply_chat_template(CHAT), add_special_tokens=False)])


@pytest.fixture(scope="session")
def fp32_bundle(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle(smollm2, tmp_path_factory, "fp32")


@pytest.fixture(scope="session")
def int4_bundle(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle(smollm2, tmp_path_factory, "int4")


def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, precision: str) -> Path:
    directory = tmp_path_factory.mktemp("smollm2") / precision
    # test_check.py checks one; calibrating takes minutes, and has tests of its own
    export_model(checkpoint, directory, precision=precision, calibrate="none", verify=False)
    return directory
