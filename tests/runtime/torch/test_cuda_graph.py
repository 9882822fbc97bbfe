"""The decode step's CUDA graph, as far as it shows without a GPU: what it reads stays where it is."""

import contextlib
import gc
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gta_edge.errors import CapacityError
from gta_edge.model.config import parse_config
from gta_edge.model.decoder import Cache, Decoder
from gta_edge.plugins.attention.definition import Features
from gta_edge.runtime.cache_moves import ManagedStep
from gta_edge.runtime.torch import step_graphs
from gta_edge.runtime.torch.cuda_graph import CHECKED, CaptureError, DecodeGraph, GraphMemory
from gta_edge.runtime.torch.session import TorchSession
from tests.helpers import reference

# As torch's allocator says it on Tegra, where there is no NVML to tell how much memory is free.
TEGRA = (
    'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/opt/pytorch/c10/cuda/CUDACachingAllocator.cpp":995, please report '
    "a bug to PyTorch. "
)
SMALL = reference.gta_entries(vocab_size=31, max_position_embeddings=64)


@pytest.mark.usefixtures("no_gpu")
def test_what_a_graph_reads_lives_as_long_as_the_graph() -> None:
    """A replay reads addresses: a tensor that is freed leaves its memory to the next one of its size."""
    read: dict[str, weakref.ref[torch.Tensor]] = {}

    def model(*inputs: Any) -> tuple[torch.Tensor, Any]:
        for name, tensor in zip(("ids", "past_length", "logit_positions"), inputs[:3], strict=True):
            read[name] = weakref.ref(tensor)
        return torch.ones(1, 1, 8), inputs[3]

    graph = DecodeGraph(model, [Cache(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4))], 1)
    gc.collect()
    assert {name: tensor() is not None for name, tensor in read.items()} == dict.fromkeys(read, True)
    assert len(read) == 3
    del graph
    gc.collect()
    assert {name: tensor() is None for name, tensor in read.items()} == dict.fromkeys(read, True)  # it would be seen


# --- a check of that at every replay ---------------------------------------------------------------------------------


def cache() -> Cache:
    return Cache(torch.full((1, 1, 4, 4), 3.0), torch.full((1, 1, 4, 4), 5.0))


def step(*inputs: Any) -> tuple[torch.Tensor, Any]:
    """What a model does: it writes to its caches, at position 0 here."""
    for layer in inputs[3]:
        layer.key[:, :, :1] = 7.0
        layer.latent[:, :, :1] = 7.0
    return torch.ones(1, 1, 8), inputs[3]


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("asked", ["1", "0", None])
@pytest.mark.parametrize("known", [True, False], ids=["torch 2.13", "torch 2.12"])
def test_torch_checks_what_a_graph_reads_where_it_is_asked_to(
    asked: str | None, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each token it walks over all parameters, so not by itself; and before 2.13 it cannot."""
    given: dict[str, Any] = {}

    class Newer:
        def __init__(
            self, graph: Any, stream: Any, pool: Any, capture_error_mode: str, check_input_liveness: bool = False
        ) -> None:
            given.update(check_input_liveness=check_input_liveness)

        def __enter__(self) -> None: ...

        def __exit__(self, *error: Any) -> None: ...

    if known:
        monkeypatch.setattr(torch.cuda, "graph", Newer)
    monkeypatch.delenv(CHECKED, raising=False)
    if asked is not None:
        monkeypatch.setenv(CHECKED, asked)
    DecodeGraph(step, [cache()], 1)
    assert given == ({"check_input_liveness": asked == "1"} if known else {})


# --- steps that cannot be captured -----------------------------------------------------------------------------------


def fails_in_the_capture(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def graph(*arguments: Any, **options: Any) -> Any:
        yield
        raise error

    monkeypatch.setattr(torch.cuda, "graph", graph)


@pytest.mark.usefixtures("no_gpu")
def test_a_step_that_cannot_be_captured_leaves_the_caches_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    fails_in_the_capture(RuntimeError("CUDA error: operation not permitted\n when stream is capturing"), monkeypatch)
    caches = [cache(), cache()]
    with pytest.raises(
        CaptureError, match=r"cannot be captured as a CUDA graph .CUDA error: operation not permitted w"
    ):
        DecodeGraph(step, caches, 1)
    for layer in caches:
        assert (layer.key == 3.0).all()
        assert (layer.latent == 5.0).all()


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(TEGRA)])
def test_want_of_memory_is_not_taken_for_a_refusal(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    fails_in_the_capture(error, monkeypatch)
    with pytest.raises(RuntimeError) as caught:
        DecodeGraph(step, [cache()], 1)
    assert caught.value is error


@pytest.mark.usefixtures("no_gpu")
def test_a_step_that_does_not_run_is_no_refusal_either() -> None:
    def broken(*inputs: Any) -> Any:
        raise RuntimeError("CUDA error: device-side assert triggered")

    with pytest.raises(RuntimeError, match="device-side assert"):
        DecodeGraph(broken, [cache()], 1)


@pytest.fixture
def session(no_gpu: None) -> Any:
    """On the CPU, taken for a GPU: every single token asks for a graph."""
    torch.manual_seed(0)
    with TorchSession(Decoder(parse_config(SMALL))) as made:
        made.device, made.graph_refused = "gpu", None
        yield made


def test_such_a_step_runs_uncaptured(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def refuses(*arguments: Any, **options: Any) -> None:
        tries.append(options["tokens"])
        raise CaptureError("the step cannot be captured as a CUDA graph (as a test)", "run it as it is")

    monkeypatch.setattr(step_graphs, "DecodeGraph", refuses)
    assert session.cuda_graph is None
    whole = session.forward([[3, 5, 7, 9]], all_logits=True)[0]
    session.truncate(1)
    for t, token in enumerate([5, 7, 9], start=1):
        torch.testing.assert_close(session.forward([[token]])[0], whole[t], rtol=1e-4, atol=1e-5)
        assert session.cuda_graph is False
    assert session.graph_refused == "the step cannot be captured as a CUDA graph (as a test)"
    assert tries == [4, 1]  # not at every token again


# --- no memory left --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried…"), RuntimeError(TEGRA)])
@pytest.mark.parametrize("where", ["step_graphs.DecodeGraph", "session.empty_cache"])
def test_want_of_memory_is_a_capacity_error(
    error: Exception, where: str, session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(f"gta_edge.runtime.torch.{where}", fails)
    with pytest.raises(CapacityError, match=r"too little memory left|has not that much left"):
        session.forward([[3]])


def test_another_failure_of_the_allocator_stays_what_it_is(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any, **options: Any) -> None:
        raise RuntimeError('false INTERNAL ASSERT FAILED at "CUDACachingAllocator.cpp":1')

    monkeypatch.setattr(step_graphs, "DecodeGraph", fails)
    with pytest.raises(RuntimeError, match="INTERNAL ASSERT"):
        session.forward([[3]])


# --- what is given to it ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_gpu")
def test_ids_that_may_only_be_read_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch warns of an array that it could write to and must not."""
    seen: dict[str, Any] = {}

    def model(*inputs: Any) -> tuple[torch.Tensor, Any]:
        seen.update(ids=inputs[0], past=inputs[1])
        return torch.ones(2, 1, 8), inputs[3]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    graph = DecodeGraph(model, [Cache(torch.ones(2, 1, 4, 4), torch.ones(2, 1, 4, 4))], 2)
    ids, past = np.frombuffer(np.array([4, 9]).tobytes(), np.int64).reshape(2, 1), np.array([1, 2])
    past.flags.writeable = False
    assert graph.replay(ids, past).shape == (2, 1, 8)
    assert (seen["ids"].tolist(), seen["past"].tolist()) == ([[4], [9]], [1, 2])


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("features", [Features(None, 0, True), Features("mass", 2, True), Features("last", 0, True)])
def test_a_managed_step_reads_its_inputs_and_leaves_what_rows_received(
    features: Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Addresses stay the same from step to step: positions, rows in use, weights and biases lie behind them."""
    seen: list[Any] = []

    def model(ids: torch.Tensor, past: torch.Tensor, positions: torch.Tensor, caches: Any, managed: Any) -> Any:
        seen[:] = [ids, past, managed]
        for received in managed.past_received or ():
            received.fill_(9.0)
        return torch.ones(2, 1, 8), caches

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    caches = [Cache(torch.ones(2, 1, 4, 4), torch.ones(2, 1, 4, 4)) for _ in range(3)]
    received = [torch.full((2, 4), 0.5) for _ in range(3)] if features.observe else []
    graph = DecodeGraph(model, caches, 2, features, received)
    assert all((each == 0.5).all() for each in received)
    for step in range(2):
        given = ManagedStep(
            past_length=np.arange(6).reshape(3, 2) + step,
            positions=np.array([[7], [8]]) + step,
            row_bias=np.full((3, 2, 2), 0.25 + step, np.float32) if features.bias_rows else None,
            query_weight=np.array([[1], [2]], np.float32) if features.observe else None,
            decay=np.array([0.5, 0.25], np.float32) if features.observe else None,
        )
        graph.replay(np.array([[4], [9]]), np.array([100, 200]), given)
        ids, past, managed = seen
        assert (ids.tolist(), past.tolist()) == ([[4], [9]], given.past_length.tolist())
        for name in ("positions", "row_bias", "query_weight", "decay"):
            found, expected = getattr(managed, name), getattr(given, name)
            assert (found is None) == (expected is None)
            assert expected is None or found.tolist() == expected.tolist()
        assert managed.observe == (features.observe or "")


@pytest.mark.usefixtures("no_gpu")
def test_graphs_share_a_pool_as_long_as_one_of_them_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its last graph torch's pool goes, and its handle is no good any more."""
    given: list[Any] = []
    handles = iter(range(9))

    def graph(*arguments: Any, pool: Any, **options: Any) -> Any:
        given.append(pool)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    memory = GraphMemory(torch.device("cpu"))
    first = DecodeGraph(step, [cache()], 1, memory=memory)
    second = DecodeGraph(step, [cache()], 1, memory=memory)
    del first
    third = DecodeGraph(step, [cache()], 1, memory=memory)
    del second, third
    DecodeGraph(step, [cache()], 1, memory=memory)
    assert given == [0, 0, 0, 1]
