"""Checkpoint to bundle: trace, passes, weights streamed through, manifest, check."""

from __future__ import annotations

import platform
import shlex
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from gta_edge.accuracy.tolerance import Report
from gta_edge.errors import BundleError, ExportError, GtaEdgeError, InputError, OutputError
from gta_edge.export.calibration_choice import Calibration, choose_calibration
from gta_edge.export.own_codes import OwnCodes, storage_of_own
from gta_edge.export.quantizer import Quantizer
from gta_edge.formats.bundle import CONFIG, FORMAT, MODEL, WEIGHTS, Bundle, write_manifest
from gta_edge.formats.checkpoint import Checkpoint
from gta_edge.formats.rotated_checkpoint import RotatedCheckpoint
from gta_edge.formats.text_files import TextFiles, check_text_files
from gta_edge.formats.weights import COLUMNS, EMBEDDING, TRANSPOSED
from gta_edge.libraries.optional import optional
from gta_edge.model.rope import check_table_size
from gta_edge.model.tables import model_tables
from gta_edge.numerics.quantization import BITS, QuantizedMatrix
from gta_edge.plan.cost import stored_bytes
from gta_edge.plan.host_memory import require_memory_for_export
from gta_edge.support.files import new_directory
from gta_edge.support.ownership import foreign_entry
from gta_edge.support.progress import Progress, silent
from gta_edge.support.text import one_line
from gta_edge.version import __version__

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir
else:
    onnx, ir = optional("onnx", "export"), optional("onnx_ir", "export")

__all__ = ["Export", "export_model"]

_INLINE_BYTES = 1024  # smaller tensors stay in the graph's own file
_MADE_WITH = ("torch", "onnx", "onnx-ir", "onnxscript")
_OTHER_TOKENIZERS = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt", "tekken.json")


@dataclass(frozen=True)
class Export:
    """A finished export.

    Attributes:
        bundle: what was written.
        report: what the check found; None when it was left out.
        notes: what a person should know of it.
    """

    bundle: Bundle
    report: Report | None
    notes: tuple[str, ...] = ()


def export_model(
    checkpoint: str | Path,
    bundle: str | Path,
    *,
    precision: str | None = None,
    block_size: int | None = None,
    embedding_precision: str | None = None,
    calibrate: str | Path | None = None,
    mixed: float | None = None,
    rotate_values: bool = False,
    verify: bool = True,
    force: bool = False,
    progress: Progress = silent,
) -> Export:
    """Write a bundle from a checkpoint in the published layout, and check it against PyTorch.

    Weights are read, converted and written one tensor at a time; the model is never in memory as a whole, but for
    the check. Matrices that the checkpoint has in integers (GPTQ, AWQ, compressed-tensors) go into an int4 or int8
    bundle as they are.

    Args:
        checkpoint: directory with ``config.json`` and safetensors.
        bundle: directory to make; it appears when it is complete and has passed the check. What fails the check is kept
            beside it, as ``BUNDLE.failed-check``.
        precision: how matrices are stored, one of ``fp32``, ``fp16``, ``bf16``, ``int8``, ``int4``; the checkpoint's
            own by default.
        block_size: weights along the input dimension that share a scale: for int4 16, 32, 64 or 128, 32 by default;
            for int8 the same or None, which is one scale per output channel; of matrices that are in integers already
            their own by default.
        embedding_precision: of the embedding and the head in int4: ``int8``, the default, or ``int4``.
        calibrate: a UTF-8 text file, for which the rounding of int4 and int8 weights is corrected (GPTQ); ``"self"``
            for a text that the model writes itself, ``"none"`` for plain rounding. By default ``"self"`` in int4, for a
            model with a tokenizer and at most 2 billion parameters, if there is memory for all of it in float32 and its
            weights are not those of ``gta-edge init``.
        mixed: percent by which int8 may enlarge the matrices of an int4 model's layers; those that gain most for their
            bytes on the calibration text are stored in it.
        rotate_values: rotate the values that are cached, in the weights around them: the same model, whose cache loses
            less in 8 bits (``formats.rotated_checkpoint``).
        verify: check the result (a few hundred tokens, prefill and decode).
        force: replace an existing bundle.
        progress: told of each step.

    Raises:
        InputError: unknown precision, or a block size or text that does not fit it.
        ConfigError: the checkpoint's config describes no model that is supported.
        CheckpointError: the checkpoint cannot be read, a value in it is not finite, or a bundle could not be opened
            with its tokenizer's files.
        ExportError: the weights do not fit the precision, or the result does not agree with PyTorch.
        CapacityError: it takes more memory than there is.
        OutputError: ``bundle`` exists or cannot be written.
        BackendError: an extra is not installed.
    """
    source = Checkpoint.open(checkpoint)
    if rotate_values:
        source = RotatedCheckpoint.of(source)
    check_table_size(source.config.key_width, source.config.max_position_embeddings)
    if precision is None:
        precision = source.own_precision
    storage = storage_of_own(source, precision, block_size, embedding_precision)
    own = OwnCodes(source, storage)
    calibration = choose_calibration(source, precision, calibrate, in_integers=bool(own))
    if mixed is not None:
        _check_mixed(mixed, precision, calibration)
    text = check_text_files(source.directory, source.config)
    require_memory_for_export(source, precision, calibrated=bool(calibration), verify=verify)
    inputs = [source.directory, *([calibration.text] if isinstance(calibration.text, Path) else [])]
    size = int(stored_bytes(source.config, storage, source.names) * (1 + (mixed or 0) / 100))
    notes = text.notes if text.tokenizer else (_no_tokenizer(source.directory),)
    notes += (calibration.note,) if calibration.note else ()
    with new_directory(bundle, force=force, inputs=inputs, needed_bytes=size, kind=FORMAT) as directory:
        quantizer = None
        ready: Mapping[str, QuantizedMatrix] = own
        if precision in BITS:
            if calibration:
                from gta_edge.export.calibration import calibrated  # and with it torch, as below

                ids = calibration.ids(source, progress)
                if mixed is not None:
                    from gta_edge.export.mixed import mixture

                    found = mixture(source, storage, ids, mixed, progress)
                    storage, notes = found.storage, (*notes, found.note)
                ready = calibrated(source, ids, storage, progress)
            quantizer = Quantizer(source.read, storage, ready)
        _write_model(source, directory, precision, quantizer, progress)
        for companion in (source.directory / CONFIG, *source.companions):
            shutil.copyfile(companion, directory / companion.name)
        made_with = {"gta-edge": __version__, "python": platform.python_version()}
        made_with |= {name: version(name) for name in _MADE_WITH}
        write_manifest(directory, source.config, storage, made_with, progress, rotated_values=rotate_values)
        _check_text(directory, source, Path(bundle))
        calibrated_matrices = ready if calibration else {}
        report = _check(directory, source, Path(bundle), progress, calibrated_matrices) if verify else None
    if report is not None:
        notes += _remove_failed(Path(bundle))
    return Export(Bundle.open(bundle), report, notes)


def _check_mixed(percent: float, precision: str, calibration: Calibration) -> None:
    if precision != "int4":
        raise InputError(f"precision is {precision}", "int4 is mixed with int8, and nothing else")
    if not calibration:
        raise InputError(
            "there is no text to measure on which matrices are worth int8", "give --calibrate FILE or --calibrate self"
        )
    if not 0 <= percent <= 100:
        raise InputError(f"mixed is {percent}", "expected 0 to 100 percent of the int4 matrices' bytes")


def _write_model(
    source: Checkpoint, directory: Path, precision: str, quantizer: Quantizer | None, progress: Progress
) -> None:
    from gta_edge.export.graph import prepare, traced

    config = source.config
    rotations = model_tables(config)

    progress("tracing the model", 0, 0)
    model = traced(config, source.biases)
    model = prepare(model, EMBEDDING, source.read, rotations, precision, quantizer)
    progress("tracing the model", 1, 1)

    def wrote(tensor: Any, info: Any) -> None:
        progress("writing weights", info.index + 1, info.total)

    path = directory / MODEL
    try:
        ir.save(model, path, external_data=WEIGHTS, size_threshold_bytes=_INLINE_BYTES, callback=wrote)
    except (OverflowError, ir.serde.SerdeError) as error:
        _raise_cause(error)
    _name_columns(path)
    try:
        onnx.checker.check_model(path, full_check=True)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the exported graph is not valid ONNX ({one_line(error)})", "please report this") from error


def _name_columns(path: Path) -> None:
    """Give a quantised table that is looked up and multiplied by a second name for the same bytes; see ``COLUMNS``."""
    model = onnx.load(path, load_external_data=False)
    stored = {tensor.name: tensor for tensor in model.graph.initializer if tensor.name.endswith(TRANSPOSED)}
    for node in model.graph.node:
        if node.op_type == "Gather" and node.input[0] in stored:
            second = model.graph.initializer.add()
            second.CopyFrom(stored[node.input[0]])
            node.input[0] = second.name = second.name.removesuffix(TRANSPOSED) + COLUMNS
            path.write_bytes(model.SerializeToString(deterministic=True))


def _raise_cause(error: Exception) -> NoReturn:
    """Raise what failed while weights were read and converted: onnx-ir wraps it, where a tensor is stored inline."""
    cause: BaseException = error
    while cause.__cause__ is not None and not isinstance(cause, (GtaEdgeError, OverflowError)):
        cause = cause.__cause__
    if isinstance(cause, OverflowError):
        raise ExportError(str(cause)) from error
    raise cause if isinstance(cause, GtaEdgeError) else error


def _check_text(directory: Path, source: Checkpoint, bundle: Path) -> None:
    """Open the bundle's tokenizer and settings: they were checked in the checkpoint, which may have changed since."""
    try:
        TextFiles.load(directory, source.config)
    except BundleError as error:
        raise ExportError(f"{bundle}: the result cannot be read back ({error})") from error


def _no_tokenizer(directory: Path) -> str:
    """Say how a model without ``tokenizer.json`` gets one."""
    found = [name for name in _OTHER_TOKENIZERS if (directory / name).exists()]
    path = str(directory.resolve())
    code = f"from transformers import AutoTokenizer as T; T.from_pretrained({path!r}).save_pretrained({path!r})"
    make = f"python -c {shlex.quote(code)}, then export again"
    if found:
        return f"no tokenizer.json, but {', '.join(found)}: the bundle takes token ids only; for text, run: {make}"
    return "no tokenizer.json: the bundle takes token ids only; for text, put one into the checkpoint and export again"


def _check(
    directory: Path, source: Checkpoint, bundle: Path, progress: Progress, calibrated: Mapping[str, QuantizedMatrix]
) -> Report:
    """Check what was written; where it fails, keep it beside the place that it was meant for."""
    from gta_edge.export.check import check_export

    try:
        report = check_export(Bundle.open(directory), source, progress, calibrated)
    except BundleError as error:
        raise ExportError(f"{bundle}: the result cannot be read back ({error})") from error
    if report.passed:
        return report
    reasons = report.failures
    more = f"; and {len(reasons) - 1} more" if len(reasons) > 1 else ""
    raise ExportError(
        f"{bundle}: the export is not the model of {source.directory} ({reasons[0]}{more})",
        f"please report this line; {_keep_failed(directory, bundle)}",
    )


def _failed_path(bundle: Path) -> Path:
    """Return where a bundle is kept that was to be ``bundle`` and has failed its check."""
    resolved = bundle.resolve()
    return resolved.with_name(f"{resolved.name}.failed-check")


def _keep_failed(directory: Path, bundle: Path) -> str:
    """Move what was written to where its name says that it failed; return where that is, or why it is not kept."""
    kept = _failed_path(bundle)
    try:
        with new_directory(kept, force=True, kind=FORMAT) as partial:
            for file in directory.iterdir():
                file.rename(partial / file.name)
    except OutputError as error:
        return f"what was written is not kept ({error.problem})"
    return f"what was written is kept as {kept.name}"


def _remove_failed(bundle: Path) -> tuple[str, ...]:
    """Remove what an earlier export to the same place has kept, if that is all that is there; return a note of it."""
    kept = _failed_path(bundle)
    with suppress(OSError):
        if kept.is_dir() and not kept.is_symlink() and any(kept.iterdir()) and foreign_entry(kept, kind=FORMAT) is None:
            shutil.rmtree(kept)
            return (f"removed {kept.name}, which an earlier export kept that had failed its check",)
    return ()
