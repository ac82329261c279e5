"""docs/habits.md as its reader follows it, and what pipelines give on both doors."""

import re
from typing import Any

import pytest
from conftest import ROOT, import_from_package
from transformers import pipeline

PAGE = (ROOT / "docs" / "habits.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
GREEDY = {"max_new_tokens": 24, "do_sample": False}
QUESTIONS = ("你好", "What is water?")

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated")


def read_answer(output: Any) -> str:
    """The answer in what a pipeline gives for one input."""
    text = output[0]["generated_text"]
    return text if isinstance(text, str) else text[-1]["content"]


@pytest.fixture(scope="module", params=["hub", "package"])
def pipe(request: pytest.FixtureRequest) -> Any:
    """A pipeline around this folder's model, by either door."""
    if request.param == "hub":
        return pipeline("text-generation", model=str(ROOT), trust_remote_code=True)
    with import_from_package("chatglm.door").package_code():
        return pipeline("text-generation", model=str(ROOT))


def test_pipelines_answer_as_chat_does(pipe: Any) -> None:
    tokenizer, model = pipe.tokenizer, pipe.model
    for question in QUESTIONS:
        right, _ = model.chat(tokenizer, question, **GREEDY)
        messages = [{"role": "user", "content": question}]
        shown = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        parts = [{"role": "user", "content": [{"type": "text", "text": question}]}]
        for given in (messages, parts, question, shown):
            options = {} if isinstance(given, list) else {"return_full_text": False}
            answer = read_answer(pipe(given, **GREEDY, **options))
            assert model.process_response(answer) == right, given


def test_batches_of_pipelines(pipe: Any) -> None:
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    right = [pipe.model.chat(pipe.tokenizer, question, **GREEDY)[0] for question in QUESTIONS]
    outputs = pipe(chats, batch_size=2, **GREEDY)
    assert [pipe.model.process_response(read_answer(output)) for output in outputs] == right


def test_the_answer_of_a_pipeline_is_not_tidied(pipe: Any) -> None:
    """What the page says of half-width signs is so; otherwise its advice is not needed."""
    raw = read_answer(pipe("你好", return_full_text=False, **GREEDY)).strip()
    assert raw != pipe.model.process_response(raw)
    assert raw == pipe.model.process_response(raw).translate(str.maketrans("，！：；？", ",!:;?"))


def test_the_page(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    assert len(BLOCKS) == 4
    for block in BLOCKS:
        exec(compile(block, "habits.md", "exec"), names)
    chat = [names["model"].chat(names["tokenizer"], q, do_sample=False)[0] for q in QUESTIONS]
    shown = capsys.readouterr().out
    assert shown.startswith(f"{chat[0]}\n{chat!r}\n你好[gMASK]<sop>\nWhat is water?")
