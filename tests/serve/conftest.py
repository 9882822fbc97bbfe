"""A model that can chat, of random weights, and a service of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.chats import with_chat_template
from tests.helpers.service import Service, running


@pytest.fixture(scope="session")
def chat_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with a chat template; not to be changed."""
    return with_chat_template(tiny_bundle, tmp_path_factory.mktemp("chat") / "bundle")


@pytest.fixture(scope="module")
def service(chat_bundle: Path) -> Iterator[Service]:
    with running(chat_bundle, body_seconds=0.5) as service:
        yield service
