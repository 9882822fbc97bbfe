"""A session over a small model, of each backend, which a policy manages."""

from collections.abc import Iterator

import pytest

from gta_edge.runtime.session import Session
from tests.helpers.managed_sessions import BACKENDS, MODELS, Start, open_session


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def start(backend: str, model: str) -> Iterator[Start]:
    """Start a session of the backend and model at hand."""
    started: list[Session] = []

    def begin(**options: object) -> Session:
        started.append(open_session(backend, model, **options))
        return started[-1]

    yield begin
    for session in started:
        session.close()
