"""Rows: answers that are decoded side by side, each as if it were alone.

Owns what a row is, how its prompt is read, and a step of many rows. Nothing is padded or masked,
and nothing is copied when rows join or leave. Knows nothing of text, and of draws: who decodes
appends the tokens.

Shapes: `N` rows, `S` pending tokens of all rows together, `V` vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .cache_chatglm import ChatGLMCache
from .masking_chatglm import count_cached_tokens


class Row:
    """A prompt and its answer so far.

    Attributes:
        input_ids: all tokens, of the prompt and the answer. Those behind the cached ones are
            pending: the next step reads them.
        cache: keys and values of the others, of one row.
        prompt_length: tokens of the prompt.
    """

    def __init__(self, input_ids: Sequence[int], cache: Any) -> None:
        self.input_ids = list(input_ids)
        self.cache = cache
        self.prompt_length = len(self.input_ids)

    @property
    def num_cached(self) -> int:
        """Tokens whose keys and values are cached."""
        return count_cached_tokens(self.cache)

    @property
    def pending(self) -> list[int]:
        """Tokens that the next step reads."""
        return self.input_ids[self.num_cached :]

    def append(self, *token_ids: int) -> None:
        """Add tokens to the answer."""
        self.input_ids.extend(token_ids)

    def crop(self, length: int) -> None:
        """Forget all tokens behind so many, cached ones too, as of a draft that was not taken."""
        del self.input_ids[length:]
        if self.num_cached > length:
            self.cache.crop(length - self.num_cached)  # by how many: 5.24 takes no length


class PromptReading:
    """A prompt that is being read, block by block.

    Attributes:
        row: what comes of it.
        logits: `(1, V)`, of the first token of the answer; None before the end.
    """

    def __init__(self, model: Any, input_ids: Sequence[int], cache: Any = None) -> None:
        self.model = model
        self.row = Row(input_ids, ChatGLMCache() if cache is None else cache)
        self.logits: Tensor | None = None

    @torch.no_grad()
    def advance(self) -> bool:
        """Run the next block; return whether the prompt is read."""
        ids = torch.tensor([self.row.input_ids], device=self.model.device)
        output = self.model(ids, past_key_values=self.row.cache, use_cache=True, logits_to_keep=1)
        self.logits = output.logits[:, -1]
        return True


def read_prompt(model: Any, input_ids: Sequence[int], cache: Any = None) -> tuple[Row, Tensor]:
    """Read a prompt without a pause.

    Args:
        model: a `ChatGLMForConditionalGeneration`.
        input_ids: the prompt's.
        cache: an empty cache of one row, or None for a `ChatGLMCache`.

    Returns:
        The row, and the logits `(1, V)` of the first token of its answer.
    """
    reading = PromptReading(model, input_ids, cache)
    while not reading.advance():
        pass
    assert reading.logits is not None
    return reading.row, reading.logits


@torch.no_grad()
def decode_rows(model: Any, rows: Sequence[Row]) -> list[Tensor]:
    """Read the pending tokens of all rows.

    Args:
        model: a `ChatGLMForConditionalGeneration`.
        rows: with one or more pending tokens each.

    Returns:
        For each row the logits behind each of its pending tokens, `(pending, V)`.
    """
    logits = []
    for row in rows:
        ids = torch.tensor([row.pending], device=model.device)
        output = model(ids, past_key_values=row.cache, use_cache=True)
        logits.append(output.logits[0])
    return logits


__all__ = ["PromptReading", "Row", "decode_rows", "read_prompt"]
