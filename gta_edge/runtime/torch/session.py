"""The `torch` backend: the reference model, its cache updated in place; on an NVIDIA GPU, on the attention kernels.

On the CPU it computes in float32. On a GPU it computes in fp16 or bf16, as ``build`` and the plugin do (softmax, norms'
sums and logits in float32), single tokens and a few at once are replayed from CUDA graphs, and the matrices of an int8
or int4 bundle stay in codes. Logits of a head in codes are rounded to fp16.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gta_edge.accuracy.reference import build_decoder, use_startable_threads
from gta_edge.cuda.gpu import OLDEST
from gta_edge.errors import BackendError, CapacityError
from gta_edge.formats.bundle import Bundle
from gta_edge.graph.weights import read_stored, read_weights
from gta_edge.libraries.optional import optional
from gta_edge.libraries.torch import is_out_of_memory
from gta_edge.model.decoder import Cache, Decoder, SelfAttention, empty_cache
from gta_edge.model.kv_cache import CacheTensor
from gta_edge.model.quantized_decoder import build_packed_decoder
from gta_edge.numerics.dtypes import CACHES, COMPUTE_TYPES, DTYPES
from gta_edge.numerics.quantization import BITS
from gta_edge.plan.host_memory import require_memory_for_torch
from gta_edge.plugins.attention.definition import MAX_BRANCH_TOKENS
from gta_edge.plugins.attention.tiling import has_kernels
from gta_edge.plugins.attention.torch import attention_in_place
from gta_edge.plugins.attention.torch_blocks import reopen
from gta_edge.runtime.cache_moves import ManagedStep, Moves
from gta_edge.runtime.cache_policies.base import CachePolicy
from gta_edge.runtime.managed_cache import GPU_CHUNK_SIZE, OBSERVED_TOKENS, cache_state
from gta_edge.runtime.saved_cache import place_in
from gta_edge.runtime.session import Ids, Logits, Session
from gta_edge.runtime.torch import managed as memory
from gta_edge.runtime.torch.cuda_graph import CaptureError, DecodeGraph
from gta_edge.runtime.torch.decode_step import DecodeStep, join_linears
from gta_edge.runtime.torch.step_graphs import StepGraphs

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = optional("torch", "export")

__all__ = ["TorchSession", "default_device", "load_decoder", "multiplies_codes"]

_GPU_CHUNK_SIZE, _LARGE_GPU_CHUNK_SIZE = 2048, 8192
"""Tokens of a prompt at once on a GPU: fewer leave most of it idle, and read the weights more often.

A chunk is about a thousand launches, which take Python 25 ms whatever its length: an H100 has computed 2,048 tokens of
GTA-1B in half of that.
"""

_LARGE_GPU_PROCESSORS = 64
"""Multiprocessors of a GPU that a chunk of 2,048 tokens does not keep busy for as long as it takes to launch."""

_GPU_CHUNK_SIZE_WITHOUT_KERNELS = 512
"""Of models whose attention is torch's own operations there, which write all scores to memory."""

_GPU_CAPACITY_STEP = 2048
"""Cost on a GPU goes by the cache's length and not by its capacity; growing it means capturing the graph again."""


def default_device() -> str:
    """Return ``cuda`` where torch finds a GPU, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def multiplies_codes(precision: str, device: str, compute: str) -> bool:
    """Tell whether there are kernels for the matmuls with matrices stored in ``precision``."""
    on_gpu = device.startswith("cuda") and precision in BITS and compute in COMPUTE_TYPES
    return on_gpu and torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= OLDEST


def _gpu_chunk_size(device: str) -> int:
    large = torch.cuda.get_device_properties(device).multi_processor_count >= _LARGE_GPU_PROCESSORS
    return _LARGE_GPU_CHUNK_SIZE if large else _GPU_CHUNK_SIZE


def load_decoder(bundle: Bundle, device: str, compute: str) -> Decoder:
    """Return a bundle's model: int8 and int4 matrices in codes where kernels multiply by them, else dequantised.

    Raises:
        BundleError: the weights cannot be read, or do not fit the config.
        CapacityError: there is no memory for it.
    """
    with _within_memory(f"{bundle.model_path}: there is no memory for the model"):
        if multiplies_codes(bundle.precision, device, compute):
            return build_packed_decoder(bundle.config, read_stored(bundle.model_path, bundle.config), device)
        require_memory_for_torch(bundle.config, bundle.precision, "the model in PyTorch")
        return build_decoder(bundle.config, read_weights(bundle.model_path, bundle.config))


@contextmanager
def _within_memory(
    problem: str, remedy: str = "close other programs, or export with --precision int4"
) -> Iterator[None]:
    """Turn torch's errors for want of memory, on a GPU or a CPU, into a CapacityError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise CapacityError(f"{problem}", remedy) from error


class TorchSession(Session):
    """A ``Decoder`` behind the session's interface.

    Args:
        model: the model, in any floating type; it is moved to the device and retyped, and its attention is switched to
            the in-place op.
        device: ``cpu``, or ``cuda`` with or without a number.
        compute: ``fp32``, ``fp16`` or ``bf16``.
        threads: threads for one operator, for the whole process; None leaves torch's own choice, as far as this process
            may use so many cores.
        cache_dtype: how cached values are stored, one of ``CACHES``; None for ``compute``.
        cache: policy that says which rows of the cache stay; None for all.
        options: as ``CacheState`` takes them.

    Raises:
        BackendError: there is no such device.
        InputError: more threads than could be of use.
        CapacityError: there is no memory for the model in that type, or the system lets fewer threads start.
    """

    backend = "torch"
    reads_rows = copies_rows = True

    def __init__(
        self,
        model: Decoder,
        *,
        device: str = "cpu",
        compute: str = "fp32",
        threads: int | None = None,
        cache_dtype: str | None = None,
        cache: CachePolicy | None = None,
        **options: Any,
    ) -> None:
        on_gpu = device.startswith("cuda")
        if on_gpu and not torch.cuda.is_available():
            raise BackendError("torch finds no CUDA GPU here", "run `gta-edge doctor`, or take the device cpu")
        if on_gpu:
            on_kernels = has_kernels(model.config.attention, compute, cache_dtype or compute)
            chunk_size = _gpu_chunk_size(device) if on_kernels else _GPU_CHUNK_SIZE_WITHOUT_KERNELS
            options = {"capacity_step": _GPU_CAPACITY_STEP, "chunk_size": chunk_size} | options
            if cache is not None:
                options["observed_tokens"] = OBSERVED_TOKENS
                options["chunk_size"] = min(options["chunk_size"], GPU_CHUNK_SIZE)
            if options.get("trees"):
                options["spare"] = MAX_BRANCH_TOKENS  # that graphs pad a step with
        options |= {"compute": compute, "on_host": not on_gpu}
        super().__init__(model.config, cache_state(model.config, cache_dtype or compute, cache, **options))
        use_startable_threads(threads)
        for module in model.modules():
            if isinstance(module, SelfAttention):
                module.attention = attention_in_place
        self.compute, self.device = compute, "gpu" if on_gpu else "cpu"
        self._options = {"device": torch.device(device), "dtype": getattr(torch, DTYPES[compute].array)}
        with _within_memory(f"there is no memory for the model in {compute}"):
            self._model = model.eval().requires_grad_(False).to(**self._options)
            if on_gpu and compute in COMPUTE_TYPES:
                join_linears(self._model)
        self._caches: list[Cache] = []
        self._observed: memory.Received | None = None
        self._graphs: StepGraphs | None = None
        self.graph_refused: str | None = None if on_gpu else "there is no GPU"  # why no step is a CUDA graph

    @property
    def cache_bytes(self) -> int:
        received = self._observed.nbytes if self._observed else 0
        return received + sum(tensor.nbytes for layer in self._caches for tensor in layer.tensors)

    @property
    def cuda_graph(self) -> bool | None:
        """Whether single tokens are replays of a CUDA graph; if False, ``graph_refused`` says why. None on the CPU, and
        before the first token after the cache was made or grew.
        """
        if self.device != "cpu" and self.graph_refused is not None:
            return False
        return None if self.decode_graph is None else True

    @property
    def decode_graph(self) -> DecodeGraph | None:
        """The step of one token as a CUDA graph; None on the CPU, where none is captured yet, or none can be."""
        return None if self._graphs is None else self._graphs.single

    def _resize(self, batch: int, capacities: Sequence[int]) -> None:
        self._graphs = None  # they hold the old caches' addresses
        try:
            with self._cache.replacing(batch, self._release):
                if not self._caches:
                    types = {"compute": self.compute, "cache_dtype": self.cache_dtype}
                    device = self._options["device"]
                    self._caches = empty_cache(self.config, batch, capacities, **types, device=device)
                    if self._observe:
                        self._observed = memory.Received(batch, capacities, device)
                    return
                shapes: list[list[tuple[int, ...]]] = [[] for _ in self._caches]
                for each in self._cache.tensors:
                    shapes[each.layer].append(each.shape(batch, capacities[each.layer]))
                for i, layer in enumerate(self._caches):  # a layer at a time: never twice the whole cache
                    self._caches[i] = Cache.of(tuple(map(_grown, layer.tensors, shapes[i])))
        except BaseException as error:
            if not is_out_of_memory(error):
                raise
            raise CapacityError(
                f"a cache of {max(capacities)} tokens for {batch} rows takes "
                f"{self._cache.nbytes(batch, capacities) / 2**30:.2f} GiB, and {self._place} has not that much left",
                "the session is now empty: give shorter prompts or fewer rows",
            ) from error

    def _rows_of_step(self, first: int, stop: int, tokens: int) -> slice:
        # a GPU replays single tokens from one graph, of all rows, and idle ones cost it little
        return slice(None) if self.device == "gpu" and tokens == 1 else slice(first, stop)

    def _read_row(self, row: int, tokens: int) -> dict[str, npt.NDArray[Any]]:
        return {each.name: _to_numpy(cache[place_in(each, row, tokens)]) for each, cache in self._by_name()}

    def _write_row(self, row: int, tokens: int, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        with torch.inference_mode():
            for each, cache in self._by_name():
                cache[place_in(each, row, tokens)] = _from_numpy(arrays[each.name], cache)

    def _copy_row(self, source: int, targets: Sequence[int], rows: Sequence[int]) -> None:
        received = self._observed.layers if self._observed else []
        with torch.inference_mode():
            for target in targets:
                for each, cache in self._by_name():
                    count = rows[each.layer]
                    cache[place_in(each, target, count)] = cache[place_in(each, source, count)]
                for each_received, count in zip(received, rows, strict=False):  # none where nothing is observed
                    each_received[target, :count] = each_received[source, :count]

    def _zero_free_rows(self) -> None:
        with torch.inference_mode():
            for each, cache in self._by_name():
                for row, count in enumerate(self._cache.rows[each.layer].tolist()):
                    place = place_in(each, row, count)
                    kept = cache[place].clone()
                    cache[row].zero_()
                    cache[place] = kept

    def _by_name(self) -> Iterator[tuple[CacheTensor, Tensor]]:
        """Yield every tensor of the cache with what it is."""
        layers = [iter(layer.tensors) for layer in self._caches]  # in the same order within a layer
        return ((each, next(layers[each.layer])) for each in self._cache.tensors)

    def _run(
        self, input_ids: Ids, past_length: Ids, logit_positions: Ids, managed: ManagedStep | None = None
    ) -> Logits:
        if managed is not None and managed.causal:
            managed = None  # as without trees, on the kernels for it
        problem = f"{self._place} has too little memory left for {input_ids.size} tokens at once"
        with _within_memory(problem, "give a smaller chunk_size or fewer rows"):
            return self._appended(input_ids, past_length, logit_positions, managed)

    @property
    def _place(self) -> str:
        return "the machine" if self._options["device"].type == "cpu" else "the GPU"

    def _appended(self, input_ids: Ids, past_length: Ids, logit_positions: Ids, managed: ManagedStep | None) -> Logits:
        with torch.inference_mode():
            logits = None
            if len(input_ids) == self._cache.batch and self.graph_refused is None:
                logits = self._replayed(input_ids, past_length, logit_positions, managed)
            if logits is None:
                logits = self._run_eagerly(input_ids, past_length, logit_positions, managed)
        result: Logits = logits.numpy()
        return result

    def _run_eagerly(
        self, input_ids: Ids, past_length: Ids, logit_positions: Ids, managed: ManagedStep | None
    ) -> Tensor:
        device = self._options["device"]
        ids, past, positions = (torch.tensor(x, device=device) for x in (input_ids, past_length, logit_positions))
        if managed is None:
            logits: Tensor = self._model(ids, past, positions, self._of_step(self._caches, len(ids)))[0]
            return logits.cpu()
        caches, received = self._shown(managed, ids.shape[1])
        caches, received = self._of_step(caches, len(ids)), [each[self._step_rows(len(ids))] for each in received]
        past, inputs = memory.managed_inputs(managed, received, self._observe, device)
        logits = self._model(ids, past, positions, caches, inputs)[0]
        return logits.cpu()

    def _step_rows(self, batch: int) -> slice:
        return slice(self._first_row, self._first_row + batch)

    def _of_step(self, caches: list[Cache], batch: int) -> list[Cache]:
        """Return the rows of the batch that a step computes."""
        if batch == self._cache.batch:
            return caches
        rows = self._step_rows(batch)
        return [Cache.of(tuple(tensor[rows] for tensor in layer.tensors)) for layer in caches]

    def _shown(self, managed: ManagedStep, tokens: int) -> tuple[list[Cache], list[Tensor]]:
        """Return what a step is given of caches [B, n, S, d] and of what rows received [B, S].

        On the CPU attention costs as the capacity, so there it is as much as a cache without a policy would have.
        """
        received = self._observed.layers if self._observed else []
        if self.device != "cpu":
            return self._caches, received
        ends = (managed.past_length.max(1) + tokens).tolist()
        sizes = [self._cache.capacity_for(end) for end in ends]
        shown = zip(self._caches, sizes, strict=True)
        caches = [Cache.of(tuple(tensor[:, :, :s] for tensor in layer.tensors)) for layer, s in shown]
        return caches, [each[:, :s] for each, s in zip(received, sizes, strict=False)]

    @property
    def _observe(self) -> str | None:
        return self._cache.features.observe if self._cache.features else None

    def _move(self, moves: Moves) -> None:
        with self._changing(), torch.inference_mode():
            memory.move(self._caches, self._observed.layers if self._observed else [], moves)

    def _received(self) -> list[npt.NDArray[np.float32]]:
        assert self._observed is not None  # a policy that observes has asked
        return self._observed.on_host()

    def _rotate(self, shifts: Sequence[Ids]) -> None:
        with self._changing(), torch.inference_mode():
            memory.rotate(self.config, self._caches, shifts)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Say what a lack of memory means while rows move."""
        problem = f"{self._place} has too little memory left to move rows of the cache, which was emptied"
        with _within_memory(problem, "give a smaller chunk_size or fewer rows"):
            yield

    def _replayed(
        self, input_ids: Ids, past_length: Ids, logit_positions: Ids, managed: ManagedStep | None
    ) -> Tensor | None:
        """Run a step as a CUDA graph; None where there is none for it, and it runs as it is."""
        if self._graphs is None:
            self._graphs = StepGraphs(
                DecodeStep(self._model),
                self._caches,
                len(input_ids),
                self._cache.capacities,
                features=None if self.trees else self._cache.features,
                received=self._observed.layers if self._observed else (),
                in_blocks=CACHES[self.cache_dtype].in_blocks,
                vocab_size=self.config.vocab_size,
            )
        captured, logits = self._graphs.captured, None
        try:
            logits = self._graphs.run(input_ids, past_length, logit_positions, managed)
        except CaptureError as error:
            self.graph_refused = error.problem
        if self._graphs.captured > captured:
            self.step_costs.leave_out()
        return logits

    def _reopen(self, sequence: int, block: int) -> None:
        with torch.inference_mode():
            for layer in self._caches:
                reopen(layer, sequence, block)

    def _release(self) -> None:
        self._graphs = None
        self._caches, self._observed = [], None


def _to_numpy(values: Tensor) -> npt.NDArray[Any]:
    """Return a copy in the host's memory; numpy has no bfloat16 and no 8-bit floats of its own, ml_dtypes has."""
    dense = values.detach().cpu().contiguous().clone()
    name = next(each for each in DTYPES.values() if each.array == str(dense.dtype).removeprefix("torch."))
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dense.element_size()]
    result: npt.NDArray[Any] = dense.view(bits).numpy().view(name.numpy)
    return result


def _from_numpy(array: npt.NDArray[Any], like: Tensor) -> Tensor:
    """Return what ``_to_numpy`` made of a tensor of the type of ``like``."""
    bits = {1: np.uint8, 2: np.int16, 4: np.int32}[array.dtype.itemsize]
    return torch.tensor(array.view(bits)).view(like.dtype)


def _grown(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tensor.shape == shape:
        return tensor
    grown = tensor.new_zeros(shape)
    grown[:, :, : tensor.shape[2]] = tensor
    return grown
