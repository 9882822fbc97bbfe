"""Small models exported once for the tests of a module, and what their own graphs compute."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from gta_edge.formats.bundle import Bundle
    from tests.helpers.tensorrt_graphs import Bundles, Exact


@pytest.fixture(scope="module", autouse=True)
def _few_logits() -> Iterator[None]:
    """A run gives logits for as few positions as of a model with a large vocabulary: there is room for no more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gta_edge.runtime.tensorrt.build.LOGITS_BYTES", 0)
        yield


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """``bundles("gta, tied", "int4")``; made once, and not to be changed."""
    # with these come torch and ONNX Runtime, which a board need not have
    from gta_edge.export.pipeline import export_model
    from tests.helpers import reference
    from tests.helpers.checkpoints import write_checkpoint
    from tests.helpers.tensorrt_graphs import TABLE

    directory = tmp_path_factory.mktemp("bundles")
    for name, entries in TABLE.items():
        write_checkpoint(directory / name, entries, reference.random_weights(entries))

    @functools.cache
    def bundle(name: str, precision: str) -> Bundle:
        return export_model(
            directory / name, directory / f"{name}, {precision}", precision=precision, verify=False
        ).bundle

    return bundle


@pytest.fixture(scope="module")
def exact(bundles: Bundles) -> Exact:
    """``exact("gta, tied", "int4")`` returns the logits of the bundle's own graph, in float32."""
    from tests.helpers.tensorrt_graphs import logits, on_onnxruntime

    @functools.cache
    def compute(name: str, precision: str) -> np.ndarray:
        return logits(on_onnxruntime(bundles(name, precision).model_path), name, np.float32)

    return compute
