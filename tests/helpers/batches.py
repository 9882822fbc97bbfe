"""Texts of a batch, what was heard of them, and a session that they are generated with."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from gta_edge.model.decoder import Decoder
from gta_edge.runtime.generation.batch import Batch
from gta_edge.runtime.generation.request import Event, RequestOptions
from gta_edge.runtime.generation.text import Text
from gta_edge.runtime.session import Session
from gta_edge.runtime.step_costs import StepCosts
from gta_edge.runtime.torch.session import TorchSession
from tests.helpers.generation import CONFIG, byte_level, save


class Cheap(StepCosts):
    """Of a machine on which a token more costs next to nothing."""

    known = True

    def seconds(self, width: int, tree: bool = False) -> float:
        return 1 + 0.01 * width


class Heard:
    """A text of a batch, and what was heard of it."""

    def __init__(self, session: Session, ids: list[int], **options: Any) -> None:
        self.events: list[Event] = []
        given = RequestOptions(**options)
        self.text = Text.asked_for(session, np.array(ids, np.int64), given, self.events.append)

    @property
    def said(self) -> tuple[list[int], str, str | None]:
        ids = [token for event in self.events for token in event.ids]
        assert ids == self.text.answer.ids
        assert [event.finish_reason for event in self.events[:-1]] == [None] * (len(self.events) - 1)
        return ids, "".join(event.text for event in self.events), self.events[-1].finish_reason


def run(batch: Batch, steps: int = 500) -> None:
    for _ in range(steps):
        if not batch.step():
            return
    raise AssertionError("the batch does not end")


def new_talker(directory: Path) -> TorchSession:
    """A random model with a tokenizer, whose files go into a directory."""
    torch.manual_seed(0)
    session = TorchSession(Decoder(CONFIG.replace(tie_word_embeddings=False)).eval(), capacity_step=16)
    session.tokenizer, session.end_token_ids = save(directory, byte_level()), frozenset()
    return session
