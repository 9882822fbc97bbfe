"""A session that texts of a batch are generated with."""

from pathlib import Path

import pytest

from gta_edge.runtime.torch.session import TorchSession
from tests.helpers.batches import new_talker


@pytest.fixture
def talker(tmp_path: Path) -> TorchSession:
    return new_talker(tmp_path)
