"""A precompiled character map, as SentencePiece's tokenizers have one."""

import struct


def charsmap(rules):
    """A map of sentencepiece: rules from one byte to a text, each with a block of the trie for itself."""
    blob, units = b"", [0] * (256 * (2 + len(rules)))
    units[0] = 256 << 10
    for i, (byte, text) in enumerate(rules.items()):
        child, base = 256 ^ byte, 512 + 256 * i
        units[child] = (child ^ base) << 10 | 1 << 8 | byte
        units[base] = 1 << 31 | len(blob)
        blob += text.encode() + b"\0"
    return struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + blob


MAP = charsmap({ord("a"): "bcd", ord("!"): "", ord("e"): "é"})
