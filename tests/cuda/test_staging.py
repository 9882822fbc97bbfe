"""Copies through a small buffer: arrays of any length, at any place, come back as they were."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("cuda.bindings.driver", reason="the package cuda-bindings is needed")

from gta_edge.cuda.session import Cuda
from gta_edge.cuda.staging import Staging
from tests.helpers.tensorrt_simulator import Driver, simulated


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(0, 90), max_size=9), size=st.sampled_from([1, 16, 40, 64, 4096]))
def test_what_was_written_is_read(lengths: list[int], size: int) -> None:
    rng = np.random.default_rng(len(lengths))
    arrays = [rng.integers(0, 2**16, n, np.uint16).view(np.float16) for n in lengths]
    places = np.cumsum([0, *(2 * n + 6 for n in lengths)]).tolist()
    driver = Driver()
    with simulated(driver):
        cuda = Cuda(0)
        address = cuda.allocate(places[-1] + 1, "a test")
        staging = Staging(cuda, size)
        parts = [(address + place, array) for place, array in zip(places, arrays, strict=False)]
        staging.write(parts)
        found = [np.empty_like(array) for array in arrays]
        staging.read([(place, array) for (place, _), array in zip(parts, found, strict=True)])
        for array, again in zip(arrays, found, strict=True):
            np.testing.assert_array_equal(again.view(np.uint16), array.view(np.uint16))
        pinned = driver.used_bytes("pinned")
        cuda.close()
    assert pinned == (size if any(lengths) else 0)
