"""The names that a model's files give to tokens reach chat templates as transformers has it."""

import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from gta_edge.errors import BundleError
from gta_edge.formats.tokenizer import Tokenizer
from tests.helpers.generation import byte_alphabet, sentencepiece

MESSAGES = [{"role": "user", "content": "Hi"}]
NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "image_token")
TEMPLATE = "".join(f"{name}={{{{ {name} }}}};" for name in NAMES) + "{{ messages[0].content }}"
WORDS = ["<s>", "</s>", "<unk>", "<pad>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<bos>", "<eos>", "<image>"]


@pytest.fixture
def directory(tmp_path):
    """A model whose vocabulary has all the usual special tokens, not all of them declared."""
    vocab = {character: byte for byte, character in enumerate(byte_alphabet())}
    vocab |= {word: 256 + i for i, word in enumerate(WORDS)}
    library = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<s>", "</s>"])
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return tmp_path


def write(directory, **files):
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


TOKEN = {"content": "<|im_end|>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
CASES = {
    "nothing": {},
    "texts": {"tokenizer_config": {"bos_token": "<s>", "eos_token": "</s>"}},
    "objects": {"tokenizer_config": {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", **TOKEN}}},
    "a class": {"tokenizer_config": {"tokenizer_class": "LlamaTokenizer"}},
    "a fast class": {"tokenizer_config": {"tokenizer_class": "LlamaTokenizerFast", "eos_token": "<|im_end|>"}},
    "a class and nulls": {"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer", "bos_token": None}},
    "qwen": {"tokenizer_config": {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}},
    "a map alone": {"tokenizer_config": {}, "special_tokens_map": {"bos_token": "<s>", "eos_token": TOKEN}},
    "a map over a config": {
        "tokenizer_config": {"bos_token": "<bos>", "eos_token": "</s>"}, "special_tokens_map": {"bos_token": "<s>"}
    },
    "a map that is old": {
        "tokenizer_config": {
            "bos_token": "<bos>", "added_tokens_decoder": {"256": {"content": "<s>", "special": True}}
        },
        "special_tokens_map": {"bos_token": "<s>"},
    },
    "named extra tokens": {
        "tokenizer_config": {"extra_special_tokens": {"image_token": "<image>"}, "eos_token": "</s>"}
    },
    "a token of its own": {"tokenizer_config": {"image_token": "<image>", "eos_token": "</s>"}},
    "listed extra tokens": {"tokenizer_config": {"extra_special_tokens": ["<image>"], "bos_token": "<s>"}},
    "additional tokens": {"tokenizer_config": {"additional_special_tokens": ["<image>"], "bos_token": "<s>"}},
    "switches": {"tokenizer_config": {"add_bos_token": True, "bos_token": "<s>", "legacy": False}},
}  # fmt: skip


@pytest.mark.parametrize("files", CASES.values(), ids=CASES)
def test_as_transformers_has_it(directory, files):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    write(directory, **files)
    named = files.get("tokenizer_config", {}).get("tokenizer_class")
    loader = AutoTokenizer if named else PreTrainedTokenizerFast
    if named and named.startswith("Llama"):  # they do not believe it of a byte-level tokenizer
        sentencepiece(["▁", *WORDS[3:]]).save(str(directory / "tokenizer.json"))
    ours = Tokenizer.load(directory)
    theirs = loader.from_pretrained(str(directory))
    text = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert ours.apply_chat_template(MESSAGES) == text
    assert ours.end_token_id == theirs.eos_token_id


def test_the_class_may_stand_in_the_models_config(directory):
    for config in {"tokenizer_class": "LlamaTokenizer"}, {"model_type": "llama"}:
        write(directory, config=config)
        assert "bos_token=<s>;eos_token=</s>;unk_token=<unk>" in Tokenizer.load(directory).apply_chat_template(MESSAGES)


def test_what_a_class_has_is_taken_only_where_the_vocabulary_has_it(directory):
    write(directory, tokenizer_config={"tokenizer_class": "CohereTokenizer"})
    tokenizer = Tokenizer.load(directory)
    assert "bos_token=;eos_token=;" in tokenizer.apply_chat_template(MESSAGES)
    assert tokenizer.end_token_id is None


def test_named_tokens_of_the_vocabulary_are_one_token(directory):
    """A token that the files only name would else be cut into pieces where a template writes it."""
    assert len(Tokenizer.load(directory).encode("<|im_end|>")) == 10
    write(directory, tokenizer_config={"eos_token": "<|im_end|>"})
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.encode("a<|im_end|>") == [97, tokenizer.end_token_id]
    assert tokenizer.decode([97, tokenizer.end_token_id]) == "a"
    write(directory, tokenizer_config={"added_tokens_decoder": {"260": {"content": "<|im_start|>", "special": True}}})
    assert Tokenizer.load(directory).encode("<|im_start|>") == [260]


DECODER = {"256": {"content": "<s>", "special": True}}
OBJECT = {"__type": "AddedToken", **TOKEN, "special": True}
NEW = ["<|n1|>", "<|n2|>", "<|n3|>"]
ADDED = {
    "a list in the config": {"tokenizer_config": {"additional_special_tokens": ["<|im_end|>"]}},
    "a list of objects": {"tokenizer_config": {"additional_special_tokens": [OBJECT]}},
    "the new name of the list": {"tokenizer_config": {"extra_special_tokens": ["<|im_end|>"]}},
    "an empty list before it": {
        "tokenizer_config": {"extra_special_tokens": [], "additional_special_tokens": ["<|im_end|>"]}
    },
    "a list in the map": {"special_tokens_map": {"additional_special_tokens": ["<|im_end|>"]}},
    "a list of objects in the map": {"special_tokens_map": {"extra_special_tokens": [TOKEN]}},
    "a list beside the decoder": {
        "tokenizer_config": {"added_tokens_decoder": DECODER, "additional_special_tokens": ["<|im_end|>"]}
    },
    "a file of added tokens": {"added_tokens": {"<|im_end|>": 2}},
    "a file of added tokens beside a name": {
        "tokenizer_config": {"eos_token": "<|im_end|>"}, "added_tokens": {"<|im_end|>": 261}
    },
    "a file of added tokens beside a list": {
        "tokenizer_config": {"extra_special_tokens": ["<|im_end|>"]}, "added_tokens": {"<|im_end|>": 261}
    },
    "a file of added tokens beside the decoder": {
        "tokenizer_config": {"added_tokens_decoder": DECODER}, "added_tokens": {"<|im_end|>": 261}
    },
    "new added tokens": {
        "tokenizer_config": {"eos_token": "<|n2|>"}, "added_tokens": {"<|n1|>": 900, "<|n2|>": 268, "<|n3|>": 267}
    },
    "a new name": {"tokenizer_config": {"eos_token": "<|n1|>"}},
    "new names and a list": {
        "tokenizer_config": {
            "image_token": "<|n1|>", "extra_special_tokens": ["<|n2|>"], "unk_token": "<pad>", "eos_token": "<|n3|>"
        }
    },
    "new names": {
        "tokenizer_config": {
            "image_token": "<|n1|>", "extra_special_tokens": {"sound_token": "<|n2|>"}, "bos_token": "<|n3|>"
        }
    },
    "a name of a token with a text": {"tokenizer_config": {"eos_token": "<plain>"}},
    "another name of it": {"tokenizer_config": {"image_token": "<plain>"}},
    "a list with it": {"tokenizer_config": {"extra_special_tokens": ["<plain>"]}},
    "a name of a token that the decoder gives a text": {
        "tokenizer_config": {
            "eos_token": "<|im_end|>", "added_tokens_decoder": {"261": {"content": "<|im_end|>", "special": False}}
        }
    },
    "switches of an object": {"special_tokens_map": {"eos_token": {**TOKEN, "rstrip": True, "lstrip": True}}},
}  # fmt: skip


@pytest.mark.parametrize("files", ADDED.values(), ids=ADDED)
def test_tokens_as_transformers_adds_them(directory, files):
    from transformers import PreTrainedTokenizerFast

    library = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    library.add_tokens([tokenizers.AddedToken("<plain>", special=False)])
    library.save(str(directory / "tokenizer.json"))
    write(directory, **{"tokenizer_config": {}, **files})
    ours, theirs = Tokenizer.load(directory), PreTrainedTokenizerFast.from_pretrained(str(directory))
    text = "a <|im_end|> b <plain> " + "".join(NEW) + " c"
    ids = theirs.encode(text, add_special_tokens=False)
    assert ours.encode(text) == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.end_token_id == theirs.eos_token_id


@pytest.mark.parametrize("name", ["additional_special_tokens", "extra_special_tokens"])
@pytest.mark.parametrize("file", ["tokenizer_config", "special_tokens_map"])
@pytest.mark.parametrize("entry", ["<|im_end|>", TOKEN, OBJECT])
def test_listed_tokens_are_one_token_wherever_they_are_listed(directory, file, name, entry):
    """Also in the list that transformers overlooks where there are both, and in a plain object."""
    write(directory, tokenizer_config={"extra_special_tokens": ["<bos>"]})
    write(directory, **{file: {"extra_special_tokens": ["<eos>"], name: ["<pad>", entry]}})
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.encode("a<|im_end|>") == [97, 261]
    assert tokenizer.whole_tokens[261] == "<|im_end|>"
    assert tokenizer.is_silent(261)
    assert tokenizer.decode([97, 261]) == "a"


def test_new_tokens_end_where_the_model_does(directory):
    settings = {"eos_token": "<|n1|>", "pad_token": "<|n2|>", "extra_special_tokens": ["<|n3|>", "<image>", ""]}
    write(directory, tokenizer_config=settings, config={"vocab_size": 267})
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.end_token_id == 266
    assert tokenizer.left_out == ("<|n2|>", "<|n3|>")
    assert tokenizer.encode("<|n1|><image>") == [266, 265]
    assert tokenizer.encode("<|n2|>") == list(b"<|n2|>")
    assert tokenizer.beyond(267) == {}
    assert tokenizer.beyond(265) == {265: "<image>", 266: "<|n1|>"}


WRONG = [["<s>"], 3, 1.5, {"text": "<s>"}, {"content": 3}, {"content": None}, {}, [{"content": "<s>"}]]


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("name", ["bos_token", "eos_token", "unk_token", "image_token"])
@pytest.mark.parametrize("file", ["tokenizer_config", "special_tokens_map"])
def test_a_token_that_is_none(directory, file, name, value):
    write(directory, **{file: {name: value}})
    with pytest.raises(
        BundleError, match=rf"{file}\.json: {name} is .*; expected text, an object with content"
    ) as caught:
        Tokenizer.load(directory)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer_class": ["a"]}, "tokenizer_class is .*expected a name"),
        ({"tokenizer_class": {"a": 1}}, "tokenizer_class is .*expected a name"),
        ({"extra_special_tokens": "<a>"}, "extra_special_tokens is .*expected an object or a list"),
        ({"extra_special_tokens": {"image_token": ["a"]}}, r"extra_special_tokens.image_token is \['a'\]"),
        ({"extra_special_tokens": ["<a>", 3]}, r"extra_special_tokens\[1\] is 3; expected text"),
        ({"additional_special_tokens": "<a>"}, "additional_special_tokens is .*expected an object or a list"),
        ({"additional_special_tokens": [["<a>"]]}, r"additional_special_tokens\[0\] is \['<a>'\]"),
        ({"model_specific_special_tokens": ["<a>"]}, "model_specific_special_tokens is .*expected an object"),
        ({"eos_token": {"content": "<s>", "lstrip": 1}}, "eos_token is .*expected text, an object with content"),
        ({"added_tokens_decoder": [1]}, "added_tokens_decoder is .*expected an object"),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, "the entry 'x'"),
        ({"added_tokens_decoder": {"-1": {"content": "a"}}}, "the entry '-1'"),
        ({"added_tokens_decoder": {"9": "a"}}, "the entry '9': 'a'"),
        ({"added_tokens_decoder": {"9": {"content": ["a"]}}}, "the entry '9'"),
        ({"added_tokens_decoder": {"9": {"content": "a", "special": "yes"}}}, "the entry '9'"),
        ({"chat_template": 3, "bos_token": "\x1b[31m"}, None),
        ({"chat_template": [{"name": "default", "template": ["x"]}]}, None),
    ],
)
def test_settings_of_another_form(directory, settings, message):
    (directory / "chat_template.jinja").unlink()
    write(directory, tokenizer_config=settings)
    with pytest.raises(BundleError, match=message or "chat_template is .*expected text, or a list") as caught:
        Tokenizer.load(directory)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("entries", [["<a>"], {"<a>": "3"}, {"<a>": None}, {"<a>": True}, {"<a>": -1}, {"": 3}])
def test_added_tokens_of_another_form(directory, entries):
    write(directory, added_tokens=entries)
    with pytest.raises(
        BundleError, match=r"added_tokens\.json: (holds list|has the entry .*; expected a token's text)"
    ):
        Tokenizer.load(directory)


def test_files_of_any_size_are_bounded(directory):
    with (directory / "tokenizer_config.json").open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(BundleError, match="has 1073741824 bytes; expected at most"):
        Tokenizer.load(directory)
    (directory / "tokenizer_config.json").unlink()
    with (directory / "tokenizer.json").open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(BundleError, match=r"tokenizer\.json: has more than 67108864 bytes"):
        Tokenizer.load(directory)


def test_byte_order_marks_are_skipped(directory):
    for name in ("tokenizer.json", "chat_template.jinja"):
        path = directory / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert Tokenizer.load(directory).apply_chat_template(MESSAGES).startswith("bos_token=;")
