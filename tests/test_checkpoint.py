"""A checkpoint is read as it is or refused with a CheckpointError, whatever is in its files."""

import json
import os
import pickle
import struct
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save, save_file

from gta_edge.checkpoint import COMPANIONS, Checkpoint
from gta_edge.config import GQAConfig, GTAConfig
from gta_edge.errors import CheckpointError, ConfigError

GTA = GTAConfig(
    vocab_size=16,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    head_dim=4,
    num_query_heads=2,
    num_key_heads=1,
    key_dim=4,
    num_latent_heads=1,
    latent_dim=4,
)
TIED = GTA.replace(tie_word_embeddings=True)
SMALLEST = GQAConfig(
    vocab_size=2,
    hidden_size=2,
    intermediate_size=2,
    num_hidden_layers=1,
    num_attention_heads=1,
    head_dim=2,
    num_key_value_heads=1,
    tie_word_embeddings=True,
)
HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
BIAS = "model.layers.0.self_attn.q_proj.bias"


def _tensors(config, dtype=ml_dtypes.bfloat16):
    generator = np.random.default_rng(0)
    return {name: generator.standard_normal(shape).astype(dtype) for name, shape in config.parameter_shapes().items()}


def _write(directory, config=GTA, tensors=None):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config.to_dict()))
    save_file(_tensors(config) if tensors is None else tensors, directory / "model.safetensors")
    return directory


def _write_shards(directory, config=GTA, shards=3):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config.to_dict()))
    tensors = _tensors(config)
    weight_map = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        save_file({name: value for name, value in tensors.items() if weight_map[name] == shard}, directory / shard)
    _write_index(directory, weight_map)
    return directory


def _write_index(directory, weight_map):
    index = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(index)


def _read_index(directory):
    return json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]


def _split_header(path):
    """Return the header of a safetensors file, parsed, and the bytes behind it."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _refused(directory, pattern):
    """Expect one line that says what is wrong."""
    with pytest.raises(CheckpointError, match=pattern) as caught:
        Checkpoint.open(directory)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600
    return str(caught.value)


@contextmanager
def _unprivileged():
    """Root may do anything, so permissions are tested as somebody else."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


# --- what can be read ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [_write, _write_shards])
@pytest.mark.parametrize("config", [GTA, TIED, SMALLEST])
def test_everything_is_read_as_it_was_written(tmp_path, write, config):
    checkpoint = Checkpoint.open(str(write(tmp_path / "c", config)))
    tensors = _tensors(config)
    assert checkpoint.config == config
    assert checkpoint.names == tuple(config.parameter_shapes())
    assert checkpoint.biases == {name for name in tensors if name.endswith(".bias")}
    assert checkpoint.weight_bytes == config.weight_bytes
    for name, expected in tensors.items():
        value = checkpoint.read(name)
        assert value.dtype == expected.dtype
        assert value.shape == expected.shape
        assert value.tobytes() == expected.tobytes()
        assert value.flags.owndata or value.base.flags.owndata
        assert value.flags.writeable
        assert checkpoint.dtype_of(name) == "bfloat16"


def test_types_may_differ_from_tensor_to_tensor(tmp_path):
    tensors = _tensors(GTA, np.float16)
    tensors[NORM] = tensors[NORM].astype(np.float32)
    tensors[HEAD] = tensors[HEAD].astype(ml_dtypes.bfloat16)
    checkpoint = Checkpoint.open(_write(tmp_path / "c", GTA, tensors))
    types = [checkpoint.dtype_of(name) for name in (NORM, HEAD, EMBEDDING)]
    assert types == ["float32", "bfloat16", "float16"]
    assert checkpoint.weight_bytes == sum(value.nbytes for value in tensors.values())
    for name, expected in tensors.items():
        assert checkpoint.read(name).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        *((np.float64, "F64"), (np.int8, "I8"), (np.uint8, "U8"), (np.int64, "I64"), (bool, "BOOL")),
        *((ml_dtypes.float8_e4m3fn, "F8_E4M3"), (ml_dtypes.float8_e5m2, "F8_E5M2")),
    ],
)
def test_other_types_are_named(tmp_path, dtype, said):
    tensors = {"model.norm.weight": np.ones(8, np.float32)} | _tensors(GTA)
    directory = _write(tmp_path / "c", GTA, tensors)
    header, data = _split_header(directory / "model.safetensors")
    begin, end = header[NORM]["data_offsets"]
    header[NORM] = _entry(begin, begin + 8 * np.dtype(dtype).itemsize, said, (8,))
    difference = header[NORM]["data_offsets"][1] - end
    for name, entry in header.items():
        if name != NORM and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [offset + difference for offset in entry["data_offsets"]]
    data = data[:begin] + bytes(8 * np.dtype(dtype).itemsize) + data[end:]
    (directory / "model.safetensors").write_bytes(_safetensors(header, data))
    _refused(directory, rf"model\.norm\.weight is stored as {said}; expected one of F32, F16, BF16")


def test_an_index_of_very_many_entries(tmp_path):
    directory = _write_shards(tmp_path / "c")
    placed = _read_index(directory)
    shard = placed[EMBEDDING]
    _write_index(directory, placed | {f"t{i}": shard for i in range(100_000)})
    _refused(directory, "says that t0 is in model-00001-of-00003.safetensors, but it is in none of its files")
    _write_index(directory, placed | {f"t{i}": shard for i in range(1_000_000)})
    _refused(directory, r"index\.json: has \d+ bytes; expected at most 16777216")


def test_a_bias_may_be_absent_and_nothing_else(tmp_path):
    tensors = _tensors(GTA)
    del tensors[BIAS]
    checkpoint = Checkpoint.open(_write(tmp_path / "c", GTA, tensors))
    assert BIAS not in checkpoint.names
    assert checkpoint.biases == {name for name in GTA.parameter_shapes() if name.endswith(".bias")} - {BIAS}
    with pytest.raises(CheckpointError, match="no parameter"):
        checkpoint.read(BIAS)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    _refused(_write(tmp_path / "d", GTA, tensors), r"lacks 1 .*: model\.layers\.1\.mlp\.up_proj\.weight;")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "rotary_emb.inv_freq",
        "model.layers.1.self_attn.rotary_emb.cos_cached",
        "model.layers.1.self_attn.rotary_emb.sin_cached",
        "model.rotary_emb.original_inv_freq",
        "model.decoder.version",
    ],
)
@pytest.mark.parametrize("config", [GTA, TIED, SMALLEST], ids=["untied", "tied", "llama"])
def test_tables_of_old_checkpoints_are_ignored(tmp_path, config, name):
    for table in (np.ones(2), np.ones((1, 1, 4, 4), np.int8), np.full(3, np.nan, np.float16)):
        checkpoint = Checkpoint.open(_write(tmp_path / "c", config, _tensors(config) | {name: table}))
        assert checkpoint.names == tuple(config.parameter_shapes())
        assert checkpoint.weight_bytes == config.weight_bytes


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.inv_freq", "rotary_emb", "model.inv_freq", "version"])
def test_what_is_only_named_alike_is_not_ignored(tmp_path, name):
    _refused(_write(tmp_path / "c", GTA, _tensors(GTA) | {name: np.ones(2)}), "holds 1 that no GTAForCausalLM has")


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (GTA, "model.layers.1.self_attn.o_proj.bias"),
        (GTA, "lm_head.bias"),
        (GTA, "model.norm.bias"),
        (SMALLEST, "model.layers.0.post_attention_layernorm.bias"),
        (SMALLEST, "model.layers.0.self_attn.q_proj.bias"),
        (SMALLEST, "model.layers.0.mlp.down_proj.bias"),
    ],
)
def test_a_bias_that_no_model_has_is_ignored_where_it_is_zero(tmp_path, config, name):
    zeros = np.zeros(4, ml_dtypes.bfloat16)
    checkpoint = Checkpoint.open(_write(tmp_path / "c", config, _tensors(config) | {name: zeros}))
    assert checkpoint.names == tuple(config.parameter_shapes())
    assert checkpoint.biases == {n for n in config.parameter_shapes() if config.is_optional(n)}
    for value in (1e-9, np.nan):
        zeros[3] = value
        _refused(_write(tmp_path / "c", config, _tensors(config) | {name: zeros}), f"holds 1 that no .* has: {name};")


@pytest.mark.parametrize("write", [_write, _write_shards])
@pytest.mark.parametrize("config", [TIED, SMALLEST], ids=["gta", "llama"])
def test_a_tied_checkpoint_may_hold_only_the_head(tmp_path, config, write):
    """safetensors' ``save_model`` keeps one of two names that share memory, whichever comes last."""
    directory = write(tmp_path / "c", config)
    for path in directory.glob("*.safetensors"):
        save_file({HEAD if n == EMBEDDING else n: value for n, value in load_file(path).items()}, path)
    if write is _write_shards:
        _write_index(directory, {HEAD if n == EMBEDDING else n: f for n, f in _read_index(directory).items()})
    checkpoint = Checkpoint.open(directory)
    assert checkpoint.names == tuple(config.parameter_shapes())
    assert checkpoint.weight_bytes == config.weight_bytes
    assert checkpoint.read(EMBEDDING).tobytes() == _tensors(config)[EMBEDDING].tobytes()
    (directory / "config.json").write_text(json.dumps(config.replace(tie_word_embeddings=False).to_dict()))
    _refused(directory, f"lacks 1 of the tensors that its config.json asks for: {EMBEDDING}")


@pytest.mark.parametrize("write", [_write, _write_shards])
@pytest.mark.parametrize("config", [TIED, SMALLEST], ids=["gta", "llama"])
def test_a_model_saved_without_its_head_has_names_without_a_prefix(tmp_path, config, write):
    directory = write(tmp_path / "c", config)
    for path in directory.glob("*.safetensors"):
        save_file({n.removeprefix("model."): value for n, value in load_file(path).items()}, path)
    if write is _write_shards:
        _write_index(directory, {n.removeprefix("model."): f for n, f in _read_index(directory).items()})
    checkpoint = Checkpoint.open(directory)
    assert checkpoint.names == tuple(config.parameter_shapes())
    for name, values in _tensors(config).items():
        assert checkpoint.read(name).tobytes() == values.tobytes()
    (directory / "config.json").write_text(json.dumps(config.replace(tie_word_embeddings=False).to_dict()))
    _refused(directory, f"lacks 1 of the tensors that its config.json asks for: {HEAD}")


def test_names_with_and_without_a_prefix_are_not_mixed(tmp_path):
    tensors = {n.removeprefix("model.") if "norm" in n else n: value for n, value in _tensors(TIED).items()}
    _refused(_write(tmp_path / "c", TIED, tensors), "lacks 5 .* holds 5 that no GTAForCausalLM has")


def test_a_tied_head_alone_must_have_the_embeddings_shape(tmp_path):
    tensors = _tensors(TIED)
    tensors[HEAD] = np.ascontiguousarray(tensors.pop(EMBEDDING)[:-1])
    _refused(_write(tmp_path / "c", TIED, tensors), r"has the shape \[15, 8\]; config.json asks for \[16, 8\]")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", [EMBEDDING, NORM, BIAS])
def test_every_value_must_be_finite(tmp_path, name, dtype, value):
    tensors = _tensors(GTA, dtype)
    tensors[name].flat[-1] = value
    checkpoint = Checkpoint.open(_write(tmp_path / "c", GTA, tensors))
    size, last = tensors[name].size, [n - 1 for n in tensors[name].shape]
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read(name)
    assert f"model.safetensors: {name} holds {value} at {last}, 1 of {size} values are not finite; " in str(
        caught.value
    )
    for other in tensors.keys() - {name}:
        checkpoint.read(other)


def test_links_to_regular_files_may_leave_the_directory(tmp_path):
    _write(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "snapshot" / name).symlink_to(f"../blobs/{name}")
    checkpoint = Checkpoint.open(tmp_path / "snapshot")
    assert checkpoint.read(NORM).shape == (8,)
    (tmp_path / "blobs" / "model.safetensors").unlink()
    _refused(tmp_path / "snapshot", "model.safetensors: cannot be read")


def test_a_single_file_is_taken_before_an_index(tmp_path):
    _write_shards(_write(tmp_path / "c"))
    (tmp_path / "c" / "model.safetensors.index.json").write_text("nonsense")
    assert Checkpoint.open(tmp_path / "c").read(NORM).shape == (8,)


def test_companions(tmp_path):
    _write(tmp_path / "c")
    assert Checkpoint.open(tmp_path / "c").companions == ()
    for name in COMPANIONS[1:]:
        (tmp_path / "c" / name).write_text("{}")
    assert Checkpoint.open(tmp_path / "c").companions == tuple(tmp_path / "c" / name for name in COMPANIONS[1:])
    (tmp_path / "c" / COMPANIONS[0]).mkdir()
    _refused(tmp_path / "c", "tokenizer.json: is not a regular file")
    (tmp_path / "c" / COMPANIONS[0]).rmdir()
    with (tmp_path / "c" / COMPANIONS[0]).open("wb") as file:
        file.truncate(64 * 2**20 + 1)
    _refused(tmp_path / "c", "tokenizer.json: has 67108865 bytes; expected at most 67108864")


def test_reading_a_whole_checkpoint_takes_the_memory_of_one_tensor(tmp_path):
    config = SMALLEST.replace(vocab_size=2**20, hidden_size=2, intermediate_size=2**20)  # 4 tensors of 8 MiB
    config = config.replace(num_hidden_layers=6, dtype="float32")
    _write(tmp_path / "c", config, {name: np.ones(s, np.float32) for name, s in config.parameter_shapes().items()})
    script = """
import sys
from gta_edge.checkpoint import Checkpoint
def peak():  # KiB; the kernel's own mark, since getrusage also counts the parent before exec
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
checkpoint = Checkpoint.open(sys.argv[1])
for name in checkpoint.names:
    checkpoint.read(name)
print(peak() - before)
"""
    output = subprocess.run([sys.executable, "-c", script, tmp_path / "c"], check=True, capture_output=True, text=True)
    assert config.weight_bytes > 140 * 2**20
    assert int(output.stdout) < 30 * 2**10  # one that is read while the last one is still held, and a little


# --- what does not fit the config ------------------------------------------------------------------------------------


def test_missing_and_surplus_tensors_are_counted_and_named(tmp_path):
    renamed = {name.replace("model.", "transformer."): value for name, value in _tensors(GTA).items()}
    shapes = GTA.parameter_shapes()
    missing = sum(not GTA.is_optional(name) for name in shapes) - 1  # lm_head keeps its name
    message = _refused(_write(tmp_path / "c", GTA, renamed), f"lacks {missing} .* and {missing - 3} more; ")
    assert f"holds {len(shapes) - 1} that no GTAForCausalLM has" in message
    assert EMBEDDING in message
    assert "transformer.layers.0" in message


def test_a_wrong_shape_is_named(tmp_path):
    tensors = _tensors(GTA)
    tensors[EMBEDDING] = np.ascontiguousarray(tensors[EMBEDDING].T)
    _refused(_write(tmp_path / "c", GTA, tensors), r"embed_tokens.weight has the shape \[8, 16\]; .* \[16, 8\]")


def test_a_config_with_absurdly_many_layers_is_refused_at_once(tmp_path):
    _write(tmp_path / "c")
    (tmp_path / "c" / "config.json").write_text(json.dumps(GTA.replace(num_hidden_layers=2**31 - 1).to_dict()))
    _refused(tmp_path / "c", "too few for the 2147483647 layers")


def test_a_tied_head_must_equal_the_embedding(tmp_path):
    tensors = _tensors(TIED)
    same = tensors | {HEAD: tensors[EMBEDDING].copy()}
    checkpoint = Checkpoint.open(_write(tmp_path / "same", TIED, same))
    assert checkpoint.names == tuple(TIED.parameter_shapes())
    assert checkpoint.weight_bytes == TIED.weight_bytes
    other = same[HEAD].copy()
    other[-1, -1] += 1
    for value in (other, same[HEAD].astype(np.float32), same[HEAD][:-1]):
        directory = _write(tmp_path / "other", TIED, same | {HEAD: np.ascontiguousarray(value)})
        _refused(directory, "lm_head.weight differs from model.embed_tokens.weight, but config.json ties them")


# --- files that are missing or something else ------------------------------------------------------------------------


def test_paths_that_are_no_directory(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    _refused(tmp_path / "missing", "No such file or directory")
    _refused(tmp_path / "file", "is a file")
    _refused(tmp_path / "empty", "config.json: cannot be read")
    (tmp_path / "esc\x1b[2J").mkdir()
    _refused(tmp_path / "esc\x1b[2J", r"esc\\x1b\[2J")
    _refused("a\0b", "null")
    _refused("x" * 300, "File name too long")


def test_a_config_that_is_wrong_is_a_config_error(tmp_path):
    _write(tmp_path / "c")
    (tmp_path / "c" / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"config\.json"):
        Checkpoint.open(tmp_path / "c")
    (tmp_path / "c" / "config.json").unlink()
    (tmp_path / "c" / "config.json").mkdir()
    _refused(tmp_path / "c", "not a regular file")


def test_no_weights(tmp_path):
    (_write(tmp_path / "c") / "model.safetensors").unlink()
    _refused(tmp_path / "c", "holds neither model.safetensors nor model.safetensors.index.json")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("adapter_model.safetensors", "found adapter_model.safetensors: give the whole model"),
        ("consolidated.00.safetensors", "found consolidated.00.safetensors: give the whole model"),
        ("gta_edge.json", "this is a bundle"),
    ],
)
def test_something_else_instead_of_weights(tmp_path, name, said):
    (_write(tmp_path / "c") / "model.safetensors").rename(tmp_path / "c" / name)
    _refused(tmp_path / "c", said)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_pickles_are_never_read(tmp_path, name):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    (_write(tmp_path / "c") / "model.safetensors").unlink()
    (tmp_path / "c" / name).write_bytes(pickle.dumps(Trap()))
    _refused(tmp_path / "c", f"found {name}, but pickle files are never read.*convert")
    (tmp_path / "c" / name).rename(tmp_path / "c" / "model.safetensors")
    _refused(tmp_path / "c", "is a pickle and no safetensors file")
    (tmp_path / "c" / "model.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))  # what torch.save writes
    _refused(tmp_path / "c", "is a pickle and no safetensors file")
    assert not (tmp_path / "run").exists()


def test_weights_that_are_no_regular_file(tmp_path):
    path = _write(tmp_path / "c") / "model.safetensors"
    for make in (path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero")):
        path.rmdir() if path.is_dir() else path.unlink()
        make()
        _refused(tmp_path / "c", "is not a regular file")


def test_files_that_may_not_be_read():
    with tempfile.TemporaryDirectory() as root:
        Path(root).chmod(0o755)
        directory = _write(Path(root, "c"))
        for path in (directory / "model.safetensors", directory):
            directory.chmod(0o755)
            path.chmod(0)
            with _unprivileged():
                _refused(directory, "Permission denied")
        directory.chmod(0o755)


# --- damaged files ---------------------------------------------------------------------------------------------------


def _safetensors(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _entry(begin, end, dtype="F32", shape=(1,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


_ONE = json.dumps(_entry(0, 4))
DAMAGED = {
    "empty": b"",
    "three bytes": b"abc",
    "length only": struct.pack("<Q", 100),
    "header of 2^62 bytes": _safetensors({}, length=2**62),
    "header of 2^64-1 bytes": _safetensors({}, length=2**64 - 1),
    "header of 99 MB": _safetensors({}, length=99_000_000),
    "header of 99 MB that is there": _safetensors(b"{" + b" " * 99_000_000 + b"}"),
    "sizes below zero": _safetensors({"a": _entry(0, 4, shape=[-1, -1])}, bytes(4)),
    "size that is no integer": _safetensors({"a": _entry(0, 4, shape=[1.0])}, bytes(4)),
    "size of 40 digits": _safetensors({"a": _entry(0, 4, shape=[10**39])}, bytes(4)),
    "no UTF-8": _safetensors(b'{"\xff":1}'),
    "no JSON": _safetensors(b"hello"),
    "a list": _safetensors([]),
    "nested deeply": _safetensors(b'{"a":' * 100_000),
    "the same tensor twice": _safetensors(f'{{"a":{_ONE},"a":{_ONE}}}'.encode(), bytes(4)),
    "overlap": _safetensors({"a": _entry(0, 8, shape=[2]), "b": _entry(4, 12, shape=[2])}, bytes(12)),
    "hole": _safetensors({"a": _entry(0, 4), "b": _entry(8, 12)}, bytes(12)),
    "hole at the start": _safetensors({"a": _entry(4, 8)}, bytes(8)),
    "bytes at the end": _safetensors({"a": _entry(0, 4)}, bytes(8)),
    "backwards": _safetensors({"a": _entry(4, 0)}, bytes(4)),
    "below zero": _safetensors({"a": _entry(-4, 0)}, bytes(4)),
    "beyond the end": _safetensors({"a": _entry(0, 2**40, shape=[2**38])}, bytes(4)),
    "shape that overflows": _safetensors({"a": _entry(0, 4, shape=[2**63, 2**63])}, bytes(4)),
    "shape of another size": _safetensors({"a": _entry(0, 4, shape=[2])}, bytes(4)),
    "unknown type": _safetensors({"a": _entry(0, 4, dtype="Q7")}, bytes(4)),
    "no type": _safetensors({"a": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    "three offsets": _safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2, 4]}}, bytes(4)),
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_damaged_files(tmp_path, data):
    (_write(tmp_path / "c") / "model.safetensors").write_bytes(data)
    _refused(tmp_path / "c", r"model\.safetensors: (is empty|is no valid safetensors|has no valid header)")


def test_a_tensor_twice_in_a_header_that_fits_otherwise(tmp_path):
    file = _write(tmp_path / "c") / "model.safetensors"
    (length,) = struct.unpack("<Q", file.read_bytes()[:8])
    header, data = file.read_bytes()[8 : 8 + length].strip(), file.read_bytes()[8 + length :]
    entry = json.dumps(json.loads(header)[NORM])
    file.write_bytes(_safetensors(header[:-1] + f',"{NORM}":{entry}}}'.encode(), data))
    _refused(tmp_path / "c", "the key 'model.norm.weight' comes twice")


def test_text_of_a_file_stays_one_short_line(tmp_path):
    tensors = _tensors(GTA) | {"a\nb" * 1000: np.ones(1, np.float32)}
    _refused(_write(tmp_path / "c", GTA, tensors), r"holds 1 .*a\\nb")
    escapes = {f"\x1b]0;{i}\x07\u202e" * 1000: np.ones(1, np.float32) for i in range(10)}
    _refused(_write(tmp_path / "c", GTA, _tensors(GTA) | escapes), r"holds 10 .*\\x1b\]0;.* and 7 more")


@pytest.fixture(scope="module")
def smallest(tmp_path_factory):
    """A directory, the bytes of its weights, and where the header ends."""
    directory = _write(tmp_path_factory.mktemp("fuzz") / "c", SMALLEST)
    content = (directory / "model.safetensors").read_bytes()
    return directory, content, 8 + struct.unpack("<Q", content[:8])[0]


def _refused_or_unchanged(directory, content):
    (directory / "model.safetensors").write_bytes(content)
    try:
        checkpoint = Checkpoint.open(directory)
    except CheckpointError as error:
        assert "\n" not in str(error)  # noqa: PT017 - either outcome is right
        return
    for name, expected in _tensors(SMALLEST).items():
        assert checkpoint.read(name).tobytes() == expected.tobytes()


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_truncation_is_refused(smallest, data):
    directory, content, _ = smallest
    (directory / "model.safetensors").write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    _refused(directory, "model.safetensors")


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
    (directory / "model.safetensors").write_bytes(_safetensors(header, data))
    _refused(directory, "model.safetensors")


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
    directory = _write_shards(tmp_path / "c")
    _write_index(directory, _read_index(directory) | {NORM: name})
    _refused(directory, "names the shard")


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
    directory = _write_shards(tmp_path / "c")
    (directory / "model.safetensors.index.json").write_text(text)
    _refused(directory, "(is not valid JSON|has no weight_map)")


def test_an_index_in_another_encoding(tmp_path):
    directory = _write_shards(tmp_path / "c")
    (directory / "model.safetensors.index.json").write_bytes(b"\xff\xfe{}")
    _refused(directory, "is not valid JSON")


def test_a_shard_that_is_missing_or_damaged(tmp_path):
    directory = _write_shards(tmp_path / "c")
    shard = directory / "model-00002-of-00003.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    _refused(directory, "00002-of-00003.safetensors: is no valid safetensors file")
    shard.unlink()
    _refused(directory, "00002-of-00003.safetensors: cannot be read")


def test_index_and_shards_must_agree(tmp_path):
    directory = _write_shards(tmp_path / "c")
    weight_map = _read_index(directory)
    _write_index(directory, weight_map | {NORM: weight_map[EMBEDDING]})
    _refused(directory, "says that model.norm.weight is in model-00001-.*, but it is in model-0000[23]")
    _write_index(directory, weight_map | {"ghost": weight_map[EMBEDDING]})
    _refused(directory, "says that ghost is in model-00001-.*, but it is in none of its files")
    del weight_map[NORM]
    _write_index(directory, weight_map)
    _refused(directory, "says that model.norm.weight is nowhere, but it is in")


def _store_twice(directory, change):
    """Put a tensor of the second shard into the first too, and return its name."""
    shard = directory / "model-00001-of-00003.safetensors"
    other = load_file(directory / "model-00002-of-00003.safetensors")
    name = min(other)
    save_file(load_file(shard) | {name: change(other[name])}, shard)
    return name


def test_a_tensor_in_two_shards(tmp_path):
    directory = _write_shards(tmp_path / "c")
    name = _store_twice(directory, lambda values: values)
    assert Checkpoint.open(directory).read(name).tobytes() == _tensors(GTA)[name].tobytes()
    _store_twice(directory, lambda values: values + 1)
    _refused(directory, "which model-00001-of-00003.safetensors holds too, with other values")
    _store_twice(directory, lambda values: values.astype(np.float32))
    _refused(directory, "which model-00001-of-00003.safetensors holds too, with other values")


@pytest.mark.parametrize("config", [GTA, TIED, SMALLEST], ids=["untied", "tied", "llama"])
def test_an_index_may_be_wrong_about_what_does_not_matter(tmp_path, config):
    directory = _write_shards(tmp_path / "c", config)
    placed = _read_index(directory)
    shard = placed[EMBEDDING]
    absent = {"model.rotary_emb.inv_freq": shard, "model.layers.0.self_attn.rotary_emb.inv_freq": shard}
    if config.tie_word_embeddings:
        absent[HEAD] = shard
    _write_index(directory, placed | absent)
    assert Checkpoint.open(directory).names == tuple(config.parameter_shapes())
    _write_index(directory, placed)
    save_file(
        load_file(directory / shard) | {name: np.ones(2, np.float32) for name in absent if "inv" in name},
        directory / shard,
    )
    assert Checkpoint.open(directory).names == tuple(config.parameter_shapes())


def test_an_index_needs_a_map_and_nothing_else(tmp_path):
    directory = _write_shards(tmp_path / "c")
    placed = _read_index(directory)
    for index in ({"weight_map": placed}, {"metadata": None, "weight_map": placed, "format": "pt", "total": [1]}):
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        assert Checkpoint.open(directory).names == tuple(GTA.parameter_shapes())


# --- files that change while they are used ---------------------------------------------------------------------------


def test_a_file_that_changes_after_opening(tmp_path):
    file = _write(tmp_path / "c") / "model.safetensors"
    checkpoint = Checkpoint.open(tmp_path / "c")
    info = file.stat()
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        checkpoint.read(NORM)
    os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns))
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        checkpoint.read(NORM)
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.read(NORM)


def test_a_read_that_ends_early(tmp_path, monkeypatch):
    checkpoint = Checkpoint.open(_write(tmp_path / "c"))
    fromfile = np.fromfile
    monkeypatch.setattr(np, "fromfile", lambda file, dtype, count: fromfile(file, dtype, count)[:-1])
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        checkpoint.read(EMBEDDING)


def test_save_and_the_reader_agree_on_the_layout():
    """What the damaged files above vary is what the library writes."""
    tensor = {"a": np.ones(1, np.float32)}
    content = save(tensor)
    (length,) = struct.unpack("<Q", content[:8])
    assert json.loads(content[8 : 8 + length]) == {"a": _entry(0, 4)}
