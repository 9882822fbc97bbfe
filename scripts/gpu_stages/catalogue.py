"""The stages of the GPU campaign, ordered by worth: what is left when the time is over is missed least."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["STAGES", "Stage"]


@dataclass(frozen=True)
class Stage:
    """One process of the campaign.

    Attributes:
        name: for ``--only``, and in the results.
        what: it shows, in a line.
        limit_s: when it is ended.
        command: with the places ``{python}`` and ``{output}``, and ``{program:NAME}`` for a program that is looked for
            on the path and in CUDA's toolkit; without it the stage is left out.
        needs: Python modules without which it is left out, also where one is older than ``pyproject.toml`` requires; or
            ``distribution:NAME``.
        environment: variables that it runs with.
        rehearsal: the command with which ``--rehearse`` runs it; None where nothing of it runs without a GPU, or
            another stage's rehearsal has it.
        is_test: whether it is pytest, of which nothing but skipped tests proves nothing.
    """

    name: str
    what: str
    limit_s: int
    command: tuple[str, ...]
    needs: tuple[str, ...] = ("torch", "numpy", "cuda.core")
    environment: Mapping[str, str] = field(default_factory=dict)
    rehearsal: tuple[str, ...] | None = None
    is_test: bool = False


_TORCH = ("torch", "numpy", "cuda.core")
_EXPORT = (*_TORCH, "onnx", "onnx_ir", "onnxscript", "tokenizers", "typer")
_PYTEST = ("pytest", "ml_dtypes", "rich", "safetensors", "tokenizers", "typer")
_SIMULATED = ("-p", "tests.helpers.simulated_gpu")


def _module(module: str, *arguments: str) -> tuple[str, ...]:
    return ("{python}", "-m", f"scripts.gpu_stages.{module}", *arguments)


def _own(
    name: str,
    what: str,
    limit_s: int,
    command: tuple[str, ...],
    *,
    needs: tuple[str, ...] = _TORCH,
    rehearsed: bool | tuple[str, ...] = True,
) -> Stage:
    """Return a stage that is a module here, which knows itself what to do in a rehearsal.

    Args:
        name: of the stage.
        what: it shows.
        limit_s: its time limit.
        command: of ``_module``.
        needs: as for ``Stage``.
        rehearsed: False where another stage's rehearsal takes this one's arguments too, or that command.
    """
    rehearsal = rehearsed if isinstance(rehearsed, tuple) else command if rehearsed else None
    return Stage(name, what, limit_s, command, needs, rehearsal=rehearsal)


def _benchmark(script: str, name: str, *arguments: str) -> tuple[str, ...]:
    results = ("--json", f"{{output}}/{name}.json", "--markdown", f"{{output}}/{name}.md")
    return ("{python}", f"benchmarks/{script}", *arguments, *results)


def _tests(
    name: str, limit_s: int, *arguments: str, needs: tuple[str, ...] = _TORCH, rehearsal: tuple[str, ...] | None = None
) -> Stage:
    """Return a stage of the tests that are marked ``gpu``.

    Warnings are shown and no errors: some are of the machine's releases only.

    Args:
        name: of the stage.
        limit_s: its time limit.
        arguments: pytest's: a module, and what to choose of it.
        needs: as for ``Stage``.
        rehearsal: what to choose in the simulation.
    """
    pytest: tuple[str, ...] = (
        "{python}",
        "-m",
        "pytest",
        "-q",
        "-rfEs",
        "--tb=short",
        "-W",
        "default",
        "-m",
        "gpu",
        "--maxfail=40",
    )
    pytest = (*pytest, "-p", "no:cacheprovider")
    return Stage(
        name,
        f"pytest -m gpu {' '.join(arguments)}",
        limit_s,
        (*pytest, "{spread}", *arguments),
        (*_PYTEST, *needs),
        {"GTA_EDGE_REQUIRE_GPU": "1"},
        None if rehearsal is None else (*pytest, *_SIMULATED, *arguments, *rehearsal),
        is_test=True,
    )


def _sanitizer(tool: str, limit_s: int) -> Stage:
    """Return a stage of compute-sanitizer; initcheck has to see what torch's kernels write, the others only ours."""
    ours = () if tool == "initcheck" else ("--kernel-regex", "kns=gta_")
    sanitizer = ("{program:compute-sanitizer}", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all")
    return Stage(
        tool,
        f"a few small launches under compute-sanitizer --tool {tool}",
        limit_s,
        (*sanitizer, *ours, *_module("launches", "small")),
        _TORCH,
        # allocations of their own, and not parts of torch's: then what is beyond one is beyond memory
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        _module("launches", "small", "large") if tool == "memcheck" else None,
    )


_LEAN = "tensorrt_lean_bindings"
_ENGINES = "tests/runtime/tensorrt/test_session.py"

STAGES: tuple[Stage, ...] = (
    _own("environment", "versions, GPU, driver, doctor", 60, _module("machine", "environment"), needs=()),
    _own("constants", "cost of a launch, rates of copies, reads and matmuls", 60, _module("machine", "constants")),
    _own("programs", "GTA-1B's kernels compiled and loaded: registers, occupancy", 90, _module("machine", "programs")),
    _own(
        "exact-decode",
        "attention, few new tokens, against float64",
        60,
        _module("exactness", "decode"),
        rehearsed=_module("exactness", "decode", "few", "prefill", "blocks", "many"),
    ),
    _own("exact-few", "matmuls of few rows, against float64", 60, _module("exactness", "few"), rehearsed=False),
    _own("exact-prefill", "attention, prompts, against float64", 60, _module("exactness", "prefill"), rehearsed=False),
    _own(
        "exact-blocks",
        "attention with a cache in int4 and int4v2, against the bits that are to be written, and float64",
        90,
        _module("exactness", "blocks"),
        rehearsed=False,
    ),
    _own("exact-many", "matmuls of many rows, against float64", 60, _module("exactness", "many"), rehearsed=False),
    _own(
        "model-bf16",
        "GTA-1B in bf16: a token at 4 contexts beside the floor, kernels of a token and of prompts",
        90,
        _module("models", "gta-1b/bf16"),
        rehearsed=_module("models", "gta-1b/bf16", "gta-1b/int4", "gqa-1b/bf16"),
    ),
    _own("model-int4", "the same in int4", 90, _module("models", "gta-1b/int4"), rehearsed=False),
    _own(
        "logits-bf16",
        "GTA-1B's logits in bf16 against torch's own operations",
        60,
        _module("agreement", "gta-1b/bf16"),
        rehearsed=_module("agreement", "gta-1b/bf16", "gta-1b/int4", "gqa-1b/bf16"),
    ),
    _own("logits-int4", "the same in int4", 90, _module("agreement", "gta-1b/int4"), rehearsed=False),
    _own("logits-gqa-bf16", "GQA-1B's logits in bf16", 60, _module("agreement", "gqa-1b/bf16"), rehearsed=False),
    _own("widths", "calls of 1 to 16 tokens of GTA-1B as graphs, guesses", 60, _module("widths", "gta-1b/int4")),
    _own("liveness", "a captured step after another prompt, and memory handed out anew", 45, _module("liveness")),
    _own("shipped", "the shipped model: export, verify, generate", 90, _module("shipped"), needs=_EXPORT),
    _tests("tests-attention", 120, "tests/plugins/attention/test_kernels_gpu.py", rehearsal=("-k", "zeros and bf16")),
    _tests(
        "tests-block-attention",
        120,
        "tests/plugins/attention/test_block_kernels_gpu.py",
        rehearsal=("-k", "exact and gqa-9-3 and bf16 and int4v2 and past1"),
    ),
    _tests(
        "tests-managed-attention",
        120,
        "tests/plugins/attention/test_managed_kernels_gpu.py",
        rehearsal=("-k", "exact and gqa and last and int8 and 333"),
    ),
    _tests("tests-cache", 60, "tests/plugins/cache/test_kernels_gpu.py", rehearsal=("-k", "int8 and gqa")),
    _tests("tests-cache-rows", 60, "tests/runtime/test_cuda_cache.py"),
    _tests("tests-matmul", 90, "tests/plugins/matmul/test_kernels_gpu.py", rehearsal=("-k", "multiple_of_128")),
    _tests(
        "tests-elementwise",
        45,
        "tests/plugins/elementwise/test_kernels_gpu.py",
        rehearsal=("-k", "raw_addresses and 264"),
    ),
    _tests(
        "tests-torch",
        100,
        "tests/runtime/torch/test_gpu.py",
        "tests/runtime/torch/test_decode_step.py",
        "tests/runtime/torch/test_managed_gpu.py",
        "tests/runtime/torch/test_cache_types_gpu.py",
    ),
    _tests("tests-torch-int4", 90, "tests/runtime/torch/test_quantized.py"),
    _tests("tests-torch-bundles", 60, "tests/runtime/torch/test_quantized_bundles.py", needs=_EXPORT),
    _tests("tests-matmul-op", 60, "tests/plugins/matmul/test_definition.py", needs=(*_EXPORT, "hypothesis")),
    _tests("tests-plan", 30, "tests/plan/test_roofline.py", needs=(*_TORCH, "hypothesis")),
    Stage(
        "matmuls",
        "matmuls beside cuBLAS and torch's int4",
        90,
        _benchmark("int4.py", "matmuls", "--quick", "--rows", "1,8,512"),
    ),
    _own("model-gqa-bf16", "GQA-1B in bf16, as GTA-1B above", 120, _module("models", "gqa-1b/bf16"), rehearsed=False),
    _sanitizer("memcheck", 60),
    _sanitizer("racecheck", 60),
    Stage(
        "profile",
        "the main kernels under Nsight Compute",
        60,
        _module("profile", "{program:ncu}", "{output}/ncu.csv"),
    ),
    _tests(
        "tests-attention-plugin",
        60,
        "tests/plugins/attention/test_plugin.py",
        "tests/plugins/attention/test_plugin_managed_gpu.py",
        "tests/plugins/attention/test_plugin_blocks_gpu.py",
        needs=(*_EXPORT, _LEAN),
    ),
    _tests("tests-matmul-plugin", 60, "tests/plugins/matmul/test_plugin.py", needs=(*_EXPORT, _LEAN)),
    Stage(
        "attention",
        "attention beside scaled_dot_product_attention and FlashInfer",
        120,
        _benchmark("kernels.py", "attention", "--quick", "--only", "decode,prefill", "--contexts", "512,4096"),
    ),
    _sanitizer("synccheck", 60),
    _sanitizer("initcheck", 60),
    _tests("tests-tensorrt", 180, _ENGINES, "-k", "not rtx", needs=("numpy", "tensorrt")),
    _tests("tests-tensorrt-timing", 90, "tests/runtime/tensorrt/test_matmul_timing.py", needs=("numpy", "tensorrt")),
    _tests("tests-tensorrt-rtx", 180, _ENGINES, "-k", "rtx", needs=("numpy", "tensorrt_rtx")),
    _tests(
        "tests-onnxruntime-cuda",
        120,
        "tests/runtime/onnxruntime/test_cuda_session.py",
        "tests/runtime/onnxruntime/test_cuda_managed.py",
        "tests/runtime/onnxruntime/test_cuda_trees.py",
        needs=(*_EXPORT, "distribution:onnxruntime-gpu"),
    ),
)
