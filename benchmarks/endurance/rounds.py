"""Thousands of rounds of chat in one process: answers come, and its memory stays as it is."""

import gc
import random
import warnings
from typing import Any

from transformers import AutoTokenizer

from benchmarks.endurance.campaign import Campaign, Case, Finding
from benchmarks.endurance.folders import make_model
from benchmarks.endurance.strings import draw_text
from benchmarks.results import ROOT
from chatglm.process_memory import read_status

WARM_ROUNDS = 300  # until allocators have what they need
KEPT_ROUNDS = 3
LIMIT = 24 << 20  # bytes that a process may grow by afterwards


class Talk:
    """A conversation that forgets, and the memory it takes."""

    def __init__(self) -> None:
        self.model = make_model()
        self.model.generation_config.max_length = None
        self.tokenizer = AutoTokenizer.from_pretrained(ROOT)
        self.history: list[Any] = []
        self.rounds, self.base = 0, 0

    def take(self, rng: random.Random) -> str:
        """Ask one more question, of any text, as a stream every other time."""
        options = {"history": self.history, "max_new_tokens": 6, "do_sample": rng.random() < 0.5}
        query = draw_text(rng).strip() or "?"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if rng.random() < 0.5:
                answer, history = self.model.chat(self.tokenizer, query, **options)
            else:
                *_, (answer, history) = self.model.stream_chat(self.tokenizer, query, **options)
        if history[-1] != (query, answer):
            raise Finding(f"{query!r}: the history ends with {history[-1]!r}")
        self.history = history[-KEPT_ROUNDS:]
        self.rounds += 1
        return self._look_at_memory()

    def _look_at_memory(self) -> str:
        if self.rounds % 100 == 0:
            gc.collect()
            resident = read_status("VmRSS")
            if self.rounds <= WARM_ROUNDS:
                self.base = resident
            elif resident > self.base + LIMIT:
                grown = (resident - self.base) >> 20
                self.base = resident
                raise Finding(f"{grown} MB more after {self.rounds} rounds")
        return "right"


def prepare() -> Case:
    """Begin a conversation."""
    return Talk().take


CAMPAIGN = Campaign("rounds", "Rounds of chat with flat memory", "rounds", 10_000, 1, prepare)
