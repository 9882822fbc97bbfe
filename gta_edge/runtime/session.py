"""The one shape of every backend: a session holds a model and its cache, and appends tokens to it.

What is the same everywhere lives here, in ``Session``: checking ids, prompts in chunks, rows of different length, and
whose the cache is. What the cache holds and when it grows is in its state (``cache_state``). A backend adds only how
memory is held (``_resize``) and how one chunk is run (``_run``).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from gta_edge.errors import BackendError, InputError
from gta_edge.model.config import ModelConfig
from gta_edge.runtime.cache_moves import ManagedStep
from gta_edge.runtime.cache_state import CacheState, Lengths, Part
from gta_edge.runtime.claim import Claim
from gta_edge.runtime.session_backend import Ids, Logits
from gta_edge.runtime.session_exports import SessionExports
from gta_edge.runtime.session_inputs import as_array, checked_ids, checked_lengths
from gta_edge.runtime.step_costs import StepCosts
from gta_edge.runtime.token_tree import TokenTree, check_new_nodes, listed
from gta_edge.runtime.tree_cache import TreeCache, TreeCall
from gta_edge.runtime.tree_rows import TreeRows
from gta_edge.support.arguments import whole_argument
from gta_edge.support.exclusive import Exclusive
from gta_edge.support.text import brief

if TYPE_CHECKING:
    from typing_extensions import Self

    from gta_edge.formats.tokenizer import Tokenizer

__all__ = ["Claim", "Ids", "Logits", "Session", "checked_session"]


class Session(SessionExports):
    """A model with a cache, ready to take tokens. Use it as a context manager, or call ``close``.

    Args:
        config: the model's sizes.
        cache: what the cache holds and when it grows; float32 on a device, growing in steps, by default.

    Rows of a batch may differ in length; the first ``forward`` on an empty cache sets their number.

    There is one cache, and so one text at a time. What needs the cache to stay as it left it (a generation, an
    evaluation) takes a ``claim``, and learns from an error when something else used the session meanwhile. Two threads
    never run at once: the second call is an InputError, but ``close`` waits.
    """

    rounds_activations: bool = False
    """Whether matmuls round activations to int8; the option ``exact`` of such a backend turns it off."""

    compute: str = "fp32"
    """Type of activations and cache: ``fp32``, ``fp16`` or ``bf16``."""

    device: str = "cpu"
    """What the model runs on: ``cpu`` or ``gpu``."""

    weights_as_stored: bool = True
    """Whether quantised weights stay so in memory; otherwise they were dequantised when they were loaded."""

    def __init__(self, config: ModelConfig, cache: CacheState | None = None) -> None:
        self.config = config
        # for text in and out; who loads a bundle sets them from its files
        self.bundle_hash: str | None = None
        self.tokenizer: Tokenizer | None = None
        self.end_token_ids: frozenset[int] = frozenset(config.eos_token_ids)
        self.chat_end_token_ids: frozenset[int] = frozenset()  # besides those
        self.chat_sampling: Mapping[str, float] = {}  # options of ``generate`` where a chat leaves them open
        self.skipped: dict[str, str] = {}  # by name, why ``auto`` passed over a backend that is there
        self.step_costs = StepCosts()  # of calls that continue a text, as speculation measures them
        self._cache = cache or CacheState(config)
        self._closed = False
        self._calls = Exclusive("the session", "load the bundle once for each thread, or let them take turns")
        self._owner: Claim | None = None  # the claim that the cache is of; None after anybody else changed it
        self._changed_by = "nothing"
        self._holds_nan = False  # in the cache's memory, in rows of tokens or behind them

    # --- what a backend adds, beside what ``SessionBackend`` has -------------------------------------------------

    @property
    @abstractmethod
    def cache_bytes(self) -> int:
        """Bytes that the cache occupies now, over all layers."""

    @property
    def max_batch(self) -> int | None:
        """Rows of a batch at most; None where only memory limits them."""
        return None

    @property
    def cuda_graph(self) -> bool | None:
        """Whether single tokens are replays of a CUDA graph; None where there is none or before the first token."""
        return None

    # --- what everyone uses ------------------------------------------------------------------------------------

    def close(self) -> None:
        """Free what the session holds; it cannot run afterwards. A step that another thread runs is waited for."""
        with self._calls.held(wait=True):
            if not self._closed:
                self._closed = True
                self._release()

    def claim(self, batch: int | None = None) -> Claim:
        """Empty the cache and return the right to it, which lasts until something else changes it.

        Args:
            batch: rows that the cache is to have from now on; by default the first ``forward`` says how many.

        Raises:
            InputError: a number of rows that makes no sense.
            CapacityError: there is no memory for so many.
            BackendError: the session is closed.
        """
        if batch is not None and whole_argument(batch, "batch") < 1:
            raise InputError(f"batch is {batch}", "expected at least one row")
        claim = Claim(self)
        with self._calls.held():
            self._check_open()
            self._empty(claim)
            if batch is not None and batch != self._cache.batch:
                self._cache.check_memory(batch, 1, 1, 0)
                self._cache.reserve(batch, 1, self._resize)
        return claim

    @property
    def length(self) -> Ids:
        """Tokens in the cache, int64 [B], per row (a copy)."""
        return self._cache.length.copy()

    @property
    def rows(self) -> Ids:
        """Rows of memory in use, int64 [L, B], per layer and row of the batch (a copy).

        Without a policy that evicts, every token has one: then they are ``length`` in each layer, and where a sequence
        has a tree, the rows of its nodes more.
        """
        return self._cache.rows.copy()

    @property
    def capacity(self) -> int:
        """Tokens per row that the cache has memory for now."""
        return self._cache.capacity

    def revocable(self) -> int | None:
        """Return how many tokens beyond its first the next call may take for ``truncate`` to undo them entirely.

        None is any number. As many at most may a call guess that is to leave what token after token would.

        Raises:
            InputError: a policy manages the cache that would count what was taken back.
        """
        return self._cache.revocable()

    @property
    def cache_dtype(self) -> str:
        """How cached values are stored: in the type of ``compute``, or as another of ``CACHES``."""
        return self._cache.dtype

    @property
    def max_length(self) -> int:
        """Tokens per row at most: those that the model has positions for (P), or that an engine was built for."""
        return self._cache.max_length

    @property
    def chunk_size(self) -> int:
        """Tokens of a prompt that are run at once, per row."""
        return self._cache.chunk_size

    @property
    def observed_tokens(self) -> int | None:
        """Tokens of a chunk, its last, whose attention alone a cache policy is told of; None where all are."""
        return self._cache.observed_tokens

    @property
    def trees(self) -> bool:
        """Whether it was loaded with ``trees=True``, and ``tree`` opens one."""
        return isinstance(self._cache, TreeCache)

    def tree_room(self, sequence: int = 0) -> int:
        """Return how many nodes a tree behind the text of one sequence could have, if none were there yet.

        There are positions for fewer where they are deeper than the model has some, and perhaps memory.

        Raises:
            InputError: the session was loaded without trees; there is no such sequence.
        """
        return self._tree_cache().room(sequence)

    def tree(self, sequence: int = 0) -> TokenTree:
        """Open a tree of tokens behind the text of one sequence: several continuations of it, held at once.

        Args:
            sequence: row of the batch.

        Raises:
            InputError: the session was loaded without trees; there is no such sequence; it has a tree with nodes.
        """
        with self._calls.held():
            return self._opened_tree(sequence, None)

    def forward(
        self,
        ids: Any,
        *,
        lengths: Any = None,
        all_logits: bool = False,
        tree: TokenTree | Sequence[TokenTree] | None = None,
    ) -> Logits:
        """Append tokens to the cache, or run the new nodes of trees, and return logits.

        Args:
            ids: integers [B, T]; with ``lengths``, or trees, the rows are right-padded to T (padding must be valid ids
                too).
            lengths: integers [B], 0 to T: how many tokens of each row are real; all by default. A row without any
                stays as it is; rows before the first and behind the last that has some need not be computed.
            all_logits: give logits for every position instead of each row's last real one.
            tree: the tree whose new nodes these are, in the order in which they were grown; of several sequences a tree
                for each, of which some may have none. By default the tokens continue the text.

        Returns:
            float32 [B, V], or [B, T, V] with ``all_logits``, where padded positions are zero. Those of a row without
            tokens are zero too.

        Raises:
            InputError: ids that are no integers, of another shape or outside the vocabulary; lengths outside 0 to T,
                or all 0; another number of rows than the cache holds, or of tokens than a tree has new nodes; a tree
                that is closed, or is not given where it has nodes.
            CapacityError: a row, padding included, would pass the model's last position, or there is not as much memory
                as it would take. The cache is unchanged.
            BackendError: the session is closed, or the backend failed.

        Whatever it raises, new nodes of the trees given are taken back.
        """
        with self._calls.held():
            return self._forward(ids, lengths, all_logits, None, tree)

    def truncate(self, length: Any) -> None:
        """Forget all but the first ``length`` tokens of the cache: one number, or one per row. It closes all trees.

        Raises:
            InputError: a length below 0 or above what the row holds.
        """
        with self._calls.held():
            self._truncate(length, None)

    def reset(self) -> None:
        """Empty the cache, and close all trees; its memory stays for the next prompt."""
        with self._calls.held():
            self._empty(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- how -----------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise BackendError("the session is closed", "load the bundle again")

    def _check_owner(self, owner: Claim | None) -> None:
        """Raise unless the cache is as this claim left it; None is anybody, who takes it as it is."""
        if owner is not None and owner is not self._owner and not self._closed:
            raise InputError(
                f"the session is no longer as it was left, something else used it: {self._changed_by}",
                "finish one generation or evaluation before the next, or load the bundle once for each",
            )

    def _changed(self, owner: Claim | None, call: str) -> None:
        """Note who changed the cache, and for claims that end with it, how."""
        self._owner = owner
        self._changed_by = f"{call} was called on it" if owner is None else "another generation or evaluation began"

    def _empty(self, owner: Claim | None) -> None:
        self._cache.reset()
        self._clean()
        self._changed(owner, "reset()")

    def _forward(
        self,
        ids: Any,
        lengths: Any,
        all_logits: bool,
        owner: Claim | None,
        tree: TokenTree | Sequence[TokenTree] | None = None,
    ) -> Logits:
        """``forward``, of a claim or of anybody."""
        self._check_open()
        self._check_owner(owner)
        if tree is not None:
            return self._forward_trees(ids, lengths, all_logits, owner, tree)
        ids = checked_ids(ids, self.config.vocab_size)
        batch, tokens = ids.shape
        counts = checked_lengths(lengths, batch, tokens)
        cache = self._cache
        past = cache.past_for(batch)
        parts = cache.plan(past, counts, tokens, self._logits_bytes(ids, all_logits), self._rows_of_step)

        def step(part: Part, past: Lengths, positions: Ids) -> tuple[Logits, Lengths]:
            cache.reserve(batch, int(cache.reached(part, past).max()), self._resize)
            found = self._computed(part, ids, past, positions, cache.prepare(part, self))
            return found, cache.append(part, self)

        self._changed(None, "a forward() that failed")  # what it leaves is nobody's
        logits = self._run_parts(parts, ids.shape, past, all_logits, step)
        self._changed(owner, "forward()")
        return logits

    def _room(self, row: int) -> int:
        beside = self._rows_of_step(row, row + 1, 2)
        return self.max_length - int(self._cache.length[beside].max())

    def _logits_bytes(self, ids: Ids, all_logits: bool) -> int:
        return 4 * self.config.vocab_size * (ids.size if all_logits else len(ids))

    def _computed(self, part: Part, ids: Ids, past: Lengths, positions: Ids, managed: ManagedStep | None) -> Logits:
        """Run a part of a call, in the rows of the batch that it computes."""
        rows = part.rows
        before = self._cache.past_of(part, past[rows])
        given = ids[rows, part.start : part.stop], before, np.ascontiguousarray(positions, np.int64)
        self._first_row = rows.start or 0
        logits = self._run(*given) if managed is None else self._run(*given, managed.of_rows(rows))
        # a state that holds one NaN, or is infinite, makes NaN of every logit, and so of the first
        self._holds_nan |= not np.isfinite(logits[:, -1:, 0]).all()
        return logits

    def _clean(self) -> None:
        """Let nothing be left of tokens whose logits were NaN, now that some of the cache's rows hold no token."""
        if self._holds_nan and not self._closed and self.capacity:  # there is memory
            self._zero_free_rows()
        self._holds_nan = False  # or what is left shows with the next token

    def _run_parts(
        self,
        parts: Sequence[Part],
        shape: tuple[int, ...],
        past: Lengths,
        all_logits: bool,
        step: Callable[[Part, Lengths, Ids], tuple[Logits, Lengths]],
    ) -> Logits:
        """Run the parts of a call of ids [B, T] one after the other; return its logits.

        Args:
            parts: of the call.
            shape: B, T.
            past: rows in use before it, int64 [B].
            all_logits: as in ``forward``.
            step: runs a part behind ``past``, and returns the logits for positions [B', M] of the rows that it
                computes, and the rows in use then.
        """
        counts = parts[0].counts
        # where one step gives all logits, as for every token of a generation, they are handed on and not copied
        at_once = len(parts) == 1 or (not all_logits and bool((counts == counts[0]).all()))
        at_once = at_once and bool(counts.all())
        whole = (*shape, self.config.vocab_size) if all_logits else (shape[0], self.config.vocab_size)
        logits: Logits = np.zeros(0 if at_once else whole, np.float32)
        for part in parts:
            rows = part.rows
            real, ends_here = part.real[rows], part.ends_here[rows]
            if all_logits:
                positions = np.broadcast_to(np.arange(part.width), (len(real), part.width))
            else:
                positions = np.maximum(real - 1, 0)[:, None] if ends_here.any() else np.zeros((len(real), 0), np.int64)
            found, past = step(part, past, positions)
            if all_logits:
                found[positions >= real[:, None]] = 0
            if at_once:
                if all_logits or found.shape[1]:
                    logits = found if all_logits else found[:, 0]
            elif all_logits:
                logits[rows, part.start : part.stop] = found
            elif found.shape[1]:
                logits[rows][ends_here] = found[ends_here, 0]
        return logits

    # --- trees -----------------------------------------------------------------------------------------------------

    def _tree_cache(self) -> TreeCache:
        if not isinstance(self._cache, TreeCache):
            raise InputError("the session was loaded without trees of tokens", "load the bundle with trees=True")
        return self._cache

    def _has_tree(self, sequence: int, rows: TreeRows) -> bool:
        """Tell whether a sequence's tree is the one in these rows."""
        return isinstance(self._cache, TreeCache) and self._cache.trees.get(sequence) is rows

    def _opened_tree(self, sequence: int, owner: Claim | None) -> TokenTree:
        cache = self._tree_cache()
        self._check_open()
        self._check_owner(owner)
        return TokenTree(self, cache.open(sequence), sequence, owner)

    def _forward_trees(
        self, ids: Any, lengths: Any, all_logits: bool, owner: Claim | None, given: TokenTree | Sequence[TokenTree]
    ) -> Logits:
        """``forward`` of what the trees have new."""
        cache, trees = self._tree_cache(), listed(given)
        for tree in trees:
            tree._require(self)
        with cache.taking_back(self):
            if lengths is not None:
                raise InputError("lengths do not go with a tree, whose new nodes are known", "leave lengths out")
            ids = checked_ids(ids, self.config.vocab_size)
            check_new_nodes(trees, ids, cache.batch)
            call = TreeCall(cache, self._logits_bytes(ids, all_logits), self._rows_of_step)

            def step(part: Part, past: Lengths, positions: Ids) -> tuple[Logits, Lengths]:
                cache.reserve(len(ids), int(past[part.rows].max()) + part.width + call.spare, self._resize)
                found = self._computed(part, ids, past, positions, call.prepare(part))
                return found, call.append(part, ids)

            self._changed(None, "a forward() that failed")
            logits = self._run_parts(call.parts, ids.shape, call.past, all_logits, step)
        self._changed(owner, "forward()")
        return logits

    def _accept(self, tree: TokenTree, node: int, owner: Claim | None) -> None:
        """Make a tree's path to a node part of the text; see ``TokenTree.accept``."""
        self._check_open()
        self._changed(None, "a tree's accept() that failed")
        self._tree_cache().accept(tree.sequence, node, self)
        self._changed(owner, "a tree's accept()")

    # --- the rest --------------------------------------------------------------------------------------------------

    def _truncate(self, length: Any, owner: Claim | None) -> None:
        self._check_owner(owner)
        try:
            self._cache.truncate(as_array(length, "a length for truncate"), length, self)
            self._clean()
        except InputError:  # nothing has changed
            raise
        except BaseException:
            self._changed(None, "a truncate() that failed")
            raise
        self._changed(owner, "truncate()")


def checked_session(value: object, name: str) -> Session:
    """Return a session that was given.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(value, Session):
        raise InputError(f"{name} is {brief(value)}", "expected a session: load its bundle")
    return value
