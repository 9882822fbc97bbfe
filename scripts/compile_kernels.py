"""Compiles the CUDA kernels ahead of time, into the cache that the package reads: no board waits for its first compile.

    python scripts/compile_kernels.py ARCH [--models NAME,...] [--ops attention,matmul,elementwise,cache]
        [--compute fp16,bf16] [--cache-dtypes fp16,bf16,int8,fp8,int4,int4v2] [--output DIR]

ARCH is ``sm_87`` for Orin, ``sm_110`` for Thor, ``sm_90`` for an H100; no GPU is needed, NVRTC is (the extra cuda12 or
cuda13). NAME is a preset, or the directory of a bundle or a checkpoint. Without ``--output`` the kernels go to this
machine's cache; with it to DIR, which is then the cache of whoever has its path in ``GTA_EDGE_CACHE``. What is cached
is found by the sources and by NVRTC's release: compile with the release that the board has.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).parents[1]
if TYPE_CHECKING:
    from gta_edge.cuda.compiler import Compilable, Compiled
    from gta_edge.model.config import ModelConfig

OPS = ("attention", "matmul", "elementwise", "cache")
_ELSEWHERE = "name another directory in --output"


def main(arguments: list[str] | None = None) -> int:
    """Compile what the command line asks for.

    Returns:
        0, or 1 where something does not compile or cannot be written.
    """
    sys.path.insert(0, str(ROOT))
    from gta_edge.errors import GtaEdgeError

    options = _parser().parse_args(arguments)
    if options.output:
        os.environ["GTA_EDGE_CACHE"] = str(options.output.absolute())
    try:
        run(options)
    except GtaEdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("architecture", metavar="ARCH", help="of the GPU: sm_87")
    parser.add_argument(
        "--models", default="", metavar="NAME,...", help="presets or directories; all presets if not given"
    )
    parser.add_argument("--ops", default=",".join(OPS), help="some of attention, matmul, elementwise, cache")
    parser.add_argument("--compute", default="fp16,bf16", help="types that are computed in")
    parser.add_argument(
        "--cache-dtypes", default="fp16,bf16,int8,fp8", help="types of the KV cache; int4 and int4v2 too"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="instead of this machine's cache")
    return parser


def run(options: argparse.Namespace) -> None:
    """Compile, with a line for each program.

    Raises:
        BackendError: NVRTC is missing, or does not know the architecture.
        InputError: an option names what there is not.
        OutputError: the cache cannot be written.
    """
    from gta_edge.cuda.compiler import check_compiler
    from gta_edge.errors import OutputError
    from gta_edge.support.cores import usable_cores
    from gta_edge.support.files import cache_directory

    directory = cache_directory()
    if directory is None:
        raise OutputError("this user has no directory for caches", "name one with --output")
    programs = list(dict.fromkeys(_programs(options)))
    check_compiler(options.architecture)
    kernels = directory / "kernels"
    try:
        kernels.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{kernels} cannot be made ({error.strerror})", "name another directory in --output"
        ) from error
    if not os.access(kernels, os.W_OK):
        raise OutputError(f"{kernels} cannot be written", "name another directory in --output")
    before = _cached(kernels)
    with ThreadPoolExecutor(usable_cores()) as pool:
        done = pool.map(lambda program: (program, *_compiled(program, options.architecture)), programs)
        for i, (program, compiled, seconds) in enumerate(done, start=1):
            registers = max((found.registers for found in compiled.resources.values()), default=0)
            print(
                f"{i}/{len(programs)} {program.source}, {_described(program)}: {seconds:.1f} s, {registers} registers",
                flush=True,
            )
    new = len(_cached(kernels) - before)
    print(f"{len(programs)} programs for {options.architecture} in {kernels}, {new} of them new")


def _programs(options: argparse.Namespace) -> Iterator[Compilable]:
    """Yield all that the models run; an op to come is a branch here."""
    from gta_edge.numerics.dtypes import CACHE_TYPES, COMPUTE_TYPES, ROW_CACHE_TYPES

    ops = _chosen(options.ops, "--ops", OPS)
    computes = _chosen(options.compute, "--compute", COMPUTE_TYPES)
    caches = _chosen(options.cache_dtypes, "--cache-dtypes", CACHE_TYPES)
    if "attention" in ops:
        for config in _configs(options.models):
            yield from _attention(config, options.architecture, computes, caches)
    if "matmul" in ops:
        yield from _matmul(options.architecture, computes)
    if "elementwise" in ops:
        from gta_edge.plugins.elementwise.launches import Program

        yield from map(Program, computes)
    if "cache" in ops:
        from gta_edge.plugins.cache import launches

        for compute in computes:
            yield from (launches.Program(compute, each) for each in caches if each in (compute, *ROW_CACHE_TYPES))


def _attention(
    config: ModelConfig, architecture: str, computes: Iterable[str], caches: Iterable[str]
) -> Iterator[Compilable]:
    from gta_edge.model.config import GTAConfig
    from gta_edge.numerics.dtypes import COMPUTE_TYPES
    from gta_edge.plugins.attention.definition import Sizes
    from gta_edge.plugins.attention.launches import programs_for
    from gta_edge.plugins.attention.tiling import Variant

    if isinstance(config, GTAConfig):
        heads = (config.num_query_heads, config.num_key_heads, config.num_latent_heads)
        sizes = Sizes(*heads, config.key_dim, config.latent_dim, config.hidden_size)
    else:
        key, value = config.caches
        heads, width = (config.num_attention_heads, key.heads, value.heads), config.num_attention_heads * value.width
        sizes = Sizes(*heads, key.width, value.width, width, has_gate=False, has_value_decoder=False)
    for compute in computes:
        for cache in caches:
            if cache == compute or cache not in COMPUTE_TYPES:
                yield from programs_for(Variant(sizes, compute, cache), architecture).all


def _matmul(architecture: str, computes: Iterable[str]) -> Iterator[Compilable]:
    from gta_edge.plugins.matmul.launches import programs_for
    from gta_edge.plugins.matmul.packing import BLOCK_SIZES
    from gta_edge.plugins.matmul.tiling import Variant

    for bits, blocks in BLOCK_SIZES.items():
        for block in blocks:
            for compute in computes:
                yield from programs_for(Variant(bits, block, compute), architecture).all


def _configs(names: str) -> Iterator[ModelConfig]:
    from gta_edge.errors import InputError
    from gta_edge.formats.bundle import MANIFEST, Bundle
    from gta_edge.formats.checkpoint import Checkpoint
    from gta_edge.model.presets import PRESETS, preset

    for name in names.split(",") if names else PRESETS:
        path = Path(name)
        if path.is_dir():
            yield (Bundle if (path / MANIFEST).exists() else Checkpoint).open(path).config
        elif name in PRESETS:
            yield preset(name)
        else:
            raise InputError(f"{name} is neither a directory nor a preset", f"presets are {', '.join(PRESETS)}")


def _chosen(text: str, option: str, known: Iterable[str]) -> list[str]:
    from gta_edge.errors import InputError

    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"{option} got {unknown[0]!r}", f"expected some of {', '.join(known)}")
    return names


def _compiled(program: Compilable, architecture: str) -> tuple[Compiled, float]:
    from gta_edge.cuda.compiler import compile_program
    from gta_edge.plugins.domain import KERNELS

    start = time.perf_counter()
    return compile_program(program, architecture, KERNELS), time.perf_counter() - start


def _cached(kernels: Path) -> set[Path]:
    return set(kernels.glob("*.cubin"))


def _described(program: Any) -> str:
    """Return the types of a program's variant, and of the attention its heads."""
    variant = getattr(program, "variant", program)
    values = [f"{name} {value}" for name, value in vars(variant).items() if name != "sizes"]
    sizes = getattr(variant, "sizes", None)
    return ", ".join([*values, *(["sizes " + "-".join(map(str, astuple(sizes)))] if sizes else [])])


if __name__ == "__main__":
    sys.exit(main())
