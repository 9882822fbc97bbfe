"""Weights where ONNX Runtime will not read them by itself, weights that change in use, and what it prints."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from gta_edge.errors import BackendError, BundleError
from gta_edge.export.pipeline import export_model
from gta_edge.formats.bundle import WEIGHTS, Bundle
from gta_edge.libraries.onnxruntime import first_line
from gta_edge.runtime.onnxruntime.cuda_session import OnnxRuntimeCudaSession
from gta_edge.runtime.onnxruntime.model import open_model
from gta_edge.runtime.onnxruntime.session import OnnxRuntimeSession
from gta_edge.runtime.registry import load
from gta_edge.runtime.session import Session

IDS = np.array([[1, 2, 3], [4, 5, 6]])
Open = Callable[[Path], Session]


def on_cpu(directory: Path) -> Session:
    return OnnxRuntimeSession(Bundle.open(directory), exact=True)


def as_on_cuda(directory: Path) -> Session:
    return OnnxRuntimeCudaSession(Bundle.open(directory), compute="fp32", device="cpu")


def with_torch(directory: Path) -> Session:
    return load(directory, "torch")


EVERY = {"onnxruntime": on_cpu, "onnxruntime-cuda": as_on_cuda, "torch": with_torch}


@pytest.fixture(scope="module", params=["bf16", "int4"])
def bundle(request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "bundle"
    export_model(tiny_checkpoint, directory, precision=request.param, verify=False)
    return directory


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns("engines"))


def logits(session: Session) -> np.ndarray:
    with session:
        return session.forward(IDS, all_logits=True)


@pytest.mark.parametrize("backend", EVERY)
def test_files_with_several_links(copy: Path, tmp_path: Path, backend: str) -> None:
    """As ``cp -al``, package stores and container layers make them; also what was kept in the bundle before."""
    expected = logits(EVERY[backend](copy))
    linked = shutil.copytree(copy, tmp_path / "linked", copy_function=os.link)
    assert (linked / WEIGHTS).stat().st_nlink == 2
    np.testing.assert_array_equal(logits(EVERY[backend](linked)), expected)
    shutil.rmtree(linked / "engines", ignore_errors=True)
    np.testing.assert_array_equal(logits(EVERY[backend](linked)), expected)
    np.testing.assert_array_equal(logits(EVERY[backend](linked)), expected)  # from what is kept now


@pytest.mark.parametrize("place", ["mapped", "in memory"])
def test_a_graph_with_weights_anywhere(tmp_path: Path, place: str) -> None:
    """In one folder, or in several, behind links, under names that are not the files'."""
    (tmp_path / "a" / "deep").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    files = {"x.data": tmp_path / "a" / "x.data", "deep/y.data": tmp_path / "a" / "deep" / "y.data"}
    if place == "in memory":
        files["deep/y.data"] = tmp_path / "b" / "another name"
    for number, path in enumerate(files.values(), 1):
        path.write_bytes(np.full(1024, number, np.float32).tobytes())
    graph = summing(list(files))
    opened = open_model(onnxruntime, graph, files, onnxruntime.SessionOptions(), ["CPUExecutionProvider"])
    np.testing.assert_array_equal(opened.session.run(None, {})[0], np.full(1024, 3, np.float32))
    for path in files.values():
        os.truncate(path, 0)
    if place == "mapped":
        with pytest.raises(BundleError, match="was changed while it was in use"):
            opened.check()
    else:  # ONNX Runtime has what it needs
        opened.check()
        np.testing.assert_array_equal(opened.session.run(None, {})[0], np.full(1024, 3, np.float32))
    opened.close()
    opened.close()


def summing(locations: list[str]) -> bytes:
    """A graph that adds up the tensors in files."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    tensors = []
    for location in locations:
        tensor = onnx.TensorProto(name=location, data_type=kind, dims=[1024], data_location=onnx.TensorProto.EXTERNAL)
        for key, value in (("location", location), ("offset", "0"), ("length", "4096")):
            tensor.external_data.add(key=key, value=value)
        tensors.append(tensor)
    node, output = helper.make_node("Sum", locations, ["sum"]), helper.make_tensor_value_info("sum", kind, [1024])
    graph = helper.make_graph([node], "sum", [], [output], tensors)
    return bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10).SerializeToString()
    )


# --- files that change while a session uses them ---------------------------------------------------------------------


def cut_short(path: Path) -> None:
    os.truncate(path, 4096)


def overwritten(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[::2] = bytes(len(content[::2]))
    with path.open("r+b") as file:
        file.write(content)


def removed(path: Path) -> None:
    path.unlink()


def replaced(path: Path) -> None:
    shutil.copyfile(path, path.with_name("new"))
    path.with_name("new").replace(path)


@pytest.mark.parametrize("change", [cut_short, overwritten])
@pytest.mark.parametrize("backend", ["onnxruntime", "onnxruntime-cuda"])
def test_weights_that_change_in_use_are_one_error(copy: Path, backend: str, change: Callable[[Path], None]) -> None:
    """Reading them would end the process by SIGBUS, or give other numbers."""
    with EVERY[backend](copy) as session:
        session.forward(IDS)
        files = [copy / WEIGHTS, *copy.glob("engines/**/weights.data")]
        for path in files:
            change(path)
        for _ in range(2):
            with pytest.raises(
                BundleError, match=r"was changed while it was in use; .* load the bundle again"
            ) as caught:
                session.forward(IDS)
            assert str(caught.value).isprintable()
            assert session.length.tolist() == [3, 3]


@pytest.mark.parametrize("change", [removed, replaced])
def test_files_that_others_take_the_place_of_are_kept(copy: Path, change: Callable[[Path], None]) -> None:
    with on_cpu(copy) as session:
        expected = session.forward(IDS)
        session.reset()
        for path in [copy / WEIGHTS, *copy.glob("engines/**/weights.data")]:
            change(path)
        np.testing.assert_array_equal(session.forward(IDS), expected)


def test_torch_has_its_weights_in_its_own_memory(copy: Path) -> None:
    with with_torch(copy) as session:
        expected = session.forward(IDS)
        session.reset()
        cut_short(copy / WEIGHTS)
        np.testing.assert_array_equal(session.forward(IDS), expected)


# --- what ONNX Runtime prints ----------------------------------------------------------------------------------------


def test_a_model_that_is_refused_says_nothing_itself(capfd: pytest.CaptureFixture[str]) -> None:
    """ONNX Runtime's Python would tell on stdout of a fallback, to the provider that has just failed."""
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    with pytest.raises(Exception, match="INVALID_PROTOBUF") as caught:
        open_model(onnxruntime, b"no model", {}, settings, ["CPUExecutionProvider"])
    assert first_line(caught.value)
    with pytest.raises(Exception, match="does not exist"):
        open_model(onnxruntime, summing(["nowhere"]), {}, settings, ["CPUExecutionProvider"])
    assert capfd.readouterr() == ("", "")


def test_a_step_that_fails_says_nothing_itself(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with on_cpu(copy) as session:
        assert isinstance(session, OnnxRuntimeSession)
        session.forward(IDS)
        capfd.readouterr()
        behind_the_end = np.full(2, 10**6)
        with pytest.raises(BackendError, match="ONNX Runtime failed in a step") as caught:
            session._run(np.ones((2, 1), np.int64), behind_the_end, np.zeros((2, 1), np.int64))
        assert str(caught.value).isprintable()
        assert capfd.readouterr() == ("", "")
        session.reset()
        assert np.isfinite(session.forward(IDS)).all()  # it is usable
