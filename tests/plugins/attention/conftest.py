"""Fixtures of the attention's plugin; what needs TensorRT is loaded where one is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from gta_edge import plugins
from gta_edge.plugins.plugin_base import take_failures


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
