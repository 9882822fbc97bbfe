"""Damaged and hostile files of a tokenizer: each is read and used, or refused in one line."""

import base64
import copy
import json
from pathlib import Path

import pytest
import tokenizers

from gta_edge.formats.text_files import TextFiles
from gta_edge.formats.tokenizer import Tokenizer
from gta_edge.runtime.generation.incremental_decoder import IncrementalDecoder
from tests.helpers.charsmap import MAP
from tests.helpers.fuzz import CASES, ends_well, rng
from tests.helpers.generation import CONFIG, byte_level, sentencepiece

TEXTS = ["", "a", "Hello world  it's 12\n", "naïve 中文 😀 ﬁ ½\u0301", "\0\x7f\ufffd", " " * 40, "a" * 60 + "!"]
ODD = [
    None, True, -1, 0, 1, 2, 2**31, 2**32, 2**63, 2**64, 10**30, 1e308, -0.5, "", "a", "▁", " ", "é" * 99, "\0", "<s>",
    "\x1b[31m", [], [[]], ["a"], [0], {}, {"a": 0}, {"Regex": "(a+)+$"}, {"Regex": "("}, {"String": ""},
    {"type": "Fuse"},
]  # fmt: skip


def parts(random):
    """One part of a tokenizer, of any kind, in any place."""
    data = bytearray(MAP)
    for _ in range(random.choice([0, 1, 4, 40])):
        data[random.randrange(len(data) if random.random() < 0.5 else 8)] = random.randrange(256)
    return random.choice([
        {"type": "Precompiled",
         "precompiled_charsmap": base64.b64encode(data[: random.choice([None, None, 3, 99])]).decode()},
        {"type": "Replace", "pattern": {"String": random.choice(["", "a", " "])},
         "content": random.choice(["", "▁", "a" * 99])},
        {"type": "Replace", "pattern": {"Regex": random.choice([".", "", "(a|aa)+$", "a*", "^"])}, "content": "aa"},
        {"type": "Prepend", "prepend": random.choice(["", "▁", "x" * 999])},
        {"type": "Strip", "content": " ", "start": random.choice([0, 1, 9]), "stop": random.choice([0, 1, 9])},
        {"type": "Strip", "strip_left": True, "strip_right": True},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        {"type": "Metaspace", "replacement": random.choice(["▁", "a", ""]), "prepend_scheme": "always", "split": True},
        {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "NFKC"}, {"type": "NFD"}, {"type": "StripAccents"},
        {"type": "Lowercase"}, {"type": "CTC", "pad_token": "a", "word_delimiter_token": " ", "cleanup": True},
        {"type": "WordPiece", "prefix": random.choice(["##", ""]), "cleanup": True},
        {"type": "BPEDecoder", "suffix": ""},
        {"type": "Split", "pattern": {"Regex": random.choice(["", "\\s+", "(?=a)", "(a+)+$"])}, "behavior": "Isolated",
         "invert": True},
        {"type": "Digits", "individual_digits": True}, {"type": "Punctuation", "behavior": "Contiguous"},
        {"type": "UnicodeScripts"}, {"type": "FixedLength", "length": random.choice([0, 1, 5])},
        {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None,
         "lowercase": True},
        {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * random.choice([1, 2, 999]),
         "pair": [], "special_tokens": {}},
        {"type": "RobertaProcessing", "sep": ["a", 0], "cls": ["a", random.choice([0, 2**31])], "trim_offsets": True,
         "add_prefix_space": True},
    ])  # fmt: skip


def sequence(random, place):
    name = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}.get(
        place, "processors"
    )
    return {"type": "Sequence", name: [parts(random) for _ in range(random.randrange(6))]}


def bases():
    yield json.loads(byte_level(["<think>"]).to_str())
    yield json.loads(sentencepiece(["▁", "▁Hello", "a", "▁a"]).to_str())
    unigram = tokenizers.Tokenizer(
        tokenizers.models.Unigram([("<unk>", -1.0), ("▁", -2.0), ("a", -3.0), ("▁a", -2.5)], 0)
    )
    unigram.pre_tokenizer, unigram.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    yield json.loads(unigram.to_str())
    wordpiece = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "a": 1, "##a": 2}, unk_token="[UNK]"))
    wordpiece.normalizer, wordpiece.decoder = tokenizers.normalizers.BertNormalizer(), tokenizers.decoders.WordPiece()
    yield json.loads(wordpiece.to_str())


BASES = list(bases())


def paths(value, path=()):
    if path:
        yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value[:40]) if isinstance(value, list) else ()
    for key, entry in list(entries)[:40]:
        yield from paths(entry, (*path, key))


def changed(random, content):
    """Return JSON with one to three values replaced, removed, renamed, or exchanged for a part of another kind."""
    content = copy.deepcopy(content)
    for _ in range(random.randint(1, 3)):
        found = list(paths(content))
        if not found:
            break
        *way, key = random.choice(found)
        place = content
        for step in way:
            place = place[step]
        kind = random.randrange(4)
        if kind == 0:
            del place[key]
        elif kind == 1 and isinstance(place, dict):
            place[random.choice(["type", "a", "content", "id", "vocab"])] = place.pop(key)
        elif kind == 2:
            place[key] = parts(random)
        else:
            place[key] = copy.deepcopy(random.choice(ODD))
    return content


def damaged(random, data):
    data = bytearray(data)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(data)) if data else 0
        kind = random.randrange(4)
        if kind == 0 and data:
            data[at] = random.randrange(256)
        elif kind == 1:
            data[at : at + random.randrange(1, 20)] = b""
        elif kind == 2:
            data[at:at] = random.choice(
                [b"\0", b"\xff", b"{", b"]", b",", b"\xef\xbb\xbf", b"9" * 30, data[at : at + 50]]
            )
        else:
            del data[at:]
    return bytes(data)


SETTINGS = {
    "tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False},
    "extra_special_tokens": {"image_token": "<image>"}, "additional_special_tokens": ["<a>"], "add_bos_token": True,
    "added_tokens_decoder": {"1": {"content": "<s>", "special": True}, "9": {"content": "<x>", "lstrip": True}},
    "chat_template": [{"name": "default", "template": "{{ bos_token }}"}], "unk_token": None, "model_max_length": 1e30,
}  # fmt: skip
GENERATION = {
    "eos_token_id": [1, 2], "do_sample": True, "temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.1,
    "repetition_penalty": 1.1, "max_new_tokens": 9,
}  # fmt: skip


def use(directory: Path, random) -> None:
    """Do with a directory's files what loading a bundle and generating does."""
    files = TextFiles.load(directory, CONFIG)
    tokenizer = files.tokenizer
    if tokenizer is None:
        return
    assert all(isinstance(name, str) for name in tokenizer.whole_tokens.values())
    for text in TEXTS:
        ends_well(lambda text=text: tokenizer.decode(tokenizer.encode(text)))
    ids = [random.randrange(320) for _ in range(20)]
    decoder = IncrementalDecoder(tokenizer, ids[:10])
    for token in ids:
        decoder.push(token)


def write(directory, library, **files):
    for name, content in {"tokenizer.json": library, **files}.items():
        path = directory / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


@pytest.mark.parametrize("part", range(4))
def test_tokenizer_json(tmp_path, part):
    for case in range(part, CASES, 4):
        random = rng("tokenizer.json", case)
        content = copy.deepcopy(random.choice(BASES))
        kind = random.randrange(3)
        if kind == 0:
            for place in random.sample(
                ["normalizer", "pre_tokenizer", "decoder", "post_processor"], random.randint(1, 4)
            ):
                content[place] = parts(random) if random.random() < 0.5 else sequence(random, place)
        elif kind == 1:
            content = changed(random, content)
        data = json.dumps(content, ensure_ascii=random.random() < 0.5).encode()
        write(tmp_path, damaged(random, data) if kind == 2 else data)
        ends_well(lambda random=random: use(tmp_path, random))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", SETTINGS),
        ("special_tokens_map.json", {name: SETTINGS[name] for name in ("bos_token", "eos_token", "unk_token")}),
        ("added_tokens.json", {"<s>": 256, "<|new|>": 300, "a": 1}),
        ("generation_config.json", GENERATION),
    ],
)
def test_settings(tmp_path, name, content):
    write(tmp_path, BASES[0])
    for case in range(CASES):
        random = rng(name, case)
        if random.random() < 0.3:
            (tmp_path / name).write_bytes(damaged(random, json.dumps(content).encode()))
        else:
            (tmp_path / name).write_text(json.dumps(changed(random, content)), encoding="utf-8")
        ends_well(lambda random=random: use(tmp_path, random))


def test_maps_that_are_taken_are_followed_anywhere(tmp_path):
    """A damaged map that passes the check holds for every character there is, alone and after another."""
    everything = "".join(map(chr, [*range(1, 0x3000), 0xFFFD, 0x1F600, 0x10FFFF]))
    taken = 0
    for case in range(CASES):
        random = rng("map", case)
        data = bytearray(MAP)
        for _ in range(random.randrange(3)):
            at = random.choice([0, random.randrange(0, 2048), random.randrange(2048, len(data)), len(data) - 3])
            data[at] = random.randrange(256)
        normalizer = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}
        write(tmp_path, {**BASES[0], "normalizer": normalizer})

        def follow():
            nonlocal taken
            tokenizer = Tokenizer.load(tmp_path)
            taken += 1
            tokenizer._library.normalizer.normalize_str(everything + everything[::-1])

        ends_well(follow)
    assert taken > CASES / 10
