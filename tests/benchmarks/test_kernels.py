"""The GPU benchmark, as far as it goes without a GPU: what it counts, what it makes of times, and its tables."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from gta_edge.accuracy.reference import reference_logits
from tests.helpers.benchmarks import BENCHMARKS, GPU
from tests.helpers.tiny import TINY


@pytest.fixture
def kernels(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("kernels")


@pytest.fixture
def contenders(script: Callable[[str], ModuleType]) -> dict[str, Any]:
    return script("kernels_peers").CONTENDERS


# --- what is counted -------------------------------------------------------------------------------------------------


def test_gta_caches_192_values_where_gqa_caches_640(contenders):
    values = {key: contender.cached_values_per_token for key, contender in contenders.items()}
    assert values == {
        **dict.fromkeys(["gta-bf16", "gta-int8", "gta-fp8", "gta-int4", "gta-int4v2"], 64 + 128),
        **dict.fromkeys(["gqa-bf16", "gqa-int8", "gqa-int4", "gqa-int4v2"], 5 * (64 + 64)),
        **dict.fromkeys(["gqa-sdpa", "gqa-flashinfer"], 5 * (64 + 64)),
        **dict.fromkeys(["padded-sdpa", "padded-flashinfer"], 128 + 128),
    }


def test_bytes_of_a_cached_token(contenders):
    sizes = {key: contender.cache_bytes_per_token for key, contender in contenders.items()}
    assert sizes["gta-bf16"] == 2 * 192
    assert sizes["gta-int8"] == sizes["gta-fp8"] == 192 + 2 * 4  # a scale for the key, one for the latent
    assert sizes["gqa-bf16"] == sizes["gqa-sdpa"] == 2 * 640
    assert sizes["gqa-int8"] == 640 + 5 * 2 * 4
    # 4 bits, a scale and a minimum for a channel of 32 keys, both for a row of values of 4 or 2 bits
    assert (sizes["gta-int4"], sizes["gta-int4v2"]) == (32 + 8 + 64 + 4, 32 + 8 + 32 + 4)
    assert (sizes["gqa-int4"], sizes["gqa-int4v2"]) == (5 * (32 + 8 + 32 + 4), 5 * (32 + 8 + 16 + 4))
    assert sizes["padded-sdpa"] == 2 * 256


def test_gta_multiplies_960_times_per_pair_where_gqa_does_2560_times(contenders):
    work = {key: contender.multiply_adds_per_pair for key, contender in contenders.items()}
    assert work["gta-bf16"] == work["gta-int8"] == 5 * (64 + 128) == 960
    assert work["gqa-bf16"] == work["gqa-sdpa"] == work["gqa-flashinfer"] == 20 * (64 + 64) == 2560
    assert work["padded-sdpa"] == 5 * (128 + 128) == 1280


def test_bytes_of_a_decode_step(contenders):
    batch, context = 8, 1000
    new = 5 * 64 + 64 + 128 + 1280 + 1280  # query, key, latent, gate, output
    decoder = 5 * 128 * 256
    assert contenders["gta-bf16"].traffic_bytes(batch, 1, context) == (
        batch * (context * 384 + 384 + 2 * new) + 2 * decoder
    )
    assert contenders["gta-int8"].traffic_bytes(batch, 1, context) == (
        batch * (context * 200 + 200 + 2 * new) + 2 * decoder
    )
    # query and output; the cache is there already
    assert contenders["gqa-sdpa"].traffic_bytes(batch, 1, context) == batch * (context * 1280 + 2 * 2 * 1280)
    assert contenders["gqa-bf16"].traffic_bytes(batch, 1, context) == (
        batch * (context * 1280 + 1280 + 2 * (1280 + 2 * 320 + 1280))  # the append, and the new key and value
    )
    assert contenders["padded-sdpa"].traffic_bytes(batch, 1, context) == batch * (context * 512 + 2 * 2 * 640)
    # rows in codes, and those of the open block in 16 bits, of which half a one where the last token would fill it
    for held, end in ((1000, 1000), (1008, 1024)):
        read = 992 * 108 + (held - 992) * 384
        assert contenders["gta-int4"].traffic_bytes(batch, 1, end) == batch * (read + 384 + 2 * new) + 2 * decoder


def test_flops_of_a_decode_step(contenders):
    assert contenders["gta-bf16"].flops(8, 1, 1000) == 2 * 8 * (960 * 1000 + 5 * 128 * 256)
    assert contenders["gqa-sdpa"].flops(8, 1, 1000) == 2 * 8 * 2560 * 1000


def test_a_prompts_token_sees_those_up_to_its_own(contenders):
    assert contenders["gqa-sdpa"].flops(1, 4, 4) == 2 * 2560 * (1 + 2 + 3 + 4)
    assert contenders["gqa-sdpa"].flops(1, 2, 10) == 2 * 2560 * (9 + 10)
    assert contenders["gta-bf16"].flops(1, 4, 4) == 2 * (960 * 10 + 4 * 5 * 128 * 256)


def test_the_counts_are_those_of_the_models(script):
    peers = script("kernels_peers")
    for config, key in ((peers.GTA, "gta-bf16"), (peers.GQA, "gqa-bf16"), (peers.GQA, "gqa-sdpa")):
        assert config.cache_values_per_token_per_layer == peers.CONTENDERS[key].cached_values_per_token
        assert config.attention_flops_per_pair == 2 * peers.CONTENDERS[key].multiply_adds_per_pair


def test_caches_are_together_four_times_the_l2(script):
    kernels = script("gpu_timing")
    assert kernels.layer_count(layer_bytes=1000, l2_bytes=10_000) == 40
    assert kernels.layer_count(layer_bytes=999, l2_bytes=10_000) == 41
    assert kernels.layer_count(layer_bytes=10**9, l2_bytes=10_000) == 1
    assert kernels.layer_count(layer_bytes=1, l2_bytes=10_000) == kernels.MAX_LAYERS


def test_every_backend_of_a_peer_is_tried(script):
    peers = script("kernels_peers")
    found = {way.split()[0] for way in peers.candidates(peers.CONTENDERS["gqa-sdpa"], 1)}
    assert found == {"FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"}
    assert set(peers.candidates(peers.CONTENDERS["gqa-sdpa"], 128)) == {f"{backend} gqa" for backend in found}


# --- what is made of times -------------------------------------------------------------------------------------------


def test_ratios_are_taken_within_a_round(kernels):
    # the GPU became slower with each round, the ratio stayed
    found = kernels.ratios({"gta-bf16": [1.0, 2.0, 3.0], "gta-int8": [2.0, 2.0, 2.0], "gqa-sdpa": [4.0, 8.0, 12.0]})
    assert found["gta-bf16"] == {"gqa-sdpa": {"median": 4, "min": 4, "max": 4}}
    assert found["gta-int8"] == {"gqa-sdpa": {"median": 4, "min": 2, "max": 6}}


def test_the_two_models_are_compared_on_these_kernels_too(kernels):
    found = kernels.ratios({"gta-bf16": [1.0], "gta-int8": [0.5], "gqa-bf16": [3.0], "gqa-sdpa": [4.0]})
    assert {own: set(others) for own, others in found.items()} == {
        "gta-bf16": {"gqa-bf16", "gqa-sdpa"},
        "gta-int8": {"gqa-bf16", "gqa-sdpa"},
        "gqa-bf16": {"gta-bf16", "gta-int8", "gqa-sdpa"},
    }
    assert found["gta-bf16"]["gqa-bf16"]["median"] == 3


def test_fractions_are_of_the_measured_rates(kernels):
    figures = {"bytes": 10e9, "flops": 5e12, "time_s": kernels.spread([0.2])}
    kernels.add_fractions(figures, GPU)
    assert figures["copy_fraction"] == pytest.approx(0.5)
    assert figures["matmul_fraction"] == pytest.approx(0.5)


# --- the report ------------------------------------------------------------------------------------------------------


def row(kernels: ModuleType, tokens: int, context: int) -> dict[str, Any]:
    """A row as ``measure_row`` makes it, of made-up times."""
    times = {"gta-bf16": [1e-5, 2e-5, 3e-5], "gqa-sdpa": [4e-5, 8e-5, 12e-5]}
    contenders: dict[str, Any] = {"padded-sdpa": {"bytes": 1, "flops": 1, "failed": "needs 9.9 GB of memory"}}
    for key, found in times.items():
        contenders[key] = {
            "bytes": 1_000_000,
            "flops": 2_000_000,
            "layers": 7,
            "won": "MATH gqa",
            "tried": {"MATH gqa": 1e-5, "CUDNN_ATTENTION gqa": "no such thing"},
            "time_s": kernels.spread(found),
            "overhead_s": 3e-6 if tokens == 1 else None,
        }
        kernels.add_fractions(contenders[key], GPU)
    ratios = kernels.ratios(times)
    return {"batch": 2, "tokens": tokens, "context": context, "contenders": contenders, "ratios": ratios}


@pytest.fixture
def document(kernels: ModuleType) -> dict[str, Any]:
    return {
        "command": "python benchmarks/kernels.py",
        "date": "2026-01-02T03:04:05+00:00",
        "gpu": GPU,
        "versions": {"torch": "1.2", "flashinfer-python": "not installed"},
        "rounds": 3,
        "notes": ["FlashInfer is not installed and was not measured"],
        "decode": [row(kernels, 1, 1024), row(kernels, 1, 4096)],
        "prefill": [row(kernels, 128, 128)],
        "model": [
            {
                "model": "gta-1b",
                "context": 2048,
                "prefill_tokens_per_s": 1234.4,
                "token_s": kernels.spread([0.01, 0.011, 0.012]),
                "tokens_per_s": 90.9,
                "floor_s": 0.0055,
                "floor_fraction": 0.5,
            }
        ],
    }


def test_the_page_has_every_figure(kernels, document):
    page = kernels.markdown(document)
    assert "A GPU (sm_99, 3 multiprocessors, 4 MiB L2, 8 GiB), 2026-01-02; torch 1.2" in page
    assert "copies 100 GB/s (read and written), reads 90 GB/s and multiplies 50.0 TFLOP/s" in page
    assert "| gta-edge GTA, bf16 cache | 192 | 384 | 960 |" in page
    measured = "| 20.0 (10.0..30.0) | 3.0 | 1.00 | 0.002 | 0.50 | 0.00 | MATH gqa |"
    assert f"| 2 | 1 | 4096 | gta-edge GTA, bf16 cache {measured}" in page
    assert "| 2 | 128 | 128 | gta-edge GTA, bf16 cache | 20.0 (10.0..30.0) | n/a | 1.00 |" in page
    assert "| 2 | 1 | 1024 | SDPA GTA padded | n/a | n/a | n/a | n/a | n/a | n/a | n/a |" in page
    assert "| 2 | 1 | 1024 | gta-edge GTA, bf16 cache | 4.00 (4.00..4.00) |" in page
    assert "| gta-1b | 2048 | 11.00 (10.00..12.00) | 91 | 5.50 | 0.50 | 1234 |" in page
    assert "FlashInfer is not installed and was not measured" in page
    assert "SDPA GTA padded, batch 2, 1 new of 1024 tokens: needs 9.9 GB of memory" in page
    assert "SDPA GQA by CUDNN_ATTENTION gqa, batch 2, 128 new of 128 tokens: no such thing" in page


def test_every_table_of_the_page_is_whole(kernels, document):
    for block in kernels.markdown(document).split("\n\n"):
        lines = block.splitlines()
        if lines[0].startswith("|"):
            assert len({line.count("|") for line in lines}) == 1
            assert set(lines[1]) == {"|", "-", " "}


def test_what_was_shown_is_what_is_on_the_page(kernels, document, capsys):
    kernels.show(document)
    shown = capsys.readouterr().out
    for text in ("20.0 (10.0..30.0)", "4.00 (4.00..4.00)", "MATH gqa", "11.00 (10.00..12.00)", "no such thing"):
        assert text in shown


@pytest.mark.parametrize("part", ["decode", "prefill", "model"])
def test_one_part_alone_makes_a_page_too(kernels, document, part, tmp_path):
    for other in {"decode", "prefill", "model"} - {part}:
        del document[other]
    rules = [line for line in kernels.markdown(document).splitlines() if line.startswith("| ---")]
    assert len(rules) == (2 if part == "model" else 3)  # the static costs' table is always there
    json.dumps(document)
    pytest.importorskip("matplotlib")
    kernels.plot(document, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").exists() == (part != "model")


# --- the command -----------------------------------------------------------------------------------------------------


def call(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "kernels.py"), *arguments]
    hidden = {"CUDA_VISIBLE_DEVICES": ""}  # no GPU, also where there is one
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={"PATH": "", **hidden, **(environment or {})}
    )


def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    done = call("--json", str(tmp_path / "result.json"))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "GPU" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--only", "decode,all"], "'all'"),
        (["--markdown", "nowhere/page.md"], "nowhere/page.md"),
        (["--contexts", "12,-3"], "--contexts got '12,-3'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments, expected):
    done = call(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert expected in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_what_is_measured_can_be_chosen(kernels):
    options = kernels.parse(["--models", "gqa-1b", "--contexts", "256,512", "--rounds", "2", "--only", "decode,model"])
    assert (options.models, options.rounds, options.only) == (("gqa-1b",), 2, ("decode", "model"))
    assert options.contexts == dict.fromkeys(kernels.PARTS, (256, 512))
    assert kernels.parse([]).contexts["decode"] == kernels.DECODE_CONTEXTS
    assert kernels.parse(["--quick"]).contexts == kernels.QUICK_CONTEXTS


def test_each_row_is_written_when_it_is_there(kernels, tmp_path, monkeypatch):
    """Times are made up; the model ends the run, as a hang or a kill would."""
    path = tmp_path / "rows.json"

    def model(name, contexts, new_tokens, place):
        yield {"model": name, "context": contexts[0]}
        raise KeyboardInterrupt

    stand_ins = {
        "gpu": lambda: dict(GPU),
        "rates": lambda quick: {},
        "check_all": lambda keys, tokens, context: ({}, []),
        "measure_row": lambda ways, sizes, place, rounds: {"sizes": sizes, "contenders": {}, "ratios": {}},
        "measure_model": model,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(kernels, name, stand_in)
    with pytest.raises(KeyboardInterrupt):
        kernels.run(kernels.parse(["--json", str(path), "--contexts", "512", "--quick"]))
    found = json.loads(path.read_text())
    assert [row["sizes"] for row in found["decode"]] == [[1, 1, 512], [8, 1, 512]]
    assert [row["sizes"] for row in found["prefill"]] == [[1, 512, 512]]
    assert found["model"] == [{"model": "gta-1b", "context": 512}]


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_a_model_of_random_weights_is_timed(script, precision):
    """On the CPU, where it takes the same way."""
    models = script("gpu_models")
    config = TINY.replace(max_position_embeddings=40)
    with models.random_session(config, precision, "cpu") as (session, weight_bytes):
        rows = list(models.measure(session, (3, 20), 4, weight_bytes=weight_bytes, read_bytes_per_s=1e9, name="tiny"))
    assert [(row["model"], row["context"]) for row in rows] == [("tiny", 3), ("tiny", 20)]
    for row in rows:
        cache_bytes = row["context"] * 2 * config.num_hidden_layers * config.cache_values_per_token_per_layer
        assert row["floor_s"] == pytest.approx((weight_bytes + cache_bytes) / 1e9)
        assert row["floor_fraction"] == pytest.approx(row["floor_s"] / row["token_s"]["median"])
    bits = {"bf16": 16, "int8": 8, "int4": 4}[precision]
    assert 1 <= weight_bytes / (config.parameters * bits / 8) < 1.6  # scales, and what stays in 16 bits


def test_random_codes_mean_the_same_in_both_forms(script):
    models = script("gpu_models")
    for bits in (4, 8):
        packed, plain = models.packed_decoder(TINY, bits, "cpu"), models.float_decoder(TINY, bits)
        ids = np.arange(12)[None]
        found, wanted = (reference_logits(model, ids) for model in (packed, plain))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * wanted.std())
