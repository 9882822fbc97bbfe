"""Reading a bundle's graph: what export writes is taken, and nothing that could harm who runs it."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from gta_edge.errors import BundleError, CapacityError, EngineError, GtaEdgeError
from gta_edge.export.pipeline import export_model
from gta_edge.formats.bundle import MODEL, WEIGHTS, Bundle
from gta_edge.graph import io
from gta_edge.graph.io import load_graph, rewriting, run_passes
from gta_edge.graph.shapes import Known
from gta_edge.graph.validate import check_model
from gta_edge.graph.weights import read_weights
from gta_edge.libraries.install import install_command
from gta_edge.plugins.attention import definition as op
from gta_edge.plugins.attention.function import function as attention_function
from gta_edge.runtime.onnxruntime.cuda_lower import cuda_graph
from gta_edge.runtime.onnxruntime.lower import graphs
from gta_edge.runtime.tensorrt.lower import lower
from tests.helpers import reference
from tests.helpers.checkpoints import write_checkpoint

Edit = Callable[[onnx.ModelProto], object]


@pytest.fixture(scope="module", params=["gta in int4", "gta in fp32", "gqa in bf16", "gqa in int8"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    model, precision = request.param.split(" in ")
    tied = {"tie_word_embeddings": precision in ("int4", "bf16")}
    small = {"vocab_size": 48, "max_position_embeddings": 32, **tied}
    entries = reference.gta_entries(**small) if model == "gta" else reference.llama_entries(**small)
    directory = tmp_path_factory.mktemp("graph")
    write_checkpoint(directory / "checkpoint", entries, reference.random_weights(entries))
    return export_model(directory / "checkpoint", directory / "bundle", precision=precision, verify=False).bundle


def refused(directory: Path, edit: Edit) -> str:
    """Change a bundle's graph, and return why it is refused."""
    bundle = Bundle.open(directory)
    proto = onnx.load(bundle.model_path, load_external_data=False)
    edit(proto)
    bundle.model_path.write_bytes(proto.SerializeToString())
    with pytest.raises(BundleError) as caught:
        load_graph(bundle.model_path, bundle.config)
    text = str(caught.value)
    assert text.isprintable() and len(text) < 600
    assert text.startswith(f"{directory / MODEL}: ")
    assert text.endswith("; export the bundle again, or copy it anew")
    return text


# --- what export writes ----------------------------------------------------------------------------------------------


def test_what_export_writes_is_taken(bundle: Bundle) -> None:
    model = load_graph(bundle.model_path, bundle.config)
    plain = ir.load(bundle.model_path)
    assert list(model.graph.initializers) == list(plain.graph.initializers)
    for name, value in model.graph.initializers.items():
        other = plain.graph.initializers[name].const_value
        assert value.const_value is not None and other is not None
        np.testing.assert_array_equal(value.const_value.numpy(), other.numpy())
        assert value.const_value.tobytes() == other.tobytes()


def test_sizes_are_those_that_the_standard_infers(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every value that ONNX's own shape inference knows, with the same sizes of inputs."""
    proto = onnx.load(bundle.model_path, load_external_data=False)
    looked_at: list[tuple[dict[str, Known], dict[str, int]]] = []

    def note(declared: Any, values: dict[str, Known], symbols: dict[str, int]) -> None:
        looked_at.append((values, symbols))

    monkeypatch.setattr("gta_edge.graph.validate._check_declared", note)
    check_model(proto, bundle.config, {WEIGHTS: bundle.weight_bytes})
    for values, symbols in looked_at:
        inferred = with_sizes(proto, symbols)
        assert len(inferred) > 0.8 * (len(values) - len(proto.graph.input) - len(proto.graph.initializer))
        for name, (dtype, shape) in inferred.items():
            assert (values[name].dtype, list(values[name].shape)) == (dtype, shape), name
    assert len(looked_at) == 2


def with_sizes(proto: onnx.ModelProto, symbols: dict[str, int]) -> dict[str, tuple[int, list[int]]]:
    """Type and shape of each value, inferred by ONNX where it can."""
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    del model.graph.value_info[:]
    for value in model.graph.input:
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_value = symbols[size.dim_param]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    graph = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True).graph
    tensors = {value.name: value.type.tensor_type for value in (*graph.value_info, *graph.output)}
    sizes = {name: [size.dim_value for size in tensor.shape.dim] for name, tensor in tensors.items()}
    known = {n for n, t in tensors.items() if t.HasField("shape") and all(s.HasField("dim_value") for s in t.shape.dim)}
    return {name: (tensors[name].elem_type, sizes[name]) for name in known}


def test_the_function_is_our_own(copied_bundle: Path) -> None:
    """Whatever body a file gives it: what the op means is written down in the package."""
    bundle = Bundle.open(copied_bundle)
    proto = onnx.load(bundle.model_path, load_external_data=False)
    del proto.functions[0].node[3:]
    bundle.model_path.write_bytes(proto.SerializeToString())
    (function,) = load_graph(bundle.model_path, bundle.config).functions.values()
    sizes = bundle.config.attention
    own = onnx.parser.parse_function(attention_function(sizes.has_gate, sizes.has_value_decoder))
    assert [node.op_type for node in function] == [node.op_type for node in own.node]


@pytest.mark.parametrize("name", op.MODEL_OPTIONAL_INPUTS)
def test_an_attention_of_another_form_than_the_config_has_is_refused(copied_bundle: Path, name: str) -> None:
    """All layers are one function, whose body is that form's."""
    config = Bundle.open(copied_bundle).config
    expected = config.attention.has_gate  # and value decoder: both, or neither
    text = refused(copied_bundle, attention_input(name, "" if expected else "past_key.0"))
    assert f"a {op.OP} {'lacks' if expected else 'has'} the input {name}" in text


def test_remarks_and_hints_are_left_behind(copied_bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """onnx-ir prints warnings of some of them."""
    bundle = Bundle.open(copied_bundle)
    proto = onnx.load(bundle.model_path, load_external_data=False)
    expected = load_graph(bundle.model_path, bundle.config)
    proto.configuration.add(name="devices", num_devices=2)
    proto.doc_string = proto.graph.doc_string = "remark"
    proto.graph.quantization_annotation.add(tensor_name="cos")
    for node in proto.graph.node:
        node.device_configurations.add(configuration_id="devices")
        node.metadata_props.add(key="namespace", value="elsewhere")
    bundle.model_path.write_bytes(proto.SerializeToString())
    found = load_graph(bundle.model_path, bundle.config)
    assert ir.to_proto(found).SerializeToString() == ir.to_proto(expected).SerializeToString()
    assert capfd.readouterr() == ("", "")


# --- what is refused -------------------------------------------------------------------------------------------------


def nodes(*made: onnx.NodeProto) -> Edit:
    """Return an edit that puts nodes at the end of a graph."""
    return lambda model: model.graph.node.extend(made)


def doubled(times: int) -> Edit:
    """A value joined to itself, again and again: 2**times of it."""
    joins = [helper.make_node("Concat", [f"d{i}", f"d{i}"], [f"d{i + 1}"], axis=0) for i in range(times)]
    return nodes(helper.make_node("Constant", [], ["d0"], value_ints=[1, 2]), *joins)


def attribute(op_type: str, **attributes: Any) -> Edit:
    """Return an edit that changes the attributes of all nodes of a kind."""

    def edit(model: onnx.ModelProto) -> None:
        found = [node for node in model.graph.node if node.op_type == op_type]
        assert found
        for node in found:
            kept = [each for each in node.attribute if each.name not in attributes]
            made = [helper.make_attribute(name, value) for name, value in attributes.items() if value is not None]
            del node.attribute[:]
            node.attribute.extend([*kept, *made])

    return edit


def outer(model: onnx.ModelProto) -> None:
    """A table times itself, so that its rows meet each other: [V, V], and that again."""
    made = [
        helper.make_node("Cast", ["model.embed_tokens.weight"], ["o"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["o"], ["o.t"], perm=[1, 0]),
        helper.make_node("MatMul", ["o", "o.t"], ["o.o"]),
    ]
    made += [helper.make_node("MatMul", ["o.o", "o.o"], [f"o.o.{i}"]) for i in range(300)]
    model.graph.node.extend(made)


def expanded(*sizes: int) -> Edit:
    shape = helper.make_node("Constant", [], ["wide.shape"], value_ints=list(sizes))
    one = helper.make_node("Constant", [], ["one.wide"], value_float=1.0)
    return nodes(shape, one, helper.make_node("Expand", ["one.wide", "wide.shape"], ["wide"]))


def last_tensor(**changes: Any) -> Edit:
    """Return an edit of where the last external tensor lies; a change to None takes the entry away."""

    def edit(model: onnx.ModelProto) -> None:
        tensor = [tensor for tensor in model.graph.initializer if tensor.external_data][-1]
        place = {entry.key: entry.value for entry in tensor.external_data} | changes
        del tensor.external_data[:]
        for key, value in place.items():
            if value is not None:
                tensor.external_data.add(key=key, value=str(value))

    return edit


def tensor_of(model: onnx.ModelProto, name: str = "cos") -> TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def set_dims(*dims: int) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        tensor = tensor_of(model)
        del tensor.dims[:]
        tensor.dims.extend(dims)

    return edit


def inline(name: str, dims: list[int], content: bytes, dtype: int = TensorProto.FLOAT) -> Edit:
    made = TensorProto(name=name, dims=dims, data_type=dtype, raw_data=content)
    return lambda model: model.graph.initializer.append(made)


def loop(model: onnx.ModelProto) -> None:
    body = helper.make_graph([], "body", [], [])
    model.graph.node.append(helper.make_node("Loop", [], ["looped"], body=body))


def in_a_subgraph(model: onnx.ModelProto) -> None:
    body = helper.make_graph([], "body", [], [])
    model.graph.node[-1].attribute.append(helper.make_attribute("axis", body))


def reference_attribute(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "Cast")
    node.attribute[0].ref_attr_name = "to"


def declare(name: str, dtype: int, shape: list[Any]) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        kept = [value for value in model.graph.value_info if value.name != name]
        del model.graph.value_info[:]
        model.graph.value_info.extend([*kept, helper.make_tensor_value_info(name, dtype, shape)])

    return edit


def rename_size(old: str, new: str) -> Edit:
    """Call one dimension by another's name, everywhere."""

    def edit(model: onnx.ModelProto) -> None:
        for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
            for size in value.type.tensor_type.shape.dim:
                if size.dim_param == old:
                    size.dim_param = new

    return edit


def circle(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Add", ["a.circle", "a.circle"], ["b.circle"]))
    model.graph.node.append(helper.make_node("Add", ["b.circle", "b.circle"], ["a.circle"]))


def attention_input(name: str, value: str) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            if node.op_type == op.OP:
                node.input[op.MODEL_INPUTS.index(name)] = value

    return edit


def function(domain: str, name: str) -> Edit:
    made = helper.make_function(domain, name, ["x"], ["y"], [helper.make_node("Identity", ["x"], ["y"])], [])
    return lambda model: model.functions.append(made)


REFUSED: dict[str, tuple[Edit, str]] = {
    "a value joined to itself": (doubled(38), "its values would be"),
    "a value joined to itself beyond all bounds": (doubled(45), "Concat 'd40': its size is none that it takes"),
    "products without end": (outer, "in a long step"),
    "a huge tensor": (expanded(2**38), "its values would be"),
    "a huge tensor of many axes": (expanded(2**20, 2**20, 2**20), "its values would be"),
    "a shape of negative sizes": (expanded(-1), "the shape it is given"),
    "a shape that overflows": (expanded(2**62, 2**62), "its size is none"),
    "attention that is written out": (
        nodes(helper.make_node("Softmax", ["logits"], ["x.y"], axis=-1)),
        "a node 'Softmax', which no bundle has",
    ),
    "a loop": (loop, "a node 'Loop', which no bundle has"),
    "a graph within": (in_a_subgraph, "has the attribute 'axis'"),
    "another domain": (
        nodes(helper.make_node("Add", ["cos", "cos"], ["x.y"], domain="com.microsoft")),
        "microsoft::Add",
    ),
    "an operator of ONNX Runtime's": (
        nodes(helper.make_node("MatMulNBits", ["cos", "cos"], ["x.y"], domain="com.microsoft")),
        "a node 'com.microsoft::MatMulNBits', which no bundle has",
    ),
    "a terminal's escape": (nodes(helper.make_node("\x1b[31m\n", [], ["x.y"])), "a node '\\x1b[31m\\n', which"),
    "an attribute that refers": (reference_attribute, "the attribute to of a Cast is of another type"),
    "an attribute of another type": (attribute("Cast", to="float"), "the attribute to of a Cast is of another type"),
    "an attribute that is missing": (attribute("Cast", to=None), "KeyError"),
    "no such type": (attribute("Cast", to=77), "the type it casts to"),
    "an axis that is not there": (attribute("Concat", axis=7), "its axis is none that it takes"),
    "heads that do not divide": (attribute(op.OP, num_query_heads=7), "GroupedLatentAttention"),
    "no heads": (attribute(op.OP, num_query_heads=0), "GroupedLatentAttention"),
    "an attention without its attributes": (attribute(op.OP, scale=None), "lacks one of its attributes"),
    "an attention without one of its inputs": (attention_input("past_key", ""), "its number of inputs"),
    "a circle": (circle, "reads 'a.circle', which is not made before it"),
    "an order that is reversed": (lambda m: m.graph.node.reverse(), "is not made before it"),
    "a value made twice": (nodes(helper.make_node("Sigmoid", ["cos"], ["logits"])), "which there is already"),
    "a value without a name": (nodes(helper.make_node("Sigmoid", ["cos"], [""])), "has no name"),
    "an input without a name": (nodes(helper.make_node("Concat", ["", "cos"], ["x.y"], axis=0)), "reads ''"),
    "too few inputs": (nodes(helper.make_node("Add", ["cos"], ["x.y"])), "a Add has 1 inputs"),
    "too many outputs": (nodes(helper.make_node("Add", ["cos", "sin"], ["x.y", "x.z"])), "and 2 outputs"),
    "too many nodes": (
        lambda model: model.graph.node.extend([helper.make_node("Sigmoid", ["cos"], [f"n{i}"]) for i in range(1000)]),
        "entries of node, expected at most",
    ),
    "too many attributes": (
        lambda model: [model.graph.node[-1].attribute.add() for _ in range(9)],
        "a node of more than 8 attributes",
    ),
    "a tensor of 1.1 TiB": (set_dims(2**19, 2**19), "passes the end of model.onnx.data"),
    "a tensor beyond all bounds": (set_dims(2**62, 2**62, 2**62), "passes the end of model.onnx.data"),
    "a tensor of a negative size": (set_dims(-1, 4), "has the shape (-1, 4)"),
    "a tensor of another shape": (set_dims(4, 128), "not as config.json has it"),
    "a tensor of no known type": (
        lambda m: setattr(tensor_of(m), "data_type", TensorProto.STRING),
        "of type 8, which no",
    ),
    "a tensor without data": (inline("model.norm.bias", [2], b""), "has 0 bytes, expected 8"),
    "a large tensor in the graph": (inline("x", [2**15], bytes(2**17)), "has 131072 bytes, expected 131072"),
    "a tensor unknown to the config": (
        inline("model.layers.9.mlp.up_proj.weight", [1], bytes(4)),
        "unknown to config.json",
    ),
    "a tensor twice": (lambda m: m.graph.initializer.append(m.graph.initializer[0]), "two tensors called"),
    "an input that is stored": (inline("past_length", [1], bytes(8), TensorProto.INT64), "unknown to config.json"),
    "a sparse tensor": (lambda m: m.graph.sparse_initializer.add(), "sparse tensors"),
    "weights elsewhere": (last_tensor(location="../elsewhere"), "lies outside the bundle, in '../elsewhere'"),
    "weights at the root": (last_tensor(location="/etc/passwd"), "lies outside the bundle, in '/etc/passwd'"),
    "weights in the graph's file": (last_tensor(location=MODEL), "lies outside the bundle, in 'model.onnx'"),
    "weights without a place": (last_tensor(location=None), "does not say in one way where it lies"),
    "weights before the file": (last_tensor(offset=-8), "lies at"),
    "weights behind the file": (last_tensor(offset=2**50), "passes the end of model.onnx.data"),
    "weights far behind the file": (last_tensor(offset=2**62), "lies at"),
    "weights at no number": (last_tensor(offset="1e3"), "lies at"),
    "weights at a number of many digits": (last_tensor(offset="1" * 5000), "lies at"),
    "weights at a number in other digits": (last_tensor(offset="\u0661"), "lies at"),
    "weights of another length": (last_tensor(length=4), "or its 4 bytes are not the"),
    "a size declared wrongly": (declare("cos", TensorProto.FLOAT, [2, 2]), "'cos' is declared as [2, 2], and is"),
    "a type declared wrongly": (declare("cos", TensorProto.INT8, [128, 4]), "'cos' is declared of type 3"),
    "a name for what there is none of": (declare("nowhere", TensorProto.FLOAT, [1]), "'nowhere', which nothing makes"),
    "dimensions of one name": (rename_size("tokens", "batch"), "its input input_ids is"),
    "an output less": (lambda m: m.graph.output.pop(), "it has 4 outputs, expected 5"),
    "an input more": (lambda m: m.graph.input.append(helper.make_tensor_value_info("x", 1, [1])), "it has 8 inputs"),
    "an output of another size": (
        lambda m: setattr(m.graph.output[0].type.tensor_type.shape.dim[2], "dim_value", 7),
        "logits is",
    ),
    "no tensor": (
        lambda m: m.graph.input[0].type.sequence_type.elem_type.tensor_type.CopyFrom(m.graph.input[1].type.tensor_type),
        "is no tensor",
    ),
    "another function": (function("gta", "Other"), "its functions are"),
    "a function in place of an operator": (function("", "MatMul"), "its functions are"),
    "another opset": (lambda m: setattr(m.opset_import[0], "version", 17), "its opsets are"),
    "an opset more": (lambda m: m.opset_import.add(domain="com.microsoft", version=1), "its opsets are"),
    "an IR version of no date": (lambda m: setattr(m, "ir_version", 2**40), "its IR version is"),
    "a graph to train": (lambda m: m.training_info.add(), "graphs for training"),
    "nothing": (lambda m: m.Clear(), "its IR version is 0"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(copied_bundle: Path, what: str) -> None:
    edit, message = REFUSED[what]
    assert message in refused(copied_bundle, edit)


def test_sums_within_bounds_are_taken(copied_bundle: Path) -> None:
    """The same kinds of edit, of a harmless size: it is the size that is refused."""
    bundle = Bundle.open(copied_bundle)
    proto = onnx.load(bundle.model_path, load_external_data=False)
    for edit in (doubled(5), expanded(3, 4)):
        edit(proto)
    bundle.model_path.write_bytes(proto.SerializeToString())
    load_graph(bundle.model_path, bundle.config)


@pytest.mark.parametrize(
    "content",
    [b"", b"no graph" * 100, b"\x3a" * 3000, b"\x3a\xff\xff\xff\xff\x0f", b"\x00" * 2**18],
    ids=["nothing", "text", "nested", "a length beyond the end", "zeros"],
)
def test_files_that_are_no_graph(copied_bundle: Path, content: bytes) -> None:
    bundle = Bundle.open(copied_bundle)
    bundle.model_path.write_bytes(content)
    with pytest.raises(BundleError, match="is no graph that gta-edge writes"):
        load_graph(bundle.model_path, bundle.config)


def test_messages_that_are_nested_without_end(copied_bundle: Path) -> None:
    """Types of types: parsers go into each."""
    bundle, content = Bundle.open(copied_bundle), b""
    for _ in range(300):
        content = b"\x22" + length_of(b"\x0a" + length_of(content) + content) + b"\x0a" + length_of(content) + content
    value = b"\x12" + length_of(content) + content
    graph = b"\x5a" + length_of(value) + value
    bundle.model_path.write_bytes(b"\x3a" + length_of(graph) + graph)
    with pytest.raises(BundleError):
        load_graph(bundle.model_path, bundle.config)


def length_of(content: bytes) -> bytes:
    """The length of a message, as protobuf writes it before it."""
    number, digits = len(content), []
    while number >= 128:
        digits.append(number & 127 | 128)
        number >>= 7
    return bytes([*digits, number])


def test_a_file_that_is_too_large(copied_bundle: Path) -> None:
    bundle = Bundle.open(copied_bundle)
    with bundle.model_path.open("r+b") as file:
        file.truncate(2**40)
    with pytest.raises(BundleError, match=r"has more than \d+ bytes, too many for a graph of 2 layers"):
        load_graph(bundle.model_path, bundle.config)


def test_files_that_cannot_be_read(copied_bundle: Path) -> None:
    bundle = Bundle.open(copied_bundle)
    bundle.model_path.unlink()
    with pytest.raises(BundleError, match="cannot be read"):
        load_graph(bundle.model_path, bundle.config)
    os.mkfifo(bundle.model_path)  # reading it would wait for ever
    with pytest.raises(BundleError, match="is not a regular file"):
        load_graph(bundle.model_path, bundle.config)


def test_weights_that_are_missing(copied_bundle: Path) -> None:
    bundle = Bundle.open(copied_bundle)
    (copied_bundle / WEIGHTS).unlink()
    with pytest.raises(BundleError, match="lies outside the bundle"):
        load_graph(bundle.model_path, bundle.config)


# --- weights in their file -------------------------------------------------------------------------------------------


def test_weights_with_several_links(bundle: Bundle, tmp_path: Path) -> None:
    """As ``cp -al``, package stores and container layers make; onnx-ir and ONNX Runtime refuse to read them."""
    linked = tmp_path / "linked"
    shutil.copytree(bundle.directory, linked, copy_function=os.link, ignore=shutil.ignore_patterns("engines"))
    assert (linked / WEIGHTS).stat().st_nlink == 2
    plain = load_graph(bundle.model_path, bundle.config)
    for name, value in load_graph(linked / MODEL, bundle.config).graph.initializers.items():
        other = plain.graph.initializers[name].const_value
        assert value.const_value is not None and other is not None
        np.testing.assert_array_equal(value.const_value.numpy(), other.numpy())
        np.testing.assert_array_equal(np.asarray(value.const_value), other.numpy())
        assert value.const_value.tobytes() == other.tobytes()
        with (tmp_path / "written").open("w+b") as file:
            value.const_value.tofile(file)
            file.seek(0)
            assert file.read() == other.tobytes()


def test_weights_that_are_cut_short_after_they_were_looked_at(copied_bundle: Path) -> None:
    bundle = Bundle.open(copied_bundle)
    model = load_graph(bundle.model_path, bundle.config)
    tensors = [v.const_value for v in model.graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor)]
    os.truncate(copied_bundle / WEIGHTS, 100)
    for read in (lambda tensor: tensor.numpy(), lambda tensor: tensor.tobytes()):
        with pytest.raises(BundleError, match="was cut short; copy the bundle anew"):
            read(tensors[-1])
    (copied_bundle / WEIGHTS).unlink()
    with pytest.raises(BundleError, match="cannot be read"):
        tensors[-1].numpy()


def test_numbers_that_are_none_make_no_warnings(copied_bundle: Path, tmp_path: Path) -> None:
    """numpy warns of signalling ones, on stderr, when it converts or looks at them; here a warning is an error."""
    bundle = Bundle.open(copied_bundle)
    content = np.frombuffer((copied_bundle / WEIGHTS).read_bytes(), "<u2").copy()
    content[::7] = 0x7F81  # a signalling NaN in bfloat16
    (copied_bundle / WEIGHTS).write_bytes(content.tobytes())
    assert any(np.isnan(values).any() for _, values in read_weights(bundle.model_path, bundle.config))
    for form in ("plugin", "function"):
        lower(bundle, tmp_path / form, form=form, compute="fp16", capacity=16)
    cuda_graph(bundle, "fp16", tmp_path / "weights.data", "weights.data")
    graphs(bundle, tmp_path / "cpu.data", "cpu.data")


# --- passes ----------------------------------------------------------------------------------------------------------


class Failing(ir.passes.InPlacePass):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        raise self.error


@pytest.mark.parametrize(
    "error", [ValueError("one\ntwo"), KeyError("x"), AssertionError(), RecursionError(), TypeError()]
)
def test_what_a_pass_meets_is_an_error_of_ours(tiny_bundle: Path, error: Exception) -> None:
    bundle = Bundle.open(tiny_bundle)
    with pytest.raises(BundleError, match=r"is no graph that gta-edge writes \(.*\); export") as caught:
        run_passes(load_graph(bundle.model_path, bundle.config), bundle.model_path, Failing(error))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("error", "kind"),
    [(EngineError("ours"), EngineError), (MemoryError(), CapacityError), (OSError(28, "full"), OSError)],
)
def test_what_passes_as_it_is(error: Exception, kind: type[Exception], tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    with pytest.raises(kind):
        run_passes(load_graph(bundle.model_path, bundle.config), bundle.model_path, Failing(error))
    with pytest.raises(kind), rewriting("a graph"):
        raise error


def test_ctrl_c_is_not_caught() -> None:
    with pytest.raises(KeyboardInterrupt), rewriting("a graph"):
        raise KeyboardInterrupt


def test_a_missing_library_says_what_to_install(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gta_edge.libraries.optional import optional

    monkeypatch.setattr(io, "ir", optional("no_such_module", "ort"))
    monkeypatch.setattr(io, "optional", lambda name, extra: optional("no_such_module", extra))
    bundle = Bundle.open(tiny_bundle)
    with pytest.raises(GtaEdgeError, match=re.escape(install_command("tensorrt"))):
        load_graph(bundle.model_path, bundle.config, "tensorrt")
