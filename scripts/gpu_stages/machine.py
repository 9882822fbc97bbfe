"""Stages on the machine itself: what it has, what it reaches, and what its compiler makes of the kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from scripts.gpu_stages.figures import REHEARSAL, tell

_DISTRIBUTIONS = (
    *("torch", "triton", "numpy", "ml-dtypes", "safetensors", "tokenizers", "typer", "rich"),
    *("cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"),
    *("onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu", "transformers", "flashinfer-python"),
    *("tensorrt", "tensorrt-rtx", "tensorrt-lean-cu13-bindings"),
    *("pytest", "pytest-xdist", "hypothesis"),
)
_QUERY = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit,ecc.mode.current"
_GRAPH_NODES = 500


def environment() -> None:
    """Tell versions and the GPU, and print what ``doctor`` says."""
    tell("versions", python=sys.version.split()[0], **{name: _version(name) for name in _DISTRIBUTIONS})
    if smi := shutil.which("nvidia-smi"):
        _show([smi, f"--query-gpu={_QUERY}", "--format=csv"])
    if power := shutil.which("nvpmodel"):  # a Jetson's power mode
        _show([power, "-q"])
    _show([sys.executable, "-m", "gta_edge", "doctor"])
    if not REHEARSAL:
        from gta_edge.libraries.cuda import driver_cuda_version

        tell("gpu", driver=_driver(smi), driver_cuda=driver_cuda_version(), cpus=os.cpu_count(), **_gpu())


def _gpu() -> dict[str, Any]:
    """Return what is known of the GPU: as much as torch says, and without it what the kernels go by."""
    try:
        import torch
    except ImportError:
        from gta_edge.cuda.gpu import current_gpu

        found = current_gpu()
        return {"name": found.name, "architecture": found.architecture, "processors": found.processors}
    print(torch.__config__.show())
    properties, (major, minor) = torch.cuda.get_device_properties(0), torch.cuda.get_device_capability(0)
    return {
        "name": properties.name,
        "architecture": f"sm_{major}{minor}",
        "processors": properties.multi_processor_count,
        "l2_MiB": properties.L2_cache_size / 2**20,
        "memory_GiB": properties.total_memory / 2**30,
        "torch_cuda": torch.version.cuda,
    }


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _show(command: list[str]) -> None:
    """Print what a command prints; what it says is of interest, and not whether it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=40)
        print(done.stdout + done.stderr)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(error)


def _driver(smi: str | None) -> str | None:
    if smi is None:
        return None
    done = subprocess.run(
        [smi, "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
    )
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def constants() -> None:
    """Tell what a launch in a CUDA graph costs, and the rates of copies, reads and matmuls: what estimates build on."""
    if REHEARSAL:
        tell("constants", graph_launch_us=1.0)
        return
    import torch
    from gpu_timing import captured, rates, seconds

    from gta_edge.errors import BackendError
    from gta_edge.machine.probe import measure_gpu

    x = torch.zeros(64, device="cuda")

    def nodes() -> None:
        for _ in range(_GRAPH_NODES):
            x.add_(1)

    graph = captured(nodes)
    tell("constants", graph_launch_us=1e6 * seconds(graph.replay, 0.2) / _GRAPH_NODES)
    found = rates(quick=False)
    tell(
        "constants",
        copy_GB_per_s=found["copy_bytes_per_s"] / 1e9,
        read_GB_per_s=found["read_bytes_per_s"] / 1e9,
        bf16_TFLOP_per_s=found["matmul_flops_per_s"] / 1e12,
    )
    try:
        device = measure_gpu()
        tell("constants", plan_copy_GB_per_s=device.bandwidth / 1e9, plan_fp16_TFLOP_per_s=device.rates["fp16"] / 1e12)
    except BackendError as error:
        tell("problem", why=f"plan cannot measure this GPU: {error}")


def programs() -> None:
    """Compile and load what GTA-1B runs; tell registers, spills, and how many blocks fit a multiprocessor."""
    from gta_edge.cuda.compiler import compile_program
    from gta_edge.cuda.gpu import Launcher, current_gpu
    from gta_edge.plugins.domain import KERNELS

    if REHEARSAL:
        from tests.helpers.simulated_gpu import install

        install()
    else:
        import torch

        torch.zeros(1, device="cuda")  # torch's context
    gpu = current_gpu()
    launches = list(_launches(gpu))
    resources: dict[Any, Any] = {}
    for program in dict.fromkeys(each.program for _, each in launches):
        start = time.perf_counter()
        compiled = compile_program(program, gpu.architecture, KERNELS) if not REHEARSAL else None
        resources[program] = compiled.resources if compiled else {}
        tell("program", source=program.source, seconds=round(time.perf_counter() - start, 2))
    for case, each in launches:
        launch = each.launch
        (kernel,) = (
            Launcher(gpu, "campaign's", KERNELS).load({each.program: {each.kernel: launch.shared_bytes}}).values()
        )
        try:
            fitting = kernel.occupancy.max_active_blocks_per_multiprocessor(launch.threads, launch.shared_bytes)
        except Exception as error:  # of a kind that differs from release to release; the rest is worth having
            fitting = str(error)[:80]
        found = resources[each.program].get(each.kernel)
        tell(
            "launch",
            case=case,
            kernel=each.kernel,
            grid=list(launch.grid),
            threads=launch.threads,
            shared_bytes=launch.shared_bytes,
            registers=found.registers if found else None,
            spill_bytes=found.spill_bytes if found else None,
            blocks_per_processor=fitting,
        )


def _launches(gpu: Any) -> Iterator[tuple[str, Any]]:
    """Yield what GTA-1B launches, each op by its own plans."""
    from gta_edge.plugins.attention import launches as attention
    from gta_edge.plugins.matmul import launches as matmul
    from scripts.gpu_stages.cases import ATTENTION, MATMULS, STEPS

    plans = attention.programs_for(ATTENTION, gpu.architecture)
    for tokens, capacity in STEPS:
        found = attention.plan_attention(plans, gpu.processors, batch=1, tokens=tokens, capacity=capacity)
        yield from ((f"attention, {tokens} new of {capacity}", each) for each in found.launches)
    products = matmul.programs_for(MATMULS[0].variant, gpu.architecture)
    for each in MATMULS:
        plan = matmul.plan_matmul(products, gpu.processors, each.rows, each.in_features, each.output_sizes)
        yield f"matmul, {each.rows} x {each.in_features} x {sum(each.output_sizes)}", plan


if __name__ == "__main__":
    {"environment": environment, "constants": constants, "programs": programs}[sys.argv[1]]()
