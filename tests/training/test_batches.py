"""Batches: padding and packing change nothing about the loss and the gradients of a row."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatglm.data.dialects import read_answers
from chatglm.data.files import RecordFiles
from chatglm.training.data.batches import (
    Examples,
    LengthSampler,
    Packed,
    PackingCollator,
    PaddingCollator,
    find_learned,
    pack_lengths,
)
from chatglm.training.data.rendering import IGNORED_LABEL, Example, Renderer
from chatglm.training.trainer import count_token_losses

ROWS = [
    {"prompt": "你好", "response": "你好！"},
    {"prompt": "再见", "response": "再见，祝你愉快！", "history": [["hello", "Hello! Nice day."]]},
    {"prompt": "what is two plus two?", "response": "Two plus two is four."},
    {"prompt": "one, two, three, four", "response": "five"},
]


@pytest.fixture(scope="module")
def model(tiny_repo: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_repo, trust_remote_code=True)


@pytest.fixture(scope="module")
def examples(model: Any, tiny_repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Examples:
    path = tmp_path_factory.mktemp("rows") / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tokenizer = AutoTokenizer.from_pretrained(tiny_repo, trust_remote_code=True)
    records = RecordFiles([str(path)], read_answers)
    return Examples(records, Renderer(model, tokenizer).render)


def sum_gradients(model: Any, **batch: Any) -> dict[str, torch.Tensor]:
    """Return the gradients of a batch's summed loss."""
    model.zero_grad()
    model(**batch, num_items_in_batch=1, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def add_up(model: Any, examples: Any) -> dict[str, torch.Tensor]:
    """Return the gradients of rows that are alone, without padding or mask."""
    total: dict[str, torch.Tensor] = {}
    for example in examples:
        ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        for name, gradient in sum_gradients(model, input_ids=ids, labels=labels).items():
            total[name] = total.get(name, 0) + gradient
    return total


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        largest = gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * largest, msg=name)


def test_a_padded_batch_has_the_gradients_of_its_rows_alone(model: Any, examples: Examples) -> None:
    rows = [examples[i] for i in range(len(examples))]
    batch = PaddingCollator(model.config.pad_token_id, 8)(rows)
    assert batch["input_ids"].shape[1] % 8 == 0
    assert_same(sum_gradients(model, **batch), add_up(model, rows))


def test_packed_documents_have_the_gradients_of_rows_alone(model: Any, examples: Examples) -> None:
    packed = Packed(examples, max(examples.lengths) + 12)
    assert 1 < len(packed) < len(examples)
    rows = [packed[i] for i in range(len(packed))]
    collate = PackingCollator(model.config.pad_token_id, model.locate_documents)
    assert_same(
        sum_gradients(model, **collate(rows)), add_up(model, [e for row in rows for e in row])
    )


def test_packed_documents_have_the_logits_they_have_alone(model: Any, examples: Examples) -> None:
    rows = [[examples[0], examples[1], examples[2]], [examples[3]]]
    collate = PackingCollator(model.config.pad_token_id, model.locate_documents)
    batch = collate(rows)
    batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits
        start = 0
        for example in rows[0]:
            alone = model(torch.tensor([example.input_ids])).logits[0]
            found = logits[0, start : start + len(alone)]
            torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
            start += len(alone)


@pytest.mark.parametrize("lengths", [[5], [3, 9, 1, 4, 4, 2, 9], list(range(1, 11)) * 3])
def test_rows_are_filled_without_loss(lengths: list[int]) -> None:
    rows = pack_lengths(lengths, 10)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 10 for row in rows)
    # Best fit of sorted sizes is never far from the least number of rows.
    assert len(rows) <= -(-sum(lengths) // 10) + 1


def test_the_best_fit_is_taken() -> None:
    assert pack_lengths([6, 5, 4, 3], 10) == [[0, 2], [1, 3]]


def test_labels_stay_with_their_answers(examples: Examples) -> None:
    batch = PaddingCollator(3)([examples[0], examples[1]])
    for row, example in zip(batch["labels"], (examples[0], examples[1])):
        assert row[row != IGNORED_LABEL].tolist() == example.answer_ids
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED_LABEL).all()


def test_rows_that_are_too_long_are_left_out_and_counted(
    model: Any, examples: Examples, tiny_repo: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_repo, trust_remote_code=True)
    limit = sorted(examples.lengths)[1]
    kept = Examples(examples.records, Renderer(model, tokenizer, limit, "skip").render)
    assert (len(kept), kept.num_skipped) == (2, 2)
    assert all(isinstance(kept[i], Example) for i in range(2))
    with pytest.raises(ValueError, match="raise max_length"):
        Examples(examples.records, lambda record: None)


def test_losses_of_learned_places_and_of_all_are_the_same(model: Any, examples: Examples) -> None:
    batch = PaddingCollator(model.config.pad_token_id)([examples[i] for i in range(4)])
    labels = batch.pop("labels")
    with torch.no_grad():
        whole = model(**batch).logits
        kept = model(**batch, logits_to_keep=find_learned(labels)).logits
    sums = count_token_losses(whole, labels)
    torch.testing.assert_close(count_token_losses((kept,), labels), sums)
    losses = torch.nn.functional.cross_entropy(
        whole[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none"
    )
    torch.testing.assert_close(sums[:, 0], losses.sum(1))
    assert sums[:, 1].tolist() == (labels[:, 1:] != IGNORED_LABEL).sum(1).tolist()
    right = (whole[:, :-1].argmax(-1) == labels[:, 1:]).sum(1)
    assert sums[:, 2].tolist() == right.tolist()


def count_columns(rows: list[int], lengths: list[int], size: int) -> int:
    """Return the columns, times rows, that batches of an order have."""
    batches = [rows[i : i + size] for i in range(0, len(rows), size)]
    return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)


def test_rows_of_like_length_share_a_batch() -> None:
    rng = random.Random(5)
    lengths = [rng.randint(5, 400) for _ in range(3_003)]
    sampler = LengthSampler(lengths, 8, seed=3)
    rows = list(sampler)
    assert sorted(rows) == list(range(len(lengths))) and len(sampler) == len(lengths)
    shuffled = rng.sample(range(len(lengths)), len(lengths))
    assert count_columns(rows, lengths, 8) < 1.05 * sum(lengths)
    assert count_columns(shuffled, lengths, 8) > 1.5 * sum(lengths)
    means = [sum(lengths[i] for i in rows[k : k + 8]) / 8 for k in range(0, 3_000, 8)]
    jumps = [abs(a - b) for a, b in itertools.pairwise(means)]
    assert sum(jumps) / len(jumps) > 60  # short and long batches take turns


def test_each_epoch_has_an_order_of_its_own_that_can_be_had_again() -> None:
    first, again = LengthSampler(range(100), 4, seed=3), LengthSampler(range(100), 4, seed=3)
    orders = []
    for epoch in range(3):
        first.set_epoch(epoch)
        orders.append(list(first))
    again.set_epoch(2)
    assert list(again) == orders[2]
    assert len({tuple(order) for order in orders}) == 3


def test_fewer_rows_than_a_batch_are_all_drawn() -> None:
    assert sorted(LengthSampler([5, 3, 4], 8, seed=0)) == [0, 1, 2]
