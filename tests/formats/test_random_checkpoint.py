"""Random checkpoints: what they hold, that they are the same every time, and that others can read them."""

import json
import os
import stat
from collections import namedtuple

import numpy as np
import pytest
from safetensors import safe_open

from gta_edge.errors import InputError, OutputError
from gta_edge.formats.checkpoint import Checkpoint
from gta_edge.formats.random_checkpoint import STANDARD_DEVIATION, initialise
from gta_edge.model.config import GQAConfig, GTAConfig
from tests.helpers.limits import largest_file

GTA = GTAConfig(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    head_dim=16,
    num_query_heads=2,
    num_key_heads=1,
    key_dim=16,
    num_latent_heads=1,
    latent_dim=32,
)
GQA = GQAConfig(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    head_dim=16,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    dtype="float32",
)
EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"
BIAS = "model.layers.1.self_attn.q_proj.bias"


def _content(directory):
    checkpoint = Checkpoint.open(directory)
    return {name: checkpoint.read(name).tobytes() for name in checkpoint.names}


@pytest.mark.parametrize("config", [GTA, GQA, GTA.replace(tie_word_embeddings=True, dtype="float16")])
def test_a_checkpoint_is_what_its_config_asks_for(tmp_path, config):
    initialise(config, tmp_path / "c")
    checkpoint = Checkpoint.open(tmp_path / "c")
    assert checkpoint.config == config.replace(eos_token_ids=(256,))
    assert checkpoint.names == tuple(config.parameter_shapes())
    assert {checkpoint.dtype_of(name) for name in checkpoint.names} == {config.dtype}
    assert checkpoint.weight_bytes == config.weight_bytes
    assert [path.name for path in checkpoint.companions] == ["tokenizer.json", "tokenizer_config.json"]
    assert not (tmp_path / "c" / "model.safetensors.index.json").exists()


def test_values_are_normal_but_for_the_norms(tmp_path):
    initialise(GTA, tmp_path / "c")
    checkpoint = Checkpoint.open(tmp_path / "c")
    for name in checkpoint.names:
        value = checkpoint.read(name).astype(np.float64)
        if name.endswith("norm.weight"):
            assert (value == 1).all()
        else:
            assert abs(value.mean()) < 5 * STANDARD_DEVIATION / value.size**0.5
            assert 0.7 < value.std() / STANDARD_DEVIATION < 1.3
    value = checkpoint.read(EMBEDDING).astype(np.float64) / STANDARD_DEVIATION
    assert value.std() == pytest.approx(1, abs=0.02)
    within = [(abs(value) < sigmas).mean() for sigmas in (1, 2, 3)]
    assert within == pytest.approx([0.683, 0.954, 0.997], abs=0.01)
    rows = np.corrcoef(value)
    assert abs(rows - np.eye(len(rows))).max() < 0.7  # no row repeats another


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    for name, seed in (("a", 7), ("b", 7), ("c", 8), ("d", 2**70)):
        initialise(GTA, tmp_path / name, seed=seed)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abcd"]
    assert files[0] == files[1]
    assert len(set(files)) == 3


def test_values_stay_the_same_from_version_to_version(tmp_path):
    initialise(GTA, tmp_path / "c", seed=1)
    checkpoint = Checkpoint.open(tmp_path / "c")
    first = [checkpoint.read(name).reshape(-1)[:3].astype(float).tolist() for name in (EMBEDDING, BIAS)]
    assert first == [
        [-0.010986328125, -0.00799560546875, 0.01025390625],
        [-0.0047607421875, -0.035888671875, 0.0111083984375],
    ]


def test_values_do_not_depend_on_the_shards(tmp_path):
    initialise(GTA, tmp_path / "one")
    initialise(GTA, tmp_path / "many", shard_bytes=20_000)
    initialise(GTA, tmp_path / "each", shard_bytes=1)
    assert _content(tmp_path / "one") == _content(tmp_path / "many") == _content(tmp_path / "each")
    shards = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert 3 < len(shards) < len(GTA.parameter_shapes())
    assert all((tmp_path / "many" / shard).stat().st_size < 50_000 for shard in shards)
    assert len(list((tmp_path / "each").glob("*.safetensors"))) == len(GTA.parameter_shapes())
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == GTA.weight_bytes
    assert sorted(set(index["weight_map"].values())) == shards


def test_a_tensor_longer_than_a_block_does_not_repeat(tmp_path):
    config = GTA.replace(vocab_size=20_011, num_hidden_layers=1)  # 1.28 M values, and no multiple of a block
    initialise(config, tmp_path / "c")
    value = Checkpoint.open(tmp_path / "c").read(EMBEDDING)
    assert len({row.tobytes() for row in value}) == len(value)


def test_every_file_has_the_usual_permissions(tmp_path):
    before = os.umask(0o022)
    try:
        initialise(GTA, tmp_path / "c")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "c").iterdir()} == {0o644}
    assert stat.S_IMODE((tmp_path / "c").stat().st_mode) == 0o755


def test_progress_counts_bytes(tmp_path):
    calls = []
    initialise(GTA, tmp_path / "c", progress=lambda *call: calls.append(call))
    assert [call[1] for call in calls] == sorted(call[1] for call in calls)
    assert {call[2] for call in calls} == {GTA.weight_bytes}
    assert calls[-1][1] == GTA.weight_bytes


# --- the tokenizer ---------------------------------------------------------------------------------------------------


def test_the_tokenizer_is_made_of_bytes(tmp_path):
    from tokenizers import Tokenizer

    initialise(GTA, tmp_path / "c")
    tokenizer = Tokenizer.from_file(str(tmp_path / "c" / "tokenizer.json"))
    text = " Größe:\t東京 🙂\r\n  two  spaces\x00\x7f "
    assert tokenizer.encode(text).ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer.encode("a<|endoftext|>").ids == [97, 256]
    assert tokenizer.decode([97, 256]) == "a"
    assert tokenizer.get_vocab_size() == 257


def test_transformers_reads_the_tokenizer(tmp_path):
    transformers = pytest.importorskip("transformers")
    initialise(GTA, tmp_path / "c")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "c")
    assert tokenizer("Grüße")["input_ids"] == list("Grüße".encode())
    assert tokenizer.eos_token_id == 256
    assert tokenizer.decode(tokenizer(" a , b .")["input_ids"]) == " a , b ."


def test_a_vocabulary_without_room_has_no_tokenizer(tmp_path):
    initialise(GTA.replace(vocab_size=256, eos_token_ids=(3, 4), bos_token_id=1), tmp_path / "c")
    checkpoint = Checkpoint.open(tmp_path / "c")
    assert checkpoint.companions == ()
    assert (checkpoint.config.eos_token_ids, checkpoint.config.bos_token_id) == ((3, 4), 1)
    initialise(GTA.replace(vocab_size=257, bos_token_id=1), tmp_path / "d")
    checkpoint = Checkpoint.open(tmp_path / "d")
    assert len(checkpoint.companions) == 2
    assert (checkpoint.config.eos_token_ids, checkpoint.config.bos_token_id) == ((256,), None)


# --- other readers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [GTA, GQA])
def test_the_librarys_reader_agrees(tmp_path, config):
    torch = pytest.importorskip("torch")
    initialise(config, tmp_path / "c")
    checkpoint = Checkpoint.open(tmp_path / "c")
    with safe_open(tmp_path / "c" / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(checkpoint.names)
        for name in checkpoint.names:
            ours = torch.from_numpy(checkpoint.read(name).astype(np.float32))
            assert torch.equal(file.get_tensor(name).float(), ours)


def test_transformers_reads_a_baseline(tmp_path):
    transformers = pytest.importorskip("transformers")
    initialise(GQA, tmp_path / "c", shard_bytes=50_000)
    checkpoint = Checkpoint.open(tmp_path / "c")
    state = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "c").state_dict()
    for name in checkpoint.names:
        assert np.array_equal(state[name].float().numpy(), checkpoint.read(name))


# --- what is refused -------------------------------------------------------------------------------------------------


def test_arguments_out_of_range(tmp_path):
    with pytest.raises(InputError, match="seed"):
        initialise(GTA, tmp_path / "c", seed=-1)
    with pytest.raises(InputError, match="shard size"):
        initialise(GTA, tmp_path / "c", shard_bytes=0)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_checkpoint_needs_force(tmp_path):
    initialise(GTA, tmp_path / "c")
    with pytest.raises(OutputError, match="already exists"):
        initialise(GTA, tmp_path / "c", seed=1)
    before = _content(tmp_path / "c")
    initialise(GTA, tmp_path / "c", seed=1, force=True)
    assert _content(tmp_path / "c") != before


def test_a_disk_without_room_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10, 10, GTA.weight_bytes - 1))
    with pytest.raises(OutputError, match="GB are free"):
        initialise(GTA, tmp_path / "c")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10, 10, GTA.weight_bytes))
    initialise(GTA, tmp_path / "d")
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_absurdly_many_layers_are_refused_at_once(tmp_path):
    with pytest.raises(OutputError, match="GB are free"):
        initialise(GTA.replace(num_hidden_layers=2**31 - 1), tmp_path / "c")


def test_a_disk_that_takes_no_more(tmp_path):
    with largest_file(20_000), pytest.raises(OutputError, match="cannot be written") as caught:
        initialise(GTA, tmp_path / "c")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing(tmp_path):
    def interrupt(what, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        initialise(GTA, tmp_path / "c", progress=interrupt)
    assert list(tmp_path.iterdir()) == []
