"""TensorRT's builder: a lowered model and its profiles to a serialised engine."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gta_edge.cuda.gpu import OLDEST, current_gpu
from gta_edge.errors import BackendError, EngineError
from gta_edge.libraries.tensorrt import TensorRT, load
from gta_edge.plugins import register
from gta_edge.runtime.tensorrt.engine import EngineSpec, compute_capability
from gta_edge.runtime.tensorrt.engine_kind import ENGINES
from gta_edge.runtime.tensorrt.log import first_reason, new_log, started
from gta_edge.runtime.tensorrt.runtime_cache import read_cached
from gta_edge.support.files import cache_directory, write_cached
from gta_edge.support.progress import Progress, silent
from gta_edge.support.text import brief

__all__ = ["Target", "build_plan"]

_log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_OLDEST = 10 * OLDEST[0] + OLDEST[1]

Shapes = Mapping[str, Sequence[Sequence[int]]]
"""Least, usual and largest shape of every input by name."""


@dataclass(frozen=True)
class Target:
    """What an engine is built with and for.

    Attributes:
        trt: the TensorRT that builds.
        compute_capabilities: of the GPUs, ``8.7``.
        gpu: the GPU here if it is the only one, its name and size; TensorRT then times kernels on it.
        gpu_name: name of that GPU alone, empty if it is none.
    """

    trt: TensorRT
    compute_capabilities: tuple[str, ...]
    gpu: str | None
    gpu_name: str = ""

    @classmethod
    def choose(cls, engine: str, asked: Sequence[str] = (), *, rtx_would_do: bool = False) -> Target:
        """Return the target for the GPUs asked for, else for the one here, else for all that there are.

        TensorRT builds on the GPU that will run the engine. TensorRT-RTX builds for any that it knows, without it, and
        for several at once: what they share is nearly all of the engine.

        Args:
            engine: ``tensorrt`` or ``tensorrt-rtx``.
            asked: compute capabilities.
            rtx_would_do: as ``libraries.tensorrt.load`` takes it.

        Raises:
            BackendError: TensorRT or the GPU is missing, or it cannot build for what was asked.
        """
        trt, anywhere = load(engine, rtx_would_do=rtx_would_do), ENGINES[engine].builds_for_others
        try:
            gpu = current_gpu()
            here = compute_capability(gpu.architecture)
        except BackendError as error:
            if not anywhere:
                raise BackendError(
                    f"{engine} builds on the GPU that will run the engine: {error.problem}", error.remedy
                ) from error
            gpu, here = None, None
        if anywhere:
            known = _known_capabilities(trt)
            chosen = tuple(asked) or ((here,) if here else known)
            unknown = next((each for each in chosen if each not in known), None)
            if unknown is not None:
                raise BackendError(
                    f"{engine} {trt.version_text} does not build for compute capability {brief(unknown)}",
                    f"expected {', '.join(known)}",
                )
        else:
            chosen = (str(here),)
            other = next((each for each in asked if each != here), None)
            if other is not None:
                raise BackendError(
                    f"--compute-capability is {brief(other)} and the GPU here has {here}",
                    f"{engine} builds on the GPU that will run the engine",
                )
        if gpu is None or chosen != (here,):
            return cls(trt, chosen, None)
        return cls(trt, chosen, f"{gpu.name}, {gpu.processors} SMs", gpu.name)

    @property
    def tensorrt(self) -> str:
        """TensorRT's version."""
        return self.trt.version_text

    @property
    def newer_ops(self) -> bool:
        """Whether the parser knows the ops of opset 23 and 24."""
        return self.trt.parses_newer_ops


def build_plan(
    model: Path, spec: EngineSpec, profiles: Sequence[Shapes], target: Target, progress: Progress = silent
) -> memoryview:
    """Return the serialised engine.

    Args:
        model: the lowered ONNX file.
        spec: what the engine is for.
        profiles: shapes of the inputs, for each profile.
        target: what builds it, and for which GPU.
        progress: told of TensorRT's phases.

    Raises:
        EngineError: TensorRT refuses the model, or cannot build it; with its own first error.
        BackendError: TensorRT cannot start.
        KeyboardInterrupt: Ctrl-C came meanwhile.
    """
    interrupt = _Interrupt()
    with interrupt.handled():
        try:
            plan = _plan(model, spec, profiles, target, progress, interrupt)
        except EngineError:
            if not interrupt.asked:
                raise
    interrupt.deliver()
    return plan


def _plan(
    model: Path,
    spec: EngineSpec,
    profiles: Sequence[Shapes],
    target: Target,
    progress: Progress,
    interrupt: _Interrupt,
) -> memoryview:
    trt = target.trt.module
    if ENGINES[spec.engine].takes_plugins:
        register(trt)
    log = new_log(trt)
    builder = started(trt.Builder, log, "builder")
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if target.trt.strongly_typed_flag else 0
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(model)):
        reason = first_reason([*(parser.get_error(i).desc() for i in range(parser.num_errors)), *log.errors])
        raise EngineError(f"TensorRT {target.tensorrt} refuses the model ({reason})", "report this line")

    config = builder.create_builder_config()
    monitor = _monitor(trt, progress, interrupt)
    config.progress_monitor = monitor
    if target.trt.compiles_at_run_time:
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # otherwise a run may allocate: no CUDA graphs
    if ENGINES[spec.engine].builds_for_others:
        config.num_compute_capabilities = len(target.compute_capabilities)
        for i, each in enumerate(target.compute_capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{each.replace('.', '')}"), i)
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for i in range(network.num_inputs):
            name = network.get_input(i).name
            profile.set_shape(name, *shapes[name])
        config.add_optimization_profile(profile)
    timings = _timing_cache(target)
    if timings:
        content = read_cached(timings)
        known = config.create_timing_cache(content)
        if known is None or not config.set_timing_cache(known, ignore_mismatch=False):  # damaged, or another GPU's
            _log.warning("%s: is not used (%s); kernels are timed anew", timings, first_reason(log.errors))
            log.errors.clear()
            config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)

    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(
            f"TensorRT {target.tensorrt} cannot build the engine ({first_reason(log.errors)})",
            "if memory is short, give a smaller --max-length or --max-batch",
        )
    kept = config.get_timing_cache() if timings else None
    if timings and kept is not None:
        write_cached(timings, memoryview(kept.serialize()))
    return memoryview(plan)


def _known_capabilities(trt: TensorRT) -> tuple[str, ...]:
    """Return what TensorRT-RTX builds for, from 8.0 on: older GPUs have no bf16 and take no int4."""
    names = [name for name in dir(trt.module.ComputeCapability) if name.startswith("SM")]
    known = {f"{name[2:-1]}.{name[-1]}": int(name[2:]) for name in names}
    return tuple(text for text, number in sorted(known.items(), key=lambda item: item[1]) if number >= _OLDEST)


def _timing_cache(target: Target) -> Path | None:
    """Return where timings of kernels on this GPU are kept: they make the next build much shorter."""
    directory = cache_directory()
    if target.gpu is None or directory is None or not target.trt.times_kernels:
        return None
    name = "".join(c if c.isalnum() else "-" for c in f"{target.trt.flavour}-{target.tensorrt}-{target.gpu}")
    with suppress(OSError):
        (directory / "timings").mkdir(parents=True, exist_ok=True)
        return directory / "timings" / f"{name}.cache"
    return None


class _Interrupt:
    """Ctrl-C, or another signal to end, while TensorRT works.

    Python would raise KeyboardInterrupt in whatever of it runs next, which is the log or the monitor, called by
    TensorRT; and that prints exceptions and goes on. So it is kept here, and the monitor ends the build.
    """

    number: int | None = None

    @property
    def asked(self) -> bool:
        """Whether one came."""
        return self.number is not None

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Take the signals that are handled in Python; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: Any) -> None:
            self.number = number

        before = {number: signal.getsignal(number) for number in _SIGNALS}
        for number, handler in before.items():
            if callable(handler):
                signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                if callable(handler):
                    signal.signal(number, handler)

    def deliver(self) -> None:
        """Let what came have its effect now."""
        if self.number is not None:
            signal.raise_signal(self.number)
            raise KeyboardInterrupt  # of the progress itself, or a handler that raises nothing


def _monitor(trt: Any, progress: Progress, interrupt: _Interrupt) -> Any:
    """Return a progress monitor that passes outermost phases on, and ends the build at Ctrl-C."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # TensorRT has no stubs, so its base class is Any
        def __init__(self) -> None:
            super().__init__()
            self._outer: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self._outer[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                if phase_name in self._outer:
                    progress(phase_name, step + 1, self._outer[phase_name])
            except KeyboardInterrupt:  # of the progress itself; it must not pass through C++
                interrupt.number = signal.SIGINT
            return not interrupt.asked

        def phase_finish(self, phase_name: str) -> None:
            total = self._outer.pop(phase_name, None)
            if total is not None:
                progress(phase_name, total, total)

    return Monitor()
