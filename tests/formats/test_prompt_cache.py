"""Files of prompt caches: what was written comes back, and nothing else is taken for one."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from gta_edge.errors import GtaEdgeError, InputError, OutputError
from gta_edge.formats.prompt_cache import PromptCacheFile, read_prompt_cache, read_prompt_ids, write_prompt_cache

TYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.int8, ml_dtypes.float8_e4m3fn, np.uint8]
ORIGIN = {"bundle": "abc", "backend": "torch"}


def some_tensors() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {f"key.{i}": random.integers(0, 256, (1, 2, 5, 8), np.uint8).astype(kind) for i, kind in enumerate(TYPES)}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    write_prompt_cache(tmp_path / "cache", np.arange(5), some_tensors(), ORIGIN)
    return tmp_path / "cache"


def test_what_was_written_comes_back(written: Path) -> None:
    found = read_prompt_cache(written)
    assert found.ids.tolist() == list(range(5))
    assert found.ids.dtype == np.int64
    assert {**ORIGIN}.items() <= dict(found.origin).items()
    for name, array in some_tensors().items():
        assert found.tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(found.tensors[name].view(np.uint8), array.view(np.uint8))
    ids, origin = read_prompt_ids(written)
    assert ids.tolist() == list(range(5))
    assert ORIGIN.items() <= origin.items()
    write_prompt_cache(written, np.arange(5), {"key.0": np.ones((1, 1, 5, 2), np.float32)}, ORIGIN)
    assert load_file(written)["token_ids"].tolist() == list(range(5))  # as anybody reads it
    assert [path.name for path in written.parent.iterdir()] == ["cache"]


@settings(max_examples=60, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), change=st.integers(1, 255), cut=st.booleans())
def test_a_damaged_file_is_refused_in_one_line(tmp_path_factory, place: float, change: int, cut: bool) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.unlink(missing_ok=True)
    write_prompt_cache(path, np.arange(5), some_tensors(), ORIGIN)
    content = bytearray(path.read_bytes())
    at = int(place * len(content))
    if cut:
        del content[at:]
    else:
        content[at] ^= change
    path.write_bytes(content)
    refusals = []
    for read in (read_prompt_ids, read_prompt_cache):
        try:
            found = read(path)
        except InputError as error:
            refusals.append(str(error))
            found = None
    assert all(each.startswith(str(path)) and "\n" not in each for each in refusals)
    if isinstance(found, PromptCacheFile):  # what is beside the tensors has no hash: the version that wrote it, say
        assert found.ids.tolist() == list(range(5))
        for name, array in some_tensors().items():
            np.testing.assert_array_equal(found.tensors[name].view(np.uint8), array.view(np.uint8))


def resaved(path: Path, tensors: dict[str, np.ndarray], **metadata: str) -> Path:
    save_file(tensors, path, metadata=metadata)
    return path


def test_other_files_are_refused_and_not_replaced(tmp_path: Path, written: Path) -> None:
    ids, known = np.arange(5, dtype=np.int32), {"format": "gta-edge-prompt-cache", "format_version": "1"}
    (tmp_path / "text").write_text("a text of mine")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "directory").mkdir()
    header = json.dumps({"__metadata__": {**known}, "token_ids": "?"}).encode()
    (tmp_path / "header").write_bytes(len(header).to_bytes(8, "little") + header)
    resaved(tmp_path / "model.safetensors", {"a": ids})
    resaved(tmp_path / "newer", {"token_ids": ids}, format="gta-edge-prompt-cache", format_version="2")
    resaved(tmp_path / "odd", {"token_ids": ids}, format="gta-edge-prompt-cache", format_version="first")
    resaved(tmp_path / "no hash", {"token_ids": ids}, **known)
    for name, reason in [
        ("text", "is no prompt cache"),
        ("empty", "is no prompt cache"),
        ("directory", "is no regular file"),
        ("absent", "cannot be read (No such file or directory)"),
        ("header", "is damaged"),
        ("model.safetensors", "is no prompt cache"),
        ("newer", "format_version is 2; this version of gta-edge reads up to 1: upgrade it"),
        ("odd", "is damaged (its format_version is 'first'"),
        ("no hash", "is damaged (its tensors are not as they were written)"),
    ]:
        path = tmp_path / name
        with pytest.raises(InputError) as caught:
            read_prompt_cache(path)
        assert str(caught.value).startswith(f"{path}: {reason}")
        if name in ("text", "empty", "directory", "model.safetensors", "newer"):
            before = path.read_bytes() if path.is_file() else None
            with pytest.raises(GtaEdgeError):
                write_prompt_cache(path, np.arange(5), some_tensors(), ORIGIN)
            assert before is None or path.read_bytes() == before
    write_prompt_cache(written, np.arange(2), {"key.0": np.zeros((1, 1, 2, 4), np.float32)}, ORIGIN)
    assert read_prompt_cache(written).ids.tolist() == [0, 1]  # an older one is replaced
    with pytest.raises(OutputError, match="its parent directory does not exist"):
        write_prompt_cache(tmp_path / "nowhere" / "cache", np.arange(5), some_tensors(), ORIGIN)
