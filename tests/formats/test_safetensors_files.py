"""Headers, shards and their index: read as they are, or refused with a CheckpointError."""

import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save, save_file

from gta_edge.errors import CheckpointError
from gta_edge.formats.checkpoint import Checkpoint
from tests.helpers.checkpoint_files import (
    EMBEDDING,
    GTA,
    HEAD,
    NORM,
    SMALLEST,
    TIED,
    header_entry,
    random_tensors,
    read_index,
    refused,
    safetensors_bytes,
    write_index,
    write_shards,
    write_single,
)

# --- damaged files ---------------------------------------------------------------------------------------------------


_ONE = json.dumps(header_entry(0, 4))
DAMAGED = {
    "empty": b"",
    "three bytes": b"abc",
    "length only": struct.pack("<Q", 100),
    "header of 2^62 bytes": safetensors_bytes({}, length=2**62),
    "header of 2^64-1 bytes": safetensors_bytes({}, length=2**64 - 1),
    "header of 99 MB": safetensors_bytes({}, length=99_000_000),
    "header of 99 MB that is there": safetensors_bytes(b"{" + b" " * 99_000_000 + b"}"),
    "sizes below zero": safetensors_bytes({"a": header_entry(0, 4, shape=[-1, -1])}, bytes(4)),
    "size that is no integer": safetensors_bytes({"a": header_entry(0, 4, shape=[1.0])}, bytes(4)),
    "size of 40 digits": safetensors_bytes({"a": header_entry(0, 4, shape=[10**39])}, bytes(4)),
    "no UTF-8": safetensors_bytes(b'{"\xff":1}'),
    "no JSON": safetensors_bytes(b"hello"),
    "a list": safetensors_bytes([]),
    "nested deeply": safetensors_bytes(b'{"a":' * 100_000),
    "the same tensor twice": safetensors_bytes(f'{{"a":{_ONE},"a":{_ONE}}}'.encode(), bytes(4)),
    "overlap": safetensors_bytes({"a": header_entry(0, 8, shape=[2]), "b": header_entry(4, 12, shape=[2])}, bytes(12)),
    "hole": safetensors_bytes({"a": header_entry(0, 4), "b": header_entry(8, 12)}, bytes(12)),
    "hole at the start": safetensors_bytes({"a": header_entry(4, 8)}, bytes(8)),
    "bytes at the end": safetensors_bytes({"a": header_entry(0, 4)}, bytes(8)),
    "backwards": safetensors_bytes({"a": header_entry(4, 0)}, bytes(4)),
    "below zero": safetensors_bytes({"a": header_entry(-4, 0)}, bytes(4)),
    "beyond the end": safetensors_bytes({"a": header_entry(0, 2**40, shape=[2**38])}, bytes(4)),
    "shape that overflows": safetensors_bytes({"a": header_entry(0, 4, shape=[2**63, 2**63])}, bytes(4)),
    "shape of another size": safetensors_bytes({"a": header_entry(0, 4, shape=[2])}, bytes(4)),
    "unknown type": safetensors_bytes({"a": header_entry(0, 4, dtype="Q7")}, bytes(4)),
    "no type": safetensors_bytes({"a": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    "three offsets": safetensors_bytes({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2, 4]}}, bytes(4)),
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_damaged_files(tmp_path, data):
    (write_single(tmp_path / "c") / "model.safetensors").write_bytes(data)
    refused(tmp_path / "c", r"model\.safetensors: (is empty|is no valid safetensors|has no valid header)")


def test_a_tensor_twice_in_a_header_that_fits_otherwise(tmp_path):
    file = write_single(tmp_path / "c") / "model.safetensors"
    (length,) = struct.unpack("<Q", file.read_bytes()[:8])
    header, data = file.read_bytes()[8 : 8 + length].strip(), file.read_bytes()[8 + length :]
    entry = json.dumps(json.loads(header)[NORM])
    file.write_bytes(safetensors_bytes(header[:-1] + f',"{NORM}":{entry}}}'.encode(), data))
    refused(tmp_path / "c", "the key 'model.norm.weight' comes twice")


def test_text_of_a_file_stays_one_short_line(tmp_path):
    tensors = random_tensors(GTA) | {"a\nb" * 1000: np.ones(1, np.float32)}
    refused(write_single(tmp_path / "c", GTA, tensors), r"holds 1 .*a\\nb")
    escapes = {f"\x1b]0;{i}\x07\u202e" * 1000: np.ones(1, np.float32) for i in range(10)}
    refused(write_single(tmp_path / "c", GTA, random_tensors(GTA) | escapes), r"holds 10 .*\\x1b\]0;.* and 7 more")


@pytest.fixture(scope="module")
def smallest(tmp_path_factory):
    """A directory, the bytes of its weights, and where the header ends."""
    directory = write_single(tmp_path_factory.mktemp("fuzz") / "c", SMALLEST)
    content = (directory / "model.safetensors").read_bytes()
    return directory, content, 8 + struct.unpack("<Q", content[:8])[0]


def _refused_or_unchanged(directory, content):
    (directory / "model.safetensors").write_bytes(content)
    try:
        checkpoint = Checkpoint.open(directory)
    except CheckpointError as error:
        assert "\n" not in str(error)  # noqa: PT017 - either outcome is right
        return
    for name, expected in random_tensors(SMALLEST).items():
        assert checkpoint.read(name).tobytes() == expected.tobytes()


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_truncation_is_refused(smallest, data):
    directory, content, _ = smallest
    (directory / "model.safetensors").write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    refused(directory, "model.safetensors")


@settings(deadline=None, max_examples=400)
@given(data=st.data())
def test_any_changed_byte_of_a_header_is_refused_or_means_nothing(smallest, data):
    directory, content, end = smallest
    position = data.draw(st.integers(0, end - 1))
    _refused_or_unchanged(
        directory, content[:position] + bytes([data.draw(st.integers(0, 255))]) + content[position + 1 :]
    )


@settings(deadline=None, max_examples=100)
@given(header=st.binary(max_size=200), data=st.binary(max_size=20))
def test_any_header_is_refused(smallest, header, data):
    directory, _, _ = smallest
    (directory / "model.safetensors").write_bytes(safetensors_bytes(header, data))
    refused(directory, "model.safetensors")


# --- shards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../c/model-00001-of-00003.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        "a\\b.safetensors",
        "C:x.safetensors",
        "",
        ".",
        "..",
        "model.bin",
        "x\0.safetensors",
        "\ud800.safetensors",
        3,
        None,
        ["x"],
    ],
)
def test_shard_names_that_lead_elsewhere(tmp_path, name):
    directory = write_shards(tmp_path / "c")
    write_index(directory, read_index(directory) | {NORM: name})
    refused(directory, "names the shard")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        "[" * 100_000,
        "\ufeff{}",
        '{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}',
        '{"weight_map": {"a": 1' + "0" * 5000 + "}}",
    ],
)
def test_damaged_indexes(tmp_path, text):
    directory = write_shards(tmp_path / "c")
    (directory / "model.safetensors.index.json").write_text(text)
    refused(directory, "(is not valid JSON|has no weight_map)")


def test_an_index_in_another_encoding(tmp_path):
    directory = write_shards(tmp_path / "c")
    (directory / "model.safetensors.index.json").write_bytes(b"\xff\xfe{}")
    refused(directory, "is not valid JSON")


def test_a_shard_that_is_missing_or_damaged(tmp_path):
    directory = write_shards(tmp_path / "c")
    shard = directory / "model-00002-of-00003.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    refused(directory, "00002-of-00003.safetensors: is no valid safetensors file")
    shard.unlink()
    refused(directory, "00002-of-00003.safetensors: cannot be read")


def test_index_and_shards_must_agree(tmp_path):
    directory = write_shards(tmp_path / "c")
    weight_map = read_index(directory)
    write_index(directory, weight_map | {NORM: weight_map[EMBEDDING]})
    refused(directory, "says that model.norm.weight is in model-00001-.*, but it is in model-0000[23]")
    write_index(directory, weight_map | {"ghost": weight_map[EMBEDDING]})
    refused(directory, "says that ghost is in model-00001-.*, but it is in none of its files")
    del weight_map[NORM]
    write_index(directory, weight_map)
    refused(directory, "says that model.norm.weight is nowhere, but it is in")


def _store_twice(directory, change):
    """Put a tensor of the second shard into the first too, and return its name."""
    shard = directory / "model-00001-of-00003.safetensors"
    other = load_file(directory / "model-00002-of-00003.safetensors")
    name = min(other)
    save_file(load_file(shard) | {name: change(other[name])}, shard)
    return name


def test_a_tensor_in_two_shards(tmp_path):
    directory = write_shards(tmp_path / "c")
    name = _store_twice(directory, lambda values: values)
    assert Checkpoint.open(directory).read(name).tobytes() == random_tensors(GTA)[name].tobytes()
    _store_twice(directory, lambda values: values + 1)
    refused(directory, "which model-00001-of-00003.safetensors holds too, with other values")
    _store_twice(directory, lambda values: values.astype(np.float32))
    refused(directory, "which model-00001-of-00003.safetensors holds too, with other values")


@pytest.mark.parametrize("config", [GTA, TIED, SMALLEST], ids=["untied", "tied", "llama"])
def test_an_index_may_be_wrong_about_what_does_not_matter(tmp_path, config):
    directory = write_shards(tmp_path / "c", config)
    placed = read_index(directory)
    shard = placed[EMBEDDING]
    absent = {"model.rotary_emb.inv_freq": shard, "model.layers.0.self_attn.rotary_emb.inv_freq": shard}
    if config.tie_word_embeddings:
        absent[HEAD] = shard
    write_index(directory, placed | absent)
    assert Checkpoint.open(directory).names == tuple(config.parameter_shapes())
    write_index(directory, placed)
    save_file(
        load_file(directory / shard) | {name: np.ones(2, np.float32) for name in absent if "inv" in name},
        directory / shard,
    )
    assert Checkpoint.open(directory).names == tuple(config.parameter_shapes())


@pytest.mark.parametrize("config", [GTA, TIED, SMALLEST], ids=["untied", "tied", "llama"])
@pytest.mark.parametrize("name", ["model.layers.0.self_attn.o_proj.bias", "model.layers.0.mlp.up_proj.bias"])
def test_an_index_may_be_wrong_about_a_bias_of_zeros(tmp_path, config, name):
    directory = write_shards(tmp_path / "c", config)
    placed = read_index(directory)
    shard, other = sorted(set(placed.values()))[:2]
    without = load_file(directory / shard)
    zeros = np.zeros(2, np.float32)
    for values, index in ((zeros, placed), (zeros, placed | {name: other}), (zeros, placed | {name: shard})):
        save_file(without | {name: values}, directory / shard)
        write_index(directory, index)
        assert Checkpoint.open(directory).names == tuple(config.parameter_shapes())
    for values, index in ((zeros + 1, placed), (zeros + 1, placed | {name: other}), (zeros.astype(np.int8), placed)):
        save_file(without | {name: values}, directory / shard)
        write_index(directory, index)
        refused(directory, f"says that {name} is .*, but it is in {shard}")
    save_file(without, directory / shard)
    write_index(directory, placed | {name: shard})
    refused(directory, f"says that {name} is in {shard}, but it is in none of its files")


def test_an_index_needs_a_map_and_nothing_else(tmp_path):
    directory = write_shards(tmp_path / "c")
    placed = read_index(directory)
    for index in ({"weight_map": placed}, {"metadata": None, "weight_map": placed, "format": "pt", "total": [1]}):
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        assert Checkpoint.open(directory).names == tuple(GTA.parameter_shapes())


def test_an_index_of_very_many_entries(tmp_path):
    directory = write_shards(tmp_path / "c")
    placed = read_index(directory)
    shard = placed[EMBEDDING]
    write_index(directory, placed | {f"t{i}": shard for i in range(100_000)})
    refused(directory, "says that t0 is in model-00001-of-00003.safetensors, but it is in none of its files")
    write_index(directory, placed | {f"t{i}": shard for i in range(1_000_000)})
    refused(directory, r"index\.json: has \d+ bytes; expected at most 16777216")


def test_save_and_the_reader_agree_on_the_layout():
    """What the damaged files above vary is what the library writes."""
    tensor = {"a": np.ones(1, np.float32)}
    content = save(tensor)
    (length,) = struct.unpack("<Q", content[:8])
    assert json.loads(content[8 : 8 + length]) == {"a": header_entry(0, 4)}
