"""The code of docs/rows.md runs, and gives what the page says."""

import re
from typing import Any

import pytest
import torch
from chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_6b.tokenization_chatglm import ChatGLMTokenizer
from conftest import ROOT

pytest.importorskip("chatglm", reason="needs the package")

PAGE = (ROOT / "docs" / "rows.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the page's code leaves behind."""
    model = ChatGLMForConditionalGeneration.from_pretrained(ROOT, dtype=torch.float32).eval()
    names = {"model": model, "tokenizer": ChatGLMTokenizer.from_pretrained(ROOT)}
    for block in BLOCKS:
        exec(block, names)
    return names


def test_answers_side_by_side_are_those_alone(names: dict[str, Any]) -> None:
    model, tokenizer = names["model"], names["tokenizer"]
    assert list(names["said"]) and set(names["said"]) == set(names["questions"])
    for number, question in enumerate(names["questions"]):
        decoder = names["decoding"].RowDecoder(model)
        ids = tokenizer(model.build_prompt(question))["input_ids"]
        generator = torch.Generator().manual_seed(number)
        options = {"do_sample": True, "top_p": 0.7, "max_new_tokens": 64}
        answer = decoder.add(ids, generator, **options)
        while decoder.answers:
            decoder.step()
        alone = tokenizer.decode(answer.answer_ids, skip_special_tokens=True)
        assert names["said"][question] == alone != ""


def test_rows_say_what_chat_says(names: dict[str, Any]) -> None:
    model, tokenizer = names["model"], names["tokenizer"]
    for row, question in zip(names["rows"], names["questions"]):
        ids = tokenizer(model.build_prompt(question), return_tensors="pt")["input_ids"]
        expected = model.generate(ids, do_sample=False, max_new_tokens=4)[0].tolist()
        assert len(row.input_ids) == ids.shape[1] + 4 and row.input_ids == expected
