"""Bundles before and after a session has cached its graph in them."""

import shutil
from pathlib import Path

import pytest

from gta_edge.runtime.registry import load


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that no session has seen; not to be changed."""
    from tests.helpers.small_models import write_bundle  # and with it torch, which not every test needs

    return write_bundle(tmp_path_factory.mktemp("prepared") / "bundle", "more keys", "int4")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with other weights; not to be changed."""
    from tests.helpers.small_models import write_bundle

    return write_bundle(tmp_path_factory.mktemp("other") / "bundle", "more keys", "int4", seed=1)


@pytest.fixture
def bundle(pristine: Path, tmp_path: Path) -> Path:
    """A copy that no session has seen, to do anything to."""
    return shutil.copytree(pristine, tmp_path / "bundle")


@pytest.fixture(scope="module")
def lowered_once(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy in which a session has kept its graph; not to be changed."""
    directory = shutil.copytree(pristine, tmp_path_factory.mktemp("kept") / "bundle")
    load(directory, "onnxruntime").close()
    return directory


@pytest.fixture
def kept(lowered_once: Path, tmp_path: Path) -> Path:
    """A copy in which a session has kept its graph, times of files included, to do anything to."""
    return shutil.copytree(lowered_once, tmp_path / "kept")
