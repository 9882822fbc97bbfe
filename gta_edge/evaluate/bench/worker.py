"""The process that measures one bundle on one backend: ``python -m gta_edge.evaluate.bench.worker``.

It reads one JSON object per line on stdin and answers each with one on stdout; ``process.py`` is the other end. Being a
process of its own makes its peak of memory its own, and lets it be another interpreter's. It does not outlive who
asked, whatever it is doing: it ends with its stdin, and where the system tells it, with its parent.
"""

from __future__ import annotations

import ctypes
import json
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
import numpy.typing as npt

from gta_edge.errors import BackendError, GtaEdgeError, InputError, OutputError
from gta_edge.evaluate.bench.beside import answered, speculated
from gta_edge.formats.bundle import Bundle
from gta_edge.model.kv_cache import bytes_per_token
from gta_edge.numerics.dtypes import BLOCK_CACHE_TYPES
from gta_edge.runtime.cache_policies import policy
from gta_edge.runtime.registry import BACKENDS, open_session
from gta_edge.runtime.session import Session
from gta_edge.support.memory import available_bytes
from gta_edge.support.ownership import ARTIFACTS

__all__ = ["Measurer", "serve"]

Ids = npt.NDArray[np.int64]
Document = dict[str, Any]

_WARM_UP_S = 0.1
_WARM_UP_STEPS = 4
_WARM_UP_CHUNKS = 2
_SECONDS_TO_END = 10.0
_PR_SET_PDEATHSIG = 1  # prctl(2)


class Measurer:
    """A loaded bundle, asked to check and to measure. Requests are dictionaries; ``answer`` says which there are."""

    def __init__(self) -> None:
        self._session: Session | None = None
        self._gpu = False  # whether to ask a GPU what it has free
        self._gpu_taken: int | None = None  # by this process, of what the GPU had free
        self._gpu_peak: int | None = None
        self._gpu_free_bytes: int | None = None
        self._shares_memory = False
        self._warm: tuple[int, ...] = ()  # shape of the prompt that was run before

    def answer(self, request: Document) -> Document:
        """Do what is asked: ``open``, ``check``, ``measure`` or ``bandwidth``.

        Raises:
            GtaEdgeError: the backend does not work, or failed.
        """
        operations: dict[str, Callable[[Document], Document]] = {
            "open": self._open,
            "check": self._check,
            "measure": self._measure,
            "bandwidth": _bandwidth,
        }
        return operations[request["do"]](request)

    def close(self) -> None:
        """Free what was loaded; a backend may keep on disk what it compiled."""
        if self._session:
            self._session.close()

    def _open(self, request: Document) -> Document:
        """Load a bundle and say what of it matters to the figures."""
        bundle = Bundle.open(request["bundle"])
        self._gpu = BACKENDS[request["backend"]].device != "cpu"
        held = _status_bytes("VmRSS") or 0
        before = self._ask_gpu()
        options = {name: request[name] for name in ("threads", "exact", "cache_dtype")}
        if request.get("cache") is not None:
            options["cache"] = policy(**request["cache"])
        guesses = bool(request.get("speculate")) and BACKENDS[request["backend"]].has_free_trees
        guesses = guesses and "cache" not in options and options["cache_dtype"] not in BLOCK_CACHE_TYPES
        if request.get("answers", 1) > 1 or guesses:  # as ``generate`` does
            options["trees"] = True
        cached = _records(bundle)
        start = time.perf_counter()
        session = self._session = open_session(bundle, request["backend"], **options)
        seconds = time.perf_counter() - start
        on_gpu = session.device == "gpu"
        self._gpu, self._shares_memory = on_gpu, on_gpu and self._shares_memory
        self._gpu_taken = held if self._shares_memory else 0
        self._count_gpu(before)
        return {
            "backend": session.backend,
            "compute": session.compute,
            "cache_dtype": session.cache_dtype,
            "device": session.device,
            "rounds_activations": session.rounds_activations,
            "holds_codes": session.weights_as_stored,
            "chunk_size": session.chunk_size,
            "max_length": session.max_length,
            "max_batch": getattr(session, "max_batch", None),
            "load_s": seconds,
            "lowered": _records(bundle) != cached,
            **_versions(),
        }

    def _check(self, request: Document) -> Document:
        """Run a prompt and the first greedy steps, and write the logits after each to a file; this warms up too.

        Request: ``prompt``, a .npy file of ids [B, T]; ``steps``; ``logits``, the file, float32 [1 + steps, B, V].
        """
        session, ids, before = self._ready(), np.load(request["prompt"]), self._ask_gpu()
        session.reset()
        path = Path(request["logits"])
        logits = session.forward(ids)
        _write(path, logits, "wb")
        for _ in range(request["steps"]):
            logits = session.forward(logits.argmax(-1)[:, None])
            _write(path, logits, "ab")
        self._warm = ids.shape
        self._count_gpu(before)
        return self._memory()

    def _measure(self, request: Document) -> Document:
        """Time a prompt, and each greedy step after it alone. Choosing the token is part of both.

        Request: ``prompt``, a .npy file of ids [B, T]; ``new_tokens``; ``warm_up``, whether a prompt of another shape
        than the last one's is first run in full, and not just its first chunks; ``speculate`` and ``answers``, what is
        timed beside it.
        """
        session, ids, before = self._ready(), np.load(request["prompt"]), self._ask_gpu()
        others = _Others()
        if not request["warm_up"] and ids.shape != self._warm:
            self._warm_up(ids[:, : _WARM_UP_CHUNKS * session.chunk_size], request["new_tokens"])
            self._warm = ids.shape
        self._warm_up(ids, request["new_tokens"])
        session.reset()
        start = time.perf_counter()
        chosen = session.forward(ids).argmax(-1)
        first = time.perf_counter() - start
        steps = []
        for _ in range(request["new_tokens"]):
            start = time.perf_counter()
            chosen = session.forward(chosen[:, None]).argmax(-1)
            steps.append(1e3 * (time.perf_counter() - start))
        busy = others.busy()
        self._count_gpu(before)
        return {
            "ttft_ms": 1e3 * first,
            "steps_ms": steps,
            "others_busy_s": busy,
            "cuda_graph": session.cuda_graph,
            **self._memory(),
            **self._beside(ids, request),
        }

    def _beside(self, ids: Ids, request: Document) -> Document:
        """Time what was asked for beside plain decoding; the cache's bytes and peaks are from before it."""
        session, steps, found = self._ready(), request["new_tokens"], Document()
        if request.get("speculate"):
            found["speculation"] = speculated(session, ids, steps)
        if request.get("answers", 1) > 1:
            found["answers"] = answered(session, ids, steps, request["answers"])
        return found

    def _warm_up(self, ids: Ids, new_tokens: int) -> None:
        """Run what will be timed: the prompt in full where it is new, and else just enough steps to wake up.

        It never takes more of the cache than the measurement, since attention may cost as the cache's capacity.
        """
        session, begin = self._ready(), time.perf_counter()
        session.reset()
        part = ids if ids.shape != self._warm else ids[:, :_WARM_UP_STEPS]
        self._warm = ids.shape
        logits, steps = session.forward(part), 0
        while steps < _WARM_UP_STEPS or time.perf_counter() - begin < _WARM_UP_S:
            if steps % new_tokens == 0:
                self._back_to(part)
            logits = session.forward(logits.argmax(-1)[:, None])
            steps += 1

    def _back_to(self, ids: Ids) -> None:
        """Forget what came after a prompt; where rows of it have been evicted since, run it again."""
        session = self._ready()
        try:
            session.truncate(ids.shape[1])
        except InputError:
            session.reset()
            session.forward(ids)

    def _ready(self) -> Session:
        if self._session is None:
            raise BackendError("nothing is open", "ask to open a bundle first")
        return self._session

    def _memory(self) -> Document:
        """Return the cache's bytes, the peak of this process's memory, and what it has taken of the GPU's.

        Where CPU and GPU share memory, ``gpu_bytes`` is what this process has taken of it in all.
        """
        session = self._ready()
        return {
            "cache_bytes": session.cache_bytes,
            "cache_bytes_per_token": bytes_per_token(session.config, session.cache_dtype),
            "cache_rows": float(session.rows.mean()),
            "peak_host_bytes": _status_bytes("VmHWM"),
            "gpu_bytes": self._gpu_peak,
            "gpu_free_bytes": self._gpu_free_bytes,
            "shares_memory": self._shares_memory,
        }

    def _ask_gpu(self) -> int | None:
        """Return what the GPU has free now, None where none is used."""
        if self._gpu:
            self._gpu_free_bytes, self._shares_memory = _gpu_free_bytes()
        return self._gpu_free_bytes if self._gpu else None

    def _count_gpu(self, before: int | None) -> None:
        """Add what the GPU has less of than before: by turns, since between them other processes take some too."""
        after = self._ask_gpu()
        if before is None or after is None or self._gpu_taken is None:
            self._gpu_taken = self._gpu_peak = None
        else:
            self._gpu_taken += before - after
            self._gpu_peak = max(self._gpu_peak or 0, self._gpu_taken)


class _Others:
    """How much of the CPU other programs take from now on."""

    def __init__(self) -> None:
        self._begin = self._now()

    def busy(self) -> tuple[float, float] | None:
        """Return seconds of cores that others took, and seconds on the clock; None where the system does not say.

        The system counts in ticks of 10 ms, so the first may be off by some, either way: sum it before it is divided.
        """
        (wall, all_s, own), (then, all_then, own_then) = self._now(), self._begin
        if all_s is None or all_then is None:
            return None
        return all_s - all_then - (own - own_then), wall - then

    @staticmethod
    def _now() -> tuple[float, float | None, float]:
        """Return seconds: on the clock, of all cores at work, of this process at work."""
        try:
            # user, nice, system, idle, iowait, irq, softirq, steal: proc(5)
            ticks = [int(n) for n in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
            busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, IndexError):
            busy = None
        return time.perf_counter(), busy, time.process_time()


def _gpu_free_bytes() -> tuple[int | None, bool]:
    """Return the GPU's free memory, and whether it is the CPU's; None without a GPU or what asks it."""
    from gta_edge.cuda.session import Cuda

    available = available_bytes()  # before there is a context, which takes memory too
    try:
        cuda = Cuda()
    except Exception:  # CUDA's bindings have errors of their own where there is no driver
        return None, False
    try:
        return available if cuda.shares_memory else cuda.free_bytes(), cuda.shares_memory
    finally:
        cuda.close()


def _bandwidth(request: Document) -> Document:
    """Measure the bandwidth of the memory of the CPU or of the GPU; request: ``device``."""
    from gta_edge.machine.probe import cpu_bandwidth, measure_gpu

    return {"bytes_per_s": measure_gpu().bandwidth if request["device"] == "gpu" else cpu_bandwidth()}


def _records(bundle: Bundle) -> set[tuple[str, int]]:
    """Return the records of a bundle's artifacts, with the times at which they were written."""
    return {(str(path), path.stat().st_mtime_ns) for path in (bundle.directory / ARTIFACTS).rglob("*.json")}


def _versions() -> Document:
    import platform

    from gta_edge.machine.info import package_versions
    from gta_edge.version import __version__

    return {"python": platform.python_version(), "versions": {"gta-edge": __version__} | package_versions()}


def _status_bytes(entry: str) -> int | None:
    """Return an entry of this process's status; unlike ``getrusage``'s peak it is not inherited from who started it."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{entry}:")), None)


def _write(path: Path, logits: npt.NDArray[np.float32], mode: str) -> None:
    """Add logits to a file.

    Raises:
        OutputError: there is no room for them.
    """
    try:
        with path.open(mode) as file:
            file.write(logits.tobytes())
    except OSError as error:
        raise OutputError(
            f"{path.parent}: temporary files cannot be written there ({error.strerror})",
            "free some space, or set TMPDIR to another directory",
        ) from error


def serve(requests: Iterable[str | bytes], answers: TextIO) -> None:
    """Answer requests until there are no more; an error is an answer too."""
    measurer = Measurer()
    for line in requests:
        answer: Document
        try:
            answer = {"ok": True} | measurer.answer(json.loads(line))
        except GtaEdgeError as error:
            answer = {"ok": False, "kind": type(error).__name__, "reason": error.problem, "remedy": error.remedy}
        except MemoryError:
            answer = {"ok": False, "reason": "not enough memory; use a shorter context, or close other programs"}
        except Exception as error:  # a backend's own: the parent reports it in one line
            answer = {"ok": False, "reason": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    measurer.close()


class _Requests:
    """The lines of a stream, read by a thread of their own, which ends the process where it works and they end.

    Who asks waits for the answer. So a stream that ends before it has gone with whoever asked.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._working = False
        threading.Thread(target=self._read, daemon=True).start()

    def __iter__(self) -> _Requests:
        return self

    def __next__(self) -> bytes:
        self._working = False
        line = self._lines.get()
        if line is None:
            raise StopIteration
        self._working = True
        return line

    def _read(self) -> None:
        with suppress(OSError):
            for line in self._stream:
                self._lines.put(line)
        if self._working:
            os._exit(1)
        self._lines.put(None)
        time.sleep(_SECONDS_TO_END)  # for what a backend has to tidy up
        os._exit(1)


def _end_with_parent() -> None:
    """Have the system end this process when its parent ends, where it can (Linux)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """Serve stdin and stdout; what libraries print goes to stderr."""
    _end_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        answers.write("\n")  # ends a line that was begun before this was ours
        answers.flush()
        # unbuffered: no lock that a thread could hold when the interpreter ends
        serve(_Requests(open(0, "rb", buffering=0, closefd=False)), answers)  # noqa: SIM115  # as long as the process
    except BrokenPipeError:  # who asked has gone
        os._exit(1)


if __name__ == "__main__":
    main()
