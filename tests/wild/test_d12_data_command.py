"""D12: `chatglm data` shows how rows are read and what is learned, before a model is loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("chatglm", reason="needs the package")

from training.aligning import write_rows

from chatglm import cli
from chatglm.previewing.command import read_words
from chatglm.training import models
from chatglm.training.keys.problems import KeyProblem

ANSWERED = [
    {"instruction": "How are you?", "input": "", "output": "Fine, thanks."},
    {"instruction": "你好", "input": "", "output": "你好！"},
    {"instruction": "How are you?", "input": "", "output": "Fine, thanks."},
]
PAIRED = [{"prompt": "你好", "chosen": "你好！", "rejected": "no"}]


@pytest.fixture
def data(
    tiny_repo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run `chatglm data` where no model can be loaded; returns exit code, output and errors."""

    def load(*args: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(models, "_load", load)

    def run(*words: str) -> tuple[int, str, str]:
        code = cli.main(["data", *words, "--model", str(tiny_repo)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_answers(tmp_path: Path, data: Callable[..., Any]) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ANSWERED)
    code, out, err = data(str(rows), "--json")
    told = json.loads(out)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert (told["rows"], told["dialect"], told["skipped"]) == (3, "alpaca", [])
    assert told["duplicates"] == 1 and told["stage"] == "sft"
    assert told["files"][0]["kind"] == "JSON lines" and told["files"][0]["encoding"] == "UTF-8"
    first = told["examples"][0]
    assert (first["prompt"], first["learned"]) == ("How are you?", "Fine, thanks.")
    counts = [item["prompt_tokens"] + item["learned_tokens"] for item in told["examples"]]
    lengths = told["lengths"]
    assert (lengths["min"], lengths["max"], told["tokens"]) == (
        min(counts),
        max(counts),
        sum(counts),
    )
    assert told["learned_tokens"] == sum(item["learned_tokens"] for item in told["examples"])


def test_lines_for_people(tmp_path: Path, data: Callable[..., Any]) -> None:
    rows = write_rows(
        tmp_path / "rows.jsonl", [*ANSWERED, {"instruction": "\x1b[31m", "output": "a"}]
    )
    code, out, err = data("--show", "4", str(rows))
    assert (code, err) == (0, "")
    assert f"{rows}: JSON lines, UTF-8, 4 rows, 4 examples\n" in out
    assert "How are you?[[Fine, thanks.]]\n" in out and "rows are read as alpaca (4)" in out
    assert "1 examples are there a second time" in out
    assert "\\x1b[31m[[a]]" in out and "\x1b" not in out, "a row does nothing to a terminal"


def test_a_terminal_gets_colours(
    tmp_path: Path, data: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ANSWERED)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "How are you?\x1b[32mFine, thanks.\x1b[0m" in data(str(rows))[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "How are you?[[Fine, thanks.]]" in data(str(rows))[1]


@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_pairs(stage: str, tmp_path: Path, data: Callable[..., Any]) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", PAIRED)
    told = json.loads(data(str(rows), "--stage", stage, "--json")[1])
    first = told["examples"][0]
    assert (first["prompt"], first["learned"], first["rejected"]) == ("你好", "你好！", "no")
    assert "rejected: no" in data(str(rows), f"--stage={stage}")[1]


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_questions(stage: str, tmp_path: Path, data: Callable[..., Any]) -> None:
    """Neither needs a reward here, though a training of theirs does."""
    rows = write_rows(tmp_path / "rows.jsonl", ANSWERED)
    code, out, _ = data("--stage", stage, str(rows), "--json")
    first = json.loads(out)["examples"][0]
    assert (code, first["prompt"], first["learned"]) == (0, "How are you?", "")
    assert first["reference"] == "Fine, thanks."
    assert "the data answers: Fine, thanks." in data("--stage", stage, str(rows))[1]


def test_texts(tmp_path: Path, data: Callable[..., Any]) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "one two three four five six seven"}] * 9)
    told = json.loads(data(str(rows), "--stage", "pretrain", "--json", "--show", "9")[1])
    blanks = [item["prompt"] for item in told["examples"] if "[MASK]" in item["prompt"]]
    ends = [item for item in told["examples"] if "[MASK]" not in item["prompt"]]
    assert told["rows"] == 9 and blanks and ends
    assert all(item["learned"] and not item["prompt"].endswith("<sop>") for item in ends)


def test_what_cannot_be_read_is_refused_or_counted(
    tmp_path: Path, data: Callable[..., Any]
) -> None:
    bad = [*ANSWERED, {"nothing": 1}, *ANSWERED, {"instruction": "no answer"}]
    rows = write_rows(tmp_path / "rows.jsonl", bad)
    code, out, err = data(str(rows), "--json")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{rows}:4: " in err and f"{rows}:8: " in err, "all of the first ones are named"
    told = json.loads(data("--json", "--bad_rows", "skip", "--show", "0", str(rows))[1])
    assert told["rows"] == 6 and sum(item["count"] for item in told["skipped"]) == 2
    places = [place for item in told["skipped"] for place in item["places"]]
    assert any(f"{rows}:4: " in place for place in places)
    assert any(f"{rows}:8: " in place for place in places)
    code, out, _ = data(str(rows), "--bad_rows", "skip")
    assert code == 0 and "rows left out" in out


def test_rows_that_are_too_long(tmp_path: Path, data: Callable[..., Any]) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [*ANSWERED, {"prompt": "x " * 200, "output": "y"}])
    words = (str(rows), "--max_length", "48", "--json")
    code, _, err = data(*words)
    assert code == 2 and f"{rows}:4: the row has " in err
    told = json.loads(data(*words, "--long_rows", "skip")[1])
    assert (told["rows"], told["skipped"]) == (
        3,
        [{"reason": "too long", "count": 1, "places": []}],
    )
    told = json.loads(data(*words, "--long_rows", "cut", "--show", "4")[1])
    last = told["examples"][3]
    assert told["rows"] == 4 and last["prompt_tokens"] + last["learned_tokens"] == 48
    assert last["learned"] == "y" and len(last["prompt"]) < 200


def test_every_file_that_fails_is_named(tmp_path: Path, data: Callable[..., Any]) -> None:
    files = [write_rows(tmp_path / f"{n}.jsonl", [{"nothing": n}]) for n in range(2)]
    _, _, err = data(*map(str, files))
    assert all(f"{file}:1: " in err for file in files)
    _, _, err = data("a.jsonl", "b.jsonl")
    assert "no data file a.jsonl" in err and "no data file b.jsonl" in err


def test_keys_of_a_training_hold(tmp_path: Path, data: Callable[..., Any]) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"q": "frage", "a": "antwort"}])
    config = tmp_path / "sft.yaml"
    config.write_text(f"train_data: [{rows}]\ncolumns: {{prompt: q, response: a}}\nlora_rank: 8\n")
    for words in (["--config", str(config)], [str(rows), "--columns", "prompt=q", "response=a"]):
        told = json.loads(data(*words, "--json")[1])
        assert (told["examples"][0]["prompt"], told["examples"][0]["learned"]) == (
            "frage",
            "antwort",
        )
    told = json.loads(data("--config", str(config), "--val_data", str(rows), "--json")[1] or "{}")
    assert told == {}, "a key that no stage has is refused"
    told = json.loads(data("--config", str(config), "--validation_file", str(rows), "--json")[1])
    assert told["held_out"]["rows"] == 1
    code, _, err = data(str(rows), "--stage", "eval", "--columns", "prompt=q", "response=a")
    assert (code, err) == (0, "")


def test_words_are_taken_apart_in_any_order() -> None:
    whole = (["--train_data", "a", "b", "--x", "1"], "sft", 3, True)
    for words in ("a b --json --x 1", "--json a b --x 1", "a --x 1 --json b", "--x 1 --json a b"):
        asked = read_words(words.split())
        assert (asked.words, asked.stage, asked.show, asked.is_json) == whole
    assert read_words(["--stage", "eval", "a"]).words == ["--eval_data", "a"]
    assert read_words(["--stage=dpo", "a", "--show=7"])[:2] == ("dpo", 7)
    for words in (["--stage"], ["--stage", "rm"], ["a", "--show", "x"]):
        with pytest.raises(KeyProblem, match="stage must be one of pretrain, sft"):
            read_words(words)


def test_help_and_misspelt_keys(data: Callable[..., Any]) -> None:
    code, out, _ = data("--help")
    assert code == 0 and "--stage STAGE" in out and "--json" in out
    code, _, err = data("a.jsonl", "--bad_row", "skip")
    assert code == 2 and "did you mean bad_rows?" in err
