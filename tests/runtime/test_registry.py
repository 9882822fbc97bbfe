"""Which backend a bundle is opened with, and what becomes of those that do not work."""

import errno
import gc
import json
import logging
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gta_edge.errors import BackendError, BundleError, CapacityError, EngineError, InputError
from gta_edge.evaluate.verify import verify
from gta_edge.formats.bundle import Bundle
from gta_edge.model.presets import preset
from gta_edge.runtime import registry
from gta_edge.runtime.cache_policies.window import Window
from gta_edge.runtime.registry import BACKENDS, load, open_session
from gta_edge.support.choices import unknown
from tests.helpers.commands import Result

Command = Callable[..., Result]
Error = tuple[Any, ...]
"""A class, and what it is made with: an error that is kept would keep what was loaded."""
Failing = Callable[[str, Error], None]
FULL = "takes 0.5 GB and the GPU has 0.1 GB free; close other programs"


class Loaded:
    """What a backend had loaded when it failed."""

    def __init__(self) -> None:
        self.cycle = self
        ALIVE.add(self)


ALIVE: "weakref.WeakSet[Loaded]" = weakref.WeakSet()


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Failing:
    """Let a backend that is here die of an error, half way."""

    def make(name: str, error: Error) -> None:
        def die(*_: Any, **__: Any) -> Any:
            held = Loaded()
            raise error[0](*error[1:])
            return held

        monkeypatch.setattr(BACKENDS[name], "open", die)
        monkeypatch.setattr(BACKENDS[name], "is_here", lambda bundle: True)

    return make


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    assert not list(ALIVE)


ERRORS = [
    (CapacityError, FULL),
    (EngineError, "the engine is damaged"),
    (BackendError, "the library is too old"),
    (PermissionError, errno.EACCES, "Permission denied", "/somewhere/engines"),
    (OSError, "something"),
    (MemoryError,),
    (RuntimeError, "CUDA failure 2: out of memory;\n" + "and more\n" * 1000),
    (ValueError, "\x1b[31mred"),
    (ImportError, "libcudart.so.13: cannot open shared object file"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error[0].__name__)
def test_auto_goes_on_where_a_backend_dies_and_says_so(
    tiny_bundle: Path, failing: Failing, caplog: pytest.LogCaptureFixture, error: Error
) -> None:
    failing("tensorrt", error)
    with caplog.at_level(logging.WARNING), open_session(Bundle.open(tiny_bundle)) as session:
        assert session.backend == "onnxruntime"
        assert session.skipped.keys() == {"tensorrt"}
        assert not list(ALIVE)  # it was freed before the next one was loaded
    (said,) = caplog.messages
    assert said.startswith("tensorrt is there and was passed over for onnxruntime: ")
    assert session.skipped["tensorrt"] in said
    assert len(said) < 400
    assert said.isprintable()
    words = {MemoryError: "not enough memory", PermissionError: "/somewhere/engines: Permission denied"}
    assert words.get(error[0], str(error[-1])[:20].strip("\x1b")) in said


def test_what_was_never_installed_is_not_worth_a_word(tiny_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), open_session(Bundle.open(tiny_bundle)) as session:
        assert session.skipped == {}
    assert caplog.messages == []


@pytest.mark.parametrize("error", [(BundleError, "the bundle is damaged"), (InputError, "chunk_size is 0")])
def test_what_no_other_backend_helps_against_is_raised(tiny_bundle: Path, failing: Failing, error: Error) -> None:
    failing("tensorrt", error)
    with pytest.raises(error[0], match=error[1]):
        open_session(Bundle.open(tiny_bundle))
    gc.collect()


@pytest.mark.parametrize("cache", ["window", 64, {"rows": 64}, Window])
@pytest.mark.parametrize("backend", ["auto", "onnxruntime", "torch"])
def test_a_cache_policy_that_is_none_is_refused(tiny_bundle: Path, backend: str, cache: Any) -> None:
    with pytest.raises(InputError, match=r"^cache is .*; expected a cache policy; make one: .*policy\(") as error:
        load(tiny_bundle, backend, cache=cache)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("length", [10, 250, 5000])
def test_a_reason_has_its_remedy_whole_or_not_at_all(length: int) -> None:
    remedy = f"run: pip install '{'x' * length}'"
    said = registry.reason_of(BackendError("a problem " * 1000, remedy))
    assert len(said) < 600
    assert said.startswith("a problem a problem")
    assert said.endswith(f"; {remedy}") == (length < 300)
    assert ("pip" in said) == (length < 300)


def test_nothing_works(tiny_bundle: Path, failing: Failing) -> None:
    for name in ("onnxruntime", "torch"):
        failing(name, (RuntimeError, "this is why " + "x" * 1000))
    with pytest.raises(BackendError, match=r"no backend works here \(onnxruntime: RuntimeError: this is why") as raised:
        open_session(Bundle.open(tiny_bundle))
    assert len(str(raised.value)) < 600
    assert "not here: tensorrt" in str(raised.value)


def test_a_backend_that_was_asked_for_is_not_replaced(tiny_bundle: Path, failing: Failing) -> None:
    failing("tensorrt", (CapacityError, FULL))
    with pytest.raises(CapacityError, match=r"takes 0\.5 GB"):
        open_session(Bundle.open(tiny_bundle), "tensorrt")
    gc.collect()


def test_a_bundle_whose_tokenizer_is_damaged_is_refused_before_anything_is_loaded(
    copied_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.helpers.bundle_files import relist

    (copied_bundle / "tokenizer.json").write_text("{}")
    relist(copied_bundle)
    monkeypatch.setattr(registry, "BACKENDS", {"onnxruntime": None})  # opening would be an AttributeError
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        open_session(Bundle.open(copied_bundle), "onnxruntime")


# --- on a GPU that is full: the simulation of one ---------------------------------------------------------------------


@pytest.fixture
def with_engine(copied_bundle: Path, tmp_path: Path) -> Path:
    """A bundle with an engine for the simulation."""
    from gta_edge.runtime.tensorrt.engine import EngineSpec
    from tests.helpers import tensorrt_simulator as simulator

    spec = EngineSpec("tensorrt-rtx", "fp16", "fp16", max_length=100, max_batch=2, chunk_size=32)
    simulator.build(Bundle.open(copied_bundle), spec, tmp_path / "prepared")
    return copied_bundle


def test_a_full_gpu_is_passed_over(with_engine: Path, command: Command, tiny_checkpoint: Path) -> None:
    from tests.helpers.tensorrt_simulator import Driver, simulated

    driver = Driver(memory_bytes=1000)
    with simulated(driver):
        arguments = ("generate", with_engine, "--ids", "1,2", "--max-new-tokens", "2")
        result = command(*arguments)
        assert result.status == 0
        assert "note: tensorrt-rtx is there and was passed over for onnxruntime: the engine takes " in result.err
        for silent in ("--quiet", "--json"):
            result = command(*arguments, silent)
            assert (result.status, result.err) == (0, "")
        assert not driver.live

        result = command("verify", with_engine, "--checkpoint", tiny_checkpoint)
        assert (result.status, result.err) == (0, "")
        lines = result.out.splitlines()
        assert [line.split()[0] for line in lines[1:3]] == ["onnxruntime", "torch"]
        assert lines[-2].startswith("not verified: tensorrt-rtx: the engine takes ")
        assert lines[-1] == "passed"
        asked = command("verify", with_engine, "--checkpoint", tiny_checkpoint, "--backend", "tensorrt-rtx")
        assert "GB free" in asked.error


# --- verify -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ERRORS[0], ERRORS[3], ERRORS[6]], ids=lambda error: error[0].__name__)
def test_verify_goes_on_where_a_backend_dies(
    tiny_bundle: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, failing: Failing, error: Error
) -> None:
    failing("tensorrt", error)
    monkeypatch.delitem(BACKENDS, "torch")  # which takes its time
    report = verify(tiny_bundle, tiny_checkpoint)
    assert report.passed
    assert report.backends.keys() == {"onnxruntime"}
    assert report.unavailable.keys() == {"tensorrt"}
    assert len(report.unavailable["tensorrt"]) <= 201
    document = json.loads(json.dumps(report.to_dict()))
    assert document["unavailable"] == report.unavailable
    assert {"tensorrt-rtx"} <= document["absent"].keys() <= {"tensorrt-rtx", "onnxruntime-cuda"}


def test_verify_fails_where_answers_are_wrong_though_another_died(
    tiny_bundle: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, failing: Failing
) -> None:
    class Wrong:
        """The backend's session, one logit of which is off."""

        def __init__(self, session: Any) -> None:
            self._session = session

        def __getattr__(self, name: str) -> Any:
            return getattr(self._session, name)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            self._session.close()

        def forward(self, *arguments: Any, **options: Any) -> Any:
            logits = self._session.forward(*arguments, **options)
            logits[..., 0] += 1
            return logits

    right = BACKENDS["onnxruntime"].open
    failing("tensorrt", (CapacityError, FULL))
    monkeypatch.setattr(BACKENDS["onnxruntime"], "open", lambda *a, **o: Wrong(right(*a, **o)))
    monkeypatch.delitem(BACKENDS, "torch")
    report = verify(tiny_bundle, tiny_checkpoint)
    assert not report.passed
    assert "max_rel_error" in report.failures[0]


def test_verify_with_nothing_that_works(
    tiny_bundle: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, failing: Failing
) -> None:
    failing("onnxruntime", (CapacityError, FULL))
    monkeypatch.delitem(BACKENDS, "torch")
    with pytest.raises(BackendError, match=r"none of the backends works here .*takes 0\.5 GB"):
        verify(tiny_bundle, tiny_checkpoint)


# --- descriptors ------------------------------------------------------------------------------------------------------


def test_sessions_have_the_names_of_their_descriptors() -> None:
    from gta_edge.runtime.onnxruntime.cuda_session import OnnxRuntimeCudaSession
    from gta_edge.runtime.onnxruntime.session import OnnxRuntimeSession
    from gta_edge.runtime.torch.session import TorchSession

    own = {"onnxruntime": OnnxRuntimeSession, "onnxruntime-cuda": OnnxRuntimeCudaSession, "torch": TorchSession}
    assert {name: session.backend for name, session in own.items()} == {name: BACKENDS[name].name for name in own}
    assert {name: backend.name for name, backend in BACKENDS.items()} == {name: name for name in BACKENDS}


def test_every_backend_has_an_extra_that_the_package_declares() -> None:
    from importlib.metadata import metadata

    declared = set(metadata("gta-edge").get_all("Provides-Extra", []))
    assert {backend.extra for backend in BACKENDS.values()} <= declared


@pytest.mark.parametrize(
    ("name", "precision", "device", "compute"),
    [
        ("onnxruntime", "bf16", None, "fp32"),
        ("onnxruntime-cuda", "bf16", None, "bf16"),
        ("onnxruntime-cuda", "int4", None, "fp16"),
        ("tensorrt", "int8", None, "fp16"),
        ("torch", "fp16", "cpu", "fp32"),
        ("torch", "fp16", "cuda", "fp16"),
        ("torch", "int4", "cuda", "bf16"),
    ],
)
def test_what_is_computed_in_by_default(name: str, precision: str, device: str | None, compute: str) -> None:
    assert BACKENDS[name].compute_for(None, precision, device) == compute
    assert compute in BACKENDS[name].compute_types


@pytest.mark.parametrize(
    ("name", "model", "caches"),
    [
        ("tensorrt", "gta-1b", ("fp16", "int8", "fp8", "int4", "int4v2")),
        ("tensorrt", "gqa-1b", ("fp16", "int8", "fp8", "int4", "int4v2")),
        ("tensorrt-rtx", "gta-1b", ("fp16",)),
        ("onnxruntime-cuda", "gta-1b", ("fp16",)),
        ("torch", "gta-1b", ("fp16", "int8", "fp8", "int4", "int4v2")),
    ],
)
def test_what_a_cache_may_hold(name: str, model: str, caches: tuple[str, ...]) -> None:
    assert BACKENDS[name].cache_types(preset(model), "fp16") == caches


def test_without_kernels_for_its_widths_a_model_has_no_cache_of_8_bits() -> None:
    """Its attention is standard operators then."""
    wide = preset("gqa-1b").replace(num_attention_heads=5, num_key_value_heads=5, head_dim=256)
    assert BACKENDS["tensorrt"].cache_types(wide, "fp16") == ("fp16",)


def test_codes_of_a_token_fill_whole_words() -> None:
    """Of kernels, whole units; torch's own operations take what fills words of 16 bits."""
    narrow = preset("gqa-1b").replace(num_attention_heads=10, num_key_value_heads=10, head_dim=32)
    assert BACKENDS["tensorrt"].cache_types(narrow, "fp16") == ("fp16", "int8", "fp8", "int4")
    odd = preset("gqa-1b").replace(num_attention_heads=8, num_key_value_heads=8, head_dim=36)
    assert BACKENDS["torch"].cache_types(odd, "fp32") == ("fp32", "int8", "fp8", "int4")


def test_a_plan_is_for_the_fastest_of_a_device() -> None:
    assert (registry.fastest_on("cpu").name, registry.fastest_on("gpu").name) == ("onnxruntime", "tensorrt")


@pytest.mark.parametrize("compute", ["fp16", "int8", "", "FP32"])
def test_a_type_that_a_backend_does_not_compute_in(tiny_bundle: Path, compute: str) -> None:
    with pytest.raises(BackendError, match=f"^onnxruntime computes in fp32, not in {compute}; "):
        open_session(Bundle.open(tiny_bundle), "onnxruntime", compute=compute)


@pytest.mark.parametrize(
    ("types", "said"),
    [
        ({"cache_dtype": "fp16"}, "there is no engine; run: gta-edge build .* --compute fp16 --cache-dtype fp16$"),
        ({"cache_dtype": "fp32"}, "tensorrt has no cache of fp32 for GTAForCausalLM in bf16; expected bf16, or leave "),
        ({"compute": "fp32"}, "tensorrt computes in fp16, bf16, not in fp32; "),
    ],
)
def test_an_engine_is_asked_for_only_where_it_can_be_built(tiny_bundle: Path, types: dict[str, str], said: str) -> None:
    with pytest.raises((BackendError, EngineError), match=said):
        open_session(Bundle.open(tiny_bundle), "tensorrt", **types)


# --- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("ONNXRuntime", "(did you mean onnxruntime?)"),
        (" torch", "(did you mean torch?)"),
        ("tensorrt_rtx", "(did you mean tensorrt-rtx?)"),
        ("onnxrutnime", "(did you mean onnxruntime?)"),
        ("tpu", None),
        ("", None),
        ("x" * 10**6, None),
        ("\x1b[31m", None),
        ("\udcff", None),
    ],
)
def test_a_backend_that_there_is_not(tiny_bundle: Path, name: str, hint: str | None) -> None:
    with pytest.raises(BackendError, match="there are tensorrt, tensorrt-rtx, onnxruntime-cuda, onnxruntime, torch"):
        open_session(Bundle.open(tiny_bundle), name)
    said = "; ".join(unknown("no backend is called {}; there are {}", name, BACKENDS))
    assert said.isprintable()
    assert len(said) < 400
    assert said.endswith(hint) if hint else "did you mean" not in said
