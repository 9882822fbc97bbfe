"""A session of each backend over a small model."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from gta_edge.runtime.session import Session
from tests.helpers.sessions import MODELS, SESSIONS, open_session


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=SESSIONS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def start(backend: str, model: str) -> Iterator[Callable[..., Session]]:
    """Start a session of the backend and model at hand; options as ``Session`` takes them."""
    started: list[Session] = []

    def begin(**options: Any) -> Session:
        session = open_session(backend, model, **options)
        started.append(session)
        return session

    yield begin
    for session in started:
        session.close()


@pytest.fixture
def session(start: Callable[..., Session]) -> Session:
    return start()


@pytest.fixture(autouse=True)
def warn_each_time() -> Iterator[None]:
    """Without this, torch gives most warnings once in a process, and only the first test would fail on one."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(before)
