"""Engines as a build leaves them in a bundle, with any plan."""

from pathlib import Path

from gta_edge.formats.bundle import Bundle
from gta_edge.runtime.tensorrt.engine import EngineManifest, engine_directory, engine_output, write_engine


def keep_engine(bundle: Bundle, record: EngineManifest, plan: bytes, *, force: bool = False) -> Path:
    """Write an engine and its record into the bundle."""
    with engine_output(bundle, record.spec.engine, force=force, needed_bytes=len(plan)) as partial:
        write_engine(partial, record, plan)
    return engine_directory(bundle, record.spec.engine)
