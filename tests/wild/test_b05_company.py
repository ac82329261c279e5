"""B5: a row's logits are the same bits in any company, and nearly so in a padded batch.

Random companies of rows join and leave, with 1 to 64 tokens in a step, on several numbers of
threads, in every format. What a row says alone is the oracle.
"""

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from chatglm_6b.rows_chatglm import PromptReading, Row, decode_rows, read_prompt
from conftest import build_model, pad_rows
from torch import Tensor

# Without the engine torch chooses how it sums, by the number of rows among others.
pytest.importorskip("llvmlite")
compiler = pytest.importorskip("chatglm.cpu.compiler", exc_type=ImportError)
pytestmark = pytest.mark.skipif(compiler.find_compiler() is None, reason="needs the engine")

PAD, MASK, GMASK, SOP, END = 3, 300, 301, 304, 305
MOST_TOKENS = 64  # of a step, for which rows are promised the same bits


class Format(NamedTuple):
    """What a model's numbers are: a dtype, and how its products are packed."""

    dtype: torch.dtype
    packed: dict[str, Any]


PACKED: dict[str, dict[str, Any]] = {
    "plain": {},
    "INT8": {"bits": 8},
    "INT8-exact": {"bits": 8, "activations": "exact"},
    "INT4": {"bits": 4},
    "INT4-exact": {"bits": 4, "activations": "exact"},
    "INT4-groups": {"bits": 4, "group_size": 32, "embeddings": True},
}
FORMATS = {
    f"{name}-{str(dtype).rpartition('.')[2]}": Format(dtype, packed)
    for name, packed in PACKED.items()
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
}


def make_model(kind: Format) -> Any:
    model = build_model(spread=1).to(kind.dtype)
    if kind.packed:
        options = dict(kind.packed)
        model = model.quantize(options.pop("bits"), **options)
    return model


def draw_prompt(draw: random.Random) -> list[int]:
    words = [draw.randint(5, 290) for _ in range(draw.choice([1, 3, 9, 33, 60]))]
    return [*words, draw.choice([MASK, GMASK]), SOP]


@pytest.fixture
def threads() -> Iterator[None]:
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


class Twin(NamedTuple):
    """A row in company, and the same row alone."""

    together: Row
    alone: Row


def make_twins(model: Any, draw: random.Random, count: int) -> list[Twin]:
    prompts = [draw_prompt(draw) for _ in range(count)]
    return [Twin(read_prompt(model, ids)[0], read_prompt(model, ids)[0]) for ids in prompts]


def append_tokens(twins: list[Twin], draw: random.Random, most: int) -> None:
    """Give every row a token, and drafts to some as long as the step has room."""
    room = most - len(twins)
    for twin in twins:
        drafts = min(draw.choice([0, 0, 0, 1, 3]), room)
        room -= drafts
        ids = [draw.choice([draw.randint(5, 290), MASK, GMASK, SOP]) for _ in range(1 + drafts)]
        twin.together.append(*ids)
        twin.alone.append(*ids)


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_says_in_any_company_what_it_says_alone(name: str, threads: None) -> None:
    model, draw = make_model(FORMATS[name]), random.Random(name)
    twins = make_twins(model, draw, 3)
    for count in (1, 17, 64, 8):
        draw.shuffle(twins)
        del twins[count:]  # they leave, and others join
        twins += make_twins(model, draw, count - len(twins))
        append_tokens(twins, draw, MOST_TOKENS)
        torch.set_num_threads(draw.randint(1, 3))
        found = decode_rows(model, [twin.together for twin in twins])
        torch.set_num_threads(draw.randint(1, 3))
        for logits, twin in zip(found, twins):
            assert torch.equal(logits, decode_rows(model, [twin.alone])[0]), count


@pytest.mark.parametrize("name", FORMATS)
def test_a_prompt_is_read_beside_others_as_alone(name: str, threads: None) -> None:
    model, draw = make_model(FORMATS[name]), random.Random(name)
    twins = make_twins(model, draw, 3)
    for _ in range(3):
        ids = draw_prompt(draw)
        torch.set_num_threads(draw.randint(1, 3))
        expected = read_prompt(model, ids)[1]
        torch.set_num_threads(draw.randint(1, 3))
        reading = PromptReading(model, ids)
        while not reading.advance():
            append_tokens(twins, draw, MOST_TOKENS)
            decode_rows(model, [twin.together for twin in twins])
        assert torch.equal(reading.logits, expected)


def compute_logits(model: Any, rows: list[list[int]], tokens: int) -> Tensor:
    """Return the logits `(B, T, V)` of greedy answers to padded prompts."""
    ids = torch.tensor(pad_rows(rows, "left"))
    output = model.generate(
        ids,
        attention_mask=(ids != PAD).long(),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(list(output.logits), dim=1)


def find_bound(kind: Format) -> float:
    """Return how far a row may be off, in parts of its largest logit.

    Plain and exact products of halves may be torch's where a step has more tokens than kernels take
    at once: a sum in another order can round to the neighbouring half, once a layer.
    """
    is_rounded = kind.packed.get("activations", "int8") == "int8" and bool(kind.packed)
    return 1e-5 if is_rounded or kind.dtype == torch.float32 else 8 * torch.finfo(kind.dtype).eps


@pytest.mark.parametrize("name", FORMATS)
def test_generate_gives_a_padded_row_what_it_gives_it_alone(name: str) -> None:
    model, draw = make_model(FORMATS[name]), random.Random(name)
    for count in (2, 7):
        prompts = [draw_prompt(draw) for _ in range(count)]
        together = compute_logits(model, prompts, 3)
        for prompt, found in zip(prompts, together):
            alone = compute_logits(model, [prompt], 3)[0]
            assert float((found - alone).abs().max() / alone.abs().max()) <= find_bound(
                FORMATS[name]
            )
