"""What generate prints when all is well."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.commands import Result, run

TIMINGS = {"ttft_ms", "tpot_ms", "prompt_tokens_per_s", "decode_tokens_per_s", "total_ms"}
TIMINGS |= {"drafted", "accepted", "tokens_per_step"}
GENERATE = {"text", "ids", "finish_reason", "prompt_tokens", "timings", "seed", "backend"}

Command = Callable[..., Result]


# --- generate ------------------------------------------------------------------------------------------------------


def generate(command: Command, bundle: Path, *options: object) -> dict[str, Any]:
    return command("generate", bundle, "--max-new-tokens", 20, "--ignore-eos", "--json", *options).content


def test_generate_in_a_process_of_its_own(command: Command, tiny_bundle: Path) -> None:
    options = ("generate", tiny_bundle, "--prompt", "Grüße", "--max-new-tokens", 9, "--ignore-eos")
    document = run(*options, "--json").content
    assert document.keys() == GENERATE
    assert document["timings"].keys() == TIMINGS
    assert (document["finish_reason"], document["prompt_tokens"]) == ("length", len("Grüße".encode()))
    assert len(document["ids"]) == 9
    assert document["timings"]["ttft_ms"] > 0
    assert document["timings"]["tpot_ms"] > 0
    streamed = run(*options)
    assert (streamed.status, streamed.out) == (0, document["text"] + "\n")
    assert re.fullmatch(r"\[onnxruntime\] 7 prompt tokens, .* 9 tokens .*; ended by length\n", streamed.err)
    quiet = command(*options, "--quiet")
    assert (quiet.status, quiet.out, quiet.err) == (0, streamed.out, "")


def test_prompts_of_every_kind(command: Command, tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text("Hello")
    documents = [
        generate(command, tiny_bundle, "--prompt", "Hello"),
        generate(command, tiny_bundle, "--prompt-file", tmp_path / "prompt"),
        generate(command, tiny_bundle, "--ids", ",".join(map(str, b"Hello"))),
        generate(command, tiny_bundle, "--prompt", "Hello", "--backend", "torch", "--threads", 1),
        generate(command, tiny_bundle, "--prompt", "Hello", "--temperature", 0, "--seed", 5),
        generate(command, tiny_bundle, "--prompt", "Hello", "--temperature", 3, "--top-k", 1),
    ]
    assert [document["ids"] for document in documents[1:]] == [documents[0]["ids"]] * 5  # all of them are greedy
    assert [document["backend"] for document in documents] == ["onnxruntime"] * 3 + ["torch"] + ["onnxruntime"] * 2


def test_a_prompt_may_be_piped(command: Command, tiny_bundle: Path) -> None:
    expected = generate(command, tiny_bundle, "--prompt", "Hello")["ids"]
    options = ("generate", tiny_bundle, "--max-new-tokens", 20, "--ignore-eos", "--json")
    for more in ((), ("--prompt-file", "-")):
        assert run(*options, *more, input="Hello").content["ids"] == expected
    assert "or pipe a text in" in run(*options, input="").usage
    assert "or pipe a text in" in run(*options, "--prompt", "a", "--ids", "1", input="Hello").usage


def test_top_k_of_0_is_off(command: Command, tiny_bundle: Path) -> None:
    hot = ("--prompt", "Hello", "--temperature", 2, "--seed", 1)
    assert generate(command, tiny_bundle, *hot, "--top-k", 0)["ids"] == generate(command, tiny_bundle, *hot)["ids"]


def test_a_seed_gives_the_same_text_again(command: Command, tiny_bundle: Path) -> None:
    hot = ("--prompt", "Hello", "--temperature", 2)
    first = generate(command, tiny_bundle, *hot, "--seed", 1)
    assert first["seed"] == 1
    assert generate(command, tiny_bundle, *hot, "--seed", 1)["ids"] == first["ids"]
    assert generate(command, tiny_bundle, *hot, "--seed", 2)["ids"] != first["ids"]
    unseeded = generate(command, tiny_bundle, *hot)
    assert generate(command, tiny_bundle, *hot, "--seed", unseeded["seed"])["ids"] == unseeded["ids"]


@pytest.mark.parametrize(
    "option", [("--top-k", 1), ("--top-p", 1e-9), ("--min-p", 1), ("--temperature", 0), ("--temperature", 1e-6)]
)
def test_options_that_leave_no_choice(command: Command, tiny_bundle: Path, option: tuple[str, float]) -> None:
    greedy = generate(command, tiny_bundle, "--ids", "1,2,3")
    assert generate(command, tiny_bundle, "--ids", "1,2,3", *option)["ids"] == greedy["ids"]


def test_a_repetition_penalty_forbids_repetition(command: Command, tiny_bundle: Path) -> None:
    ids = generate(command, tiny_bundle, "--ids", "1,2,3", "--repetition-penalty", 1e6)["ids"]
    assert len({*ids, 1, 2, 3}) == 23


def test_speculation(command: Command, tiny_bundle: Path) -> None:
    plain = generate(command, tiny_bundle, "--ids", "1,2,3,1,2,3,1,2")
    assert {plain["timings"][key] for key in ("drafted", "accepted", "tokens_per_step")} == {None}
    for options in (
        ["--speculate", "lookup"],
        ["--draft", tiny_bundle],
        ["--speculate", "draft", "--draft", tiny_bundle],
    ):
        document = generate(command, tiny_bundle, "--ids", "1,2,3,1,2,3,1,2", *options)
        assert document["ids"] == plain["ids"]
        assert document["timings"]["tokens_per_step"] >= 1
    shown = command("generate", tiny_bundle, "--ids", "1,2,3", "--speculate", "lookup")
    assert re.search(r" tokens at .*/s \(\d\.\d a step\); ended by", shown.err)
    for options, message in (
        (["--speculate", "draft"], "--speculate draft needs a model: give --draft BUNDLE"),
        (["--speculate", "lookup", "--draft", tiny_bundle], "--draft is for --speculate draft"),
        (["--speculate", "guess"], "guess"),
    ):
        assert message in command("generate", tiny_bundle, "--ids", "1", *options).usage


def test_several_answers(command: Command, tiny_bundle: Path) -> None:
    hot = ("--ids", "1,2,3", "--temperature", 2)
    document = generate(command, tiny_bundle, *hot, "--seed", 7, "--n", 3)
    assert document.keys() == {"answers", "prompt_tokens", "backend", "timings"}
    assert [each["seed"] for each in document["answers"]] == [7, 8, 9]
    alone = generate(command, tiny_bundle, *hot, "--seed", 8)
    assert document["answers"][1] == {key: alone[key] for key in ("text", "ids", "finish_reason", "seed")} | {
        "score": None
    }
    options = ("generate", tiny_bundle, *hot, "--seed", 7, "--max-new-tokens", 20, "--ignore-eos")
    shown = command(*options, "--n", 3)
    texts = [each["text"] for each in document["answers"]]
    assert shown.out == "".join(
        f"--- {i} of 3, seed {6 + i}, ended by length\n{text}\n" for i, text in enumerate(texts, 1)
    )
    # a cache that drops rows has no branches
    dropped = generate(
        command, tiny_bundle, *hot, "--seed", 7, "--n", 2, "--cache-policy", "window", "--cache-rows", 64
    )
    assert [each["ids"] for each in dropped["answers"]] == [each["ids"] for each in document["answers"][:2]]
    guessed = generate(command, tiny_bundle, *hot, "--seed", 7, "--n", 2, "--speculate", "lookup")
    assert [each["ids"] for each in guessed["answers"]] == [each["ids"] for each in document["answers"][:2]]
    assert guessed["timings"]["drafted"] >= guessed["timings"]["accepted"] >= 0
    assert "greedy" not in shown.err
    same = command("generate", tiny_bundle, "--ids", "1,2,3", "--max-new-tokens", 2, "--n", 2)
    assert "note: greedy answers are all the same; --temperature draws others\n" in same.err
    usage = command("generate", tiny_bundle, "--ids", "1", "--n", 2, "--draft", tiny_bundle).usage
    assert "for one answer: leave out --n and --beams" in usage
    for told, *beside in (
        ("--beams guesses nothing", "--speculate", "lookup"),
        ("leave out --cache-policy", "--cache-policy", "window", "--cache-rows", 64),
        ("take another --cache-dtype", "--cache-dtype", "int4", "--backend", "torch"),
    ):
        assert told in command("generate", tiny_bundle, "--ids", 1, "--beams", 2, *beside).usage


def test_beam_search(command: Command, tiny_bundle: Path) -> None:
    document = generate(command, tiny_bundle, "--ids", "1,2,3", "--beams", 4, "--n", 2)
    scores = [each["score"] for each in document["answers"]]
    assert len(scores) == 2
    assert scores == sorted(scores, reverse=True)
    best = command("generate", tiny_bundle, "--ids", "1,2,3", "--max-new-tokens", 20, "--ignore-eos", "--beams", 4)
    assert best.out == document["answers"][0]["text"] + "\n"
    short = generate(command, tiny_bundle, "--ids", "1,2,3", "--beams", 4, "--length-penalty", 0)
    assert short["answers"][0]["score"] < scores[0]


def test_stop_strings(command: Command, tiny_bundle: Path) -> None:
    options = ("--prompt", "Hello", "--temperature", 2, "--seed", 4)
    whole = generate(command, tiny_bundle, *options)["text"]
    stop = next(part for i in range(5, len(whole)) if (part := whole[i : i + 2]).isprintable() and "\ufffd" not in part)
    document = generate(command, tiny_bundle, *options, "--stop", "not in the text", "--stop", stop)
    assert document["finish_reason"] == "stop"
    assert document["text"] == whole[: whole.index(stop)]
    result = command("generate", tiny_bundle, *options, "--max-new-tokens", 20, "--ignore-eos", "--stop", stop)
    assert result.out == document["text"] + "\n"  # no part of it was shown before it was complete


def test_generation_ends_with_the_positions(command: Command, tiny_bundle: Path) -> None:
    full = generate(command, tiny_bundle, "--ids", ",".join(["1"] * 128))
    assert (full["finish_reason"], len(full["ids"]), full["prompt_tokens"]) == ("context", 1, 128)
    assert len(generate(command, tiny_bundle, "--ids", ",".join(["1"] * 120))["ids"]) == 9


def test_an_end_token_ends_the_text(command: Command, copied_checkpoint: Path, tiny_bundle: Path) -> None:
    ids = generate(command, tiny_bundle, "--ids", "1,2,3")["ids"]
    entries = json.loads((copied_checkpoint / "config.json").read_text())
    (copied_checkpoint / "config.json").write_text(json.dumps(entries | {"eos_token_id": ids[0]}))
    bundle = copied_checkpoint.with_name("other")
    assert command("export", copied_checkpoint, bundle, "--no-verify").status == 0
    document = command("generate", bundle, "--ids", "1,2,3", "--json").content
    assert (document["finish_reason"], document["ids"], document["text"]) == ("stop", [], "")


def test_a_model_without_a_tokenizer(command: Command, copied_checkpoint: Path, tiny_bundle: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copied_checkpoint / name).unlink()
    bundle = copied_checkpoint.with_name("other")
    assert command("export", copied_checkpoint, bundle, "--no-verify").status == 0
    document = generate(command, bundle, "--ids", "1,2,3")
    assert document["text"] is None
    assert document["ids"] == generate(command, tiny_bundle, "--ids", "1,2,3")["ids"]
    result = command("generate", bundle, "--ids", "1,2,3", "--max-new-tokens", 20, "--ignore-eos")
    assert result.out == ",".join(map(str, document["ids"])) + "\n"
    (bundle.parent / "text").write_text("text")
    for options in (
        ("generate", bundle, "--prompt", "text"),
        ("generate", bundle, "--ids", "1", "--stop", "text"),
        ("eval", bundle, "--text", bundle.parent / "text"),
    ):
        assert "tokenizer" in command(*options).error
