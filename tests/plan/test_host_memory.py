"""What has no room in memory is refused before anything heavy is loaded, and what has room is not."""

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gta_edge.errors import CapacityError
from gta_edge.formats.bundle import Bundle
from gta_edge.formats.checkpoint import Checkpoint
from gta_edge.formats.random_checkpoint import initialise
from gta_edge.formats.weights import Storage, storage_for
from gta_edge.model.presets import preset
from gta_edge.plan import host_memory
from gta_edge.support import memory
from tests.helpers.commands import environment
from tests.helpers.tiny import TINY

LARGE = preset("gta-1b")

# A process's own limit counts as a container's does, and needs no rights.
SCRIPT = """
import resource, sys
from pathlib import Path
import gta_edge
import gta_edge.formats.checkpoint, gta_edge.runtime.registry
{before}
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + {room} * 2**20,) * 2)
try:
    {call}
except gta_edge.CapacityError as error:
    print(error)
print([name for name in ("torch", "onnx_ir", "onnxscript") if name in sys.modules])
"""


def in_little_room(call: str, before: str = "", room: int = 150) -> list[str]:
    """Run Python with so many MiB beside what the package itself takes, and return the lines that it prints."""
    script = SCRIPT.format(call=call, before=before, room=room)
    process = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


def test_an_export_is_refused_before_torch_is_loaded(tiny_checkpoint: Path, tmp_path: Path) -> None:
    before = "import gta_edge.export.pipeline, tokenizers, numpy"
    message, loaded = in_little_room(
        f"gta_edge.export_model({str(tiny_checkpoint)!r}, {str(tmp_path / 'b')!r})", before
    )
    assert message.startswith("the export takes at least 25")
    assert message.endswith(" MB are available; close other programs, or use a machine with more memory")
    assert "torch" not in loaded
    assert "onnxscript" not in loaded
    assert list(tmp_path.iterdir()) == []


def test_a_session_is_refused_before_torch_is_loaded(tiny_bundle: Path) -> None:
    message, loaded = in_little_room(f"gta_edge.load({str(tiny_bundle)!r}, 'torch')", "import tokenizers")
    assert message.startswith("PyTorch takes at least 2")
    assert loaded == "[]"


def test_a_comparison_is_refused_before_torch_is_loaded(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    call = f"verify.verify({str(tiny_bundle)!r}, {str(tiny_checkpoint)!r})"
    message, loaded = in_little_room(call, "from gta_edge.evaluate import verify")
    assert message.startswith("comparing with PyTorch takes at least 2")
    assert "torch" not in loaded


@pytest.fixture
def leaves(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Call it with the bytes that the system has left."""
    return lambda size: monkeypatch.setattr(memory, "reachable_bytes", lambda: size)


def test_what_fits_without_the_check_is_said(tmp_path: Path, leaves: Callable[[int | None], None]) -> None:
    initialise(TINY.replace(num_hidden_layers=12), tmp_path / "checkpoint")  # of which a layer is a small part
    source = Checkpoint.open(tmp_path / "checkpoint")
    sizes = {"calibrated": False, "verify": True}
    pytest.importorskip("torch")  # loaded, so that only the model counts
    model = 4 * source.config.parameters
    leaves(model - 1)
    with pytest.raises(CapacityError, match=r"^checking the export against PyTorch .*; give --no-verify, or close"):
        host_memory.require_memory_for_export(source, "bf16", **sizes)
    host_memory.require_memory_for_export(source, "bf16", calibrated=False, verify=False)
    host_memory.require_memory_for_export(source, "fp32", **sizes)  # which lies in its file
    host_memory.require_memory_for_export(source, "int4", **sizes)  # PyTorch has a layer at a time
    leaves(model)
    host_memory.require_memory_for_export(source, "bf16", **sizes)
    leaves(12 * sum(map(math.prod, source.config.layer_shapes().values())) - 1)  # in float32 and float64
    with pytest.raises(CapacityError, match="checking the export"):
        host_memory.require_memory_for_export(source, "fp32", **sizes)
    leaves(2 * 300 * 96 - 1)  # its table
    with pytest.raises(CapacityError, match=r"^the export takes at least 0 MB"):
        host_memory.require_memory_for_export(source, "bf16", calibrated=False, verify=False)
    leaves(100_000)
    with pytest.raises(CapacityError, match=r"^calibrating .*; give --calibrate none, or"):
        host_memory.require_memory_for_export(source, "int4", calibrated=True, verify=False)
    leaves(None)  # a system that does not say
    host_memory.require_memory_for_export(source, "int4", calibrated=True, verify=True)


def test_the_model_counts_as_it_is_run(leaves: Callable[[int | None], None]) -> None:
    pytest.importorskip("torch")
    leaves(3_000_000_000)
    host_memory.require_memory_for_torch(LARGE, "fp32", "it")
    with pytest.raises(CapacityError, match=r"^it takes at least 4,\d\d\d MB of memory, and 3,000 MB are available; "):
        host_memory.require_memory_for_torch(LARGE, "int4", "it")
    with pytest.raises(CapacityError, match="or export with --precision int4"):
        host_memory.require_memory_for_onnxruntime(LARGE, Storage("bf16"))
    host_memory.require_memory_for_onnxruntime(LARGE, storage_for(LARGE, "int4"))
    leaves(300_000_000)
    with pytest.raises(CapacityError, match="use a machine with more memory"):
        host_memory.require_memory_for_onnxruntime(LARGE, storage_for(LARGE, "int4"))


def test_what_is_loaded_already_takes_nothing(tiny_bundle: Path, leaves: Callable[[int | None], None]) -> None:
    pytest.importorskip("torch")
    config = Bundle.open(tiny_bundle).config
    leaves(0)
    host_memory.require_memory_for_torch(config, "fp32", "it")


def test_random_weights_that_do_not_fit(tmp_path: Path, leaves: Callable[[int | None], None]) -> None:
    leaves(100_000_000)
    with pytest.raises(CapacityError, match=r"^writing the weights takes at least 328 MB .* 100 MB are available"):
        initialise(LARGE, tmp_path / "c")
    assert list(tmp_path.iterdir()) == []
