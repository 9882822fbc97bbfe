"""What cache types cost: losses however a window is read, the rise of perplexity, and what the tables say."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import gta_edge
from gta_edge.errors import InputError
from gta_edge.evaluate.perplexity import evaluate
from gta_edge.formats.checkpoint import Checkpoint
from tests.helpers.benchmarks import BENCHMARKS

Script = Callable[[str], ModuleType]
EXAMPLE = BENCHMARKS.parent / "examples" / "tiny-gta"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cache-types") / "bundle"
    gta_edge.export_model(EXAMPLE, directory, verify=False)
    return directory


def test_losses_are_those_of_eval_however_a_window_is_read(script: Script, bundle: Path) -> None:
    measure = script("cache_types").losses
    with gta_edge.load(bundle, "onnxruntime") as session:
        windows = np.random.default_rng(0).integers(0, session.config.vocab_size, (3, 20))
        whole = measure(session, windows, by_token=False, rows=2)
        single = measure(session, windows, by_token=True, rows=3)
        expected = [evaluate(session, window).loss for window in windows]
    np.testing.assert_allclose(whole, expected, rtol=1e-5)
    np.testing.assert_allclose(single, expected, rtol=1e-5)


def test_the_rise_is_paired(script: Script) -> None:
    """Windows differ far more than the cache does: what counts are differences between the same ones."""
    module, source = script("cache_types"), Checkpoint.open(EXAMPLE)
    base, difference = np.array([1.0, 3.0, 5.0]), np.array([0.01, 0.02, 0.03])
    row = module._row(module.Variant("int8", rotated=True, by_token=True), base + difference, base, source)
    assert math.isclose(row["rise_percent"], 100 * (math.exp(0.02) - 1))
    assert math.isclose(row["standard_error_percent"], 100 * math.exp(0.02) * 0.01 / math.sqrt(3))
    assert math.isclose(row["perplexity"], math.exp(3.02))
    assert row["label"] == "int8, values rotated, read token by token"
    assert 0.5 < row["of_fp16"] < 0.6
    # tiny-gta caches a key of 64 and a latent of 128 for 4 query heads; GQA has a key and a value of 64 for each group
    assert math.isclose(row["of_gqa_fp16"] / row["of_fp16"], 0.75)


@pytest.mark.parametrize(
    ("backend", "caches"),
    [("onnxruntime", ["int8"] * 4), ("torch", [name for name in ("int4", "int4v2") for _ in range(2)])],
)
def test_a_small_run(
    backend: str,
    caches: list[str],
    script: Script,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, chosen = script("cache_types"), ["--backend", "torch", "--caches", "int4,int4v2"]
    words = [*(chosen if backend == "torch" else []), "--length", "48", "--windows", "2"]
    written = ["--json", tmp_path / "a.json", "--markdown", tmp_path / "a.md"]
    monkeypatch.setattr("sys.argv", ["cache_types.py", *map(str, (*words, *written))])
    module.main()
    document = json.loads((tmp_path / "a.json").read_text())
    assert [row["cache_dtype"] for row in document["variants"]] == ["fp32", *caches]
    options = " ".join([*words[:-4], "--kind", "code", *words[-4:]])
    assert document["command"] == f"python benchmarks/cache_types.py {options}"
    assert all(abs(row["rise_percent"]) < 5 for row in document["variants"])
    assert (tmp_path / "a.md").read_text().count("\n| int") == 4
    assert "± is the standard error" in capsys.readouterr().out


def test_a_text_that_is_too_short(script: Script, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("short")
    module = script("cache_types")
    with pytest.raises(InputError, match=r"the text has .* tokens, and a window 1024"):
        module.quality(module.parse(["--text", str(tmp_path / "text")]))
