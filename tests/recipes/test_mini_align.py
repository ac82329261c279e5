"""The recipe's alignment: worse answers, steps that exist, figures, and the page they make."""

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest
from chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_6b.tokenization_chatglm import ChatGLMTokenizer
from conftest import ROOT

from recipes.mini import alignment_page
from recipes.mini.align import STAGES, plan_steps
from recipes.mini.comparison import CIRCLE, choose
from recipes.mini.corpus import Dialogue, Round, load_dialogues, spell_question
from recipes.mini.own import is_right
from recipes.mini.preferences import Rejecter, miscount, repeat, truncate, write_all

build_prompt = ChatGLMForConditionalGeneration.build_prompt
SUM = Dialogue("arithmetic-en-1", "arithmetic", [Round(["What is 3 plus 4?"], "3 plus 4 is 7.")])


@pytest.fixture(scope="module")
def tokenizer() -> ChatGLMTokenizer:
    return ChatGLMTokenizer.from_pretrained(ROOT)


def test_worse_answers_are_worse() -> None:
    rng = random.Random(0)
    assert truncate("abcdefghi") == "abc" and truncate("a") == "a"
    for answer in ("one two three four five six", "一二三四五六七八九"):
        circling = repeat(answer, rng)
        assert circling != answer and len(circling) > 4
    assert CIRCLE.search(repeat("one two three four five six", rng))
    results = {miscount("3 plus 4 is 7.", rng) for _ in range(200)}
    assert "3 plus 4 is 7." not in results and len(results) > 10
    assert all(text.startswith("3 plus 4 is ") and text.endswith(".") for text in results)


def test_kinds_come_as_often_as_they_should_and_from_the_same_source() -> None:
    dialogues = [
        Dialogue(f"seeds-en-{i}", "seeds", [Round([f"Question {i}?"], f"This is answer {i}.")])
        for i in range(50)
    ]
    rejecter, rng = Rejecter([*dialogues, SUM]), random.Random(0)
    drawn = [rejecter.draw("seeds", "en", "This is answer 7.", rng) for _ in range(1000)]
    counts = {kind: sum(k == kind for k, _ in drawn) for kind in dict(drawn)}
    assert counts["mismatched"] == pytest.approx(500, abs=60)
    assert counts["truncated"] == pytest.approx(250, abs=50)
    answers = {d.rounds[0].answer for d in dialogues}
    others = {text for kind, text in drawn if kind == "mismatched"}
    assert others < answers and "This is answer 7." not in others
    sums = [rejecter.draw("arithmetic", "en", "3 plus 4 is 7.", rng) for _ in range(99)]
    text = dict(sums)["mismatched"]
    assert text.startswith("3 plus 4 is ") and text != "3 plus 4 is 7."


def test_what_is_held_out_is_in_no_file_that_is_trained_on(
    tokenizer: ChatGLMTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SFT_ROWS", "PAIRS", "PROMPTS"):
        monkeypatch.setattr(f"recipes.mini.preferences.{name}", 300)
    counts = write_all([*load_dialogues(None), SUM], tokenizer, build_prompt, tmp_path)
    assert counts["sft"] == counts["prompts"] == 300 and counts["prompts_eval"] > 890

    def read(name: str) -> list[dict[str, Any]]:
        lines = (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    held_out = {spell_question(row["prompt"], True, True) for row in read("prompts_eval")}
    for name in ("sft", "pairs", "prompts"):
        asked = {spell_question(row["prompt"], True, True) for row in read(name)}
        assert not held_out & asked
    for row in read("pairs") + read("pairs_eval"):
        assert row["chosen"] != row["rejected"] and row["kind"]


def test_an_answer_is_right_as_the_vocabulary_writes_it(tokenizer: ChatGLMTokenizer) -> None:
    assert is_right("你好!", "你好！", tokenizer)
    assert not is_right("你好", "你好！", tokenizer)


def test_every_step_is_a_command_that_there_is(tmp_path: Path) -> None:
    steps = plan_steps(tmp_path / "data", tmp_path / "work", ROOT)
    names = [step.name for step in steps]
    assert names == ["preferences", "sft", "own", "reward", "dpo", "ppo", "comparison"]
    for step in steps:
        if step.words[0] == "chatglm":
            pytest.importorskip("trl", reason="the stages on trl need it")
            from chatglm.training.command import find_stage
            from chatglm.training.settings import read_settings

            stage = find_stage(step.name)
            assert step.words[:3] == ["chatglm", "train", step.name]
            settings, _ = read_settings(stage.settings, stage.arguments, step.words[3:])
            assert settings.output == str(tmp_path / "work" / step.name)
        else:
            assert importlib.util.find_spec(step.words[0]) is not None
    assert {path.stem for path in STAGES.glob("*.yaml")} < set(names)


def test_the_best_on_the_half_that_chooses_is_chosen() -> None:
    key = "right in the half for the choice"
    variants = {
        "sft": {"groups": {"a": {key: 5, "right": 20}, "b": {key: 1, "right": 1}}},
        "ppo": {"groups": {"a": {key: 4, "right": 30}, "b": {key: 3, "right": 9}}},
    }
    assert choose(variants) == "ppo"


@pytest.mark.parametrize(
    ("text", "turns"),
    [("是是是是是是是是", True), ("ha ha ha ha ha", True), ("一步一步地走", False)],
)
def test_circles_are_found(text: str, turns: bool) -> None:
    assert bool(CIRCLE.search(text)) is turns


def test_the_page_is_made_from_the_figures_that_are_kept(tmp_path: Path) -> None:
    docs = ROOT / "docs"
    figures = json.loads((docs / alignment_page.FIGURES).read_text(encoding="utf-8"))
    assert alignment_page.format_page(figures) in (docs / "mini.md").read_text(encoding="utf-8")
    assert len(figures["samples"]) == 30
    assert alignment_page.main(["--work", str(tmp_path), "--docs", str(tmp_path)]) == 2
