"""Owns measuring rows: the seconds of steps in which several answers are decoded side by side.

A row is made of random states instead of a prompt that is read, which gives the same cache in less
time. Steps are greedy, by `decode_rows`. Does not know where a model comes from.

Shapes: `N` rows, `S` tokens of a context.
"""

import time
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from chatglm.benching.measuring import add_states, draw_prompt
from chatglm.model_modules import import_model_module


def make_row(model: Any, context: int) -> Any:
    """Return a row behind a context of so many tokens, all of them cached.

    Raises:
        ValueError: for a context shorter than a prompt can be.
    """
    prompt = draw_prompt(model, context)[0]
    rows = import_model_module(model, "rows_chatglm")
    row = rows.PromptReading(model, cast(Any, prompt).tolist()).row
    add_states(model, row.cache, context)
    return row


def time_rows(model: Any, rows: Sequence[Any], tokens: int) -> list[float]:
    """Return the seconds of so many steps of all rows, which are as before afterwards.

    Args:
        model: whose answers nothing ends here.
        rows: of `make_row`.
        tokens: that each row gets; one before them finds the processor's caches cold.
    """
    decode_rows = import_model_module(model, "rows_chatglm").decode_rows
    lengths = [len(row.input_ids) for row in rows]
    for row in rows:
        row.append(row.input_ids[0])
    seconds: list[float] = []
    for _ in range(tokens + 1):
        began = time.perf_counter()
        logits = decode_rows(model, rows)
        for row, scores in zip(rows, logits):
            row.append(int(scores[-1].argmax()))
        seconds.append(time.perf_counter() - began)
    for row, length in zip(rows, lengths):
        row.crop(length)
    return seconds[1:]


@torch.no_grad()
def time_products(model: Any, tokens: int) -> float:
    """Return the seconds of the four products of every block for so many tokens, and of no more.

    It is what a prompt's pass cannot be faster than; each product finds its input in the caches.
    """
    config = model.config
    narrow, wide = (
        torch.randn(1, tokens, width, dtype=model.dtype, device=model.device)
        for width in (config.hidden_size, config.inner_hidden_size)
    )
    pairs = [
        (layer, narrow if columns == config.hidden_size else wide)
        for block in model.transformer.layers
        for layer, columns in _list_products(block, config)
    ]
    began = time.perf_counter()
    for layer, inputs in pairs:
        layer(inputs)
    return time.perf_counter() - began


def _list_products(block: Any, config: Any) -> list[tuple[nn.Module, int]]:
    """Return the linear layers of a block, and the columns of each."""
    attention, mlp = block.attention, block.mlp
    narrow = (attention.query_key_value, attention.dense, mlp.dense_h_to_4h)
    layers = [(layer, config.hidden_size) for layer in narrow]
    return [*layers, (mlp.dense_4h_to_h, config.inner_hidden_size)]


__all__ = ["make_row", "time_products", "time_rows"]
