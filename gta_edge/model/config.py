"""What a model is, read from its ``config.json``: ``GTAConfig`` or ``GQAConfig``, both a ``ModelConfig``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gta_edge.errors import ConfigError
from gta_edge.model.architectures import ARCHITECTURES, LLAMA, architecture_of
from gta_edge.model.config_entries import check_supported, common_entries
from gta_edge.model.gqa_config import GQAConfig
from gta_edge.model.gta_config import GTAConfig
from gta_edge.model.model_config import CacheSpec, ModelConfig
from gta_edge.support.json_files import read_json
from gta_edge.support.text import brief, printable

__all__ = ["CacheSpec", "GQAConfig", "GTAConfig", "ModelConfig", "parse_config", "read_config"]

_MAX_FILE_BYTES = 2**20  # of a config.json; real ones have a few thousand


def parse_config(entries: object) -> ModelConfig:
    """Read the content of a ``config.json``.

    Raises:
        ConfigError: not an object, a key missing or of the wrong type, a size that does not fit, or an
            architecture that is not supported.
    """
    if not isinstance(entries, Mapping):
        raise ConfigError(f"the config is {type(entries).__name__}", "expected a JSON object")
    names = entries.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"architectures is {brief(names)}", "expected a list of names")
    model_type = entries.get("model_type")
    is_gta = any(name.startswith(("GTA", "GLA")) for name in names) if names else "num_query_heads" in entries
    row = LLAMA if is_gta else architecture_of(names, model_type)
    if row is None:
        raise ConfigError(
            f"architectures is {brief(names)} and model_type {brief(model_type)}",
            f"expected one of GTAForCausalLM, {', '.join(ARCHITECTURES)}, and the type that goes with it",
        )
    entries = {**row.defaults, **entries}
    check_supported(entries, row)
    cls: type[GTAConfig | GQAConfig] = GTAConfig if is_gta else GQAConfig
    return cls(**common_entries(entries), **cls.read_attention(entries, row))


def read_config(path: Path) -> ModelConfig:
    """Read a ``config.json``.

    Raises:
        ConfigError: the file is missing, is no JSON, or describes no model that is supported; the message starts
            with the path.
    """
    entries = read_json(path, ConfigError, "expected a model's config.json: copy it anew", max_bytes=_MAX_FILE_BYTES)
    try:
        return parse_config(entries)
    except ConfigError as error:
        raise ConfigError(f"{printable(str(path))}: {error}") from error
