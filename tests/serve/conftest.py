"""A model that can chat, of random weights, and a service of it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.bundle_files import forge, manifest_of, relist
from tests.helpers.service import TEMPLATE, Service, running


@pytest.fixture(scope="session")
def chat_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with a chat template; not to be changed."""
    bundle = tmp_path_factory.mktemp("chat") / "bundle"
    shutil.copytree(tiny_bundle, bundle, ignore=shutil.ignore_patterns("engines"))
    (bundle / "chat_template.jinja").write_text(TEMPLATE)
    forge(bundle, files={**manifest_of(bundle)["files"], "chat_template.jinja": {}})
    relist(bundle)
    return bundle


@pytest.fixture(scope="module")
def service(chat_bundle: Path) -> Iterator[Service]:
    with running(chat_bundle, body_seconds=0.5) as service:
        yield service
