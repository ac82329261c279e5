"""D6: which answers of a dialogue are learned: marks of messages, the last turn, all turns."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("chatglm", reason="training is the package's")
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatglm.data.dialects import read_answers
from chatglm.data.records import Columns, RowProblem
from chatglm.evaluating.evaluation import Perplexity
from chatglm.evaluating.settings import EvalSettings
from chatglm.training.data.batches import Packed, PackingCollator, read_examples
from chatglm.training.data.rendering import IGNORED_LABEL, Renderer
from chatglm.training.settings import KeyProblem
from chatglm.training.stage_settings import (
    DpoSettings,
    GrpoSettings,
    PretrainSettings,
    RewardSettings,
    SftSettings,
)

OFF = ({"weight": 0}, {"loss": False}, {"train": False}, {"train_on_turn": False}, {"masked": True})
ON = ({"weight": 1}, {"loss": True}, {"train": 1}, {"train_on_turn": True}, {"masked": False})


def talk(*marks: dict[str, Any]) -> dict[str, Any]:
    """Return messages with an answer for each mark: a0, a1 and so on."""
    messages: list[dict[str, Any]] = []
    for i, mark in enumerate(marks):
        messages.append({"role": "user", "content": f"q{i}"})
        messages.append({"role": "assistant", "content": f"a{i}", **mark})
    return {"messages": messages}


def learned(row: dict[str, Any], **told: str) -> list[tuple[int, str]]:
    """Return the learned answers of a row, each with the number of rounds before it."""
    return [(len(r.history), r.answer) for r in read_answers(row, Columns(**told))]


PAST = {"prompt": "q1", "response": "a1", "history": [["q0", "a0"]]}


@pytest.mark.parametrize(("off", "on"), list(zip(OFF, ON)))
def test_marks_take_answers_out_and_leave_them_in_the_history(off: Any, on: Any) -> None:
    assert learned(talk(off, on, {})) == [(1, "a1"), (2, "a2")]
    assert learned(talk(on, off, off)) == [(0, "a0")]
    assert learned(talk({}, off), learn_turns="all") == [(0, "a0")]
    (record,) = read_answers(talk(off, on), Columns())
    assert record.history == [("q0", "a0")]


@pytest.mark.parametrize("off", OFF)
def test_a_row_that_teaches_nothing_says_so(off: dict[str, Any]) -> None:
    with pytest.raises(RowProblem, match="nothing is to be learned: all answers are marked so"):
        learned(talk(off, off))
    with pytest.raises(RowProblem, match="nothing is to be learned: the last answer is marked so"):
        learned(talk({}, off), learn_turns="last")


def test_forms_have_their_habits_and_the_key_goes_before() -> None:
    both, last = [(0, "a0"), (1, "a1")], [(1, "a1")]
    assert learned(talk({}, {})) == both
    assert learned(talk({}, {}), learn_turns="all") == both
    assert learned(talk({}, {}), learn_turns="last") == last
    assert learned(PAST) == last
    assert learned(PAST, learn_turns="last") == last
    assert learned(PAST, learn_turns="all") == both
    shared = {"conversations": [{"from": "human", "value": "q0"}, {"from": "gpt", "value": "a0"}]}
    assert learned(shared, learn_turns="last") == [(0, "a0")]


def test_the_last_answer_is_the_last_that_there_is() -> None:
    row = talk({}, {})
    row["messages"].append({"role": "user", "content": "and?"})
    assert learned(row, learn_turns="last") == [(1, "a1")]


def test_a_history_of_the_fork_is_learned_too_if_it_is_told() -> None:
    scored = [{"answer": "a1", "score": 2}, {"answer": "b", "score": 1}]
    row = {"prompt": "q1", "history": [["q0", "a0"]], "answers": scored}
    assert learned(row, learn_turns="all") == [(0, "a0"), (1, "a1")]


@pytest.mark.parametrize(
    ("mark", "reason"),
    [
        ({"weight": 0.5}, "weight: 0.5; only 0 and 1 (false and true) are known: repeat rows"),
        ({"weight": 2}, "only 0 and 1"),
        ({"loss": "false"}, "only 0 and 1"),
        ({"weight": [0]}, "only 0 and 1"),
        ({"loss_scale": 0.3}, "loss_scale"),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 3, "train": False}]}, "train_detail"),
        ({"weight": 1, "loss": False}, "against each other"),
    ],
)
def test_marks_that_could_only_be_guessed_at_are_refused(mark: Any, reason: str) -> None:
    with pytest.raises(RowProblem, match=re.escape(reason)):
        learned(talk(mark, {}))


def test_questions_are_never_learned() -> None:
    row = talk({})
    row["messages"][0]["loss"] = True
    with pytest.raises(RowProblem, match="message 0 is a question that is marked to be learned"):
        learned(row)
    row["messages"][0]["loss"] = False
    assert learned(row) == [(0, "a0")]


@pytest.mark.parametrize("kind", [PretrainSettings, RewardSettings, DpoSettings, GrpoSettings])
def test_stages_that_learn_no_answers_refuse_the_key(kind: Any) -> None:
    with pytest.raises(KeyProblem, match="learn_turns must be left out"):
        kind(output="out", learn_turns="last").check()


def test_another_value_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(KeyProblem, match=r"learn_turns must be last or all, .*got 'first'"):
        SftSettings(output="out", learn_turns="first").check()


def test_trainings_packing_and_perplexity_take_the_same_answers(
    tiny_repo: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_repo, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(tiny_repo, trust_remote_code=True)
    path = tmp_path / "data.jsonl"
    rows = [talk({"weight": 0}, {}, {}), talk({}, {"loss": False}), PAST]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    renderer = Renderer(model, tokenizer)
    for told, wanted in (("", "a1 a2 a0 a1"), ("all", "a1 a2 a0 a0 a1")):
        keys: dict[str, Any] = {"output": "out", "learn_turns": told}
        examples = read_examples([str(path)], SftSettings(**keys), renderer)
        taught = [tokenizer.decode(examples[i].answer_ids) for i in range(len(examples))]
        assert taught == wanted.split()
        packed = Packed(examples, renderer.max_length)
        labels = PackingCollator(renderer.pad_id, model.locate_documents)([packed[0]])["labels"]
        ids = [i for i in labels[0].tolist() if i != IGNORED_LABEL]
        assert sorted(ids) == sorted(i for e in packed[0] for i in e.answer_ids)
        records = Perplexity(EvalSettings(eval_data=[str(path)], **keys)).records
        assert [record.answer for record in records] == wanted.split()
