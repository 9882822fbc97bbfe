"""Compiling the kernels with NVRTC, which needs no GPU, and the cache of what was compiled."""

import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gta_edge.cuda import compiler
from gta_edge.cuda.architecture import ARCHITECTURES, KIB
from gta_edge.cuda.compiler import Resources, compile_program
from gta_edge.errors import BackendError
from gta_edge.libraries import cuda
from gta_edge.libraries.cuda import cuda_extra, driver_cuda_version
from gta_edge.libraries.install import install_command
from gta_edge.model.config import GTAConfig
from gta_edge.model.presets import PRESETS, preset
from gta_edge.numerics.dtypes import BLOCK_CACHE_TYPES
from gta_edge.plugins.attention.definition import Features, Sizes
from gta_edge.plugins.attention.launches import Programs, decode_launches, prefill_launches, programs_for
from gta_edge.plugins.attention.tiling import DECODE_TOKENS, Program, Variant
from gta_edge.plugins.cache.launches import Program as CacheProgram
from gta_edge.plugins.domain import KERNELS
from tests.helpers.nvrtc import ALL_COMPILES, BUILT_FOR, REGISTERS, needs_nvrtc

SIZES = Sizes(5, 1, 1, 64, 128, 1280)
STUB = """
#include <stub.cuh>
extern "C" __global__ void gta_stub(float* x) { x[threadIdx.x] = GTA_STUB + GTA_KEY_DIM; }
"""


def stub_program(source: str = "stub.cu") -> Program:
    return Program(source, ("gta_stub",), (("GTA_STUB_TILE", 1),), 32, 0, 1, Variant(SIZES, "fp16", "fp16"))


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    """A directory of kernel sources that compile in no time, in a path that is not easy."""
    directory = tmp_path / "a place with spaces, $HOME and 'ü'"
    directory.mkdir()
    (directory / "stub.cu").write_text(STUB)
    (directory / "stub.cuh").write_text("#define GTA_STUB 2\n")
    return directory


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own: the directory of the entries."""
    monkeypatch.setenv("GTA_EDGE_CACHE", str(tmp_path / "the cache"))
    for name in compiler._OPTION_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "the cache" / "kernels"


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the sources that were really compiled."""
    names, original = [], compiler._compile

    def counted(program: Program, architecture: str, kernels: Path) -> compiler.Compiled:
        names.append(program.source)
        return original(program, architecture, kernels)

    monkeypatch.setattr(compiler, "_compile", counted)
    return names


def entry(cache: Path, suffix: str) -> Path:
    (path,) = cache.glob(f"*{suffix}")
    return path


# --- what ptxas says -------------------------------------------------------------------------------------------------

LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'plain' for 'sm_110'
ptxas info    : Function properties for plain
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers
ptxas info    : Compile time = 7.928 ms
ptxas info    : Compiling entry function 'all_of_it' for 'sm_80'
ptxas info    : Function properties for all_of_it
    200 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Function properties for called
    16 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 216 bytes cumulative stack size, 256 bytes smem, 364 bytes cmem[0]
"""


def test_the_report_of_each_kernel_is_read() -> None:
    assert compiler._resources(LOG) == {
        "plain": Resources(registers=10, spill_bytes=0, stack_bytes=0, shared_bytes=0),
        "all_of_it": Resources(registers=255, spill_bytes=28, stack_bytes=200, shared_bytes=256),
    }
    assert compiler._resources("") == {}


@needs_nvrtc
def test_the_report_is_that_of_the_machine_code(kernels: Path) -> None:
    (kernels / "stub.cu").write_text("""
extern "C" __global__ void gta_stub(float* x, int n) {
    __shared__ float shared[64];
    float local[100];
    for (int i = 0; i < n; ++i) local[i * 7 % 100] = x[i];
    shared[threadIdx.x] = local[n % 100];
    x[threadIdx.x] = shared[n];
}
extern "C" __global__ void gta_other(float* x) { *x = 0; }
""")
    compiled = compile_program(stub_program(), "sm_87", kernels)
    assert compiled.cubin.startswith(b"\x7fELF")
    assert set(compiled.resources) == {"gta_stub", "gta_other"}
    resources = compiled.resources["gta_stub"]
    assert resources.shared_bytes == 256
    assert resources.stack_bytes == 400
    assert resources.spill_bytes == 0
    assert 0 < resources.registers < 64


# --- the cache -------------------------------------------------------------------------------------------------------


@needs_nvrtc
def test_a_second_time_is_read_from_the_cache(kernels: Path, cache: Path, compilations: list[str]) -> None:
    first = compile_program(stub_program(), "sm_80", kernels)
    assert compile_program(stub_program(), "sm_80", kernels) == first
    assert compilations == ["stub.cu"]
    assert sorted(path.suffix for path in cache.iterdir()) == [".cubin", ".json"]  # nothing else is left
    assert json.loads(entry(cache, ".json").read_text())["kernels"]["gta_stub"]["spill_bytes"] == 0
    assert re.fullmatch(r"[0-9a-f]{64}", entry(cache, ".cubin").stem)


@needs_nvrtc
@pytest.mark.parametrize(
    "change", ["source", "header", "new file", "architecture", "tile", "variant", "flags", "nvrtc"]
)
def test_what_the_code_depends_on_is_compiled_anew(
    change: str, kernels: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program, architecture = stub_program(), "sm_80"
    compile_program(program, architecture, kernels)
    if change == "source":
        (kernels / "stub.cu").write_text(STUB + "// changed")
    elif change == "header":
        (kernels / "stub.cuh").write_text("#define GTA_STUB 3\n")
    elif change == "new file":
        (kernels / "new.cuh").write_text("")
    elif change == "architecture":
        architecture = "sm_87"
    elif change == "tile":
        program = Program("stub.cu", ("gta_stub",), (("GTA_STUB_TILE", 2),), 32, 0, 1, program.variant)
    elif change == "variant":
        program = Program("stub.cu", ("gta_stub",), program.tiles, 32, 0, 1, Variant(SIZES, "fp16", "int8"))
    elif change == "flags":
        monkeypatch.setenv("NVRTC_APPEND_FLAGS", "--fmad=false")
    elif change == "nvrtc":
        monkeypatch.setattr(compiler, "_nvrtc_version", lambda architecture: (99, 0))
    compile_program(program, architecture, kernels)
    assert compilations == ["stub.cu", "stub.cu"]


@needs_nvrtc
def test_where_the_package_lies_does_not_matter(kernels: Path, compilations: list[str]) -> None:
    first = compile_program(stub_program(), "sm_80", kernels)
    moved = kernels.rename(kernels.with_name("moved"))
    assert compile_program(stub_program(), "sm_80", moved).cubin == first.cubin
    assert compilations == ["stub.cu"]


def damage_bit(cubin: Path, report: Path) -> None:
    content = bytearray(cubin.read_bytes())
    content[-1] ^= 1
    cubin.write_bytes(content)


DAMAGE = {
    "a bit": damage_bit,
    "cut off": lambda cubin, report: cubin.write_bytes(cubin.read_bytes()[:100]),
    "empty": lambda cubin, report: cubin.write_bytes(b""),
    "no code": lambda cubin, report: cubin.unlink(),
    "no report": lambda cubin, report: report.unlink(),
    "half a report": lambda cubin, report: report.write_bytes(report.read_bytes()[:50]),
    "no text": lambda cubin, report: report.write_bytes(b"\xff\xfe"),
    "a list": lambda cubin, report: report.write_text("[1]"),
    "nested": lambda cubin, report: report.write_text("[" * 100_000),
    "another hash": lambda cubin, report: report.write_text(json.dumps({"sha256": "0", "kernels": {}, "log": ""})),
    "no numbers": lambda cubin, report: report.write_text(report.read_text().replace(": 0,", ': "0",')),
    "unknown numbers": lambda cubin, report: report.write_text(report.read_text().replace("spill_bytes", "spilled")),
}


@needs_nvrtc
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_replaced(damage: str, kernels: Path, cache: Path, compilations: list[str]) -> None:
    first = compile_program(stub_program(), "sm_80", kernels)
    DAMAGE[damage](entry(cache, ".cubin"), entry(cache, ".json"))
    for _ in range(2):
        assert compile_program(stub_program(), "sm_80", kernels) == first
    assert compilations == ["stub.cu"] * 2


@needs_nvrtc
def test_a_cache_that_cannot_be_written_is_no_failure(
    kernels: Path, tmp_path: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GTA_EDGE_CACHE", str(tmp_path / "file"))  # also for root, whom no permission stops
    for _ in range(2):
        assert compile_program(stub_program(), "sm_80", kernels).resources
    assert compilations == ["stub.cu"] * 2


@needs_nvrtc
def test_an_entry_that_cannot_be_replaced_is_no_failure(kernels: Path, cache: Path) -> None:
    first = compile_program(stub_program(), "sm_80", kernels)
    path = entry(cache, ".json")
    path.unlink()
    path.mkdir()
    assert compile_program(stub_program(), "sm_80", kernels) == first


@needs_nvrtc
def test_sources_that_change_while_they_are_compiled_are_not_cached(
    kernels: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = compiler._compile

    def edited(program: Program, architecture: str, directory: Path) -> compiler.Compiled:
        (kernels / "stub.cuh").write_text("#define GTA_STUB 4\n")
        return original(program, architecture, directory)

    monkeypatch.setattr(compiler, "_compile", edited)
    compile_program(stub_program(), "sm_80", kernels)
    assert not cache.exists()


@needs_nvrtc
def test_many_at_once_are_safe(kernels: Path, cache: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: compile_program(stub_program(), "sm_80", kernels), range(24)))
    assert len({result.cubin for result in results}) == 1
    assert len(list(cache.iterdir())) == 2
    assert stat.S_ISREG(entry(cache, ".json").stat().st_mode)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"GTA_EDGE_CACHE": "/own", "XDG_CACHE_HOME": "/xdg"}, "/own/kernels"),
        ({"GTA_EDGE_CACHE": "", "XDG_CACHE_HOME": "/xdg"}, "/xdg/gta_edge/kernels"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/someone/.cache/gta_edge/kernels"),
        ({}, "/home/someone/.cache/gta_edge/kernels"),
    ],
)
def test_where_the_cache_is(environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GTA_EDGE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/someone", **environment}.items():
        monkeypatch.setenv(name, value)
    assert compiler._cache_directory() == Path(expected)


def test_without_a_home_there_is_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("GTA_EDGE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert compiler._cache_directory() is None


# --- errors ----------------------------------------------------------------------------------------------------------


def message(program: Program, architecture: str = "sm_80", kernels: Path = KERNELS) -> str:
    with pytest.raises(BackendError) as error:
        compile_program(program, architecture, kernels)
    assert "\n" not in str(error.value)
    return str(error.value)


def fake_nvrtc(monkeypatch: pytest.MonkeyPatch, **functions: object) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", SimpleNamespace(**functions))


@pytest.mark.parametrize(
    ("driver", "extra"), [(None, "cuda13"), ((12, 4), "cuda12"), ((13, 0), "cuda13"), ((14, 1), "cuda13")]
)
def test_what_to_install_depends_on_the_driver(
    driver: tuple[int, int] | None, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "driver_cuda_version", lambda: driver)
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    text = message(stub_program())
    assert text == f"the Python module cuda.bindings.nvrtc is needed and not installed; run: {install_command(extra)}"


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "driver_cuda_version", lambda: None)


@pytest.mark.usefixtures("no_driver")
def test_without_cuda_core(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvrtc(monkeypatch, nvrtcVersion=lambda: (0, 13, 4), nvrtcGetSupportedArchs=lambda: (0, [80]))
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    assert message(stub_program(), kernels=kernels) == (
        f"the Python module cuda.core is needed and not installed; run: {install_command('cuda13')}"
    )


@pytest.mark.usefixtures("no_driver")
def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise RuntimeError("Failure finding libnvrtc.so\nsearched: everywhere")

    fake_nvrtc(monkeypatch, nvrtcVersion=absent)
    assert message(stub_program()) == (
        "NVRTC, CUDA's run-time compiler, cannot be loaded (Failure finding libnvrtc.so); "
        f"run: {install_command('cuda13')}"
    )


@pytest.mark.usefixtures("no_driver")
def test_an_nvrtc_that_is_older_than_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvrtc(monkeypatch, nvrtcVersion=lambda: (0, 12, 4), nvrtcGetSupportedArchs=lambda: (0, [80, 90]))
    assert message(stub_program(), "sm_120") == (
        "NVRTC 12.4 does not compile for sm_120, but for sm_80, sm_90; "
        f"run: {install_command('cuda13', upgrade='nvidia-cuda-nvrtc')}"
    )


@needs_nvrtc
@pytest.mark.usefixtures("no_driver")
def test_a_source_that_does_not_compile_names_the_first_error(kernels: Path, cache: Path) -> None:
    (kernels / "stub.cu").write_text(
        '#warning "not this"\nextern "C" __global__ void gta_stub() {\n  a = 1;\n  b = 2;\n}'
    )
    assert message(stub_program(), kernels=kernels) == (
        'stub.cu does not compile for sm_80 (stub.cu(3): error: identifier "a" is undefined); '
        f"run: {install_command('cuda13', upgrade='nvidia-cuda-nvrtc')}, or report this line"
    )
    assert not cache.exists()


@needs_nvrtc
def test_a_source_that_is_not_there(kernels: Path) -> None:
    assert "reinstall gta-edge" in message(stub_program("absent.cu"), kernels=kernels)
    assert "reinstall gta-edge" in message(stub_program(), kernels=kernels / "absent")


def test_a_machine_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(cuda.ctypes, "CDLL", absent)
    assert driver_cuda_version() is None


def test_the_drivers_version_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(version: SimpleNamespace) -> int:
        version._obj.value = 12060
        return 0

    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: SimpleNamespace(cuDriverGetVersion=answer))
    assert driver_cuda_version() == (12, 6)
    assert cuda_extra() == "cuda12"


# --- nothing of the machine's toolkit --------------------------------------------------------------------------------


@pytest.mark.parametrize("source", sorted(KERNELS.iterdir()), ids=lambda path: path.name)
def test_the_sources_include_nothing_but_each_other(source: Path) -> None:
    for name in re.findall(r"^\s*#\s*include\s*(.*?)\s*$", source.read_text(), re.MULTILINE):
        included = re.match(r'[<"](\w+\.cuh)[>"]', name)
        assert included, name
        assert (KERNELS / included[1]).is_file()


@needs_nvrtc
@pytest.mark.parametrize("include", ["<stub.cuh>", '"stub.cuh"'])
def test_the_working_directory_is_not_searched(
    include: str, kernels: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "stub.cuh").write_text("#error of the working directory\n")
    monkeypatch.chdir(tmp_path)
    (kernels / "stub.cu").write_text(STUB.replace("<stub.cuh>", include))
    assert compile_program(stub_program(), "sm_80", kernels).resources


def has_wheel() -> bool:
    """Whether NVRTC comes with a wheel, and not with a toolkit."""
    package = find_spec("nvidia")
    places = (package.submodule_search_locations or []) if package else []
    return any(list(Path(place).glob("*/lib/libnvrtc.so*")) for place in places)


@needs_nvrtc
@pytest.mark.skipif(not has_wheel(), reason="needs NVRTC's wheel")
def test_the_wheel_alone_compiles(tmp_path: Path) -> None:
    """In a process that knows of no toolkit; which library it used is read off its memory map."""
    script = """
from pathlib import Path
from gta_edge.cuda.compiler import compile_program
from gta_edge.plugins.attention.definition import Sizes
from gta_edge.plugins.attention.tiling import Variant, decode_program
from gta_edge.plugins.domain import KERNELS

program = decode_program(Variant(Sizes(2, 1, 1, 16, 16, 32), "fp16", "fp16"), "sm_87")
assert set(compile_program(program, "sm_87", KERNELS).resources) == set(program.kernels)
mapped = {line.split(maxsplit=5)[5] for line in Path("/proc/self/maps").read_text().splitlines() if "nvrtc" in line}
print(*sorted(mapped), sep="\\n")
"""
    environment = {"PATH": str(tmp_path / "missing"), "HOME": str(tmp_path), "GTA_EDGE_CACHE": str(tmp_path / "cache")}
    environment |= {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
    process = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    libraries = [path for path in process.stdout.splitlines() if ".so" in path and "bindings" not in path]
    assert any("libnvrtc.so" in path for path in libraries)
    assert [path for path in libraries if "/nvidia/" not in path] == []


# --- the kernels themselves ------------------------------------------------------------------------------------------


def preset_sizes() -> dict[Sizes, str]:
    """The presets' sizes, by which they are told apart, and the last preset that has them."""
    found = {}
    for name in PRESETS:
        config = preset(name)
        if isinstance(config, GTAConfig):
            heads = config.num_query_heads, config.num_key_heads, config.num_latent_heads
            found[Sizes(*heads, config.key_dim, config.latent_dim, config.hidden_size)] = name
    return found


def is_default(name: str, variant: Variant, architecture: str) -> bool:
    """Whether this is compiled at every run of the tests, and not on demand only.

    Each preset is, for the GPU of the boards and one other; gta-1b for all, and there in every type.
    """
    if name == "gta-1b":
        return architecture == "sm_87" or variant.compute == variant.cache == "bf16"
    others = [each for each in BUILT_FOR if each != "sm_87"]
    other = others[list(preset_sizes().values()).index(name) % len(others)]
    return variant.compute == variant.cache == "bf16" and architecture in ("sm_87", other)


def compiles() -> list[object]:
    cases = []
    for sizes, name in preset_sizes().items():
        for compute in ("fp16", "bf16"):
            for cache in (compute, "int8", "fp8") if name == "gta-1b" else (compute,):
                variant = Variant(sizes, compute, cache)
                for architecture in BUILT_FOR:
                    case = f"{name}-{compute}-{cache}-{architecture}"
                    if ALL_COMPILES or is_default(name, variant, architecture):
                        cases.append(pytest.param(variant, architecture, id=case))
    return cases


@needs_nvrtc
@pytest.mark.parametrize(("variant", "architecture"), compiles())
def test_the_presets_compile_without_spilling(variant: Variant, architecture: str) -> None:
    check_kernels(programs_for(variant, architecture), architecture)


GQA_64, GQA_128 = "9 heads of 64, 3 of keys", "32 heads of 128, 4 of keys"
WITHOUT = {
    GQA_64: Sizes(9, 3, 3, 64, 64, 576, False, False),
    "8 heads of 96 and of keys": Sizes(8, 8, 8, 96, 96, 768, False, False),
    GQA_128: Sizes(32, 4, 4, 128, 128, 4096, False, False),
    "16 gated heads of 128, 1 of keys": Sizes(16, 1, 1, 128, 128, 2048, True, False),
    "gta-1b without a gate": Sizes(5, 1, 1, 64, 128, 1280, False, True),
}


def combinations(usual: Callable[..., bool], *lists: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Those that every run of the tests compiles; with ``GTA_EDGE_ALL_COMPILES=1`` all."""
    return [each for each in product(*lists) if ALL_COMPILES or usual(*each)]


COMPUTES, CACHES = ("bf16", "fp16"), ("as computed", "int8", "fp8")


@needs_nvrtc
@pytest.mark.parametrize(
    ("name", "cache", "compute", "architecture"),
    combinations(
        lambda name, cache, *types: cache != "fp8" and types == ("bf16", "sm_87") and name in (GQA_64, GQA_128),
        WITHOUT,
        CACHES,
        COMPUTES,
        BUILT_FOR,
    ),
)
def test_without_a_gate_or_a_value_decoder_nothing_spills(
    name: str, cache: str, compute: str, architecture: str
) -> None:
    variant = Variant(WITHOUT[name], compute, compute if cache == "as computed" else cache)
    check_kernels(programs_for(variant, architecture), architecture)


FEATURES = {
    "tree": Features("mass", 8, True, True),
    "policy": Features("last", 8, True, False),
    "window": Features(None, 0, True, False),
}


MANAGED = {"gta-1b": SIZES, GQA_64: WITHOUT[GQA_64], GQA_128: WITHOUT[GQA_128]}
USUALLY_MANAGED = (("gta-1b", "tree", "as computed", "bf16", "sm_87"), ("gta-1b", "policy", "int8", "fp16", "sm_87"))


@needs_nvrtc
@pytest.mark.parametrize(
    ("name", "features", "cache", "compute", "architecture"),
    combinations(lambda *each: each in USUALLY_MANAGED, MANAGED, FEATURES, CACHES, COMPUTES, BUILT_FOR),
)
def test_the_kernels_of_a_managed_cache_do_not_spill(
    name: str, features: str, cache: str, compute: str, architecture: str
) -> None:
    sizes = MANAGED[name]
    variant = Variant(sizes, compute, compute if cache == "as computed" else cache, FEATURES[features])
    check_kernels(programs_for(variant, architecture), architecture)


@needs_nvrtc
@pytest.mark.parametrize(
    ("name", "cache", "compute", "architecture"),
    combinations(
        lambda *each: each == ("gta-1b", "int4", "bf16", "sm_87"), MANAGED, BLOCK_CACHE_TYPES, COMPUTES, BUILT_FOR
    ),
)
def test_the_kernels_of_a_cache_in_blocks_do_not_spill(name: str, cache: str, compute: str, architecture: str) -> None:
    check_kernels(programs_for(Variant(MANAGED[name], compute, cache), architecture), architecture)


@needs_nvrtc
@pytest.mark.parametrize(
    ("cache", "architecture"), combinations(lambda cache, architecture: architecture == "sm_87", CACHES, BUILT_FOR)
)
def test_the_kernels_for_rows_of_caches_do_not_spill(cache: str, architecture: str) -> None:
    for compute in ("fp16", "bf16"):
        program = CacheProgram(compute, compute if cache == "as computed" else cache)
        resources = compile_program(program, architecture, KERNELS).resources
        assert set(resources) == set(program.kernels)
        assert not any(each.spill_bytes or each.stack_bytes for each in resources.values()), resources


EXTREMES = {
    "smallest": Sizes(1, 1, 1, 16, 16, 16),
    "widest": Sizes(8, 4, 2, 128, 256, 8 * 256),
    "odd": Sizes(12, 4, 6, 80, 48, 12 * 48 * 3),
    "many-heads": Sizes(32, 1, 1, 128, 128, 32 * 128),
}


@needs_nvrtc
@pytest.mark.skipif(not ALL_COMPILES, reason="GTA_EDGE_ALL_COMPILES=1 compiles it")
@pytest.mark.parametrize("architecture", ["sm_86", "sm_87"])
@pytest.mark.parametrize("cache", ["bf16", "int8", "fp8"])
@pytest.mark.parametrize("sizes", EXTREMES.values(), ids=EXTREMES)
def test_other_sizes_compile(sizes: Sizes, cache: str, architecture: str) -> None:
    check_kernels(programs_for(Variant(sizes, "bf16", cache), architecture), architecture, may_spill=True)


def check_kernels(programs: Programs, architecture: str, *, may_spill: bool = False) -> None:
    """Compile, and compare what each kernel takes with what a launch and the GPU allow."""
    launches = {program: decode_launches(program, 8, 1, 1, DECODE_TOKENS) for program in programs.decodes}
    launches |= {program: prefill_launches(program, 1, 300) for program in programs.prefill}
    _, block_kib = ARCHITECTURES[architecture]
    too_much = []
    for program in programs.all:
        compiled = compile_program(program, architecture, KERNELS)
        assert set(compiled.resources) == set(program.kernels)
        assert "warning" not in compiled.log
        for each in launches[program]:
            takes = compiled.resources[each.kernel]
            registers = each.launch.threads * -(-takes.registers // 8) * 8  # they are given out by eights
            spills = takes.spill_bytes or takes.stack_bytes
            shared_bytes = takes.shared_bytes + each.launch.shared_bytes
            if registers > REGISTERS or shared_bytes > block_kib * KIB or (spills and not may_spill):
                too_much.append((each.kernel, program.tiles, takes))
    assert too_much == []
