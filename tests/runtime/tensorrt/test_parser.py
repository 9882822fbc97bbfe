"""The plugin form of a graph in TensorRT's real ONNX parser, up to the call of the plugin's creator.

TensorRT-RTX's parser needs no GPU and finds plugin creators; it cannot go on with a plugin. So the creator here reads
the fields with the plugin's own code, tells what it got, and makes nothing; the parser then stops at that node.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gta_edge.formats.bundle import Bundle
from gta_edge.runtime.tensorrt.lower import lower

pytest.importorskip("tensorrt_rtx", reason="the parser of the package tensorrt-rtx is needed")

SCRIPT = """
import json, sys
import tensorrt_rtx as trt
from gta_edge.plugins.attention import plugin_call as plugin
from gta_edge.plugins.plugin_call_base import IGNORED_ATTRIBUTES, read_fields

class Creator(trt.IPluginCreatorV3One):
    def __init__(self):
        super().__init__()
        self.name, self.plugin_version, self.plugin_namespace = "GroupedLatentAttention", "1", "gta"
        names = [*plugin.FIELDS.attributes, *IGNORED_ATTRIBUTES]
        self.field_names = trt.PluginFieldCollection([trt.PluginField(name) for name in names])

    def create_plugin(self, name, fields, phase):
        read = plugin.read_parameters(read_fields(trt, plugin.FIELDS, fields))
        told.append({key: getattr(read, key) for key in plugin.FIELDS.attributes} | {"phase": phase.name})

class Log(trt.ILogger):
    def log(self, severity, message):
        if severity <= trt.ILogger.ERROR:
            errors.append(message)

told, errors = [], []
creator, log = Creator(), Log()
assert trt.get_plugin_registry().register_creator(creator, "gta")
builder = trt.Builder(log)
network = builder.create_network(0)
parser = trt.OnnxParser(network, log)
parsed = parser.parse_from_file(sys.argv[1])
inputs = {network.get_input(i).name: network.get_input(i).dtype.name for i in range(network.num_inputs)}
print(json.dumps({"parsed": parsed, "created": told, "errors": errors, "inputs": inputs}))
"""


def parse(model: Path) -> dict[str, Any]:
    """Parse a model in a process of its own, which a plugin may end."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(model)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("newer_ops", [True, False], ids=["newer ops", "older ops"])
@pytest.mark.parametrize(
    ("compute", "cache", "names"),
    [
        ("fp16", None, ("HALF", "HALF")),
        ("bf16", None, ("BF16", "BF16")),
        ("fp16", "int8", ("HALF", "INT8")),
        ("bf16", "fp8", ("BF16", "FP8")),
        ("bf16", "int4", ("BF16", "INT8")),
    ],
)
def test_the_parser_gives_the_creator_what_the_plugin_reads(
    tiny_bundle: Path, tmp_path: Path, compute: str, cache: str | None, names: tuple[str, str], newer_ops: bool
) -> None:
    bundle = Bundle.open(tiny_bundle)
    options = {"compute": compute, "cache_dtype": cache, "capacity": 64, "newer_ops": newer_ops}
    result = parse(lower(bundle, tmp_path / "model", form="plugin", **options))
    config: Any = bundle.config
    assert result["created"] == [
        {
            "num_query_heads": config.num_query_heads,
            "num_key_heads": config.num_key_heads,
            "num_latent_heads": config.num_latent_heads,
            "scale": pytest.approx(config.scale),
            "cache_dtype": cache or "none",
            "has_gate": True,
            "has_value_decoder": True,
            "has_positions": False,
            "has_branches": False,
            "bias_rows": 0,
            "observe": "none",
            "phase": "BUILD",
        }
    ]
    assert not result["parsed"]  # it got no plugin
    assert any("Could not create the plugin" in message for message in result["errors"])
    assert result["inputs"]["past_key.0"] == names[1]
    assert result["inputs"]["past_length"] == "INT64"
    assert result["inputs"].get("past_key_scale.0") == {None: None, "int4": "HALF"}.get(cache, "FLOAT")
    assert result["inputs"].get("past_latent_open.0") == (names[0] if cache == "int4" else None)
