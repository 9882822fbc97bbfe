"""Sessions whose cache a policy manages, against models in float64 whose rows lie in a list (``managed_model``)."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from gta_edge.runtime.cache_policies import policy
from gta_edge.runtime.session import Session
from tests.helpers import reference
from tests.helpers.managed_model import ManagedModel
from tests.helpers.managed_sessions import BACKENDS, MODELS, open_session, prompt, weights_of

TOLERANCE = 1e-4

POLICIES = {
    "window": {"rows": 20, "sinks": 2},
    "window, merged": {"rows": 20, "sinks": 2, "residual_rows": 2},
    "h2o": {"rows": 20},
    "tova": {"rows": 20},
    "snapkv": {"rows": 20, "window": 6},
    "corm": {"window": 8},
    "zsmerge": {"rows": 20},
    "zsmerge, merged twice": {"rows": 20, "residual_rows": 3},
    "pyramid": {"rows": 20, "sinks": 1},
}


def make(name: str, **changes: Any) -> Any:
    return policy(name.partition(",")[0], **{"interval": 5, **POLICIES[name], **changes})


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def start(backend: str, model: str) -> Iterator[Callable[..., Session]]:
    """Start a session of the backend and model at hand."""
    started: list[Session] = []

    def begin(**options: Any) -> Session:
        started.append(open_session(backend, model, **options))
        return started[-1]

    yield begin
    for session in started:
        session.close()


# --- logits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_logits_are_those_of_the_formula(start: Callable[..., Session], model: str, name: str) -> None:
    """A prompt in chunks, single tokens, a second prompt, and single tokens again."""
    session, exact = (
        start(cache=make(name), chunk_size=24),
        ManagedModel(MODELS[model], weights_of(model), make(name), 24),
    )
    ids, place = prompt(1, 100), 0
    for count in (60, *[1] * 13, 18, 3, *[1] * 6):
        part = ids[:, place : place + count]
        found, expected = session.forward(part, all_logits=True)[0], exact.forward(part[0])
        assert np.abs(found - expected).max() <= TOLERANCE * expected.std()
        place += count
        assert session.rows[:, 0].tolist() == [len(rows) for rows in exact.layers]
    assert place == 100
    assert session.length.tolist() == [100]
    assert reference.relative_error(found, expected) <= TOLERANCE
