"""The onnxruntime-cuda backend: its graph, its session, and what both do on a GPU.

Without a GPU the graph runs in float16 on ONNX Runtime's CPU kernels and in bfloat16 in ONNX's reference, and the
session on the CPU provider; tests/runtime/sessions runs it there too. What every operator's kernel takes on a GPU is
written down in docs/onnxruntime-cuda.md, and the graphs are held against that.
"""

import functools
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from gta_edge.accuracy.tolerance import COMPUTE_BOUNDS
from gta_edge.cuda.session import free_gpu_bytes
from gta_edge.errors import BackendError, CapacityError, EngineError
from gta_edge.formats.bundle import Bundle
from gta_edge.graph.types import types_of_outputs
from gta_edge.libraries import onnxruntime as ort
from gta_edge.libraries.install import install_command
from gta_edge.model.config import parse_config
from gta_edge.model.kv_cache import TREES, cache_bytes
from gta_edge.numerics.dtypes import FLOAT_TYPES
from gta_edge.plugins.attention.definition import Features
from gta_edge.runtime.onnxruntime import cuda_session as backend
from gta_edge.runtime.onnxruntime.backend import ONNXRUNTIME_CUDA
from gta_edge.runtime.onnxruntime.cuda_lower import cuda_graph, cuda_model
from gta_edge.runtime.onnxruntime.cuda_session import OnnxRuntimeCudaSession
from gta_edge.runtime.registry import load
from tests.helpers import reference
from tests.helpers.small_models import MODELS, PRECISIONS, VOCAB, P, formula_logits, write_bundle, write_bundle_of
from tests.helpers.tensorrt_graphs import RMSNormalization

DOCUMENT = Path(__file__).parents[3] / "docs" / "onnxruntime-cuda.md"
KEPT = "engines/onnxruntime-cuda"
HALVES = ("fp16", "bf16")
IDS = np.random.default_rng(5).integers(0, VOCAB, (2, 10))  # those of formula_logits

every_model = pytest.mark.parametrize("name", MODELS)
every_precision = pytest.mark.parametrize("precision", PRECISIONS)
some = pytest.mark.parametrize(
    ("name", "precision"),
    [("more keys", "int4"), ("more latents", "bf16"), ("as many", "fp32"), ("baseline", "int8"), ("baseline", "fp16")],
)


@functools.cache
def _root() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="gta-edge-cuda-")  # removed when Python ends


@functools.cache
def bundle_of(name: str, precision: str) -> Bundle:
    """A bundle of one of the models; sessions keep their graphs in it."""
    return Bundle.open(write_bundle(Path(_root().name) / f"{name} in {precision}", name, precision))


def on_cpu(bundle: Bundle, **options: Any) -> OnnxRuntimeCudaSession:
    options = {"compute": ONNXRUNTIME_CUDA.default_compute(bundle.precision)} | options
    return OnnxRuntimeCudaSession(bundle, device="cpu", **options)


def logits(session: OnnxRuntimeCudaSession) -> np.ndarray:
    """Logits [2, 10, V] of a prompt and single tokens after it."""
    with session:
        parts = [session.forward(IDS[:, :7], all_logits=True)]
        parts += [session.forward(IDS[:, i : i + 1], all_logits=True) for i in range(7, 10)]
    return np.concatenate(parts, axis=1)


# --- the graph -------------------------------------------------------------------------------------------------------


@every_model
@every_precision
def test_in_float16_it_is_near_the_formula(name: str, precision: str) -> None:
    bundle = bundle_of(name, precision)
    found = logits(on_cpu(bundle, compute="fp16"))
    error = reference.relative_error(found, formula_logits(bundle.directory))
    assert 1e-5 < error <= COMPUTE_BOUNDS["fp16"]  # not float32's


class MatMulNBits(OpRun):
    """As ONNX Runtime documents it, for codes of 4 and 8 bits whose zero is the middle."""

    op_domain = "com.microsoft"

    def _run(self, a, codes, scales, zero=None, group=None, bias=None, K=0, N=0, bits=4, block_size=32, **_):
        assert zero is None
        assert group is None
        assert scales.dtype == a.dtype
        numbers = codes if bits == 8 else np.stack([codes & 15, codes >> 4], axis=-1)
        numbers = numbers.reshape(N, -1, block_size).astype(np.float32) - (1 << bits - 1)
        matrix = (numbers * scales.reshape(N, -1, 1).astype(np.float32)).reshape(N, -1)[:, :K]
        matmul = (a.astype(np.float32) @ matrix.T).astype(a.dtype)
        return (matmul if bias is None else matmul + bias,)


class SkipSimplifiedLayerNormalization(OpRun):
    op_domain = "com.microsoft"

    def _run(self, x, y, weight, epsilon=1e-5):
        total = x + y
        wide = total.astype(np.float32)
        normed = wide / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + np.float32(epsilon))
        return normed.astype(x.dtype) * weight, x, x, total


@some
@pytest.mark.parametrize("compute", ["bf16", "fp32"])
def test_in_bfloat16_it_is_near_the_formula(name: str, precision: str, compute: str, tmp_path: Path) -> None:
    """In ONNX's reference; in float32 as well, which shows that the reference's own part is right."""
    bundle = bundle_of(name, precision)
    graph = cuda_graph(bundle, compute, tmp_path / "weights.data", "weights.data", everything=True)
    (tmp_path / "model.onnx").write_bytes(graph)
    own = [RMSNormalization, MatMulNBits, SkipSimplifiedLayerNormalization]
    evaluator = ReferenceEvaluator(str(tmp_path / "model.onnx"), new_ops=own)
    dtype = ml_dtypes.bfloat16 if compute == "bf16" else np.float32
    config = parse_config(MODELS[name])
    state = {
        f"past_{cache.name}.{i}": np.zeros((2, cache.heads, P, cache.width), dtype)
        for i in range(config.num_hidden_layers)
        for cache in config.caches
    }
    parts = []
    for start, stop in ((0, 7), (7, 8), (8, 10)):
        feeds = {
            "input_ids": IDS[:, start:stop],
            "past_length": np.full(2, start),
            "logit_positions": np.tile(np.arange(stop - start), (2, 1)),
        }
        outputs = dict(zip(evaluator.output_names, evaluator.run(None, feeds | state), strict=True))
        assert outputs["logits"].dtype == np.float32
        state = {key: outputs[key.replace("past", "present")] for key in state}
        assert all(value.dtype == dtype for value in state.values())
        parts.append(outputs["logits"])
    error = reference.relative_error(np.concatenate(parts, axis=1), formula_logits(bundle.directory))
    assert error <= COMPUTE_BOUNDS[compute]


def documented() -> dict[str, set[str]]:
    """The document's table: by operator, the types that its kernel takes."""
    lines = re.findall(r"^\| ([\w.]+) \| ([a-z0-9, ]+) \|$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    return {operator: set(types.split(", ")) for operator, types in lines if operator != "operator"}


def used(model: ir.Model) -> set[tuple[str, str]]:
    """Operators of a graph, each with the types of its data."""
    types: dict[Any, Any] = {value: value.dtype for value in (*model.graph.inputs, *model.graph.initializers.values())}
    found = set()
    for node in model.graph:
        given = [types[value] for value in node.inputs if value is not None]
        outputs = [given[0]] * len(node.outputs) if node.domain else types_of_outputs(node, types, {"": 24})
        types.update(zip(node.outputs, outputs, strict=True))
        data = {"Constant": outputs[:1], "Where": given[1:]}.get(node.op_type, given[:1])
        found |= {(f"{node.domain}.{node.op_type}".lstrip("."), kind.name.lower()) for kind in data}
    return found


MANAGED = [Features("mass", 2, has_positions=True), Features("last", has_positions=True), TREES]
"""What a cache policy may ask of a graph, and trees do."""


@pytest.mark.parametrize("features", MANAGED, ids=lambda of: of.observe or "trees")
@pytest.mark.parametrize("compute", FLOAT_TYPES)
@pytest.mark.parametrize("name", ["more keys", "baseline"])
def test_every_operator_of_a_managed_cache_has_a_kernel_on_the_gpu(name: str, compute: str, features: Features) -> None:
    table = documented()
    found = used(cuda_model(bundle_of(name, "int4"), compute, features))
    assert {operator for operator, kind in found if kind not in table.get(operator, set())} == set()
    assert ("ReduceSum", "float") in found or features == TREES


@functools.cache
def used_by(name: str, precision: str, compute: str) -> frozenset[tuple[str, str]]:
    return frozenset(used(cuda_model(bundle_of(name, precision), compute)))


@every_model
@every_precision
@pytest.mark.parametrize("compute", FLOAT_TYPES)
def test_every_operator_has_a_kernel_on_the_gpu(name: str, precision: str, compute: str) -> None:
    table = documented()
    found = used_by(name, precision, compute)
    assert {operator for operator, kind in found if kind not in table.get(operator, set())} == set()
    assert ("TensorScatter", {"fp16": "float16", "bf16": "bfloat16", "fp32": "float"}[compute]) in found


def test_the_table_has_nothing_that_is_not_used() -> None:
    found: set[tuple[str, str]] = set()
    for name in MODELS:
        for precision in PRECISIONS:
            for compute in FLOAT_TYPES:
                found |= used_by(name, precision, compute)
    for features in MANAGED:
        found |= used(cuda_model(bundle_of("more keys", "int4"), "fp16", features))
    assert documented().keys() == {operator for operator, _ in found}


@every_model
@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_no_product_broadcasts_a_stack_over_the_batch(name: str, precision: str) -> None:
    """ONNX Runtime would read addresses from the host's memory, which a CUDA graph may not."""
    model = cuda_model(bundle_of(name, precision), "fp16")
    stacks = [node for node in model.graph if node.op_type == "MatMul" and len(node.inputs[1].shape or ()) == 3]
    assert len(stacks) == (0 if name == "baseline" else model_layers(name))
    for node in stacks:
        assert [value.op_type for value in (node.inputs[0].producer(),)] == ["Reshape"]
        shape = ir.convenience.get_const_tensor(node.inputs[0].producer().inputs[1]).numpy()
        assert list(shape) == [node.inputs[1].shape[0], -1, node.inputs[1].shape[1]]


def model_layers(name: str) -> int:
    return parse_config(MODELS[name]).num_hidden_layers


def test_a_weight_beyond_float16_is_refused_by_name(tmp_path: Path) -> None:
    entries = MODELS["baseline"]
    weights = reference.random_weights(entries)
    weights["model.layers.0.mlp.down_proj.weight"][0, 0] = 1e6
    bundle = Bundle.open(write_bundle_of(tmp_path / "bundle", entries, weights, "fp32"))
    with pytest.raises(EngineError, match=r"down_proj\.weight.* has values up to 1e\+06, beyond float16"):
        on_cpu(bundle, compute="fp16")
    assert not list((bundle.directory / KEPT).glob("*"))
    with on_cpu(bundle, compute="fp32") as session:
        assert np.isfinite(session.forward(IDS)).all()


# --- what is kept ----------------------------------------------------------------------------------------------------


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A bundle in int4 that no session has seen, to do anything to."""
    source = bundle_of("more keys", "int4").directory
    return Bundle.open(shutil.copytree(source, tmp_path / "bundle", ignore=shutil.ignore_patterns("engines")))


def contents(directory: Path) -> dict[str, tuple[int, bytes]]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_each_type_is_made_once_and_kept(bundle: Bundle) -> None:
    first = [logits(on_cpu(bundle, compute=compute)) for compute in ("fp16", "fp32")]
    names = ["graph.json", "model.onnx", "weights.data"]
    before = contents(bundle.directory / KEPT)
    assert list(before) == [f"{compute}/{name}" for compute in ("fp16", "fp32") for name in names]
    told: list[Any] = []
    second = [
        logits(on_cpu(bundle, compute=compute, progress=lambda *event: told.append(event)))
        for compute in ("fp16", "fp32")
    ]
    assert contents(bundle.directory / KEPT) == before
    assert told == []
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)
    Bundle.open(bundle.directory, verify_hashes=True)  # the bundle itself is as it was


@pytest.mark.parametrize("name", ["model.onnx", "weights.data", "graph.json"])
def test_what_is_damaged_is_made_anew(bundle: Bundle, name: str) -> None:
    wanted = logits(on_cpu(bundle, compute="fp16"))
    path = bundle.directory / KEPT / "fp16" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    np.testing.assert_array_equal(logits(on_cpu(bundle, compute="fp16")), wanted)


def test_a_bundle_that_cannot_be_written_to_goes_without(bundle: Bundle, tmp_path: Path, monkeypatch) -> None:
    wanted = logits(on_cpu(bundle_of("more keys", "int4"), compute="fp16"))
    (bundle.directory / "engines").write_bytes(b"")  # where a directory would have to be
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    np.testing.assert_array_equal(logits(on_cpu(bundle, compute="fp16")), wanted)
    assert list(scratch.iterdir()) == []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(BackendError, match="TMPDIR") as caught:
        on_cpu(bundle, compute="fp16")
    assert len(str(caught.value).splitlines()) == 1


# --- the session -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "compute"), [("bf16", "bf16"), ("fp16", "fp16"), ("int4", "fp16")])
def test_the_type_to_compute_in_by_default(precision: str, compute: str) -> None:
    assert ONNXRUNTIME_CUDA.default_compute(precision) == compute
    if compute == "fp16":
        with on_cpu(bundle_of("baseline", precision)) as session:
            assert session.compute == compute


def test_the_cache_stays_where_it_is(bundle: Bundle, capfd: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(backend, "_FATAL", 2)  # ONNX Runtime tells of a cache that it copies
    with on_cpu(bundle, compute="fp16", capacity_step=16) as session:
        session.forward(IDS[:, :5])
        addresses = {name: cache.data_ptr() for name, cache in session._caches.items()}
        before = {name: cache.numpy().copy() for name, cache in session._caches.items()}
        for i in range(5, 9):
            session.forward(IDS[:, i : i + 1])
        for name, cache in session._caches.items():
            assert cache.data_ptr() == addresses[name]
            content = cache.numpy()
            assert (content[:, :, 5:9] != 0).any(axis=-1).all()
            np.testing.assert_array_equal(content[:, :, :5], before[name][:, :, :5])
            np.testing.assert_array_equal(content[:, :, 9:], 0)
        assert session.cache_bytes == cache_bytes(session.config, "fp16", 16, batch=2)
    assert "in-place" not in capfd.readouterr().err
    assert session.cache_bytes == 0


def test_no_memory_for_the_cache(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with on_cpu(bundle, compute="fp16", capacity_step=8) as session:
        session.forward(IDS[:, :4])
        real = session._buffer

        def refuse(content: np.ndarray) -> Any:
            if content.ndim == 4:  # a cache
                raise RuntimeError("bfc_arena.cc:360 Failed to allocate memory for requested buffer of size 1")
            return real(content)

        monkeypatch.setattr(session, "_buffer", refuse)
        with pytest.raises(CapacityError, match=r"no memory for a cache of \d+ MiB \(2 rows of 16 tokens\)"):
            session.forward(IDS[:, 4:])
        monkeypatch.undo()
        assert (session.length == 0).all()
        assert np.isfinite(session.forward(IDS)).all()


@pytest.mark.parametrize("compute", ["float16", "int8", "FP16"])
def test_an_unknown_type_is_refused(bundle: Bundle, compute: str) -> None:
    with pytest.raises(BackendError, match=f"computes in fp32, fp16, bf16, not in {compute}"):
        load(bundle.directory, "onnxruntime-cuda", compute=compute)


# --- errors ----------------------------------------------------------------------------------------------------------


def one_line(error: pytest.ExceptionInfo[BackendError]) -> str:
    text = str(error.value)
    assert len(text.splitlines()) == 1
    return text


def test_the_cpu_package_is_told_apart(bundle: Bundle) -> None:
    if ort.CUDA_PROVIDER in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is installed")
    with pytest.raises(BackendError) as caught:
        load(bundle.directory, "onnxruntime-cuda")
    text = one_line(caught)
    assert "has no CUDA provider" in text
    assert text.endswith(f"pip uninstall -y onnxruntime onnxruntime-gpu && {install_command('ort-gpu')}")
    with load(bundle.directory) as session:
        assert session.backend == "onnxruntime"


def test_a_release_for_cuda_12_is_refused(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.26.0")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [ort.CUDA_PROVIDER, "CPUExecutionProvider"])
    with pytest.raises(BackendError) as caught:
        load(bundle.directory, "onnxruntime-cuda")
    assert one_line(caught).startswith("ONNX Runtime 1.26.0 would run a part of every layer on the CPU")
    assert one_line(caught).endswith("pip install 'onnxruntime-gpu[cuda,cudnn]>=1.27'")


class Module:
    """Of onnxruntime-gpu, what is asked before there is a session."""

    __version__ = "1.31.1"
    cuda_version = "13.0"


CUDA_FAILURE = """/onnxruntime_src/cuda_call.cc:154 std::conditional_t<THRW> onnxruntime::CudaCall(ERRTYPE, const char*)
CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version ; GPU=-1 ; hostname=x ; file=y"""


@pytest.mark.parametrize(
    ("there", "raised", "expected"),
    [
        (
            {"libcudart.so.13"},
            "CUDA Provider not available, can't get interface for it",
            "ONNX Runtime 1.31.1 is made for CUDA 13.0 and libcublasLt.so.13 is not found; "
            "run: pip install 'onnxruntime-gpu[cuda,cudnn]>=1.27'",
        ),
        (
            {"libcudart.so.13", "libcublasLt.so.13", "libcublas.so.13", "libcurand.so.10", "libcufft.so.12"},
            "CUDA Provider not available, can't get interface for it",
            "ONNX Runtime 1.31.1 is made for CUDA 13.0 and libcudnn.so.9 is not found; "
            "run: pip install 'onnxruntime-gpu[cuda,cudnn]>=1.27'",
        ),
        (
            set(),
            CUDA_FAILURE,
            "ONNX Runtime 1.31.1 cannot use the GPU (CUDA failure 35: CUDA driver version is insufficient for CUDA "
            "runtime version); run `gta-edge doctor`",
        ),
        (
            set(),
            "bfc_arena.cc:360 Failed to allocate memory for requested buffer of size 256\n",
            "the GPU's memory is full; close other programs",
        ),
    ],
)
def test_what_keeps_onnxruntime_from_the_gpu(there: set[str], raised: str, expected: str, monkeypatch) -> None:
    """The texts are those of onnxruntime-gpu 1.31.1 where such a library, the driver or memory was missing."""
    monkeypatch.setattr(ort, "_loads", lambda name: name in there)
    assert str(ort.why_no_gpu(Module, RuntimeError(raised))) == expected


class Driver:
    """CUDA's driver, of one version."""

    def __init__(self, version: int) -> None:
        self.version = version

    def cuDriverGetVersion(self, place: Any) -> int:
        place._obj.value = self.version
        return 0


def test_a_driver_that_is_too_old_for_onnxruntime() -> None:
    ort._check_driver(Module, Driver(13000))
    ort._check_driver(Module, Driver(14010))
    with pytest.raises(BackendError) as caught:
        ort._check_driver(Module, Driver(12060))
    assert one_line(caught) == (
        "ONNX Runtime 1.31.1 is made for CUDA 13.0, and the NVIDIA driver knows CUDA up to 12.6; upgrade the driver, "
        "or choose another backend"
    )


# --- on a GPU --------------------------------------------------------------------------------------------------------


@functools.cache
def _why_not() -> str:
    try:
        ort.load_onnxruntime_cuda()
    except BackendError as error:
        return str(error)
    return ""


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that needs ONNX Runtime on a GPU."""
    return pytest.mark.gpu(pytest.mark.skipif(bool(_why_not()), reason=_why_not() or "there is a GPU")(test))


@pytest.fixture
def start() -> Iterator[Callable[..., OnnxRuntimeCudaSession]]:
    """Start a session on the GPU."""
    started: list[OnnxRuntimeCudaSession] = []

    def begin(name: str, precision: str, **options: Any) -> OnnxRuntimeCudaSession:
        options = {"compute": ONNXRUNTIME_CUDA.default_compute(precision)} | options
        session = OnnxRuntimeCudaSession(bundle_of(name, precision), **options)
        started.append(session)
        return session

    yield begin
    for session in started:
        session.close()


def steps(session: OnnxRuntimeCudaSession, ids: np.ndarray, prompt: int) -> np.ndarray:
    parts = [session.forward(ids[:, :prompt], all_logits=True)]
    parts += [session.forward(ids[:, i : i + 1], all_logits=True) for i in range(prompt, ids.shape[1])]
    return np.concatenate(parts, axis=1)


@on_gpu
@every_model
@every_precision
@pytest.mark.parametrize("compute", [*HALVES, "fp32"])
def test_on_a_gpu_it_is_near_the_formula(start, name: str, precision: str, compute: str) -> None:
    found = steps(start(name, precision, compute=compute), IDS, 7)
    error = reference.relative_error(found, formula_logits(bundle_of(name, precision).directory))
    assert error <= COMPUTE_BOUNDS[compute]


@on_gpu
@some
@pytest.mark.parametrize("compute", HALVES)
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_the_graph_is_the_step_without_it(start, name: str, precision: str, compute: str, rows: int) -> None:
    ids = np.random.default_rng(rows).integers(0, VOCAB, (rows, P))
    replaying = start(name, precision, compute=compute)
    assert replaying.cuda_graph is None
    found = steps(replaying, ids, 5)
    assert replaying.cuda_graph is True
    assert replaying.graph_refused is None
    plain = start(name, precision, compute=compute)
    plain.graph_refused = "for this test"
    wanted = steps(plain, ids, 5)
    assert plain.cuda_graph is False
    assert reference.relative_error(found, wanted) <= COMPUTE_BOUNDS[compute] / 2


@on_gpu
@some
def test_prompts_between_replays_do_not_disturb_them(start, name: str, precision: str) -> None:
    """They use the host's and the GPU's scratch memory that the capture used."""
    ids = np.random.default_rng(1).integers(0, VOCAB, (3, P))
    lengths, at = (1, 1, 3, 1, 1, 5, 1, 2, 1, 1), 0
    session, whole = start(name, precision, capacity_step=P), start(name, precision, capacity_step=P)
    wanted = whole.forward(ids[:, : sum(lengths)], all_logits=True)
    for tokens in lengths:
        found = session.forward(ids[:, at : at + tokens], all_logits=True)
        expected = wanted[:, at : at + tokens]
        assert reference.relative_error(found, expected) <= COMPUTE_BOUNDS[session.compute]
        at += tokens
    assert session.cuda_graph is True


@on_gpu
@some
def test_another_number_of_rows_and_growth_capture_anew(start, name: str, precision: str) -> None:
    session = start(name, precision, capacity_step=8)
    for rows in (1, 4, 2, 4):
        ids = np.random.default_rng(rows).integers(0, VOCAB, (rows, P))
        session.reset()
        found = np.stack([session.forward(ids[:, t : t + 1]) for t in range(P)], axis=1)
        wanted = start(name, precision, capacity_step=P).forward(ids, all_logits=True)
        assert reference.relative_error(found, wanted) <= COMPUTE_BOUNDS[session.compute]
    assert session.cuda_graph is True


@on_gpu
@some
def test_the_cache_is_updated_in_place(start, name: str, precision: str) -> None:
    session = start(name, precision, compute="fp16", capacity_step=16)
    session.forward(IDS[:, :5])
    addresses = {key: cache.data_ptr() for key, cache in session._caches.items()}
    before = {key: cache.numpy().copy() for key, cache in session._caches.items()}
    for i in range(5, 9):
        session.forward(IDS[:, i : i + 1])
    for key, cache in session._caches.items():
        assert cache.data_ptr() == addresses[key]
        content = cache.numpy()
        assert (content[:, :, 5:9] != 0).any(axis=-1).all()
        np.testing.assert_array_equal(content[:, :, :5], before[key][:, :, :5])
        np.testing.assert_array_equal(content[:, :, 9:], 0)
    assert session.cache_bytes == cache_bytes(session.config, "fp16", 16, batch=2)


@on_gpu
def test_steps_take_no_more_memory(start) -> None:
    if free_gpu_bytes() is None:
        pytest.skip("the GPU's free memory is not known")
    session = start("more keys", "int4", capacity_step=P)
    session.forward(IDS[:1, :3])
    session.forward(IDS[:1, :1])
    before = free_gpu_bytes()
    for _ in range(20):
        session.truncate(3)
        session.forward(IDS[:1, :1])
    after = free_gpu_bytes()
    assert before is not None
    assert after is not None
    assert before - after <= 2**20


@on_gpu
def test_logits_that_were_returned_do_not_change_later(start) -> None:
    session = start("more latents", "bf16")
    first = session.forward(IDS[:, :1])
    kept = first.copy()
    session.forward(IDS[:, 1:2])
    np.testing.assert_array_equal(first, kept)


@on_gpu
def test_auto_takes_it_where_there_is_no_engine(bundle: Bundle) -> None:
    with load(bundle.directory) as session:
        assert session.backend == "onnxruntime-cuda"
