"""The recipe's training: rates, state, resuming, and that it learns."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chatglm_6b.configuration_chatglm import ChatGLMConfig
from chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_6b.tokenization_chatglm import ChatGLMTokenizer
from conftest import ROOT
from torch import Tensor

from recipes.mini import train as recipe
from recipes.mini.corpus import MAX_TOKENS, Dialogue, Example, Round, Sampler, collate
from recipes.mini.evaluation import answer_questions, encode_questions, iter_questions, sum_losses

DIALOGUES = [
    Dialogue("seeds-zh-1", "seeds", [Round(["你是谁"], "我是小模型。"), Round(["是吗"], "是。")]),
    Dialogue("seeds-en-1", "seeds", [Round(["Who are you?"], "I am a small model.")]),
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    tokenizer = ChatGLMTokenizer.from_pretrained(ROOT)
    return Sampler(DIALOGUES, tokenizer, ChatGLMForConditionalGeneration.build_prompt)


@pytest.fixture
def batches(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the sampler's batches short."""
    monkeypatch.setattr("recipes.mini.corpus.BATCH_TOKENS", 256)


def build_model(seed: int = 0, hidden_size: int = 64) -> ChatGLMForConditionalGeneration:
    torch.manual_seed(seed)
    fields = json.loads((ROOT / "config.json").read_text())
    fields |= {"num_layers": 2, "hidden_size": hidden_size, "inner_hidden_size": 2 * hidden_size}
    return ChatGLMForConditionalGeneration(ChatGLMConfig(**fields)).train()


def examples_of(sampler: Sampler) -> list[Example]:
    questions = [q for dialogue in DIALOGUES for q in iter_questions(dialogue)]
    return [sampler.encode(q.query, q.history, q.answer) for q in questions]


def test_the_rate_warms_up_stays_and_falls() -> None:
    rates = [recipe.learning_rate(step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(1e-3 / 150)
    assert rates[74] == pytest.approx(0.5e-3)
    assert set(rates[149:701]) == {1e-3}
    assert rates[850] == pytest.approx(0.5e-3)
    assert rates[999] == pytest.approx(1e-5)
    assert rates[:150] == sorted(rates[:150]) and rates[700:] == sorted(rates[700:], reverse=True)


@pytest.mark.parametrize("steps", [1, 2, 4, 200])
def test_the_shortest_courses_have_a_rate(steps: int) -> None:
    rates = [recipe.learning_rate(step, steps) for step in range(steps)]
    assert all(0 < rate <= 1e-3 for rate in rates)


def test_only_matrices_decay_and_the_tied_one_once() -> None:
    model = build_model()
    decayed, others = recipe.build_optimizer(model).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert decayed["weight_decay"] == recipe.WEIGHT_DECAY and others["weight_decay"] == 0
    assert {names[id(p)].rsplit(".", 1)[1] for p in decayed["params"]} == {"weight"}
    assert not any("layernorm" in names[id(p)] for p in decayed["params"])
    assert len(decayed["params"]) == 1 + 4 * 2
    assert len(decayed["params"]) + len(others["params"]) == len(names)


def test_the_loss_is_the_models_own(sampler: Sampler) -> None:
    model = build_model()
    input_ids, attention_mask, labels = collate(examples_of(sampler), 3)
    expected = model(input_ids, attention_mask=attention_mask, labels=labels).loss
    found = recipe.answer_loss(model, (input_ids, attention_mask, labels))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_summed_losses_do_not_depend_on_the_batch(sampler: Sampler) -> None:
    model = build_model().eval()
    examples = examples_of(sampler)
    alone = [sum_losses(model, [example], 3) for example in examples]
    assert sum_losses(model, examples, 3) == pytest.approx(sum(alone), rel=1e-5)
    assert len(set(alone)) == len(alone)


def test_only_questions_no_longer_than_those_of_the_training_are_scored(sampler: Sampler) -> None:
    (question,) = iter_questions(DIALOGUES[1])
    lengths = []
    for words in range(200, 300):
        kept = encode_questions([question._replace(query="1" * words)], sampler)
        lengths += [sum(map(len, example)) for example in kept]
    assert max(lengths) == MAX_TOKENS and len(lengths) < 60


def test_a_tiny_model_learns_two_dialogues_and_answers_with_them(sampler: Sampler) -> None:
    model = build_model()
    optimizer = recipe.build_optimizer(model)
    batch = collate(examples_of(sampler), 3)
    losses = [recipe.train_step(model, optimizer, batch, 5e-3) for _ in range(60)]
    assert losses[0] > 7
    assert losses[-1] < 0.1
    questions = [q for dialogue in DIALOGUES for q in iter_questions(dialogue)]
    pairs = answer_questions(model.eval(), questions, sampler)
    assert [answer.text for _, answer in pairs] == ["我是小模型。", "是。", "I am a small model."]
    assert all(answer.has_stopped and answer.is_exact for _, answer in pairs)
    untrained = answer_questions(build_model(1).eval(), questions[:1], sampler)
    assert not untrained[0][1].is_exact


def train_to(work: Path, steps: int, sampler: Sampler, seed: int = 0) -> dict[str, Tensor]:
    model = build_model(seed, hidden_size=16)
    work.mkdir(exist_ok=True)
    held_out = [collate(examples_of(sampler), 3)]
    recipe.train(model, sampler, held_out, work, steps)
    return model.state_dict()


def steps_of(work: Path, name: str) -> list[int]:
    lines = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if name in line]


@pytest.mark.usefixtures("batches")
def test_a_resumed_run_ends_with_the_same_weights_bit_for_bit(
    sampler: Sampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "SAVE_EVERY", 4)
    monkeypatch.setattr(recipe, "LOG_EVERY", 3)
    whole = train_to(tmp_path / "whole", 10, sampler)
    real_step: Callable[..., float] = recipe.train_step
    taken: list[float] = []

    def interrupted_step(*args: Any) -> float:
        if len(taken) == 6:
            raise KeyboardInterrupt
        taken.append(real_step(*args))
        return taken[-1]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(recipe, "train_step", interrupted_step)
        train_to(tmp_path / "cut", 10, sampler)
    resumed = train_to(tmp_path / "cut", 10, sampler, seed=1)  # its own weights are forgotten
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert steps_of(tmp_path / "whole", "held_out_loss") == [4, 8, 10]
    assert steps_of(tmp_path / "cut", "loss") == [3, 6, 6, 9]
    # A run that is over does nothing more.
    again = train_to(tmp_path / "cut", 10, sampler, seed=2)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_save_that_is_killed_leaves_the_old_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.pt"
    recipe.save_state(path, step=1, weight=torch.ones(3))

    def killed_save(state: object, target: Path) -> None:
        Path(target).write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed_save)
    with pytest.raises(KeyboardInterrupt):
        recipe.save_state(path, step=2, weight=torch.zeros(3))
    assert torch.load(path, weights_only=True)["step"] == 1
