"""Tokenizers and sessions that the tests of generation share."""

import json

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from gta_edge.model.presets import preset
from gta_edge.runtime.generation.incremental_decoder import IncrementalDecoder, Tokenizer
from gta_edge.runtime.session import Session
from gta_edge.runtime.tree_cache import TreeCache

BOS, EOS = 256, 257

CONFIG = preset("gta1-160m").replace(
    num_hidden_layers=2,
    hidden_size=384,
    num_attention_heads=6,
    latent_dim=64,
    intermediate_size=512,
    vocab_size=300,
    max_position_embeddings=64,
    eos_token_ids=(EOS,),
)


def byte_alphabet():
    """Return the character by which byte-level BPE writes each byte: itself where printable, else the next free."""
    free = iter(range(256, 512))
    return [chr(b) if 33 <= b <= 126 or (161 <= b <= 255 and b != 173) else chr(next(free)) for b in range(256)]


def byte_level(words=()):
    """A byte-level tokenizer: id b is byte b, then <s> and </s>, then words; a text gets <s> in front."""
    library = tokenizers.Tokenizer(models.BPE(vocab={c: b for b, c in enumerate(byte_alphabet())}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<s>", "</s>"])
    library.add_tokens(list(words))
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return library


def sentencepiece(words):
    """A tokenizer as converted from sentencepiece: <unk> <s> </s>, 256 byte tokens from id 3, then words."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{b:02X}>": 3 + b for b in range(256)}
    vocab |= {word: len(vocab) + i for i, word in enumerate(words)}
    library = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    return library


def save(directory, library, **settings):
    """Write a tokenizer's files and load them."""
    library.save(str(directory / "tokenizer.json"))
    if settings:
        (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    loaded = Tokenizer.load(directory)
    assert loaded is not None
    return loaded


def stream(tokenizer, ids):
    """Return the pieces of ids pushed one by one."""
    decoder = IncrementalDecoder(tokenizer)
    return [decoder.push(token) for token in ids]


class ScriptedSession(Session):
    """Says the given tokens, whatever it is asked; an exception in the script is raised."""

    backend = "scripted"

    def __init__(self, script, tokenizer=None, config=CONFIG):
        super().__init__(config)
        self.tokenizer = tokenizer
        self.script = list(script)
        self.steps = []  # (tokens already there, tokens given) of each run

    @property
    def cache_bytes(self):
        return 0

    def _resize(self, batch, capacity):
        pass

    def _run(self, input_ids, past_length, logit_positions):
        self.steps.append((int(past_length[0]), input_ids[0].tolist()))
        said = self.script.pop(0)
        if isinstance(said, BaseException):
            raise said
        logits = np.zeros((1, logit_positions.shape[1], self.config.vocab_size), np.float32)
        logits[:, :, said] = 1
        return logits


class TableSession(Session):
    """A model of which every probability is known: the next token depends on the last two, by a table of logits.

    Args:
        table: float32 [V, V, V]: the last token but one (0 before the first), the last, and logits of the next.
        tokenizer: of its tokens.
        positions: P.
        trees: whether it holds trees of tokens.
    """

    backend = "table"

    def __init__(self, table, tokenizer=None, positions=4096, *, trees=False):
        config = CONFIG.replace(vocab_size=len(table), max_position_embeddings=positions, eos_token_ids=())
        super().__init__(config, TreeCache(config) if trees else None)
        self.table, self.tokenizer = table, tokenizer
        self.cached = np.zeros((2, positions), np.int64)  # each row's token and position
        self.widths = []  # of each call

    @property
    def cache_bytes(self):
        return 0

    def _resize(self, batch, capacity):
        pass

    def _move(self, moves):
        _, _, sources, targets = moves.moves.T
        self.cached[:, targets] = self.cached[:, sources]

    def _run(self, input_ids, past_length, logit_positions, managed=None):
        past, width = int(past_length[0]), input_ids.shape[1]
        self.widths.append(width)
        positions = past + np.arange(width) if managed is None else managed.positions[0]
        self.cached[:, past : past + width] = input_ids[0], positions
        logits = [self.table[self._before(past + t, t, managed), input_ids[0, t]] for t in logit_positions[0]]
        return np.array(logits, np.float32)[None]

    def _before(self, row, query, managed):
        """The token before that of a row: the one a position earlier among the rows that its query sees."""
        seen = np.ones(row, bool)
        if managed is not None and managed.branches is not None:
            start = int(managed.branch_start.ravel()[0])
            words = managed.branches[0, : max(0, row - start)].view(np.uint64)
            seen[start:] = words >> np.uint64(query) & np.uint64(1)
        places = np.flatnonzero(seen & (self.cached[1, :row] == self.cached[1, row] - 1))
        assert len(places) == (self.cached[1, row] > 0)
        return self.cached[0, places[0]] if len(places) else 0
