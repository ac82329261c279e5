"""D11: what is wrong is said before anything is loaded, all of a kind at once; nothing is left."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("chatglm", reason="needs the package")

from training.aligning import write_rows

from chatglm import cli
from chatglm.training import models

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is dep:FutureWarning")

STAGES = ("pretrain", "sft", "ptuning", "reward", "ppo", "dpo", "grpo")
ROW = {
    "sft": {"prompt": "a", "response": "b"},
    "pairs": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "pretrain": {"text": "some text that is long enough"},
}
LONG = "a row that is too long for its window, " * 20


def make_row(stage: str, text: str = "a") -> dict[str, Any]:
    if stage in ("reward", "dpo"):
        return {"prompt": text, "chosen": "b", "rejected": "c"}
    return {"text": f"{text} and more"} if stage == "pretrain" else {"prompt": text, "output": "b"}


def get_keys(stage: str, tmp_path: Path) -> list[str]:
    judge = tmp_path / "judge.py"
    judge.write_text("def judge(prompts, answers, references):\n    return [0.0] * len(answers)\n")
    return ["--reward_function", f"{judge}:judge"] if stage in ("ppo", "grpo") else []


@pytest.fixture
def refuse(
    tiny_repo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run a stage that is to be refused before a model is loaded, and return what it says."""

    def load(*args: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(models, "_load", load)

    def run(stage: str, *words: str) -> str:
        assert cli.main(["train", stage, "--model", str(tiny_repo), *words]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        return err

    return run


@pytest.mark.parametrize("stage", STAGES)
def test_rows_are_looked_at_before_the_model(
    stage: str, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [make_row(stage), {"nothing": 1}])
    words = ["--train_data", str(data), "--output", str(tmp_path / "deep" / "out")]
    said = refuse(stage, *words, *get_keys(stage, tmp_path))
    assert f"{data}:2" in said and said.count("\n") == 1
    assert not (tmp_path / "deep").exists(), "nothing is left of a run that never began"


@pytest.mark.parametrize("stage", [name for name in STAGES if name != "pretrain"])
def test_long_rows_are_all_counted_before_the_model(
    stage: str, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    rows = [make_row(stage), *(make_row(stage, LONG + str(i)) for i in range(5))]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    words = ["--train_data", str(data), "--output", str(tmp_path / "out"), "--max_length", "64"]
    lengths = {"ppo": ["--max_new_tokens", "8"], "grpo": ["--max_completion_length", "8"]}
    said = refuse(stage, *words, *get_keys(stage, tmp_path), *lengths.get(stage, []))
    assert f"{data}:2: the row has " in said and f"{data}:4: the row has " in said
    assert "and 2 more" in said and not (tmp_path / "out").exists()


def test_rows_of_both_sets_are_told_at_once(tmp_path: Path, refuse: Callable[..., str]) -> None:
    train = write_rows(tmp_path / "train.jsonl", [{"nothing": 1}])
    held_out = write_rows(tmp_path / "held_out.jsonl", [{"nothing": 2}])
    words = ["--train_data", str(train), "--eval_data", str(held_out)]
    said = refuse("sft", *words, "--output", str(tmp_path / "out"))
    assert f"{train}:1" in said and f"{held_out}:1" in said


def test_all_places_that_are_missing_are_told_at_once(
    tmp_path: Path, refuse: Callable[..., str]
) -> None:
    (tmp_path / "file").write_text("x")
    words = ["--train_data", "a.jsonl", "b.jsonl", "--eval_data", "c.jsonl"]
    words += ["--ptx_data", "d.jsonl", "--reward_model", "nobody/e", "--adapter", "no/where/f"]
    said = refuse("ppo", *words, "--output", str(tmp_path / "file" / "out"))
    for name in ("a.jsonl", "b.jsonl", "c.jsonl", "d.jsonl"):
        assert f"there is no data file {name}" in said
    assert "reward_model nobody/e is no folder" in said
    assert "adapter no/where/f is no folder" in said
    assert f"{tmp_path / 'file'} is a file; name another one" in said


def test_answers_beside_are_looked_for_with_the_other_places(
    tmp_path: Path, refuse: Callable[..., str]
) -> None:
    words = ["--train_data", "a.jsonl", "--sft_data", "b.jsonl", "--sft_share", "0.3"]
    said = refuse("dpo", *words, "--output", str(tmp_path / "out"))
    assert "there is no data file a.jsonl" in said and "(train_data)" in said
    assert "there is no data file b.jsonl" in said and "(sft_data)" in said


def test_keys_come_before_places_and_places_before_rows(
    tmp_path: Path, refuse: Callable[..., str]
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"nothing": 1}])
    words = ["--train_data", str(data), "--output", str(tmp_path / "out"), "--eval_data", "away"]
    assert "there is no key lorra" in refuse("sft", *words, "--lorra", "1")
    said = refuse("sft", *words)
    assert "there is no data file away" in said and f"{data}:1" not in said


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["--bits", "4"], "bits=4 packs the weights, which cannot be trained then"),
        (["--dtype", "float16"], "dtype float16 cannot be trained in"),
    ],
)
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "dpo"])
def test_formats_that_cannot_be_trained_are_told_before_rows(
    stage: str, keys: list[str], said: str, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"nothing": 1}])
    words = ["--train_data", str(data), "--output", str(tmp_path / "out"), *keys]
    assert said in refuse(stage, *words, *get_keys(stage, tmp_path))


def test_an_evaluation_looks_at_its_rows_first(tmp_path: Path, refuse: Callable[..., str]) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [make_row("sft", LONG)])
    words = ["--eval_data", str(data), "--output", str(tmp_path / "out"), "--max_length", "32"]
    assert f"{data}:1: the row has " in refuse("eval", *words)
    assert not (tmp_path / "out").exists()
    words = ["--eval_data", "away.jsonl", "--output", str(tmp_path / "out"), "--model", "no/model"]
    assert "away.jsonl" in refuse("eval", *words)


def test_what_was_there_stays(tmp_path: Path, refuse: Callable[..., str]) -> None:
    """A folder of somebody's own is neither emptied nor removed, nor is a run that has begun."""
    data = write_rows(tmp_path / "rows.jsonl", [{"nothing": 1}])
    out = tmp_path / "out"
    out.mkdir()
    refuse("sft", "--train_data", str(data), "--output", str(out))
    assert out.is_dir() and list(out.iterdir()) == []
    (out / "notes.txt").write_text("mine")
    said = refuse("sft", "--train_data", str(data), "--output", str(out))
    assert "is not empty" in said and [path.name for path in out.iterdir()] == ["notes.txt"]


def test_the_prompt_format_is_the_models_without_its_weights(tiny_repo: Path) -> None:
    from chatglm.training.models import load_policy, read_format
    from chatglm.training.settings import Settings

    settings = Settings(model=str(tiny_repo))
    source = read_format(settings)
    rounds = [("q", "a")]
    assert source.build_prompt("x", rounds) == load_policy(settings).build_prompt("x", rounds)
    stored = json.loads((tiny_repo / "config.json").read_text())
    assert source.config.max_sequence_length == stored["max_sequence_length"]
