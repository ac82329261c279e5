"""The measurements of long prompts and dialogues at tiny sizes, and the page made of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from benchmarks import long_dialogue, long_page, long_prompts
from recipes.mini.corpus import load_dialogues, split_dialogues

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
WORDS = ["--rounds", "3", "--probes", "2", "--variants", "256 tokens"]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_dialogue_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after two rounds, it ends as one that never stopped."""
    monkeypatch.setattr(long_dialogue, "PROBED_ROUNDS", (0, 2))
    monkeypatch.setattr(long_dialogue, "DISTANCES", (0, 2))
    monkeypatch.setattr(long_dialogue, "SAVED_EVERY", 1)
    whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
    assert long_dialogue.main([*WORDS, "--run", str(whole)]) == 0
    asked = []
    ask = long_dialogue.Talker.ask

    def ask_until_killed(self: Any, query: str, history: Any) -> str:
        asked.append(query)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return ask(self, query, history)

    monkeypatch.setattr(long_dialogue.Talker, "ask", ask_until_killed)
    for _ in range(2):
        try:
            long_dialogue.main([*WORDS, "--run", str(parts)])
        except KeyboardInterrupt:
            assert len(read(parts)["variants"]["256 tokens"]["rounds"]) == 1
    one, other = (read(path)["variants"]["256 tokens"] for path in (whole, parts))
    assert len(one["rounds"]) == 3 and set(one["probes"]) == {"0", "2", "3"}
    assert all(one[key] == other[key] for key in ("history", "probes", "recall"))
    answered = [row[2] for row in one["rounds"]]
    assert answered[0] is True and answered == [row[2] for row in other["rounds"]]


def test_prompts_are_as_long_as_asked_and_losses_are_the_answers(tmp_path: Path) -> None:
    run = tmp_path / "prompts.json"
    words = ["--count", "2", "--lengths", "40", "80", "--run", str(run)]
    assert long_prompts.main(words) == 0
    cells = read(run)["cells"]
    assert set(cells) == set(long_prompts.list_variants())
    for row in cells.values():
        assert row["40"]["prompt_tokens"] <= 40 < row["80"]["prompt_tokens"] <= 80
        assert row["40"]["tokens"] == row["80"]["tokens"]
    assert cells["none"]["80"]["loss"] == cells["dynamic 8"]["80"]["loss"]
    assert cells["none"]["80"]["loss"] < cells[long_prompts.BOTH_ROWS]["80"]["loss"]
    before = run.read_bytes()
    assert long_prompts.main(words) == 0
    assert read(run)["cells"] == json.loads(before)["cells"]


def test_questions_come_in_an_order_of_chance_and_all_before_one_comes_twice() -> None:
    seen, _ = split_dialogues(load_dialogues(None))
    drawn = long_dialogue.draw_questions(seen, len(seen) + 5, 1)
    assert len({id(asked) for asked in drawn[: len(seen)]}) == len(seen)
    assert drawn != long_dialogue.draw_questions(seen, len(seen) + 5, 2)


def test_the_page_is_made_of_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert long_page.main(["--check"]) == 0
    shutil.copy(ROOT / "docs" / "long_dialogue.md", tmp_path)
    rows = [[0.5, 100.0, True]] * 30 + [[0.25, 101.0, False]] * 30
    part = {"rounds": rows, "probes": {"0": 4, "60": 1}, "recall": {"0": ["Anna", "Tom"], "5": []}}
    run = {"date": "d", "commit": "c", "cpu": "p", "versions": "v", "key": {"probes": 4}}
    text = long_page.format_rounds(run | {"variants": {"256 tokens": part}})
    assert "| 256 tokens | 60 | 0.38 s | 0.25 s | 100 MB | 101 MB | 50% |" in text
    assert "| 256 tokens | 100% | 25% |" in text
    assert "| 256 tokens, taught | 1/2 | 0/2 |" in text
    assert "| 256 tokens, others | 1/4 | 0/4 |" in text
    monkeypatch.setattr(long_page, "DOCS", tmp_path)
    monkeypatch.setattr(long_page, "RECORD", tmp_path / "long_dialogue.json")
    record = {"rounds": run | {"variants": {"256 tokens": part}}}
    (tmp_path / "long_dialogue.json").write_text(json.dumps(record))
    assert long_page.main(["--check"]) == 1
