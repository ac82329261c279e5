"""A model that says given ids, so that every rule about the text of an answer can be tried quickly.

Only the choice of tokens is left out: stopping criteria are asked as `generate` asks them.
"""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from chatglm_6b.conversation_chatglm import ChatMixin
from chatglm_6b.tokenization_chatglm import ChatGLMTokenizer
from conftest import PRESETS, ROOT

GENERATIONS = ("chatglm-6b", "chatglm-6b-v0")


@functools.cache
def load_tokenizer(generation: str) -> ChatGLMTokenizer:
    """The embedded vocabulary with the settings of an official one: v1.1 cleans spaces up."""
    return make_tokenizer(PRESETS / generation)


@functools.cache
def embedded_tokenizer() -> ChatGLMTokenizer:
    """The tokenizer of the repository's own model."""
    return make_tokenizer(ROOT)


def make_tokenizer(folder: Path) -> ChatGLMTokenizer:
    fields = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    fields = {k: v for k, v in fields.items() if k not in ("auto_map", "tokenizer_class")}
    return ChatGLMTokenizer(str(ROOT / "ice_text.model"), **fields)


@functools.cache
def embedded_model() -> Any:
    """The repository's own model, read once and in float32. Not to be changed."""
    from chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration

    return ChatGLMForConditionalGeneration.from_pretrained(ROOT, dtype=torch.float32).eval()


class ScriptedModel(ChatMixin):
    """Says `ids`, `step` of them at once as drafts do; `said` counts those of the last answer."""

    device = "cpu"
    dtype = torch.float32

    def __init__(self, tokenizer: Any, ids: list[int], step: int = 1) -> None:
        self.ids, self.step, self.said = ids, step, 0
        self.config = SimpleNamespace(
            gmask_token_id=tokenizer.gmask_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eop_token_id,
            max_sequence_length=2048,
        )

    def get_input_embeddings(self) -> torch.nn.Module:
        return torch.nn.Identity()

    def stream_generate(self, **options: Any) -> Iterator[torch.Tensor]:
        prompt = options["input_ids"]
        scores: Any = None
        for end in [*range(self.step, len(self.ids), self.step), len(self.ids)]:
            outputs = torch.cat((prompt, torch.tensor([self.ids[:end]])), dim=1)
            self.said = end
            yield outputs
            criteria = options.get("stopping_criteria") or []
            if any(bool(criterion(outputs, scores).all()) for criterion in criteria):
                return

    def generate(self, **options: Any) -> torch.Tensor:
        return [*self.stream_generate(**options)][-1]


def encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
