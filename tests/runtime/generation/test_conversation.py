"""Conversations: a turn costs its own tokens, and going on from a file is as if it had not stopped."""

from pathlib import Path

import numpy as np
import pytest

import gta_edge
from gta_edge.errors import BackendError, InputError
from gta_edge.formats.prompt_cache import read_prompt_cache
from gta_edge.model.kv_cache import bytes_per_token
from gta_edge.model.presets import gqa_like, preset
from gta_edge.runtime.cache_policies import policy
from gta_edge.runtime.generation.kept_caches import KeptCaches
from gta_edge.runtime.prompt_cache import PromptCacheDirectory
from gta_edge.serve.scheduler import RequestOptions, Scheduler

SESSIONS = [
    ("onnxruntime", None),
    ("onnxruntime", "int8"),
    ("torch", None),
    ("torch", "int8"),
    ("torch", "int4"),
    ("torch", "int4v2"),
]
PROMPT = list(range(40, 80))


def turns(conversation: gta_edge.Conversation, first: list[int]) -> list[list[int]]:
    """Three turns of a chat; the tokens after each."""
    text, after = first, []
    for i in range(3):
        generation = conversation.generate(text, max_new_tokens=7, ignore_eos=True)
        list(generation)
        text = [*text, *generation.ids, i, 5, 6]
        after.append(text)
    return after


def test_a_turn_costs_its_own_tokens(tiny_bundle: Path, monkeypatch) -> None:
    with gta_edge.load(tiny_bundle, "onnxruntime") as session:
        conversation, seen, run = gta_edge.Conversation(session), [], session._run
        monkeypatch.setattr(session, "_run", lambda ids, *others: (seen.append(ids.shape[1]), run(ids, *others))[1])
        after = turns(conversation, PROMPT)
        # the answer's last token has not been run, and the three of the user
        assert [tokens for tokens in seen if tokens > 1] == [40, 4, 4]
        assert conversation.reused_tokens == len(after[1]) - 4
        assert conversation.ids.tolist() == after[2][:-4]
        for text, longer in zip([PROMPT, *after], after, strict=False):
            generation = gta_edge.generate(session, text, max_new_tokens=7, ignore_eos=True)
            list(generation)
            assert longer[:-3] == [*text, *generation.ids]


def test_another_prompt_another_user_and_an_old_generation(tiny_bundle: Path) -> None:
    with gta_edge.load(tiny_bundle, "torch") as session:
        conversation = gta_edge.Conversation(session)
        after = turns(conversation, PROMPT)
        old = conversation.generate(after[1], max_new_tokens=7)  # back to before: only less is left
        next(old)
        assert conversation.reused_tokens == len(after[1]) - 1
        new = conversation.generate([1, 2, 3], max_new_tokens=4, ignore_eos=True)
        next(new)
        assert conversation.reused_tokens == 0
        with pytest.raises(InputError, match="another generation of the conversation began; finish one"):
            next(old)
        list(new)
        alone = gta_edge.generate(session, [1, 2, 3], max_new_tokens=4, ignore_eos=True)
        list(alone)  # which empties the conversation's cache
        assert alone.ids == new.ids
        assert not conversation.ids.size
        with pytest.raises(InputError, match="holds nothing that could be saved; generate something first"):
            conversation.save("nowhere")
        assert turns(conversation, PROMPT) == after
        with (
            gta_edge.load(tiny_bundle, "torch") as other,
            pytest.raises(InputError, match="the conversation is of another session; give the session that it was"),
        ):
            gta_edge.generate(other, PROMPT, conversation=conversation)


@pytest.mark.parametrize("speculate", ["lookup", "off"])
def test_speculation_goes_on_from_the_cache_too(tiny_bundle: Path, speculate: str) -> None:
    with gta_edge.load(tiny_bundle, "torch") as session:
        conversation, text = gta_edge.Conversation(session), [7, 8, 9] * 12
        for _ in range(3):
            generation = conversation.generate(text, max_new_tokens=9, ignore_eos=True, speculate=speculate)
            list(generation)
            alone = gta_edge.generate(session, text, max_new_tokens=9, ignore_eos=True)
            expected = list(alone) and alone.ids
            assert generation.ids == expected
            text = [*text, *generation.ids, 7, 8, 9]


@pytest.mark.parametrize(("backend", "dtype"), SESSIONS, ids=str)
def test_going_on_from_a_file_is_as_if_never_stopped(tiny_bundle: Path, tmp_path: Path, backend, dtype) -> None:
    """Bit for bit: what is saved in the end is the same."""
    file, ends = tmp_path / "cache", []
    with gta_edge.load(tiny_bundle, backend, cache_dtype=dtype) as session:
        conversation = gta_edge.Conversation(session)
        first = conversation.generate(PROMPT, max_new_tokens=7, ignore_eos=True)
        list(first)
        size = conversation.save(file)
        assert size.tokens == 46
        text = [*PROMPT, *first.ids]
        ends.append(conversation.generate([*text, 1, 2, 3], max_new_tokens=9, ignore_eos=True))
        list(ends[0])
        conversation.save(tmp_path / "end")
    with gta_edge.load(tiny_bundle, backend, cache_dtype=dtype) as session:
        conversation = gta_edge.Conversation(session)
        assert conversation.load(file) == size
        assert conversation.ids.tolist() == text[:-1]
        ends.append(conversation.generate([*text, 1, 2, 3], max_new_tokens=9, ignore_eos=True))
        list(ends[1])
        assert conversation.reused_tokens == 46
        conversation.save(tmp_path / "again")
    assert ends[0].ids == ends[1].ids
    end, again = (read_prompt_cache(tmp_path / name) for name in ("end", "again"))
    assert end.ids.tolist() == again.ids.tolist()
    assert len(end.ids) == 58
    for name, array in end.tensors.items():
        np.testing.assert_array_equal(array.view(np.uint8), again.tensors[name].view(np.uint8))


def test_files_of_something_else_are_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "cache"
    with gta_edge.load(tiny_bundle, "torch") as session:
        conversation = gta_edge.Conversation(session)
        list(conversation.generate(PROMPT, max_new_tokens=3))
        conversation.save(file)
        held = conversation.ids.tolist()
        session.bundle_hash = "other"
        with pytest.raises(InputError, match="cache: is of another bundle; give another file, or remove it"):
            conversation.load(file)
        assert conversation.ids.tolist() == held
        session.bundle_hash = None
        with pytest.raises(InputError, match="the session is of no bundle"):
            conversation.save(file)
    for backend, options, reason in [
        ("onnxruntime", {}, "is of the backend torch, and the session has onnxruntime"),
        ("torch", {"cache_dtype": "int8"}, "is of the type of the cache fp32, and the session has int8"),
    ]:
        with gta_edge.load(tiny_bundle, backend, **options) as session, pytest.raises(InputError, match=reason):
            gta_edge.Conversation(session).load(file)
    with gta_edge.load(tiny_bundle, "torch", cache=policy("window", rows=32)) as session:
        conversation = gta_edge.Conversation(session)
        list(conversation.generate(PROMPT, max_new_tokens=3))
        with pytest.raises(InputError, match="a policy manages cannot be exported"):
            conversation.save(tmp_path / "other")
        turns(conversation, PROMPT)  # and a conversation all the same
    with pytest.raises(BackendError, match="closed"):
        conversation.load(file)


def test_its_size_is_that_of_the_cache_and_beside_gqas() -> None:
    config = preset("gta-1b")
    gqa = gqa_like(config)
    assert gqa is not None
    assert gqa.replace(max_position_embeddings=config.max_position_embeddings) == preset("gqa-1b")
    assert bytes_per_token(config) / bytes_per_token(gqa) == 0.3
    assert gqa_like(gqa) is None


# --- a directory of them ---------------------------------------------------------------------------------------------


def asked(scheduler: Scheduler, ids: list[int], tokens: int = 5) -> tuple[list[int], int]:
    request = scheduler.submit(ids, RequestOptions(max_new_tokens=tokens))
    found = [token for event in request for token in event.ids]
    return found, request.cached_tokens


def test_a_scheduler_finds_its_caches_again(tiny_bundle: Path, tmp_path: Path, caplog) -> None:
    directory, other = tmp_path / "caches", [9] * 30
    with gta_edge.load(tiny_bundle, "onnxruntime") as session:
        with Scheduler(session, prompt_cache=directory) as scheduler:
            first = asked(scheduler, PROMPT)[0]
            asked(scheduler, other)
            asked(scheduler, [*PROMPT, *first, 3])  # which takes the place of the first
        files = sorted(directory.iterdir())
        assert len(files) == 2
        lengths = sorted(len(read_prompt_cache(file).ids) for file in files)
        assert lengths == [34, 50]
        for file in files:
            if len(read_prompt_cache(file).ids) == 34:
                damaged = file
        (directory / "mine.txt").write_text("kept")
        content = damaged.read_bytes()
        damaged.write_bytes(content[:-1] + b"\xff")
        (directory / "cut.safetensors").write_bytes(content[:100])
        with Scheduler(session, kept_bytes=1, prompt_cache=directory) as scheduler:
            found, cached = asked(scheduler, [*PROMPT, *first, 3, 4])
            assert cached == 46
            assert asked(scheduler, [*other, 1])[1] == 0
        generation = gta_edge.generate(session, [*PROMPT, *first, 3, 4], max_new_tokens=5, ignore_eos=True)
        assert list(generation)
        assert generation.ids == found
    assert caplog.text.count("a prompt cache is passed over") == 2
    assert (directory / "mine.txt").read_text() == "kept"
    assert (directory / "cut.safetensors").exists()


def test_only_what_was_of_use_is_written_in_between(tiny_bundle: Path, tmp_path: Path) -> None:
    with gta_edge.load(tiny_bundle, "torch") as session:
        session.forward([list(range(20))])
        saved = session.export_cache()
        kept = KeptCaches(2 * saved.nbytes, PromptCacheDirectory(session, tmp_path / "caches"))
        for i in range(4):
            kept.put(np.full(20, i), saved)
        assert not list((tmp_path / "caches").iterdir())
        assert not (tmp_path / "caches").stat().st_mode & 0o077  # what users wrote is nobody else's
        assert kept.find(np.array([2] * 9), 10) is None  # too little in common
        found = kept.find(np.array([2] * 15 + [7]), 10)
        assert found is not None
        assert found[1] == 15
        for i in range(4, 8):
            kept.put(np.full(20, i), saved)
        assert len(list((tmp_path / "caches").iterdir())) == 1
        kept.flush()
        assert len(list((tmp_path / "caches").iterdir())) == 3
        assert kept.find(np.array([2] * 20)) is not None  # from there
        KeptCaches(0, PromptCacheDirectory(session, tmp_path / "no memory")).put(np.full(20, 1), saved)
        assert len(list((tmp_path / "no memory").iterdir())) == 1


def test_a_directory_keeps_within_its_bytes(tiny_bundle: Path, tmp_path: Path) -> None:
    with gta_edge.load(tiny_bundle, "torch") as session:
        session.forward([list(range(20))])
        saved, directory = session.export_cache(), PromptCacheDirectory(session, tmp_path / "caches", 1)
        for i in range(3):
            directory.put(np.full(20, i), saved)
            assert [ids.tolist() for ids in directory.texts] == [[i] * 20]
            assert len(list((tmp_path / "caches").iterdir())) == 1
        assert directory.take(0) is not None
        (tmp_path / "caches").chmod(0o700)
        for path in (tmp_path / "caches").iterdir():
            path.unlink()
        assert directory.take(0) is None
        assert not directory.texts
