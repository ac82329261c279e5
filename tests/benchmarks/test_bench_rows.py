"""The timing of rows: what a made row is, and that a measurement leaves it as it was."""

from typing import Any

import pytest
import torch

from benchmarks.contender import Contender
from benchmarks.full_size import Recipe
from chatglm.benching import rows
from chatglm.model_modules import import_model_module


@pytest.fixture(scope="module")
def contender() -> Contender:
    return Contender(Recipe(layers=2, hidden=64), torch.get_num_threads())


def test_a_made_row_decodes_as_one_whose_prompt_was_read(contender: Contender) -> None:
    """Its states are random, and as many and as wide as those of a prompt."""
    made = rows.make_row(contender.model, 12)
    module = import_model_module(contender.model, "rows_chatglm")
    read, _ = module.read_prompt(contender.model, made.input_ids)
    assert (made.num_cached, made.prompt_length) == (12, 12)
    for layer, other in zip(made.cache.layers, read.cache.layers):
        assert layer.keys.shape == other.keys.shape and layer.keys.dtype == other.keys.dtype
    made.append(5)
    (scores,) = module.decode_rows(contender.model, [made])
    assert scores.shape == (1, 130528) and bool(scores.isfinite().all())


def test_rows_are_as_before_when_they_were_timed(contender: Contender) -> None:
    kept = contender.rows([9, 14, 9], tokens=2)
    assert len(kept["seconds"]) == 2 and min(kept["seconds"]) > 0
    made: dict[int, list[Any]] = contender.made
    assert {context: len(same) for context, same in made.items()} == {9: 2, 14: 1}
    assert all(row.num_cached == context for context, same in made.items() for row in same)
    first = made[9][0]
    contender.rows([9], tokens=1)  # the same rows are taken again
    assert made[9][0] is first and len(made[9]) == 2


def test_products_alone_are_those_of_all_blocks(contender: Contender) -> None:
    products = [
        columns
        for block in contender.model.transformer.layers
        for _, columns in rows._list_products(block, contender.model.config)
    ]
    assert products == [64, 64, 64, 256] * 2
    assert contender.products(7)["seconds"] > 0
