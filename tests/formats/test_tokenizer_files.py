"""tokenizer.json from anywhere: what is no tokenizer, or one that would take the process with it, is one line."""

import base64
import json
import os
import struct
import subprocess
import sys

import pytest

from gta_edge.errors import BundleError, InputError
from gta_edge.formats.charsmap import check_charsmap
from gta_edge.formats.tokenizer import Tokenizer
from tests.helpers.charsmap import MAP, charsmap
from tests.helpers.generation import byte_level

BASE = json.loads(byte_level().to_str())


def load(directory, **parts):
    (directory / "tokenizer.json").write_text(json.dumps({**BASE, **parts}), encoding="utf-8")
    return Tokenizer.load(directory)


def precompiled(data):
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


def units(*changes):
    """The sound map with units of its trie replaced."""
    data = bytearray(MAP)
    for at, unit in changes:
        struct.pack_into("<I", data, 4 + 4 * at, unit)
    return bytes(data)


CHILD = 256 ^ ord("a")
BROKEN = {
    "nothing": (b"", "ends before its size"),
    "a size alone": (b"\0\4\0\0", "1024 bytes, and 0 follow"),
    "the size of all memory": (b"\xfc\xff\xff\xff" + b"abc", "4294967292 bytes, and 3 follow"),
    "no trie": (b"\0\0\0\0abc", "0 bytes, and 3 follow"),
    "half a block": (struct.pack("<I", 512) + bytes(512), "512 bytes; expected whole blocks"),
    "noise": (struct.pack("<I", 4096) + bytes(range(256)) * 16, "leads out of its bounds"),
    "replacements that are no text": (MAP + b"\xff\xfe", "replacements are not UTF-8"),
    "a root that leads out": (units((0, 0xFFFFFC00)), "leads out of its bounds"),
    "a unit that leads out": (units((CHILD, 0x3FFFFC00 | ord("a"))), "leads out of its bounds"),
    "a leaf that lies outside": (units((CHILD, 0x3FFFFC00 | 1 << 8 | ord("a"))), "leads out of its bounds"),
    "a leaf that points outside": (units((512, 1 << 31 | 10**6)), "points to byte 1000000 of"),
    "a leaf that points into a character": (
        units((512, 1 << 31 | MAP[4 + 4 * 1280 :].index(b"\xa9"))), "into the middle of a character"
    ),
    "too much": (bytes(5 * 2**20), "has 5242880 bytes; expected at most"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_precompiled_map_that_is_broken(tmp_path, capfd, data, reason):
    for normalizer in precompiled(data), {"type": "Sequence", "normalizers": [precompiled(data)]}:
        with pytest.raises(
            BundleError, match=rf"tokenizer\.json: is not a tokenizer \(its precompiled_charsmap: .*{reason}"
        ):
            load(tmp_path, normalizer=normalizer)
    assert capfd.readouterr() == ("", "")


def test_a_map_in_any_spelling_is_checked(tmp_path):
    text = json.dumps({**BASE, "normalizer": precompiled(BROKEN["the size of all memory"][0])})
    for spelled in (
        text.replace("precompiled_charsmap", "precompiled\\u005fcharsmap"),
        text.replace("precompiled_charsmap", "\\u0070recompiled_charsmap"),
        text.replace("precompiled_charsmap", "pre\\u0063ompiled_char\\u0073map"),
        text.replace('"precompiled_charsmap":', '"precompiled_charsmap": "", "precompiled_charsmap":'),
        text.replace('{"type": "Precompiled", ', "{"),
    ):
        assert spelled != text
        (tmp_path / "tokenizer.json").write_text(spelled, encoding="utf-8")
        with pytest.raises(BundleError, match="is not a tokenizer"):
            Tokenizer.load(tmp_path)


def test_a_sound_map_is_taken(tmp_path):
    assert check_charsmap(base64.b64encode(MAP).decode()) == 3
    tokenizer = load(tmp_path, normalizer=precompiled(MAP))
    assert tokenizer.decode(tokenizer.encode("lazy!")) == "lbcdzy"
    assert check_charsmap(base64.b64encode(charsmap({})).decode()) == 1


def test_rules_of_any_length_are_not_followed():
    with pytest.raises(ValueError, match="rules for more than 64 bytes"):
        check_charsmap(base64.b64encode(deep()).decode())


def deep():
    """A map with a rule for a hundred bytes."""
    trie = [0] * (256 * 102)
    trie[0] = 256 << 10
    for level in range(100):
        child = 256 * (level + 1) ^ ord("a")
        base = 256 * (level + 2)
        trie[child] = (child ^ base) << 10 | ord("a")
    return struct.pack(f"<I{len(trie)}I", 4 * len(trie), *trie)


GROWING = {
    "normalizer": [
        {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40},
        {"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * 10**6},
        {"type": "Sequence", "normalizers": [{"type": "ByteLevel"}] * 60},
        {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [{"type": "ByteLevel"}] * 9}] * 9},
    ],
    "decoder": [
        {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40}
    ],
    "post_processor": [
        {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 10**5,
         "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
         "special_tokens": {}}
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "part"), [(name, part) for name, parts in GROWING.items() for part in parts])
def test_a_tokenizer_that_makes_texts_too_long(tmp_path, name, part):
    with pytest.raises(BundleError, match=f"its {name} makes a text [0-9]+ times as long; expected at most 4096 times"):
        load(tmp_path, **{name: part})


def test_what_published_tokenizers_do_is_not_too_much(tmp_path):
    for parts in (
        {"normalizer": {"type": "Sequence", "normalizers": [
            precompiled(charsmap({ord("a"): "x" * 33})),
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"},
        ]}},
        {"normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        ]}},
        {"post_processor": BASE["post_processor"]},
    ):  # fmt: skip
        assert load(tmp_path, **parts).encode("a")


PANICS = {
    "a merge that is not in the vocabulary": {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}},
    "a regular expression that gives up": {
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"(a+)+$"}, "behavior": "Isolated", "invert": False}
    },
    "a strip that goes on": {"decoder": {"type": "Strip", "content": "A", "start": 9, "stop": 9}},
}


@pytest.mark.parametrize("parts", PANICS.values(), ids=PANICS)
def test_a_panic_is_one_line_and_nothing_else_is_seen(tmp_path, capfd, parts):
    with pytest.raises((BundleError, InputError)) as caught:
        load(tmp_path, **parts).encode("a" * 40 + "!")
    assert str(caught.value).isprintable()
    assert capfd.readouterr() == ("", "")


def test_what_others_write_to_stderr_meanwhile_is_not_lost(capfd):
    from gta_edge.support.native_errors import quiet_when_failing

    with quiet_when_failing():
        os.write(2, b"heard\n")

    def fail():
        with quiet_when_failing():
            os.write(2, b"of a failure\n")
            raise ValueError("expected")

    with pytest.raises(ValueError, match="expected"):
        fail()
    assert capfd.readouterr().err == "heard\n"


def test_a_process_without_stderr(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    script = f"""
import os
os.close(2)
from pathlib import Path
from gta_edge.formats.tokenizer import Tokenizer
print(Tokenizer.load(Path({str(tmp_path)!r})).encode("a"))
"""
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=True)
    assert done.stdout == b"[256, 97]\n"


def test_a_tokenizer_that_is_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(BundleError, match="is not a regular file"):
        Tokenizer.load(tmp_path)
