"""What takes more memory than there is, or more threads than could be of use, is refused before it starts."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gta_edge.errors import CapacityError, InputError
from gta_edge.evaluate.bench import settings as bench_settings
from gta_edge.runtime import cache_state
from gta_edge.runtime.registry import load
from tests.helpers.commands import Result

BACKENDS = ["onnxruntime", "torch"]


def ids(batch: int, tokens: int) -> np.ndarray:
    return np.ones((batch, tokens), np.int64)


@pytest.fixture
def leaves(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Call it with the bytes that the system has left."""
    return lambda size: monkeypatch.setattr(cache_state, "available_bytes", lambda: size)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cache_grows_only_where_there_is_room(
    tiny_bundle: Path, leaves: Callable[[int | None], None], backend: str
) -> None:
    pytest.importorskip(backend)
    with load(tiny_bundle, backend) as session:
        if session.compute != "fp32":
            pytest.skip("its cache is the GPU's")
        leaves(20_000)
        with pytest.raises(
            CapacityError, match=r"^1 rows of 4 tokens take 0\.00 GB more of memory than the session has"
        ):
            session.forward(ids(1, 4))
        leaves(2_000_000)
        before = session.forward(ids(1, 4))
        held = session.cache_bytes
        leaves(20_000)
        with pytest.raises(CapacityError) as caught:
            session.forward(ids(1, 100))
        assert str(caught.value).endswith("available; give fewer rows or shorter prompts, or close other programs")
        # nothing has changed, and what fits goes on
        assert (session.length.tolist(), session.cache_bytes) == ([4], held)
        session.truncate(0)
        np.testing.assert_allclose(session.forward(ids(1, 4)), before, rtol=1e-5, atol=1e-6)
        session.reset()
        with pytest.raises(CapacityError, match=r"^50 rows of 100 tokens take 0\.\d\d GB more"):
            session.forward(ids(50, 100))
        leaves(None)  # a system that does not say
        assert session.forward(ids(50, 100)).shape == (50, 300)


def test_logits_of_all_positions_count(tiny_bundle: Path, leaves: Callable[[int | None], None]) -> None:
    pytest.importorskip("onnxruntime")
    with load(tiny_bundle, "onnxruntime") as session:
        session.forward(ids(200, 120))
        session.reset()
        leaves(20_000_000)
        assert session.forward(ids(200, 120)).shape == (200, 300)
        session.reset()
        with pytest.raises(CapacityError, match=r"^200 rows of 120 tokens take 0\.03 GB more"):  # 200 x 120 x 300 x 4
            session.forward(ids(200, 120), all_logits=True)


def test_a_step_in_the_room_that_is_there_asks_nobody(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    with load(tiny_bundle, "onnxruntime") as session:
        session.forward(ids(1, 4))

        def ask() -> int:
            raise AssertionError("a token costs less than that")

        monkeypatch.setattr(cache_state, "available_bytes", ask)
        session.forward(ids(1, 1))


@pytest.mark.parametrize("arguments", ["generate {} --ids 1", "eval {} --text {}/config.json", "bench {} --contexts 4"])
def test_threads_that_could_be_of_no_use(command: Callable[..., Result], tiny_bundle: Path, arguments: str) -> None:
    words = [*(word.format(tiny_bundle) for word in arguments.split()), "--threads", "100000"]
    message = command(*words).error
    assert message.startswith(f"100000 threads were asked for, and of the machine's {os.cpu_count()} cores ")


def test_threads_are_checked_for_whoever_ignores_them(tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match="100000 threads were asked for"):
        load(tiny_bundle, "tensorrt", threads=100_000)


@pytest.mark.parametrize("batch", [10**7, 10**12])
def test_a_batch_that_no_machine_holds(command: Callable[..., Result], tiny_bundle: Path, batch: int) -> None:
    message = command("bench", tiny_bundle, "--contexts", 64, "--batch", batch).error
    assert message.startswith(f"--batch {batch} with a context of 64 takes ")
    assert "GB at the least beside the weights of " in message


def test_a_batch_that_the_memory_left_does_not_hold(
    command: Callable[..., Result], tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_settings, "available_bytes", lambda: 10_000_000)
    message = command("bench", tiny_bundle, "--contexts", 64, "--batch", 1000).error
    assert message.endswith("and 0.01 GB are free; give a smaller --batch or --contexts")
