"""The number format that a training computes in is the configuration's, and only that run's."""

from pathlib import Path
from typing import Any

import pytest
from aligning import forget_accelerator, train, words, write_rows

from chatglm.cli import main
from chatglm.training import stage
from chatglm.training.precision import LAUNCHER

# transformers 5 calls checkpointing by another name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is dep:FutureWarning")


@pytest.fixture(autouse=True)
def a_process_without_accelerate() -> Any:
    """Begin and end as a process that has had no run."""
    forget_accelerator()
    yield
    forget_accelerator()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"prompt": f"is {n} good?", "response": "yes"} for n in range(8)]
    return write_rows(tmp_path / "rows.jsonl", rows)


@pytest.fixture
def formats(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The number formats of the runs that follow, as accelerate has them."""
    found: list[str] = []
    evaluate = stage.train_and_evaluate

    def note(trainer: Any, *args: Any) -> Any:
        found.append(trainer.accelerator.mixed_precision)
        return evaluate(trainer, *args)

    monkeypatch.setattr(stage, "train_and_evaluate", note)
    return found


def test_a_run_in_half_is_not_the_next_one_s(
    tiny_repo: Path,
    data: Path,
    tmp_path: Path,
    formats: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(LAUNCHER, raising=False)
    train("sft", tiny_repo, data, tmp_path / "half", max_steps=1, bf16=True)
    train("sft", tiny_repo, data, tmp_path / "whole", max_steps=1)
    assert formats == ["bf16", "no"]


def test_a_launcher_may_ask_for_the_same(
    tiny_repo: Path,
    data: Path,
    tmp_path: Path,
    formats: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(LAUNCHER, "bf16")
    train("sft", tiny_repo, data, tmp_path / "out", max_steps=1, bf16=True)
    assert formats == ["bf16"]


@pytest.mark.parametrize("stage_name", ["sft", "ppo"])
@pytest.mark.parametrize("launched", ["bf16", "fp16", "fp8"])
def test_a_launcher_that_asks_for_another_format_is_refused(
    stage_name: str,
    launched: str,
    tiny_repo: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(LAUNCHER, launched)
    (tmp_path / "judge.py").write_text("def count(prompts, answers, references): return []")
    keys = {"ppo": {"reward_function": f"{tmp_path / 'judge.py'}:count"}}.get(stage_name, {})
    command = words(stage_name, tiny_repo, data, tmp_path / "out", max_steps=1, **keys)
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"mixed_precision {launched}" in line and "the configuration for no" in line
    remedy = "use bf16 or fp16" if launched == "fp8" else f"set {launched}: true"
    assert remedy in line
    assert not (tmp_path / "out").exists()
