"""Drafts and reuse (docs/speed.md): the same answers for fewer passes, and what rounds cost."""

import itertools
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from chatglm_6b import decoding_chatglm
from chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_6b.tokenization_chatglm import ChatGLMTokenizer
from conftest import ROOT, build_model
from transformers.cache_utils import DynamicCache, StaticCache, StaticLayer
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

GMASK, SOP = 301, 304
PAGE = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
GREEDY = {"do_sample": False, "max_length": 256}
DRAFTS = {"prompt_lookup_num_tokens": 8}


def read_table(head: str) -> list[list[str]]:
    """Return the cells of the page's table whose first row begins so."""
    lines = PAGE[PAGE.index(head) :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


QUESTIONS = [(row[0], [int(n) for n in row[1:]]) for row in read_table("| question |")[2:]]


class Passes(list[int]):
    """The columns of every pass through a model's blocks."""

    def __init__(self, model: Any) -> None:
        first = model.transformer.layers[0]
        self.hook = first.register_forward_pre_hook(lambda _, args: self.append(args[0].shape[1]))


@pytest.fixture(scope="module")
def mini() -> Any:
    """The embedded checkpoint."""
    return ChatGLMForConditionalGeneration.from_pretrained(ROOT, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return ChatGLMTokenizer.from_pretrained(ROOT)


@pytest.fixture
def passes(mini: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Passes]:
    passes = Passes(mini)
    # A clock by which every step takes as long as another: when drafts pay is measured.
    ticks = iter(range(10**6))
    monkeypatch.setattr(decoding_chatglm.time, "perf_counter", lambda: float(next(ticks)))
    yield passes
    passes.hook.remove()


def build_helper(mini: Any) -> Any:
    """A cheaper model of the same vocabulary: the first blocks of the embedded one."""
    helper = build_model(**mini.config.to_dict() | {"num_layers": 6})
    helper.load_state_dict(mini.state_dict(), strict=False)
    helper.generation_config.num_assistant_tokens = 4
    return helper


# --- drafts


@pytest.mark.parametrize(("question", "counts"), QUESTIONS)
def test_drafts_give_the_same_answer_in_fewer_passes(
    mini: Any, tokenizer: Any, passes: Passes, question: str, counts: list[int]
) -> None:
    history: list[tuple[str, str]] = []
    found = []
    for _ in range(2):
        answer, longer = mini.chat(tokenizer, question, history, **GREEDY)
        num_tokens = len(passes)
        passes.clear()
        drafted, _ = mini.chat(tokenizer, question, history, **GREEDY, **DRAFTS)
        assert drafted == answer
        found += [num_tokens, len(passes)]
        passes.clear()
        *_, (streamed, _) = mini.stream_chat(tokenizer, question, history, **GREEDY, **DRAFTS)
        assert streamed == answer
        assert len(passes) == found[-1]
        passes.clear()
        history = longer
    assert found[0] == found[2]  # the same answer the second time
    assert found[3] < 0.6 * found[2]
    assert [found[0], found[1], found[3]] == counts


def test_a_helper_gives_the_same_answer_in_fewer_passes(
    mini: Any, tokenizer: Any, passes: Passes
) -> None:
    query, helper = "What is the capital of France?", build_helper(mini)
    answer, _ = mini.chat(tokenizer, query, **GREEDY)
    num_tokens = len(passes)
    passes.clear()
    assert mini.chat(tokenizer, query, **GREEDY, assistant_model=helper)[0] == answer
    assert len(passes) < num_tokens


def test_the_page_s_calls(mini: Any, tokenizer: Any) -> None:
    names = {"model": mini, "tokenizer": tokenizer, "helper": build_helper(mini)}
    names |= {"query": "Who are you?", "history": [("hello", "Hi!")]}
    torch.manual_seed(0)
    exec(BLOCKS[0], names)
    assert len(names["history"]) == 3
    assert names["history"][-1][1] == names["answer"] != ""


def test_drafts_end_at_a_stop_text(mini: Any, tokenizer: Any) -> None:
    query = "What is the capital of France?"
    answer, history = mini.chat(tokenizer, query, **GREEDY)
    assert " is Paris" in answer
    options = {**GREEDY, **DRAFTS, "stop": "Paris"}
    cut, _ = mini.chat(tokenizer, query, history, **options)
    assert cut == answer.partition("Paris")[0].strip()


@pytest.mark.parametrize("kind", ["own", "given", "default"])
def test_drafts_behind_each_cache_that_can_be_cropped(kind: str) -> None:
    model = build_model(spread=5)
    row = [5, 197, 86, 97, 5, 197, 11, GMASK, SOP, 5]
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}
    ids = torch.tensor([row])
    expected = model.generate(ids, **options)
    if kind == "own":
        options["past_key_values"] = DynamicCache()
    if kind == "given":  # and filled
        options["past_key_values"] = DynamicCache()
        with torch.no_grad():
            model(ids[:, : row.index(SOP)], past_key_values=options["past_key_values"])
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **options), expected)


def test_drafts_are_refused_where_they_cannot_be() -> None:
    model = build_model()
    ids = torch.tensor([[5, 6, 5, GMASK, SOP, 5]]).repeat(2, 1)
    with pytest.raises(ValueError, match="batch_size = 1"):
        model.generate(ids, prompt_lookup_num_tokens=2, max_new_tokens=4)


def test_drafts_behind_a_static_cache_are_right_or_refused() -> None:
    model = build_model(spread=5)
    ids = torch.tensor([[5, 197, 86, 97, 5, 197, 11, GMASK, SOP, 5]])
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}
    expected = model.generate(ids, **options)
    options["past_key_values"] = StaticCache(config=model.config, max_cache_len=40)
    options["prompt_lookup_num_tokens"] = 3
    if hasattr(StaticLayer, "crop"):  # since 5.24 a static layer can be cropped
        assert torch.equal(model.generate(ids, **options), expected)
    else:
        # The oldest releases fail where they would crop the static cache.
        with pytest.raises((ValueError, AttributeError), match="Static"):
            model.generate(ids, **options)


LETTERS = (20, 21)
PROMPT = [20, 21, 21, 20, 20, 21, GMASK, SOP, 20]


class OnlyLetters(LogitsProcessor):
    """Leaves the letters as the only choice."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        allowed = torch.full_like(scores, float("-inf"))
        allowed[:, list(LETTERS)] = scores[:, list(LETTERS)]
        return allowed


def joint_distribution(model: Any, length: int) -> torch.Tensor:
    """Return the probability of every answer of some letters, in lexical order."""
    probabilities = []
    for answer in itertools.product(LETTERS, repeat=length):
        with torch.no_grad():
            logits = model(torch.tensor([[*PROMPT, *answer]])).logits[0, len(PROMPT) - 1 : -1]
        chosen = torch.tensor([LETTERS.index(letter) for letter in answer]).unsqueeze(1)
        steps = logits[:, list(LETTERS)].double().softmax(dim=-1).gather(1, chosen)
        probabilities.append(steps.prod())
    return torch.stack(probabilities)


def chi_squared(observed: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((observed - expected).square() / expected).sum())


@pytest.mark.parametrize("kind", ["copied", "assistant"])
def test_drafts_keep_the_distribution_of_samples(kind: str) -> None:
    """Of answers of three letters out of two, where drafts are often right and often wrong."""
    length, runs = 3, 300
    model, helper = (build_model(num_layers=1, seed=seed, spread=8) for seed in (0, 9))
    for each in (model, helper):
        each.lm_head.weight.data.mul_(0.35)  # or one letter would get almost all
    helper.generation_config.num_assistant_tokens = 2
    helper.generation_config.num_assistant_tokens_schedule = "constant"
    helper.generation_config.assistant_confidence_threshold = 0.0
    drafts = {"copied": {"prompt_lookup_num_tokens": 2}, "assistant": {"assistant_model": helper}}
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": length, **drafts[kind]}
    options["logits_processor"] = LogitsProcessorList([OnlyLetters()])
    expected = joint_distribution(model, length) * runs
    assert expected.min() > 5  # or the statistic below would mean little
    assert chi_squared(joint_distribution(helper, length) * runs, expected) > 50
    passes, counts = Passes(model), torch.zeros(len(LETTERS) ** length)
    torch.manual_seed(1)
    for _ in range(runs):
        answer = model.generate(torch.tensor([PROMPT]), **options)[0, len(PROMPT) :].tolist()
        places = [LETTERS.index(letter) for letter in answer]
        counts[int("".join(map(str, places)), base=len(LETTERS))] += 1
    assert 1.2 * runs < len(passes) < 2.8 * runs
    assert chi_squared(counts, expected) < 24.3  # exceeded by chance once in 1000


# --- reuse

ROUNDS = [
    (
        "What is the capital of France?",
        "The capital of France is Paris, the city of the Eiffel Tower.",
    ),
    ("Who are you?", "I am ChatGLM-mini."),
    ("What can you do?", ""),
]


def encode_round(mini: Any, tokenizer: Any, number: int) -> torch.Tensor:
    prompt = mini.build_prompt(ROUNDS[number][0], ROUNDS[:number])
    return tokenizer([prompt], return_tensors="pt")["input_ids"]


def test_a_new_round_changes_every_state_of_the_context(mini: Any, tokenizer: Any) -> None:
    """The measurement of docs/speed.md; and the same context alone gives the same states."""
    now, later = (encode_round(mini, tokenizer, number) for number in (1, 2))
    shared = now.shape[1] - 2  # without [gMASK] and <sop>
    assert torch.equal(now[:, :shared], later[:, :shared])
    assert f"the {shared} tokens" in PAGE
    with torch.no_grad():
        states = [mini(ids, output_hidden_states=True).hidden_states for ids in (now, later)]
    head, _, figures = read_table("| after block |")
    for block, figure in zip(head[1:], figures[1:]):
        mine, other = (run[int(block.split()[0])][:, :shared] for run in states)
        change = (mine - other).abs().max() / mine.abs().max()
        assert float(change) == pytest.approx(float(figure), abs=0.006)
        if block[0] != "0":
            assert ((mine - other).abs().amax(dim=-1) > 1e-4).all()


def test_the_context_does_not_see_the_answer_s_start(mini: Any, tokenizer: Any) -> None:
    ids = encode_round(mini, tokenizer, 1)
    with torch.no_grad():
        whole = mini(ids, output_hidden_states=True).hidden_states
        context = mini(ids[:, :-1], output_hidden_states=True).hidden_states
    for mine, other in zip(whole, context):
        assert torch.allclose(mine[:, :-1], other, atol=1e-4)


def test_the_same_prompt_is_read_once(mini: Any, tokenizer: Any, passes: Passes) -> None:
    # What it was never taught anything near leaves the model a choice.
    ids = tokenizer(["我昨天看到一只会飞的猪"], return_tensors="pt")["input_ids"]
    names = {"model": mini, "prompt_ids": ids, "torch": torch}
    torch.manual_seed(4)
    exec(BLOCKS[1], names)
    assert sorted(set(passes)) == [1, ids.shape[1] - 1]
    assert passes.count(ids.shape[1] - 1) == 1
    torch.manual_seed(4)
    expected = [mini.generate(ids, max_new_tokens=32) for _ in range(3)]
    assert [a.tolist() for a in names["answers"]] == [e.tolist() for e in expected]
    assert len({tuple(row[0].tolist()) for row in expected}) > 1
