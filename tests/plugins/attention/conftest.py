"""Fixtures of the attention's plugin; what needs TensorRT is loaded where one is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from gta_edge import plugins
from gta_edge.cuda.gpu import current_gpu
from gta_edge.plugins.attention.kernels import attention_kernels
from gta_edge.plugins.plugin_base import take_failures
from tests.helpers.fake_cuda import FakeCuda


@pytest.fixture(scope="module")
def creator() -> Any:
    from tests.helpers.attention_plugins import OP
    from tests.helpers.plugin_values import trt

    plugins.register(trt)
    return trt.get_plugin_registry().get_creator(OP, "1", "gta")


@pytest.fixture
def no_failures() -> Iterator[None]:
    take_failures()
    yield
    take_failures()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """A driver that keeps the launches, and the copies that a plugin makes itself."""
    for each in (current_gpu, attention_kernels):
        each.cache_clear()
    fake = FakeCuda().install(monkeypatch)
    yield fake
    for each in (current_gpu, attention_kernels):
        each.cache_clear()
