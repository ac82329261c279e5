"""Records as ids: the prompt of `chat`, labels on answers only, and rows that are too long."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatglm.data.records import Record, RowProblem
from chatglm.training.data.batches import pad_rows
from chatglm.training.data.rendering import IGNORED_LABEL, Renderer

HISTORY = [("你好", "你好！很高兴见到你。"), ("who are you?", "A small model.")]
RECORD = Record("data.jsonl:1", HISTORY, "再见", "再见！")


@pytest.fixture(scope="module")
def parts(tiny_repo: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(tiny_repo, trust_remote_code=True)
    return model, AutoTokenizer.from_pretrained(tiny_repo, trust_remote_code=True)


def test_ids_are_those_of_chat_and_of_the_template(parts: tuple[Any, Any]) -> None:
    model, tokenizer = parts
    example = Renderer(model, tokenizer).render(RECORD)
    assert example is not None
    messages = []
    for query, answer in [*HISTORY, (RECORD.query, RECORD.answer)]:
        messages += [{"role": "user", "content": query}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert example.input_ids == text
    prompt = model.build_prompt(RECORD.query, HISTORY)
    assert example.prompt_ids == tokenizer(prompt, split_special_tokens=True)["input_ids"]


def test_only_the_answer_and_its_end_carry_labels(parts: tuple[Any, Any]) -> None:
    example = Renderer(*parts).render(RECORD)
    assert example is not None
    assert example.answer_ids[-1] == parts[0].config.eos_token_id
    assert parts[1].decode(example.answer_ids) == "再见!"  # the vocabulary knows one width only
    assert example.labels == [IGNORED_LABEL] * len(example.prompt_ids) + example.answer_ids


def test_special_tokens_that_were_typed_are_text(parts: tuple[Any, Any]) -> None:
    model, tokenizer = parts
    typed = RECORD._replace(query="<sop> [gMASK] <eop>", history=[], answer="<pad><eop>")
    example = Renderer(model, tokenizer).render(typed)
    assert example is not None
    config = model.config
    assert example.input_ids.count(config.bos_token_id) == 1
    assert example.input_ids.count(config.eos_token_id) == 1
    assert config.pad_token_id not in example.input_ids


def test_long_rows_are_an_error_skipped_or_cut(parts: tuple[Any, Any]) -> None:
    whole = Renderer(*parts).render(RECORD)
    assert whole is not None
    limit = len(whole.input_ids) - 1
    with pytest.raises(RowProblem) as caught:
        Renderer(*parts, limit).render(RECORD)
    for word in ("data.jsonl:1", str(limit + 1), str(limit), "long_rows"):
        assert word in str(caught.value)
    assert Renderer(*parts, limit, "skip").render(RECORD) is None
    cut = Renderer(*parts, limit, "cut").render(RECORD)
    newer = Renderer(*parts).render(RECORD._replace(history=HISTORY[1:]))
    assert cut == newer  # the oldest round went, whole
    assert Renderer(*parts, limit + 1).render(RECORD) == whole


@pytest.mark.parametrize("limit", [9, 12, 20, 40])
def test_what_is_cut_keeps_the_markers_and_the_end(parts: tuple[Any, Any], limit: int) -> None:
    model, tokenizer = parts
    record = Record("", HISTORY, "why? " * 60, "because. " * 60)
    example = Renderer(model, tokenizer, limit, "cut").render(record)
    assert example is not None
    config = model.config
    assert len(example.input_ids) <= limit
    assert example.prompt_ids[-2:] == [config.gmask_token_id, config.bos_token_id]
    assert example.answer_ids[-1] == config.eos_token_id
    assert len(example.answer_ids) > 0


def test_pairs_share_their_prompt(parts: tuple[Any, Any]) -> None:
    renderer = Renderer(*parts)
    record = RECORD._replace(rejected="不知道，你自己看着办吧，我不想说。")
    pair = renderer.render_pair(record)
    assert pair is not None
    assert pair[0] == renderer.render(record)
    assert pair[1] == renderer.render(record._replace(answer=record.rejected))
    limit = len(pair[1].input_ids) - 3
    better, worse = Renderer(*parts, limit, "cut").render_pair(record) or (None, None)
    assert better is not None and worse is not None
    assert better.prompt_ids == worse.prompt_ids
    assert max(len(better.input_ids), len(worse.input_ids)) <= limit
    assert better.answer_ids[-1] == worse.answer_ids[-1] == renderer.end_id
    assert Renderer(*parts, limit, "skip").render_pair(record) is None


def test_prompts_leave_room_for_an_answer(parts: tuple[Any, Any]) -> None:
    whole = Renderer(*parts).render_prompt(RECORD, 1)
    assert whole is not None
    limit = len(whole) + 5
    assert Renderer(*parts, limit).render_prompt(RECORD, 5) == whole
    with pytest.raises(RowProblem):
        Renderer(*parts, limit).render_prompt(RECORD, 6)
    shorter = Renderer(*parts, limit, "cut").render_prompt(RECORD, 20)
    assert shorter is not None and len(shorter) + 20 <= limit


@pytest.mark.parametrize("limit", [1, 8, 2049])
def test_an_impossible_window_is_refused(parts: tuple[Any, Any], limit: int) -> None:
    with pytest.raises(ValueError, match="from 9 to 2048"):
        Renderer(*parts, limit)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_padded_on_either_side(side: str) -> None:
    ids, mask = pad_rows([[1, 2, 3], [4]], 0, 4, side)
    right = [[1, 2, 3, 0], [4, 0, 0, 0]]
    left = [[0, 1, 2, 3], [0, 0, 0, 4]]
    assert ids.tolist() == (left if side == "left" else right)
    assert torch.equal(mask, (ids != 0).long())


@pytest.mark.parametrize("part", ["prompt_ids", "answer_ids"])
def test_a_pad_inside_a_row_is_refused(parts: tuple[Any, Any], part: str) -> None:
    renderer = Renderer(*parts)
    example = renderer.render(RECORD)
    assert example is not None
    renderer.pad_id = getattr(example, part)[0]
    with pytest.raises(RowProblem, match=rf"data\.jsonl:1: .*pad token \(id {renderer.pad_id}\)"):
        renderer.render(RECORD)
