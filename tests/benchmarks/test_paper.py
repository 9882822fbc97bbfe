"""The page on the paper: FLOPs counted in graphs, ratios and verdicts, the roofline, and the whole way to the page."""

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import onnx
import pytest

from gta_edge.errors import BundleError, GtaEdgeError, InputError
from gta_edge.libraries.install import install_command
from gta_edge.model.config import GQAConfig, GTAConfig, ModelConfig
from gta_edge.model.presets import PRESETS, preset
from gta_edge.plan import cost
from gta_edge.plan.roofline import make_plan
from tests.benchmarks.conftest import BENCHMARKS
from tests.conftest import TINY

NAMES = ("paper", "paper_flops", "paper_page", "paper_plots", "paper_results", "paper_tables", "paper_theory")


@pytest.fixture
def it(script: Callable[[str], ModuleType]) -> SimpleNamespace:
    """All modules of the page by name."""
    return SimpleNamespace(**{name: script(name) for name in (*NAMES, "random_bundles")})


def baseline(key_value_heads: int) -> GQAConfig:
    """A Llama model of the sizes of TINY."""
    return GQAConfig(
        vocab_size=TINY.vocab_size,
        hidden_size=TINY.hidden_size,
        intermediate_size=TINY.intermediate_size,
        num_hidden_layers=TINY.num_hidden_layers,
        num_attention_heads=TINY.num_attention_heads,
        head_dim=TINY.head_dim,
        max_position_embeddings=TINY.max_position_embeddings,
        tie_word_embeddings=True,
        num_key_value_heads=key_value_heads,
    )


MODELS = {"tiny": {"gta-tiny": TINY, "gqa-tiny": baseline(3), "mha-tiny": baseline(12)}}


# --- FLOPs in graphs -------------------------------------------------------------------------------------------------


def attention_flops(config: ModelConfig) -> int:
    """FLOPs of a pair: a score of every map, and a cached vector added for it (README of the paper's repository)."""
    if isinstance(config, GTAConfig):
        return 2 * config.num_query_heads * (config.key_dim + config.latent_dim)
    return 2 * config.num_attention_heads * (config.head_dim + config.head_dim)


@pytest.mark.parametrize(
    ("name", "precision"),
    [("gta1-160m", "bf16"), ("gta-1b", "int4"), ("gta4-500m", "bf16"), ("gqa-1b", "int4"), ("mha-160m", "bf16")],
)
def test_the_graph_has_the_attention_flops_of_the_formula(it, tmp_path, name, precision):
    """The attention of the preset, everything else small."""
    config = preset(name).replace(num_hidden_layers=1, vocab_size=320, intermediate_size=64, max_position_embeddings=64)
    bundle = it.random_bundles.make_bundles(tmp_path, name, None, [precision], config=config)[precision]
    found = it.paper_flops.count(bundle / "model.onnx")
    assert found.per_pair == attention_flops(config) == config.attention_flops_per_pair
    head = 2 * config.vocab_size * config.hidden_size
    assert found.per_token == config.flops_per_token(0) - head


def test_flops_are_those_of_all_layers(it, tiny_bundle):
    found = it.paper_flops.count(tiny_bundle / "model.onnx")
    assert found.per_pair == TINY.num_hidden_layers * TINY.attention_flops_per_pair


def test_a_product_of_another_kind_is_not_passed_over(it, tiny_bundle, tmp_path):
    model = onnx.load(tiny_bundle / "model.onnx", load_external_data=False)
    first = next(node for node in model.graph.node if node.op_type == "MatMul")
    first.op_type = "Einsum"
    first.attribute.append(onnx.helper.make_attribute("equation", "btk,kn->btn"))
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    with pytest.raises(BundleError, match="has a node Einsum"):
        it.paper_flops.count(path)


# --- bundles ---------------------------------------------------------------------------------------------------------


def test_bundles_are_made_once_and_their_checkpoint_goes(it, tmp_path):
    config = TINY.replace(num_hidden_layers=1)
    made = it.random_bundles.make_bundles(tmp_path, "some", None, ["bf16"], config=config)
    assert made == {"bf16": tmp_path / "some-1-bf16"}
    assert [path.name for path in tmp_path.iterdir()] == ["some-1-bf16"]
    before = (made["bf16"] / "gta_edge.json").stat().st_mtime_ns
    assert it.random_bundles.make_bundles(tmp_path, "some", None, ["bf16"], config=config) == made
    assert (made["bf16"] / "gta_edge.json").stat().st_mtime_ns == before


# --- results by hand -------------------------------------------------------------------------------------------------

GTA_MS = {64: (100.0, 10.0), 4096: (1000.0, 10.0)}


def report(factors: dict[str, dict[int, list[float]]], device: str = "cpu", **changes: Any) -> dict[str, Any]:
    """A report in which each baseline takes so many times as long as GTA, round by round."""
    results, backends = [], []
    for name, config in MODELS["tiny"].items():
        bundle = f"/somewhere/{name}-2-int4"
        common = {"bundle": bundle, "backend": "onnxruntime", "precision": "int4"}
        per_token = config.cache_bytes_per_token(4)
        backends.append(
            common
            | {"device": device, "weight_bytes_per_step": 1000, "cache_bytes_per_token": per_token}
            | {"python": "3.11.7", "versions": {"onnxruntime": "1.31.1"}}
        )
        for context, (ttft, tpot) in GTA_MS.items():
            count = max((len(found[context]) for found in factors.values() if context in found), default=1)
            rounds = factors.get(name, {}).get(context, [1.0] * count)
            first, steps = [ttft * f for f in rounds], [tpot * f for f in rounds]
            spread = None if len(rounds) == 1 else 0.1
            row = common | {
                "context": context,
                "batch": 1,
                "new_tokens": 32,
                "ttft_ms": sorted(first)[len(first) // 2],
                "tpot_ms": {"p50": sorted(steps)[len(steps) // 2]},
                "per_round": {"ttft_ms": first, "tpot_ms": steps},
                "spread": {"ttft": spread, "tpot": spread},
                "rounds": len(rounds),
                "cache_bytes_per_step": context * per_token,
                "peak_memory_bytes": 2 * 10**9,
                "others_busy_cores": 0.1,
                "agrees": True if context <= 2048 else None,
                "notes": {},
            }
            results.append(row)
    machine = {
        "cpu": "a processor",
        "architecture": "x86_64",
        "usable_cores": 2,
        "memory_bytes": 2**34,
        "board": None,
        "gpus": [{"name": "a GPU"}] if device == "gpu" else [],
        "warnings": [],
        "bandwidth_bytes_per_s": {device: [3e10]},
    }
    found = {"date": "2026-01-02T03:04:05+00:00", "machine": machine, "backends": backends, "absent": []}
    return found | {"results": results} | changes


def render(it: SimpleNamespace, directory: Path, *reports: dict[str, Any], flops: Any = None) -> str:
    directory.mkdir(exist_ok=True)
    for number, each in enumerate(reports):
        (directory / f"{number}.json").write_text(json.dumps(each), encoding="utf-8")
    page: str = it.paper_page.render(it.paper_results.read_runs(directory, MODELS), flops or {}, MODELS, "paper")
    return page


def verdicts(page: str) -> dict[str, str]:
    """What is found of each claim, without of which models."""
    table = page.split("\n| claimed | where | found |\n")[1].partition("\n\n")[0]
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
    return {cells[0]: cells[2].partition(" (")[0] for cells in lines}


E2E, PREFILL = "twice as fast end to end", "prompts are read faster than with GQA"
PAIR = "`gta-tiny` beside `gqa-tiny` in int4, onnxruntime on the CPU"


@pytest.mark.parametrize(
    ("short", "long", "twice", "faster"),
    [
        ([2.1, 2.2, 2.3], [2.5], "yes", "yes"),
        ([1.1, 1.2, 1.3], [2.5], "no up to 64; yes from 4,096", "yes"),
        ([2.1, 2.2, 2.3], [1.5], "yes up to 64; no from 4,096", "yes"),
        ([0.8, 0.9, 0.95], [0.7], "no", "no"),
        ([0.8, 0.9, 0.95], [1.5], "no", "no up to 64; yes from 4,096"),
        ([0.9, 1.1, 1.2], [1.5], "no", "too close to tell up to 64; yes from 4,096"),
        ([1.01, 1.02, 1.02], [1.5], "no", "too close to tell up to 64; yes from 4,096"),  # too near to tell
        (
            [0.9, 2.1, 2.2],
            [0.5],
            "too close to tell up to 64; no from 4,096",
            "too close to tell up to 64; no from 4,096",
        ),
    ],
)
def test_verdicts_follow_the_data(it, tmp_path, short, long, twice, faster):
    page = render(it, tmp_path / "results", report({"gqa-tiny": {64: short, 4096: long}}))
    found = verdicts(page)
    assert found[E2E] == twice
    assert found[PREFILL] == faster
    decode = faster  # their factors are the same here
    assert f"| {PAIR} | {twice} | {faster} | {decode} |" in page


@pytest.mark.parametrize(
    ("states", "text"),
    [
        ({}, "not measured"),
        ({1: "yes", 2: "yes"}, "yes"),
        ({1: "open"}, "too close to tell"),
        ({2: "yes", 1: "no", 3: "open"}, "no up to 1; yes at 2; too close to tell from 3"),
        ({1: "no", 2: "yes", 3: "yes", 4: "no"}, "no up to 1; yes from 2 to 3; no from 4"),
    ],
)
def test_neighbours_of_one_mind_are_named_together(it, states, text):
    assert it.paper_results.verdict(states) == text


def test_without_measurements_no_claim_on_speed_is_judged(it, tmp_path):
    page = render(it, tmp_path / "results")
    found = verdicts(page)
    assert found[E2E] == found[PREFILL] == "not measured"
    assert "Not measured: no GPU was at hand" in page


def test_the_claims_on_sizes_hold_for_the_published_models(it, tmp_path):
    page = it.paper_page.render([], {}, it.paper_results.published_models(), "paper")
    found = verdicts(page)
    assert found["up to 70% less cache than GQA"].startswith("yes: ")
    assert found["up to 62.5% fewer FLOPs in the attention than GQA"].startswith("yes: ")
    assert "| `gta-1b` | 1·64 + 1·128 | 192 | 54 | 20,736 | 30.0% | n/a |" in page
    # these tiny models' cache is half of GQA's, which is not 70% less
    assert verdicts(render(it, tmp_path / "results"))["up to 70% less cache than GQA"].startswith("no: ")


def test_ratios_are_taken_within_a_round(it, tmp_path):
    """A machine that is twice as slow in the second round changes the times of both, and no ratio."""
    slowed = report({"gta-tiny": {64: [1.0, 2.0]}, "gqa-tiny": {64: [1.5, 3.0]}})
    page = render(it, tmp_path / "results", slowed)
    by_flops = MODELS["tiny"]["gqa-tiny"].flops_per_token(0), TINY.flops_per_token(0)
    assert by_flops[0] != by_flops[1]
    row = next(line for line in page.splitlines() if line.startswith("| 64 | 1.50"))
    cells = row.strip("| ").split(" | ")
    assert [cells[1], cells[3], cells[5]] == ["1.50 (1.50..1.50)"] * 3
    weights, cache = 1000, {name: 64 * c.cache_bytes_per_token(4) for name, c in MODELS["tiny"].items()}
    assert cells[4] == f"{(weights + cache['gqa-tiny']) / (weights + cache['gta-tiny']):.2f}"


def test_end_to_end_is_the_prompt_and_128_tokens(it, tmp_path):
    document = report({})
    row = next(row for row in document["results"] if "gqa" in row["bundle"] and row["context"] == 64)
    row["per_round"] = {"ttft_ms": [100.0], "tpot_ms": [20.0]}
    page = render(it, tmp_path / "results", document)
    expected = (100 + 128 * 20) / (100 + 128 * 10)
    row = next(line for line in page.splitlines() if line.startswith("| 64 | 1.00 |"))
    assert row.strip("| ").split(" | ")[3::2] == ["2.00", f"{expected:.2f}"]


def test_the_measured_cache_is_compared_with_the_formula(it, tmp_path):
    document = report({})
    page = render(it, tmp_path / "results", document)
    assert "| `gta-tiny` | int4, onnxruntime on the CPU | 48 | 192 | 4.00 | 50.0% | 50.0% |" in page
    assert "the sessions' memory agrees" in page
    for row in document["results"]:
        if "gta" in row["bundle"]:
            row["cache_bytes_per_step"] *= 2
    page = render(it, tmp_path / "results", document)
    assert "| `gta-tiny` | int4, onnxruntime on the CPU | 48 | 384 | 8.00 | 100.0% | 50.0% |" in page
    assert "the sessions' memory does NOT agree" in " ".join(page.split())


def test_counted_flops_are_compared_with_the_formula(it, tmp_path):
    right = {"gta-tiny": {"per_pair": 2 * TINY.attention_flops_per_pair, "per_token": 5}}
    assert "a count in the exported graphs gives the same" in " ".join(render(it, tmp_path, flops=right).split())
    wrong = {"gta-tiny": {"per_pair": 3 * TINY.attention_flops_per_pair, "per_token": 5}}
    assert "a count in the exported graphs does NOT" in " ".join(render(it, tmp_path, flops=wrong).split())


def test_a_gpu_has_a_section_of_its_own(it, tmp_path):
    page = render(it, tmp_path / "results", report({}), report({}, device="gpu"))
    before, _, after = page.partition("## Measured on a GPU")
    assert "### tiny, int4, onnxruntime on the CPU" in before
    assert "### tiny, int4, onnxruntime on the GPU" in after
    assert "no GPU was at hand" not in page
    assert "a GPU" in page


def test_what_failed_is_listed_and_in_no_ratio(it, tmp_path):
    document = report({"gqa-tiny": {64: [1.5], 4096: [1.5]}})
    for row in document["results"]:
        if "gqa" in row["bundle"] and row["context"] == 4096:
            row |= dict.fromkeys(["ttft_ms", "tpot_ms", "per_round", "cache_bytes_per_step", "peak_memory_bytes"])
            row["notes"] = {"ttft_ms": "the process was ended"}
    page = render(it, tmp_path / "results", document)
    assert "gqa-tiny, tiny, int4, onnxruntime on the CPU, at 4,096: the process was ended" in " ".join(page.split())
    table = page.partition("How many times as fast `gta-tiny` is as `gqa-tiny`:")[2]
    assert "| 64 | 1.50 |" in table
    assert "| 4,096 | n/a |" in table


def test_a_fast_wrong_answer_is_listed_and_in_no_ratio(it, tmp_path):
    document = report({"gqa-tiny": {64: [1.5], 4096: [1.5]}})
    for row in document["results"]:
        if "gta" in row["bundle"] and row["context"] == 64:
            row["agrees"] = False
    page = render(it, tmp_path / "results", document)
    table = page.partition("How many times as fast `gta-tiny` is as `gqa-tiny`:")[2]
    assert "| 64 | n/a |" in table
    assert "| 4,096 | 1.50 |" in table
    assert "gta-tiny, tiny, int4, onnxruntime on the CPU, at 64: its answers are wrong" in page
    times = page.partition("ms per token |")[2].partition("\n\n")[0]
    assert "| 64 | n/a | 15.0 |" in times
    assert "| 4,096 | 10.0 | 15.0 |" in times


def test_what_did_not_run_in_turns_is_in_no_ratio(it, tmp_path):
    first, second = report({}), report({}, date="2026-01-03T00:00:00+00:00")
    second["results"] = [row for row in second["results"] if "gta" in row["bundle"]]
    page = render(it, tmp_path / "results", first, second)
    assert "| 64 | n/a |" in page.partition("How many times as fast `gta-tiny` is as `gqa-tiny`:")[2]


def test_the_later_of_two_measurements_counts(it, tmp_path):
    old = report({"gqa-tiny": {64: [1.2]}}, date="2026-01-01T00:00:00+00:00")
    new = report({"gqa-tiny": {64: [1.7]}}, date="2026-01-03T00:00:00+00:00")
    page = render(it, tmp_path / "results", new, old)
    table = page.partition("How many times as fast `gta-tiny` is as `gqa-tiny`:")[2]
    assert "| 64 | 1.70 |" in table
    assert "| 64 | 1.20 |" not in page


def test_every_table_of_the_page_is_even(it, tmp_path):
    page = render(it, tmp_path / "results", report({}), report({}, device="gpu"))
    tables = [block.splitlines() for block in page.split("\n\n") if block.startswith("|")]
    assert len(tables) > 10
    assert all(len({line.count("|") for line in lines}) == 1 for lines in tables)
    text = [line for line in page.splitlines() if not line.startswith(("|", "#", "!", "    "))]
    assert max(map(len, text)) <= 120
    assert not any(line.lstrip().startswith("+") for line in text)  # which would begin a list
    assert "\n\n\n" not in page
    assert "/somewhere" not in page


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"results": [], "backends": [3]}', "null", '"text"'])
def test_a_damaged_report_is_refused_in_one_line(it, tmp_path, content):
    path = tmp_path / "tiny-int4-onnxruntime-short.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"is no report of a benchmark .*; remove it") as found:
        it.paper_results.read_runs(tmp_path, MODELS)
    assert "\n" not in str(found.value)


def at(document: Any, place: list[Any]) -> Any:
    for key in place:
        document = document[key]
    return document


def test_a_report_without_a_part_is_refused(it, tmp_path):
    whole = report({})
    parts = [[], ["machine"], ["backends", 0], ["results", 0]]
    for place, key in [(part, key) for part in parts for key in at(whole, part)]:
        damaged = copy.deepcopy(whole)
        del at(damaged, place)[key]
        (tmp_path / "a.json").write_text(json.dumps(damaged), encoding="utf-8")
        with pytest.raises(InputError, match="is no report"):
            it.paper_results.read_runs(tmp_path, MODELS)


def test_a_report_on_other_models_is_refused(it, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(report({})), encoding="utf-8")
    with pytest.raises(InputError, match="gta-tiny, which is no model of the page"):
        it.paper_results.read_runs(tmp_path, it.paper_results.published_models())


def test_damaged_flops_are_refused(it, tmp_path):
    path = tmp_path / "flops.json"
    path.write_text('{"gta-tiny": {"per_pair": "x"}}', encoding="utf-8")
    with pytest.raises(InputError, match="is no list of FLOPs"):
        it.paper.read_flops(path)


# --- the roofline ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gta-1b", "gqa-1b"])
def test_the_roofline_with_scores_is_that_of_a_plan(it, name):
    """A plan counts another number of passes over the scores; with that number both are the same."""
    theory, config = it.paper_theory, preset(name)
    plan = theory._plan(config, 1024, 1)
    written = make_plan(
        plan.model,
        plan.device,
        cost.Execution("tensorrt", "bf16", "bf16", 1024, writes_scores=True),
        context=1024,
        prompt=1024,
    )
    found = theory.roofline(config, 1024, cost._SCORE_PASSES)
    assert found.prefill_ms == pytest.approx(1e3 * written.prefill.seconds)
    assert found.decode_ms == pytest.approx(1e3 * written.decode.seconds)
    assert theory.roofline(config, 1024, 0).prefill_ms == pytest.approx(1e3 * plan.prefill.seconds)


def test_scores_in_memory_are_what_the_simulation_gains_by(it):
    """Our roofline agrees with the authors' simulation where it writes scores, and not where it does not."""
    for row in it.paper_theory.simulated():
        for phase in ("prefill", "decode"):
            assert row["written"][phase] == pytest.approx(row["simulated"][phase], rel=0.05)
        if row["tokens"] >= 1024:
            assert row["fused"]["prefill"] < 0.7 * row["simulated"]["prefill"]


def test_a_prompts_flops(it):
    config = preset("gta-1b")
    tokens, head = 300, 2 * config.vocab_size * config.hidden_size
    pairs = sum(range(1, tokens + 1))
    attention = config.num_hidden_layers * attention_flops(config) * pairs
    expected = tokens * (config.flops_per_token(0) - head) + head + attention
    assert it.paper_theory.prompt_flops(config, tokens) == expected
    assert it.paper_theory.attention_share(config, tokens) == attention / expected


# --- the whole way ---------------------------------------------------------------------------------------------------


def test_models_go_the_whole_way_and_only_once(it, tmp_path, capsys):
    two = {"tiny": {name: MODELS["tiny"][name] for name in ("gta-tiny", "gqa-tiny")}}
    request = it.paper.Request(tmp_path, two, precisions=("bf16",), contexts=(8, 16), rounds=2, new_tokens=2)
    assert it.paper.measure(request) == 1
    results = sorted((tmp_path / "results").iterdir())
    assert [path.name for path in results] == ["tiny-bf16-onnxruntime-short.json"]
    flops = it.paper.read_flops(tmp_path / it.paper.FLOPS)
    for name, config in two["tiny"].items():
        assert flops[name]["per_pair"] == config.num_hidden_layers * config.attention_flops_per_pair
    text = it.paper_page.render(it.paper_results.read_runs(tmp_path / "results", two), flops, two, "paper")
    assert verdicts(text)[E2E].startswith(("yes", "no", "too close to tell"))
    assert re.search(r"^\| 16 \| \d+\.\d\d \(\d+\.\d\d\.\.\d+\.\d\d\) \|", text, re.MULTILINE)
    assert "a count in the exported graphs gives the same" in " ".join(text.split())
    assert str(tmp_path) not in text

    before = results[0].read_bytes()
    assert it.paper.measure(request) == 0
    assert results[0].read_bytes() == before
    (part,) = it.paper.parts(replace(request, contexts=(8, 16, 32)))
    assert it.paper.missing(tmp_path / "results", part, [*two["tiny"]]) == (32,)
    assert it.paper.missing(tmp_path / "results", part, [*MODELS["tiny"]]) == (8, 16, 32)


def test_page_and_plots_are_the_same_from_run_to_run(it, tmp_path):
    pytest.importorskip("matplotlib")
    results, page = tmp_path / "results", tmp_path / "page.md"
    expected = render(it, results, report({}), report({}, device="gpu")).replace("(paper/", "(page/")
    found = []
    for _ in range(2):
        it.paper.write_page(page, results, {}, MODELS)
        assert page.read_text(encoding="utf-8") == expected
        found.append({path.name: path.read_bytes() for path in (tmp_path / "page").iterdir()})
    assert found[0] == found[1]
    assert {f"page/{name}" for name in found[0]} == set(re.findall(r"!\[.*\]\((.*)\)", expected))
    assert all(len(content) < 60_000 and b"<svg" in content for content in found[0].values())


def test_short_and_long_contexts_are_parts_of_their_own(it, tmp_path):
    request = it.paper.Request(tmp_path, MODELS, backends=("onnxruntime", "torch"), contexts=(4096, 128, 2048))
    found = [
        (f"{p.series}-{p.name}", p.contexts, p.settings.rounds, p.settings.compare, p.settings.warm_up)
        for p in it.paper.parts(request)
    ]
    assert found == [
        ("tiny-int4-onnxruntime-short", (128, 2048), 3, True, True),
        ("tiny-int4-torch-short", (128, 2048), 3, True, True),
        ("tiny-int4-onnxruntime-4096", (4096,), 2, False, False),
        ("tiny-int4-torch-4096", (4096,), 2, False, False),
    ]


def test_a_backend_that_is_not_there_is_an_error_with_its_remedy(it, tmp_path):
    request = it.paper.Request(tmp_path, {"tiny": {"gta-tiny": TINY}}, backends=("tensorrt",), contexts=(8,))
    with pytest.raises(GtaEdgeError, match=r"^tensorrt: .*; "):
        it.paper.measure(request)
    assert not list((tmp_path / "results").iterdir())


def test_the_published_models(it):
    models = it.paper_results.published_models()
    assert sorted(name for members in models.values() for name in members) == sorted(PRESETS)
    assert it.paper_results.pairs(models["500m"]) == [
        ("gta3-500m", "gqa-500m"),
        ("gta3-500m", "mha-500m"),
        ("gta4-500m", "gqa-500m"),
        ("gta4-500m", "mha-500m"),
    ]


# --- the command -----------------------------------------------------------------------------------------------------


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "paper.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_what_cannot_be_done_is_said_in_one_line(tmp_path):
    damaged = tmp_path / "results" / "1b-int4-onnxruntime-short.json"
    damaged.parent.mkdir()
    (tmp_path / "empty").mkdir()
    page = str(tmp_path / "page.md")
    for words, message in (
        (["--work", str(tmp_path / "empty"), "--page-only", "--output", page], "has no results; run without"),
        (["--work", str(tmp_path), "--page-only", "--output", str(tmp_path / "no" / "page.md")], "does not exist"),
        (["--work", str(tmp_path), "--page-only", "--output", page], "is no report of a benchmark"),
    ):
        damaged.write_text("{", encoding="utf-8")
        done = call(*words)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert not Path(page).exists()


def test_what_draws_is_asked_for_before_the_long_run(it, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", ["paper.py", "--work", str(tmp_path / "work"), "--output", str(tmp_path / "a.md")])
    with pytest.raises(SystemExit, match=rf"^error: .*matplotlib.*{re.escape(install_command('plot'))}$"):
        it.paper.main()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "option", ["--sizes=2b", "--contexts=1,x", "--precisions=int3", "--rounds=0", "--backend=torch@python3"]
)
def test_options_that_make_no_sense_are_wrong_usage(it, option):
    with pytest.raises(SystemExit) as found:
        it.paper.parse([option])
    assert found.value.code == 2
