"""``gta-edge inspect``: what a checkpoint, preset or bundle is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gta_edge.cli.output import current, key_value_table
from gta_edge.errors import InputError
from gta_edge.formats.bundle import MANIFEST, Bundle
from gta_edge.formats.checkpoint import Checkpoint
from gta_edge.formats.generation_config import GenerationConfig
from gta_edge.model.config import GTAConfig, ModelConfig
from gta_edge.model.kv_cache import bytes_per_token
from gta_edge.model.presets import PRESETS, preset
from gta_edge.numerics.dtypes import CHECKPOINT_DTYPES
from gta_edge.plan.cost import stored_parts

__all__ = ["describe", "inspect"]

_BAR = 30


def inspect(
    target: Annotated[
        str, typer.Argument(metavar="PATH_OR_PRESET", help="A checkpoint, a bundle, or a preset's name.")
    ],
    verify_hashes: Annotated[bool, typer.Option("--verify-hashes", help="Hash a bundle's weights too.")] = False,
) -> None:
    """Show the sizes of a model, its weight bytes, and the cache bytes that a token costs."""
    output = current()
    with output.progress() as progress:
        if Path(target).exists() or target not in PRESETS:
            config, precision, weight_bytes, extra = _open(Path(target), verify_hashes, progress)
        else:
            config = preset(target)
            precision = CHECKPOINT_DTYPES[config.dtype].name
            weight_bytes, extra = config.weight_bytes, {"kind": "preset"}
    # a bundle computes in float32 and so does its cache; a checkpoint's cache would be in its own type
    cache_dtype = "float32" if extra["kind"] == "bundle" else config.dtype
    description = describe(config, precision, weight_bytes, cache_dtype) | extra
    if output.json:
        output.document(description)
    else:
        output.console.print(key_value_table(_for_people(description)))


def describe(config: ModelConfig, precision: str, weight_bytes: int, cache_dtype: str) -> dict[str, Any]:
    """Return the figures of a model, as ``--json`` prints them; ``cache_dtype`` is a key of ``CHECKPOINT_DTYPES``."""
    gta = config if isinstance(config, GTAConfig) else None
    key, mixed = config.caches
    return {
        "architecture": config.architecture,
        "parameters": config.parameters,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "attention_heads": config.num_attention_heads,
        "query_heads": gta.num_query_heads if gta else config.num_attention_heads,
        "key_heads": key.heads,
        "latent_heads": mixed.heads if gta else None,
        "key_dim": key.width,
        "latent_dim": mixed.width if gta else None,
        "vocab_size": config.vocab_size,
        "max_length": config.max_position_embeddings,
        "cache_values_per_token_per_layer": config.cache_values_per_token_per_layer,
        "cache_dtype": cache_dtype,
        "cache_bytes_per_token": bytes_per_token(config, CHECKPOINT_DTYPES[cache_dtype].name),
        "attention_flops_per_pair": config.attention_flops_per_pair,
        "weight_bytes": weight_bytes,
        "precision": precision,
    }


def _open(path: Path, verify_hashes: bool, progress: Any) -> tuple[ModelConfig, str, int, dict[str, Any]]:
    if not path.exists():
        raise InputError(f"{path} is neither a directory nor a preset", f"presets are {', '.join(PRESETS)}")
    if (path / MANIFEST).exists():
        bundle = Bundle.open(path, verify_hashes=verify_hashes, progress=progress)
        extra: dict[str, Any] = {"kind": "bundle"}
        extra["weight_bytes_by_part"] = stored_parts(bundle.config, bundle.storage)
        extra |= {"files": bundle.file_bytes, "made_with": bundle.manifest["made_with"]}
        extra["sampling"] = dict(GenerationConfig.load(path, bundle.config, None).sampling)
        return bundle.config, bundle.precision, bundle.weight_bytes, extra
    checkpoint = Checkpoint.open(path)
    return checkpoint.config, "+".join(checkpoint.precisions), checkpoint.weight_bytes, {"kind": "checkpoint"}


def _for_people(found: dict[str, Any]) -> dict[str, str]:
    """Return labels and texts, with units."""
    rows = {
        found["kind"]: f"{found['architecture']} in {found['precision']}",
        "parameters": _count(found["parameters"]),
        "layers": f"{found['layers']}",
        "hidden size": f"{found['hidden_size']:,}",
        **_heads(found),
        "vocabulary": f"{found['vocab_size']:,} tokens",
        "max context": f"{found['max_length']:,} tokens",
        "KV cache": f"{found['cache_bytes_per_token']:,} bytes per token in {found['cache_dtype']}",
        "": f"{found['cache_values_per_token_per_layer']} values in each layer",
        "weights": _size(found["weight_bytes"]),
    }
    parts = {part: size for part, size in found.get("weight_bytes_by_part", {}).items() if size}
    rows |= {f"  {part}": _share(size, sum(parts.values())) for part, size in parts.items()}
    if "sampling" in found:
        options = ", ".join(f"{name} {value:g}" for name, value in found["sampling"].items())
        rows["chats"] = f"sampled with {options}" if options else "greedy"
    if "files" in found:
        rows["files"] = _size(sum(found["files"].values()))
        rows |= {f"  {name}": _size(size) for name, size in found["files"].items()}
    return rows


def _heads(found: dict[str, Any]) -> dict[str, str]:
    rows = {"attention heads": f"{found['attention_heads']}"}
    if found["latent_heads"] is None:
        return rows | {"key, value heads": f"{found['key_heads']}, {found['key_dim']} wide"}
    return rows | {
        "query heads": f"{found['query_heads']}",
        "key heads": f"{found['key_heads']}, {found['key_dim']} wide",
        "latent heads": f"{found['latent_heads']}, {found['latent_dim']} wide",
    }


def _count(number: int) -> str:
    return f"{number / 1e9:,.2f} billion" if number >= 1e9 else f"{number / 1e6:,.1f} million"


def _share(size: int, whole: int) -> str:
    """Return a part's size, its share, and a bar of that length."""
    return f"{_size(size):>9} {size / whole:>4.0%} {'█' * round(_BAR * size / whole)}"


def _size(size: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:,.2f} {unit}"
    return f"{size} B"
