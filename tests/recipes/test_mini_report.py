"""The recipe's report: what is counted, drawn and written, and what is left alone."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from recipes.mini import report
from recipes.mini.corpus import Dialogue, Round
from recipes.mini.curve import BOTTOM, LEFT, RIGHT, TOP, draw_curves, pick_ticks
from recipes.mini.evaluation import (
    Answer,
    Question,
    character_f1,
    draw_new_sums,
    iter_questions,
    numbers_of,
    pick_taught,
    score_wordings,
)

LOG = (
    {"step": 20, "loss": 8.0, "tokens": 100, "seconds": 1.0},
    {"step": 40, "loss": 7.0, "tokens": 100, "seconds": 2.0},
    {"step": 40, "held_out_loss": 7.5, "seconds": 2.0},
    {"step": 60, "loss": 6.5, "tokens": 100, "seconds": 3.0},  # lost when the run was cut
    {"step": 60, "loss": 6.0, "tokens": 110, "seconds": 3.5},
    {"step": 80, "held_out_loss": 5.5, "seconds": 3600.0},
    {"step": 100, "loss": 1.0, "tokens": 100, "seconds": 4000.0},  # not saved
)


def write_log(folder: Path, lines: Any = LOG) -> Path:
    path = folder / "log.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def ask(answer: str, language: str = "en") -> Question:
    return Question("seeds-en-1", "seeds", language, "?", [], answer)


def test_the_log_counts_each_saved_step_once(tmp_path: Path) -> None:
    facts, _ = report.describe_training(write_log(tmp_path))
    assert facts == {"steps": 80, "hours": 1, "tokens": 310, "loss": 6.0, "held_out_loss": 5.5}


def test_a_run_too_short_for_a_report_is_refused(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 4, "held_out_loss": 9.0, "seconds": 8}\n')
    with pytest.raises(ValueError, match="no training loss up to step 4: train for 20 steps"):
        report.describe_training(log)


def test_a_log_without_a_saved_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no held-out loss"):
        report.read_log(write_log(tmp_path, LOG[:2]))


def test_curves_lie_in_the_picture_and_begin_where_the_numbers_do() -> None:
    svg = draw_curves({"a < b": [(0, 4.0), (50, 2.0), (100, 1.0)], "c": [(100, 0)]})
    root = ElementTree.fromstring(svg)
    lines = [e.attrib["points"] for e in root if e.tag.endswith("polyline")]
    first = [tuple(map(float, point.split(","))) for point in lines[0].split()]
    assert first == [
        (LEFT, TOP),
        ((LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2),
        (RIGHT, BOTTOM - (BOTTOM - TOP) / 4),
    ]
    assert lines[1] == f"{RIGHT}.0,{BOTTOM}.0"
    texts = [e.text for e in root if e.tag.endswith("text")]
    assert {"a < b", "c", "0", "100", "4"} <= set(texts)


@pytest.mark.parametrize(
    ("end", "last", "spacing"), [(9.1, 9, 2), (3600, 3500, 500), (80, 80, 10), (0.4, 0.4, 0.05)]
)
def test_ticks_are_round(end: float, last: float, spacing: float) -> None:
    ticks = pick_ticks(end)
    assert ticks[0] == 0 and ticks[1] == pytest.approx(spacing)
    assert end - spacing < ticks[-1] <= end and len(ticks) <= 10


def test_f1_is_of_the_characters_in_common_and_in_order() -> None:
    assert character_f1("abc", "abc") == 1
    assert character_f1("abcd", "ab") == pytest.approx(2 * 2 / 6)
    assert character_f1("ab", "ba") == 0.5
    assert character_f1("你好", "hello") == 0


def test_wordings_are_scored_against_the_taught_answers_and_against_others() -> None:
    said = ["0123456789", "012345678x", "xxxxxxxxxx"]
    pairs = [
        (ask(taught), Answer(text, True, text == taught))
        for text, taught in zip(said, ["0123456789", "0123456789", "yyyyyyyyyy"])
    ]
    score = score_wordings(pairs)
    assert (score["asked"], score["exact"], score["near"]) == (3, 1, 2)
    assert score["f1"] == pytest.approx((1 + 0.9 + 0) / 3)
    assert score["chance"] == pytest.approx((1 + 0 + 0) / 3)


def test_questions_follow_the_taught_rounds() -> None:
    rounds = [Round(["a", "b"], "1"), Round(["c", "d"], "2")]
    asked = [*iter_questions(Dialogue("seeds-zh-007", "seeds", rounds))]
    assert [(q.language, q.query, q.history, q.answer) for q in asked] == [
        ("zh", "b", [], "1"),
        ("zh", "d", [("b", "1")], "2"),
    ]


def test_taught_rounds_are_drawn_from_every_source() -> None:
    dialogues = [
        Dialogue(f"{source}-en-{k}", source, [Round(["a"], str(k))])
        for source, number in (("seeds", 300), ("django", 5))
        for k in range(number)
    ]
    drawn = pick_taught(dialogues)
    assert [sum(q.source == s for q in drawn) for s in ("seeds", "django")] == [200, 5]
    assert len(set(map(str, drawn))) == 205
    assert drawn == pick_taught(dialogues)


def test_new_sums_are_right_known_in_neither_language_and_asked_in_both() -> None:
    known = {(str(a), str(b), str(a + b)) for a in range(61) for b in range(61) if (a + b) % 20}
    questions = draw_new_sums(known)
    assert len(set(map(str, questions))) == len(questions) == 200
    for chinese, english in zip(questions[::2], questions[1::2]):
        a, b, value = map(int, numbers_of(chinese.answer))
        assert a + b == value and value % 20 == 0 and max(a, b) <= 60
        assert (chinese.query, chinese.answer) == (f"{a}加{b}等于几？", f"{a}加{b}等于{value}。")
        assert (english.query, english.answer) == (
            f"What is {a} plus {b}?",
            f"{a} plus {b} is {value}.",
        )
    assert {q.language for q in questions[::2]} == {"zh"}


def test_samples_begin_with_untaught_wordings_in_both_languages() -> None:
    seen = [
        Dialogue(f"seeds-{language}-{k}", "seeds", [Round(["a"], "same"), Round(["b"], "c")])
        for language in ("zh", "en")
        for k in range(20)
    ]
    untaught = [
        Question(d.id, "seeds", d.id[6:8], f"new {d.id}", [], "same")
        for d in seen
        if not d.id.endswith("-3")
    ]
    samples = report.pick_samples(seen, untaught)
    assert [d.id[6:8] for d in samples] == ["zh"] * 15 + ["en"] * 15
    assert len({d.id for d in samples}) == 30
    for dialogue in samples:
        assert dialogue.rounds == [Round([f"new {dialogue.id}"], "same"), Round(["b"], "c")]


class Echo:
    """Stands for a model: answers with the question and the number of rounds before it."""

    def chat(self, tokenizer: Any, query: str, history: Any, **options: Any) -> Any:
        assert options["do_sample"] is False
        answer = f"{query} {len(history)}"
        return answer, [*history, (query, answer)]


def test_a_sample_goes_on_behind_the_models_own_answers() -> None:
    dialogue = Dialogue("seeds-en-1", "seeds", [Round(["a"], "x"), Round(["b", "c"], "y")])
    sample = report.talk(Echo(), None, dialogue)
    assert sample == {"id": "seeds-en-1", "rounds": [("a", "a 0"), ("c", "c 1")]}
    block = report.format_sample(3, sample)
    assert block == "3. `seeds-en-1`\n\n~~~~text\n问：a\n答：a 0\n问：c\n答：c 1\n~~~~"


def test_perplexities_are_per_token_and_of_the_best_baseline() -> None:
    part = {"rounds": 2, "tokens": 10, "model": 0.0, "baseline": {"x": 30.0, "y": 10.0}}
    table = report.format_losses({"taught": {"seeds": part, "django": part}, "untaught": {}})
    assert table.splitlines()[2] == "| seeds | 2 | 1.00 | 2.72 | - | - | - |"
    assert table.splitlines()[1] == "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"


def test_the_report_goes_between_the_markers_and_nowhere_else() -> None:
    text = f"# Own\n{report.BEGIN}\nold\n{report.END}\nwords\n"
    new = report.insert_report(text, "new")
    assert new == f"# Own\n{report.BEGIN}\n\nnew\n\n{report.END}\nwords\n"
    assert report.insert_report(new, "new") == new


@pytest.mark.parametrize(
    "text",
    ["none", report.BEGIN, f"{report.END} {report.BEGIN}", f"{report.BEGIN}{report.END}" * 2],
)
def test_a_page_without_its_markers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"needs one line <!-- report:begin -->"):
        report.insert_report(text, "new")


def test_the_page_of_this_repository_has_its_markers() -> None:
    text = (report.DOCS / "mini.md").read_text(encoding="utf-8")
    assert "new" in report.insert_report(text, "new")


def test_what_is_missing_is_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mini.md").write_text(f"{report.BEGIN}{report.END}")
    arguments = ["--data", "data", "--work", str(tmp_path), "--docs", str(tmp_path)]
    assert report.main([*arguments, "--threads", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "log.jsonl" in error and error.count("\n") == 1
