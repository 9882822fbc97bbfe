"""Files of bundles, changed and listed anew as someone who forges them would."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from gta_edge.errors import BundleError
from gta_edge.formats.bundle import Bundle

MANIFEST, MODEL, WEIGHTS, CONFIG = "gta_edge.json", "model.onnx", "model.onnx.data", "config.json"


def manifest_of(directory: Path) -> dict[str, Any]:
    """The manifest without its checksum."""
    manifest = json.loads((directory / MANIFEST).read_text())
    del manifest["sha256"]
    return manifest


def write(directory: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest with the checksum that belongs to it, as somebody would who means harm."""
    checksum = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (directory / MANIFEST).write_text(json.dumps({**manifest, "sha256": checksum}))


def forge(directory: Path, **changes: Any) -> None:
    """Change entries of the manifest, with the right checksum."""
    write(directory, manifest_of(directory) | changes)


def relist(directory: Path) -> None:
    """Make the manifest agree with the files that it lists, whatever is in them; those that are gone it forgets."""
    manifest = manifest_of(directory)
    files = {}
    for name in manifest["files"]:
        if (path := directory / name).exists():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            files[name] = {"bytes": path.stat().st_size, "mtime_ns": path.stat().st_mtime_ns, "sha256": digest}
    write(directory, manifest | {"files": files})


def refused(directory: Path, **options: Any) -> str:
    """What is said of a bundle that is refused: one line, and where it is."""
    with pytest.raises(BundleError) as caught:
        Bundle.open(directory, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(directory) in message
    return message


def edit_model(directory: Path, edit: Callable[[onnx.ModelProto], Any]) -> None:
    """Change the graph, and the manifest so that it agrees."""
    model = onnx.load(directory / MODEL, load_external_data=False)
    edit(model)
    (directory / MODEL).write_bytes(model.SerializeToString())
    relist(directory)
