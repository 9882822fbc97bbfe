"""The page on the paper: FLOPs counted in graphs, ratios and verdicts, the roofline, and the whole way to the page."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import onnx
import pytest

from benchmarks.paper import page, results, run, theory
from benchmarks.random_bundles import make_bundles
from gta_edge.errors import BackendError, BundleError, InputError
from gta_edge.model.config import GQAConfig, GTAConfig, ModelConfig
from gta_edge.model.kv_cache import bytes_per_token, cache_bytes
from gta_edge.model.presets import PRESETS, preset
from gta_edge.plan import cost
from gta_edge.plan.roofline import make_plan
from tests.helpers.commands import ROOT, environment
from tests.helpers.tiny import TINY


def baseline(key_value_heads: int) -> GQAConfig:
    """A Llama model of the sizes of TINY."""
    entries = TINY.to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    sizes = {name: entries[name] for name in (*names, "max_position_embeddings")}
    return GQAConfig(**sizes, tie_word_embeddings=True, num_key_value_heads=key_value_heads)


MODELS = {"tiny": {"gta-tiny": TINY, "gqa-tiny": baseline(3), "mha-tiny": baseline(12)}}
TWO = {"tiny": {name: MODELS["tiny"][name] for name in ("gta-tiny", "gqa-tiny")}}


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
def test_the_graph_has_the_attention_flops_of_the_formula(tmp_path, name, precision):
    """The attention of the preset, everything else small."""
    config = preset(name).replace(num_hidden_layers=1, vocab_size=320, intermediate_size=64, max_position_embeddings=64)
    bundle = make_bundles(tmp_path, name, None, [precision], config=config)[precision]
    found = theory.count_flops(bundle / "model.onnx")
    assert found.per_pair == attention_flops(config) == config.attention_flops_per_pair
    head = 2 * config.vocab_size * config.hidden_size
    assert found.per_token == config.flops_per_token(0) - head


def test_a_matmul_of_another_kind_is_not_passed_over(tiny_bundle, tmp_path):
    model = onnx.load(tiny_bundle / "model.onnx", load_external_data=False)
    first = next(node for node in model.graph.node if node.op_type == "MatMul")
    first.op_type = "Einsum"
    first.attribute.append(onnx.helper.make_attribute("equation", "btk,kn->btn"))
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    with pytest.raises(BundleError, match="has a node Einsum"):
        theory.count_flops(path)


def test_bundles_are_made_once_and_their_checkpoint_goes(tmp_path):
    config = TINY.replace(num_hidden_layers=1)
    made = make_bundles(tmp_path, "some", None, ["bf16"], config=config)
    assert made == {"bf16": tmp_path / "some-1-bf16"}
    assert [path.name for path in tmp_path.iterdir()] == ["some-1-bf16"]
    before = (made["bf16"] / "gta_edge.json").stat().st_mtime_ns
    assert make_bundles(tmp_path, "some", None, ["bf16"], config=config) == made
    assert (made["bf16"] / "gta_edge.json").stat().st_mtime_ns == before


# --- reports by hand -------------------------------------------------------------------------------------------------

GTA_MS = {64: (100.0, 10.0), 4096: (1000.0, 10.0)}
Factors = Mapping[str, Mapping[int, list[float]]]


def report(factors: Factors, device: str = "cpu", **changes: Mapping[str, Any]) -> dict[str, Any]:
    """A report of ``bench`` in which each model takes so many times as long as GTA, round by round.

    ``changes`` go into the rows of a model at 4,096 tokens, by its name with ``_`` for ``-``.
    """
    rows, entries = [], []
    for name, config in MODELS["tiny"].items():
        common = {"bundle": f"/somewhere/{name}-2-int4", "backend": "onnxruntime", "precision": "int4"}
        per_token = bytes_per_token(config)
        sizes = {"weight_bytes_per_step": 1000, "cache_bytes_per_token": per_token}
        entries.append(common | sizes | {"device": device, "python": "3.11.7", "versions": {"onnxruntime": "1.31.1"}})
        for context, (ttft, tpot) in GTA_MS.items():
            count = max((len(found[context]) for found in factors.values() if context in found), default=1)
            rounds = factors.get(name, {}).get(context, [1.0] * count)
            first, steps = [ttft * f for f in rounds], [tpot * f for f in rounds]
            row = common | {
                "context": context,
                "new_tokens": 32,
                "ttft_ms": sorted(first)[len(first) // 2],
                "tpot_ms": {"p50": sorted(steps)[len(steps) // 2]},
                "per_round": {"ttft_ms": first, "tpot_ms": steps},
                "spread": dict.fromkeys(("ttft", "tpot"), None if len(rounds) == 1 else 0.1),
                "rounds": len(rounds),
                "peak_memory_bytes": 2 * 10**9,
                "others_busy_cores": 0.1,
                "agrees": True if context <= 2048 else None,
                "notes": {},
            }
            rows.append(row | (changes.get(name.replace("-", "_"), {}) if context == 4096 else {}))
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
    date = "2026-01-02T03:04:05+00:00"
    return {"date": date, "machine": machine, "backends": entries, "absent": [], "results": rows}


def measured(factors: Factors, device: str = "cpu", **changes: Mapping[str, Any]) -> results.Run:
    """The run that is kept of such a report."""
    document = report(factors, device, **changes)
    layers = TINY.num_hidden_layers
    facts = {
        name: results.Facts(1000, bytes_per_token(config), layers * config.attention_flops_per_pair, 5)
        for name, config in MODELS["tiny"].items()
    }
    parts = [run.part(document, MODELS["tiny"], "a command")]
    return results.Run("tiny", "int4", "onnxruntime", device, None, facts, parts)


def render(*runs: results.Run) -> str:
    return page.render(runs, MODELS, "paper")


def verdicts(text: str) -> dict[str, str]:
    """What is found of each claim, without of which models."""
    table = text.split("\n| claimed | where | found |\n")[1].partition("\n\n")[0]
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
    return {cells[0]: cells[2].partition(" (")[0] for cells in lines}


def ratios(text: str, base: str = "gqa-tiny") -> dict[str, list[str]]:
    """The table of ratios beside a baseline, by context."""
    table = text.partition(f"How many times as fast `gta-tiny` is as `{base}`:\n\n")[2].partition("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    return {row[0]: row[1:] for row in rows}


E2E, PREFILL = "twice as fast end to end", "prompts are read faster than with GQA"
PAIR = "`gta-tiny` beside `gqa-tiny` in int4, onnxruntime on the CPU"


@pytest.mark.parametrize(
    ("short", "long", "twice", "faster"),
    [
        ([2.1, 2.2, 2.3], [2.5], "yes", "yes"),
        ([1.1, 1.2, 1.3], [2.5], "no up to 64; yes from 4,096", "yes"),
        ([2.1, 2.2, 2.3], [1.5], "yes up to 64; no from 4,096", "yes"),
        ([0.8, 0.9, 0.95], [0.7], "no", "no"),
        ([0.9, 1.1, 1.2], [1.5], "no", "too close to tell up to 64; yes from 4,096"),
        ([1.01, 1.02, 1.02], [1.5], "no", "too close to tell up to 64; yes from 4,096"),  # too near to tell
        ([0.9, 2.1, 2.2], [0.5], *["too close to tell up to 64; no from 4,096"] * 2),
    ],
)
def test_verdicts_follow_the_data(short, long, twice, faster):
    text = render(measured({"gqa-tiny": {64: short, 4096: long}}))
    found = verdicts(text)
    assert found[E2E] == twice
    assert found[PREFILL] == faster
    decode = faster  # their factors are the same here
    assert f"| {PAIR} | {twice} | {faster} | {decode} |" in text


@pytest.mark.parametrize(
    ("states", "text"),
    [
        ({}, "not measured"),
        ({1: "open"}, "too close to tell"),
        ({2: "yes", 1: "no", 3: "open"}, "no up to 1; yes at 2; too close to tell from 3"),
        ({1: "no", 2: "yes", 3: "yes", 4: "no"}, "no up to 1; yes from 2 to 3; no from 4"),
    ],
)
def test_neighbours_of_one_mind_are_named_together(states, text):
    assert results.verdict(states) == text


def test_claims_on_sizes_need_no_measurements_and_those_on_speed_do():
    found = verdicts(page.render([], results.published_models(), "paper"))
    assert found["up to 70% less cache than GQA"].startswith("yes: ")
    assert found["up to 62.5% fewer FLOPs in the attention than GQA"].startswith("yes: ")
    # these tiny models' cache is half of GQA's, which is not 70% less
    text = render()
    assert verdicts(text)["up to 70% less cache than GQA"].startswith("no: ")
    assert verdicts(text)[E2E] == verdicts(text)[PREFILL] == "not measured"
    assert "Not measured: of the two models" in text


def test_ratios_are_taken_within_a_round():
    """A machine that is twice as slow in the second round changes the times of both, and no ratio."""
    text = render(measured({"gta-tiny": {64: [1.0, 2.0]}, "gqa-tiny": {64: [1.5, 3.0]}}))
    row = ratios(text)["64"]
    assert row[0] == row[2] == row[4] == "1.50 (1.50..1.50)"
    cache = {name: cache_bytes(config, "fp32", 64) for name, config in MODELS["tiny"].items()}
    assert row[3] == f"{(1000 + cache['gqa-tiny']) / (1000 + cache['gta-tiny']):.2f}"


def test_end_to_end_is_the_prompt_and_128_tokens():
    rounds = {"per_round": {"ttft_ms": [1000.0], "tpot_ms": [20.0]}}
    expected = (1000 + 128 * 20) / (1000 + 128 * 10)
    assert ratios(render(measured({}, gqa_tiny=rounds)))["4,096"][::2] == ["1.00", "2.00", f"{expected:.2f}"]


def test_the_measured_cache_and_flops_are_compared_with_the_formulas():
    good = measured({})
    text = " ".join(render(good).split())
    assert "| `gta-tiny` | int4, onnxruntime on the CPU | 48 | 192 | 4.00 | 50.0% | 50.0% |" in text
    assert "the sessions' memory agrees" in text
    assert "a count in the exported graphs gives the same" in text
    facts = good.facts["gta-tiny"]
    wrong = replace(facts, cache_bytes_per_token=384, flops_per_pair=facts.flops_per_pair + 1)
    text = " ".join(render(replace(good, facts=good.facts | {"gta-tiny": wrong})).split())
    assert "| `gta-tiny` | int4, onnxruntime on the CPU | 48 | 384 | 8.00 | 100.0% | 50.0% |" in text
    assert "the sessions' memory does NOT agree" in text
    assert "a count in the exported graphs does NOT" in text


FAILED = dict.fromkeys(["ttft_ms", "tpot_ms", "per_round", "peak_memory_bytes"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (FAILED | {"notes": {"ttft_ms": "the process was ended"}}, "the process was ended"),
        ({"agrees": False}, "its answers are wrong, so its times count in no ratio"),
    ],
)
def test_what_failed_or_is_wrong_is_listed_and_in_no_ratio(changes, reason):
    text = render(measured({"gqa-tiny": {64: [1.5], 4096: [1.5]}}, gqa_tiny=changes))
    assert f"gqa-tiny, tiny, int4, onnxruntime on the CPU, at 4,096: {reason}" in " ".join(text.split())
    assert ratios(text)["64"][0] == "1.50"
    assert ratios(text)["4,096"][::2] == ["n/a"] * 3
    times = text.partition("ms per token |")[2].partition("\n\n")[0]
    assert "| 4,096 | 10.0 | n/a |" in times


def test_a_gpu_has_a_section_of_its_own_and_every_table_is_even():
    text = render(measured({}), measured({}, device="gpu"))
    before, _, after = text.partition("## Measured on a GPU")
    assert "### tiny, int4, onnxruntime on the CPU" in before
    assert "### tiny, int4, onnxruntime on the GPU" in after
    assert "Not measured: of the two" not in text
    assert "a processor, 16 GiB, a GPU" in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) > 10
    assert all(len({line.count("|") for line in lines}) == 1 for lines in tables)
    prose = [line for line in text.splitlines() if not line.startswith(("|", "#", "!", "    "))]
    assert max(map(len, prose)) <= 120
    assert not any(line.lstrip().startswith("+") for line in prose)  # which would begin a list
    assert "\n\n\n" not in text


# --- files -----------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path):
    good = measured({"gqa-tiny": {64: [1.5, 1.6, 1.7]}}, mha_tiny={"agrees": False})
    results.write_run(tmp_path / good.file, good)
    assert render(*results.read_runs(tmp_path, MODELS)) == render(good)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", '"text"'])
def test_a_damaged_file_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "tiny-int4-onnxruntime.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"is no file of results .*; remove it") as found:
        results.read_runs(tmp_path, MODELS)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "place",
    [
        ("device",),
        ("facts", "gta-tiny", "flops_per_pair"),
        ("parts", 0, "date"),
        ("parts", 0, "extents", "rounds"),
        ("parts", 0, "pairs", 0, "decode"),
        ("parts", 0, "times", 0, "context"),
    ],
)
def test_a_file_without_a_part_is_refused(tmp_path, place):
    path = tmp_path / measured({}).file
    results.write_run(path, measured({}))
    document = within = json.loads(path.read_text())
    for key in place[:-1]:
        within = within[key]
    del within[place[-1]]
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match="is no file of results"):
        results.read_runs(tmp_path, MODELS)


def test_a_file_on_other_models_is_refused(tmp_path):
    results.write_run(tmp_path / measured({}).file, measured({}))
    with pytest.raises(InputError, match="-tiny, which is no model of the page"):
        results.read_runs(tmp_path, results.published_models())


# --- the roofline ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gta-1b", "gqa-1b"])
def test_the_roofline_with_scores_is_that_of_a_plan(name):
    """A plan counts another number of passes over the scores; with that number both are the same."""
    config = preset(name)
    plan = theory._plan(config, 1024, 1)
    execution = cost.Execution("bf16", "bf16", 1024, writes_scores=True)
    written = make_plan(plan.model, plan.device, execution, context=1024, prompt=1024)
    found = theory.roofline(config, 1024, cost._SCORE_PASSES)
    assert found.prefill_ms == pytest.approx(1e3 * written.prefill.seconds)
    assert found.decode_ms == pytest.approx(1e3 * written.decode.seconds)
    assert theory.roofline(config, 1024, 0).prefill_ms == pytest.approx(1e3 * plan.prefill.seconds)


def test_scores_in_memory_are_what_the_simulation_gains_by():
    """Our roofline agrees with the authors' simulation where it writes scores, and not where it does not."""
    for row in theory.simulated():
        for phase in ("prefill", "decode"):
            assert row["written"][phase] == pytest.approx(row["simulated"][phase], rel=0.05)
        if row["tokens"] >= 1024:
            assert row["fused"]["prefill"] < 0.7 * row["simulated"]["prefill"]


def test_a_prompts_flops():
    config = preset("gta-1b")
    tokens, head = 300, 2 * config.vocab_size * config.hidden_size
    pairs = sum(range(1, tokens + 1))
    attention = config.num_hidden_layers * attention_flops(config) * pairs
    expected = tokens * (config.flops_per_token(0) - head) + head + attention
    assert theory.prompt_flops(config, tokens) == expected
    assert theory.attention_share(config, tokens) == attention / expected


# --- the whole way ---------------------------------------------------------------------------------------------------


def test_models_go_the_whole_way_and_only_once(tmp_path, capsys):
    series, place = run.Series("tiny", TWO["tiny"], "bf16"), tmp_path / "results"
    assert run.measure(series, (8, 16), 2, place, tmp_path / "work") == 1
    (path,) = place.iterdir()
    assert path.name == "tiny-bf16-onnxruntime.json"
    (found,) = results.read_runs(place, TWO)
    for name, config in TWO["tiny"].items():
        assert found.facts[name].flops_per_pair == config.num_hidden_layers * config.attention_flops_per_pair
    text = page.render([found], TWO, "paper")
    assert verdicts(text)[E2E].startswith(("yes", "no", "too close to tell"))
    assert re.match(r"\d+\.\d\d \(\d+\.\d\d\.\.\d+\.\d\d\)$", ratios(text)["16"][0])
    assert "a count in the exported graphs gives the same" in " ".join(text.split())
    assert str(tmp_path) not in text

    before = path.read_bytes()
    assert run.measure(series, (8, 16), 2, place, tmp_path / "work") == 0
    assert path.read_bytes() == before
    on_gpu = replace(found, device="gpu")
    results.write_run(path, on_gpu)
    with pytest.raises(InputError, match="has figures of the GPU, and these are of the CPU"):
        run.measure(series, (32,), 1, place, tmp_path / "work")
    assert results.read_run(path) == on_gpu


def test_long_contexts_are_calls_of_their_own():
    found = [
        (each.contexts, each.rounds, each.compare, each.warm_up) for each in run.calls([64], (4096, 128, 64), None)
    ]
    assert found == [((128,), 3, True, True), ((4096,), 2, False, False)]
    assert [each.rounds for each in run.calls([], (128, 4096), 1)] == [1, 1]


def test_a_backend_that_is_not_there_is_an_error_with_its_remedy(tmp_path):
    series = run.Series("tiny", {"gta-tiny": TINY}, backend="tensorrt")
    with pytest.raises(BackendError, match=r"^tensorrt: .*") as found:
        run.measure(series, (8,), 1, tmp_path / "results", tmp_path / "work")
    assert found.value.remedy
    assert not list((tmp_path / "results").iterdir())


def test_the_published_models():
    models = results.published_models()
    assert sorted(name for members in models.values() for name in members) == sorted(PRESETS)
    pairs = [(gta, base) for gta in ("gta3-500m", "gta4-500m") for base in ("gqa-500m", "mha-500m")]
    assert results.pairs(models["500m"]) == pairs


def test_the_page_in_the_documentation_is_that_of_the_results():
    models = results.published_models()
    assert page.PAGE.read_text() == page.render(results.read_runs(results.RESULTS, models), models, "paper")


def test_page_and_plots_are_the_same_from_run_to_run(tmp_path):
    pytest.importorskip("matplotlib")
    runs = [measured({}), replace(measured({}, device="gpu"), backend="torch")]
    for each in runs:
        results.write_run(tmp_path / each.file, each)
    output, expected = tmp_path / "page.md", page.render(runs, MODELS, "page")
    found = []
    for _ in range(2):
        page.write_page(output, tmp_path, MODELS)
        assert output.read_text(encoding="utf-8") == expected
        found.append({path.name: path.read_bytes() for path in (tmp_path / "page").iterdir()})
    assert found[0] == found[1]
    assert {f"page/{name}" for name in found[0]} == set(re.findall(r"!\[.*\]\((.*)\)", expected))
    assert all(len(content) < 60_000 and b"<svg" in content for content in found[0].values())


# --- the commands ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("directory", "output", "message"),
    [
        ("empty", "page.md", "has no results; run"),
        (".", "no/page.md", "does not exist"),
        (".", "page.md", "is no file"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(tmp_path, directory, output, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "1b-int4-onnxruntime.json").write_text("{", encoding="utf-8")
    words = ["--results", tmp_path / directory, "--output", tmp_path / output]
    command = [sys.executable, "-m", "benchmarks.paper.page", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / output).exists()
