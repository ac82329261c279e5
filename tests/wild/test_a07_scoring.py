"""A7: how likely given answers are, several at once, each as a forward pass of it alone has it."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chatglm_6b.scoring_chatglm import MOST_SCORED_TOKENS, AnswerScores, score_rows
from conftest import ROOT, TINY, build_model
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

QUESTION = "What is 3 + 4?"
ANSWERS = ["7", "It is seven.", "I do not know, and nobody else does", "七"]
HISTORY = [("hello", "Hello! How can I help?")]
GMASK, SOP, END = TINY["gmask_token_id"], TINY["bos_token_id"], TINY["eos_token_id"]
ROWS = [
    ([5, 9, GMASK, SOP], [7, 8, END]),
    ([11, 5, 17, 23, 31, GMASK, SOP], [12]),
    ([GMASK, SOP], [29, 31, 37, 41, 43, 47, END]),
    ([5, GMASK, SOP], [9, 9]),
]
FORMATS: dict[str, Callable[[Any], Any]] = {
    "float32": lambda model: model,
    "bfloat16": lambda model: model.bfloat16(),
    "float16": lambda model: model.half(),
    "int8": lambda model: model.quantize(8),
    "int4": lambda model: model.quantize(4, group_size=32, embeddings=True),
}


@pytest.fixture(scope="module")
def tokenizer(tiny_repo: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_repo, trust_remote_code=True)


@pytest.fixture(scope="module")
def model(tiny_repo: Path) -> Any:
    return AutoModel.from_pretrained(tiny_repo, trust_remote_code=True).eval()


@torch.no_grad()
def score_alone(model: Any, prompt_ids: list[int], answer_ids: list[int]) -> tuple[float, int, int]:
    """Return what a pass over one row without padding says of its answer."""
    row = torch.tensor([prompt_ids + answer_ids])
    logits = model(row).logits[0].double().log_softmax(-1)
    total, likeliest = 0.0, 0
    for place, token in enumerate(answer_ids, len(prompt_ids) - 1):
        total += logits[place, token].item()
        likeliest += int(logits[place].argmax()) == token
    return total, len(answer_ids), likeliest


def assert_scores(scores: AnswerScores, expected: list[tuple[float, int, int]]) -> None:
    sums = torch.tensor([row[0] for row in expected], dtype=torch.float64)
    torch.testing.assert_close(scores.log_probs, sums, rtol=1e-5, atol=1e-4)
    assert scores.num_tokens.tolist() == [row[1] for row in expected]
    assert scores.num_likeliest.tolist() == [row[2] for row in expected]
    assert scores.is_greedy.tolist() == [row[1] == row[2] for row in expected]


def encode(tokenizer: Any, text: str, **options: Any) -> list[int]:
    return tokenizer(text, split_special_tokens=True, **options)["input_ids"]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
@pytest.mark.parametrize("end_token", [True, False])
@pytest.mark.parametrize("history", [None, HISTORY], ids=["first round", "second round"])
def test_answers_have_the_figures_of_a_pass_alone(
    model: Any, tokenizer: Any, history: Any, end_token: bool, batch_size: int
) -> None:
    scores = model.score(
        tokenizer, QUESTION, ANSWERS, history, end_token=end_token, batch_size=batch_size
    )
    prompt_ids = encode(tokenizer, model.build_prompt(QUESTION, history))
    end = [model.config.eos_token_id] if end_token else []
    expected = [
        score_alone(model, prompt_ids, encode(tokenizer, text, add_special_tokens=False) + end)
        for text in ANSWERS
    ]
    assert_scores(scores, expected)
    for number, text in enumerate(ANSWERS):
        alone = model.score(tokenizer, QUESTION, text, history, end_token)
        torch.testing.assert_close(alone.log_probs[0], scores.log_probs[number])


def test_every_answer_may_have_a_prompt_of_its_own(model: Any, tokenizer: Any) -> None:
    prompts = ["hello", QUESTION, "", "你好"]
    scores = model.score(tokenizer, prompts, ANSWERS)
    for number, (prompt, answer) in enumerate(zip(prompts, ANSWERS)):
        alone = model.score(tokenizer, prompt, answer)
        torch.testing.assert_close(alone.log_probs[0], scores.log_probs[number])


def test_a_text_alone_is_read_from_left_to_right(model: Any, tokenizer: Any) -> None:
    """Each token by those before it: the text's sum is what its beginnings add up to."""
    text = "The moon goes round the earth."
    ids = encode(tokenizer, text, add_special_tokens=False)
    start = encode(tokenizer, "")
    assert start == [model.config.gmask_token_id, model.config.bos_token_id]
    found = model.score(tokenizer, "", text, end_token=False)
    steps = [score_alone(model, start + ids[:n], [ids[n]])[0] for n in range(len(ids))]
    assert float(found.log_probs[0]) == pytest.approx(sum(steps), rel=1e-5)
    mean = float(found.log_probs[0]) / len(ids)
    assert float(found.perplexity[0]) == pytest.approx(math.exp(-mean))
    # It is what the loss of the same row is, too.
    row = torch.tensor([start + ids])
    loss = model(row, labels=row.masked_fill(torch.arange(row.shape[1]) < 2, -100)).loss
    assert loss.item() == pytest.approx(-mean, rel=1e-4)


def test_what_is_generated_greedily_is_the_likeliest(model: Any, tokenizer: Any) -> None:
    prompt = encode(tokenizer, QUESTION)
    options = {"max_new_tokens": 6, "do_sample": False}
    answer = model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
    other = [*answer[:-1], answer[-1] + 1]
    scores = model.score_ids([(prompt, answer), (prompt, other)])
    assert scores.is_greedy.tolist() == [True, False]
    assert scores.num_likeliest.tolist() == [len(answer), len(answer) - 1]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_scored_by_its_own_weights(name: str) -> None:
    model = FORMATS[name](build_model())
    scores = model.score_ids(ROWS, batch_size=3)
    expected = torch.tensor([score_alone(model, *row)[0] for row in ROWS], dtype=torch.float64)
    # In company sums are rounded otherwise, in the format of the model or of its inputs.
    limit = {"float32": 1e-3, "bfloat16": 0.5, "float16": 0.06}.get(name, 0.1)
    torch.testing.assert_close(scores.log_probs, expected, rtol=0, atol=limit)
    exact = build_model().score_ids(ROWS).log_probs
    assert name == "float32" or not torch.equal(scores.log_probs, exact)
    assert (scores.log_probs - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("fields", [{"position_encoding_2d": False}, {"pre_seq_len": 3}], ids=str)
def test_other_kinds_of_models_are_scored(fields: dict[str, Any]) -> None:
    model = build_model(**fields)
    assert_scores(model.score_ids(ROWS, 4), [score_alone(model, *row) for row in ROWS])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
def test_an_adapter_counts() -> None:
    config = LoraConfig(r=2, target_modules=["query_key_value"], init_lora_weights=False)
    wrapped = get_peft_model(build_model(), config).eval()
    scores = wrapped.score_ids(ROWS)
    assert_scores(scores, [score_alone(wrapped, *row) for row in ROWS])
    assert not torch.equal(scores.log_probs, build_model().score_ids(ROWS).log_probs)


def test_long_answers_are_taken_in_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that logits of a whole vocabulary stay small; nothing is lost or taken twice."""
    model, passes = build_model(max_sequence_length=1000), []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        passes.append((kwargs["input_ids"].shape[0], kwargs["logits_to_keep"]))

    rows = [([5, GMASK, SOP], [7 + i % 50] * (i * 37 % 900 + 1)) for i in range(12)]
    expected = [score_alone(model, *row) for row in rows]
    model.register_forward_pre_hook(note, with_kwargs=True)
    assert_scores(model.score_ids(rows, batch_size=5), expected)
    assert sum(size for size, _ in passes) == len(rows) and max(passes)[0] == 5
    assert all(size * width <= MOST_SCORED_TOKENS for size, width in passes)
    alone = build_model(max_sequence_length=2 * MOST_SCORED_TOKENS)
    assert alone.score_ids([([SOP], [9] * (MOST_SCORED_TOKENS + 5))]).num_tokens.item() == 2053


def test_ids_of_pads_in_a_text_are_text() -> None:
    model, pad = build_model(), TINY["pad_token_id"]
    rows = [([pad, 5, GMASK, SOP], [pad, 7, pad]), ([9] * 9 + [SOP], [7])]
    scores = model.score_ids(rows)
    for number, (prompt, answer) in enumerate(rows):
        row = torch.tensor([prompt + answer])
        with torch.no_grad():
            logits = model(row, attention_mask=torch.ones_like(row)).logits[0].log_softmax(-1)
        places = range(len(prompt) - 1, row.shape[1] - 1)
        expected = sum(logits[p, t].item() for p, t in zip(places, answer))
        assert float(scores.log_probs[number]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("text", ["<sop>", "[gMASK]<sop>", "<eop>", "a<n>b"])
def test_specials_in_an_answer_are_text(model: Any, tokenizer: Any, text: str) -> None:
    ids = encode(tokenizer, text, add_special_tokens=False)
    assert not {model.config.bos_token_id, model.config.eos_token_id} & {*ids}
    prompt_ids = encode(tokenizer, QUESTION)
    found = model.score(tokenizer, QUESTION, text, end_token=False)
    assert_scores(found, [score_alone(model, prompt_ids, ids)])


def test_nothing_to_score_is_no_error(model: Any, tokenizer: Any) -> None:
    scores = model.score(tokenizer, QUESTION, [])
    assert [part.shape for part in scores] == [torch.Size([0])] * 3
    assert scores.is_greedy.tolist() == [] and scores.perplexity.tolist() == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"answers": ["7", ""]}, r"answers\[1\] must be a non-empty text, got ''"),
        ({"answers": [7]}, r"answers\[0\] must be a text, got 7"),
        ({"answers": [["7", "8"]]}, r"answers\[0\] must be a text, got \['7', '8'\]"),
        ({"prompt": ["a", "b"], "answers": ["c"]}, r"There are 2 prompts and 1 answers"),
        ({"prompt": ["a", "b"], "answers": "c"}, r"There are 2 prompts and 1 answers"),
        ({"prompt": "", "history": HISTORY}, r"The query must be a non-empty text, got ''"),
        ({"prompt": "  "}, r"The query must be a non-empty text, got '  '"),
        ({"prompt": None}, r"prompt must be a text or a list of texts, got None"),
        ({"history": ["hello"]}, r"history\[0\] must be a \(question, answer\) pair"),
        ({"batch_size": 0}, r"batch_size must be 1 or more, got 0"),
        (
            {"answers": ["7", "seven " * 3000]},
            r"Row 1 has \d+ tokens, \d+ of them the answer's, and the model's window is 2048",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_scored_is_refused(
    model: Any, tokenizer: Any, arguments: dict[str, Any], words: str
) -> None:
    call = {"tokenizer": tokenizer, "prompt": QUESTION, "answers": ANSWERS} | arguments
    with pytest.raises(ValueError, match=words):
        model.score(**call)


def test_rows_that_would_be_read_both_ways_are_refused() -> None:
    model = build_model()
    with pytest.raises(ValueError, match=r"Prompt 1 has no <sop> \(id 304\), so that its answer"):
        model.score_ids([([5, SOP], [7]), ([5, GMASK], [7])])
    with pytest.raises(ValueError, match="Answer 0 has no tokens"):
        model.score_ids([([5, SOP], [])])


def test_scores_that_are_no_numbers_are_refused() -> None:
    model = build_model().half()
    model.lm_head.weight.data[9] = math.nan
    with pytest.raises(ValueError, match=r"no numbers in torch\.float16: set dtype to float32"):
        model.score_ids(ROWS)


def test_a_tokenizer_of_another_generation_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="different generations"):
        build_model().score(tokenizer, QUESTION, ANSWERS)


def test_an_evaluation_has_the_same_figures(model: Any, tokenizer: Any) -> None:
    scoring = pytest.importorskip("chatglm.evaluating.scoring", reason="needs the package")
    rendering = pytest.importorskip("chatglm.training.data.rendering", reason="needs the package")
    prompt_ids, end = encode(tokenizer, QUESTION), model.config.eos_token_id
    answers = [[*encode(tokenizer, text, add_special_tokens=False), end] for text in ANSWERS]
    examples = [rendering.Example(prompt_ids, answer) for answer in answers]
    judge = scoring.BatchedModel(model, model.config.pad_token_id, 4)
    lengths = [len(example.input_ids) for example in examples]
    measured: Tensor = judge.measure_answers(examples, lengths)
    scores = model.score(tokenizer, QUESTION, ANSWERS, batch_size=4)
    assert torch.equal(measured[:, 0], -scores.log_probs)
    assert torch.equal(measured[:, 1:].long(), torch.stack(scores[1:], dim=1))
    assert torch.equal(score_rows(model, examples)[:, 1], measured[:, 1])


def test_the_page_does_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "scoring.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    monkeypatch.chdir(ROOT)
    for code in re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE):
        exec(compile(code, "docs/scoring.md", "exec"), names)
    assert names["best"] == "中国的首都是北京。"
    model, tokenizer, text = names["model"], names["tokenizer"], names["text"]
    row = tokenizer("", text)["input_ids"][:-1]
    ids = encode(tokenizer, text, add_special_tokens=False)
    assert row == [model.config.gmask_token_id, model.config.bos_token_id, *ids]
    total, count, _ = score_alone(model, row[:2], ids)
    assert float(names["perplexity"]) == pytest.approx(math.exp(-total / count), rel=1e-4)
    assert int(names["parts"].num_tokens.sum()) == len(names["ids"])
    # Without <sop> the figure is another one.
    raw = torch.tensor([ids])
    with pytest.warns(RuntimeWarning, match="labels stand in what ChatGLM reads in both"):
        copied = model(raw, labels=raw).loss.detach()
    assert float(copied.exp()) != pytest.approx(float(names["perplexity"]), rel=0.1)
