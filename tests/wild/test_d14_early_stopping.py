"""D14: a training ends when held-out rows get no better, and what is written is its best model."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("chatglm", reason="needs the package")

import aligning
from aligning import make_pairs, run_until_killed, write_rows
from safetensors.torch import load_file

from chatglm.cli import main
from chatglm.training.early_stopping import count_stale

# Transformers 5.23 has new names for checkpointing; peft and trl still say the old ones.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated"),
    pytest.mark.usefixtures("pictures"),
]
PATIENCE = 2
JUDGE = "def like(prompts, answers, references):\n    return [float(len(a)) for a in answers]\n"


def make_rows(answer: str) -> list[dict[str, Any]]:
    return [{"prompt": f"{n} plus 1?", "response": answer} for n in range(8)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows to learn, and held-out ones that say the contrary, which soon get worse."""
    folder = tmp_path_factory.mktemp("files")
    write_rows(folder / "sft.jsonl", make_rows("yes, it is 1 2 3."))
    write_rows(folder / "sft_held.jsonl", make_rows("yes no it 1 no."))
    pairs = make_pairs(range(4))
    write_rows(folder / "pairs.jsonl", pairs)
    turned = [{**p, "chosen": p["rejected"], "rejected": p["chosen"]} for p in pairs]
    write_rows(folder / "pairs_held.jsonl", turned)
    texts = [{"text": text * 20} for text in ("the sun ", "the moon ")]
    write_rows(folder / "texts.jsonl", texts)
    write_rows(folder / "texts_held.jsonl", [{"text": "no yes no 1 2 3 4 5 6 7 8 9 0" * 3}])
    (folder / "judge.py").write_text(JUDGE)
    return folder


STAGES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sft": ("sft", "sft", {"learning_rate": 1e-2}),
    "lora": ("sft", "sft", {"lora_rank": 4, "learning_rate": 3e-2, "lora_bias": "all"}),
    "qlora": ("sft", "sft", {"lora_rank": 4, "bits": 4, "learning_rate": 3e-2}),
    "ptuning": ("ptuning", "sft", {"pre_seq_len": 4, "learning_rate": 0.3}),
    "packed prefix": ("ptuning", "sft", {"pre_seq_len": 4, "bits": 8, "learning_rate": 0.3}),
    "pretrain": ("pretrain", "texts", {"max_length": 32, "learning_rate": 1e-2}),
    "reward": ("reward", "pairs", {"lora_rank": 4, "learning_rate": 1e-2}),
    "dpo": ("dpo", "pairs", {}),
}


def words(*args: Any, **keys: Any) -> list[str]:
    """A command line, without the keys that are None."""
    command = aligning.words(*args, **keys)
    while "None" in command:
        place = command.index("None")
        del command[place - 1 : place + 1]
    return command


def train(*args: Any, **keys: Any) -> None:
    assert main(words(*args, **keys)) == 0


def read_state(output: Path) -> dict[str, Any]:
    last = max(output.glob("checkpoint-*/trainer_state.json"), key=lambda p: p.stat().st_mtime)
    return json.loads(last.read_text())


def read_figures(output: Path, key: str = "eval_loss") -> dict[int, float]:
    return {x["step"]: x[key] for x in read_state(output)["log_history"] if key in x}


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    files = ("adapter_model.safetensors", "model.safetensors", "pytorch_model.bin")
    file = next(folder / name for name in files if (folder / name).is_file())
    return torch.load(file) if file.suffix == ".bin" else load_file(file)


def keys_of(files: Path, kind: str, **keys: Any) -> tuple[str, Path, dict[str, Any]]:
    stage, data, more = STAGES[kind]
    if stage in ("dpo", "reward"):
        pytest.importorskip("trl", reason="trl has no release for Python 3.10")
    given = {"eval_data": files / f"{data}_held.jsonl", "eval_steps": 2, "save_steps": 2}
    given |= {"max_steps": 60, "early_stopping_patience": PATIENCE, **more, **keys}
    return stage, files / f"{data}.jsonl", given


@pytest.mark.parametrize("kind", STAGES)
def test_the_run_ends_and_the_best_model_is_written(
    kind: str, files: Path, tiny_repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage, data, keys = keys_of(files, kind)
    keys["save_steps"] = None  # follows
    train(stage, tiny_repo, data, tmp_path / "out", **keys)
    figures = read_figures(tmp_path / "out")
    best = min(figures, key=lambda step: figures[step])
    assert max(figures) == best + 2 * PATIENCE < 60
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["eval_loss"] == pytest.approx(figures[best], rel=1e-5)
    kept = read_weights(tmp_path / "out" / f"checkpoint-{best}")
    for name, tensor in read_weights(tmp_path / "out").items():
        assert torch.equal(tensor, kept[name]), name
    last = read_weights(tmp_path / "out" / f"checkpoint-{max(figures)}")
    assert any(not torch.equal(tensor, last[name]) for name, tensor in kept.items())


def test_groups_are_stopped_by_their_reward(files: Path, tiny_repo: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="trl has no release for Python 3.10")
    keys = {"reward_function": f"{files / 'judge.py'}:like", "num_generations": 2}
    keys |= {"eval_data": files / "sft_held.jsonl", "eval_steps": 1, "max_completion_length": 4}
    keys |= {"early_stopping_patience": 2, "early_stopping_threshold": 1000, "max_steps": 30}
    keys |= {"per_device_eval_batch_size": 4, "save_steps": None}
    train("grpo", tiny_repo, files / "sft.jsonl", tmp_path / "out", **keys)
    rewards = read_figures(tmp_path / "out", "eval_reward")
    assert list(rewards) == [1, 2, 3]  # nothing is better by 1000
    state = read_state(tmp_path / "out")
    assert state["best_metric"] == max(rewards.values())


@pytest.mark.parametrize("moved", [False, True])
def test_patience_outlives_a_kill(
    moved: bool, files: Path, tiny_repo: Path, tmp_path: Path, quick_python: str
) -> None:
    """One evaluation is worse before the kill, the other one behind it."""
    stage, data, keys = keys_of(files, "sft", save_total_limit=1)
    train(stage, tiny_repo, data, tmp_path / "whole", **keys)
    figures = read_figures(tmp_path / "whole")
    best = min(figures, key=lambda step: figures[step])
    command = words(stage, tiny_repo, data, tmp_path / "cut", **keys)
    run_until_killed(quick_python, command, best + 3)
    output = tmp_path / "cut"
    if moved:
        output = output.rename(tmp_path / "away")
    command[command.index("--output") + 1] = str(output)
    if moved:
        text = (output / "settings.yaml").read_text().replace(str(tmp_path / "cut"), str(output))
        (output / "settings.yaml").write_text(text)
    assert main([*command, "--resume"]) == 0
    assert read_figures(output) == figures
    expected = read_weights(tmp_path / "whole")
    assert all(torch.equal(t, expected[n]) for n, t in read_weights(output).items())


def test_perplexity_is_better_when_it_is_smaller(
    files: Path, tiny_repo: Path, tmp_path: Path
) -> None:
    stage, data, keys = keys_of(files, "sft", metric_for_best_model="perplexity")
    train(stage, tiny_repo, data, tmp_path / "out", **keys)
    figures = read_figures(tmp_path / "out", "eval_perplexity")
    assert read_state(tmp_path / "out")["best_metric"] == min(figures.values())
    assert len(figures) > PATIENCE + 1


def test_the_best_is_written_without_patience_too(
    files: Path, tiny_repo: Path, tmp_path: Path
) -> None:
    stage, data, keys = keys_of(files, "sft", load_best_model_at_end=True, max_steps=40)
    del keys["early_stopping_patience"], keys["eval_steps"]
    train(stage, tiny_repo, data, tmp_path / "out", **keys)
    figures = read_figures(tmp_path / "out")
    best = min(figures, key=lambda step: figures[step])
    assert list(figures) == list(range(2, 41, 2)) and best < 40
    kept = read_weights(tmp_path / "out" / f"checkpoint-{best}")
    assert all(torch.equal(t, kept[n]) for n, t in read_weights(tmp_path / "out").items())


def test_the_last_model_is_written_where_that_is_asked_for(
    files: Path, tiny_repo: Path, tmp_path: Path
) -> None:
    keys = {"load_best_model_at_end": False, "save_steps": 1000}
    stage, data, keys = keys_of(files, "sft", **keys)
    train(stage, tiny_repo, data, tmp_path / "out", **keys)
    figures = read_figures(tmp_path / "out")
    assert max(figures) == min(figures, key=lambda step: figures[step]) + 2 * PATIENCE
    last = read_weights(tmp_path / "out" / f"checkpoint-{max(figures)}")
    assert all(torch.equal(t, last[n]) for n, t in read_weights(tmp_path / "out").items())


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("sft", {"eval_data": None}, "early_stopping_patience looks at held-out rows: set eval_data"),
    ("sft", {"save_steps": 4}, "eval_steps=2 and save_steps=4 not every evaluation"),
    ("sft", {"save_strategy": "epoch"}, "save_strategy=epoch writes none"),
    ("sft", {"eval_strategy": "no"}, "needs evaluations"),
    ("sft", {"metric_for_best_model": "rouge"}, "rouge, and the figures .* perplexity"),
    ("sft", {"early_stopping_patience": -1}, "patience must be 0 or more"),
    ("sft", {"early_stopping_threshold": -0.5}, "threshold must be 0 or more"),
    ("dpo", {"metric_for_best_model": "perplexity"}, r"figures .* loss, rewards/\*"),
    ("sft", {"eval_data": None, "early_stopping_patience": 0, "load_best_model_at_end": True},
     "load_best_model_at_end looks at held-out rows"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "change", "said"), REFUSED)
def test_what_cannot_choose_a_model_is_refused_before_one_is_loaded(
    kind: str, change: dict[str, Any], said: str,
    files: Path, tiny_repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    stage, data, keys = keys_of(files, kind, **change)
    repo = shutil.copytree(tiny_repo, tmp_path / "repo")
    next(repo.glob("*.safetensors")).unlink()  # whoever loads it trips over that
    assert main(words(stage, repo, data, tmp_path / "out", **keys)) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    with pytest.raises(ValueError, match=said):
        raise ValueError(error)


def test_a_run_without_an_evaluation_is_refused(
    files: Path, tiny_repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage, data, keys = keys_of(files, "sft", eval_steps=500, save_steps=500)
    assert main(words(stage, tiny_repo, data, tmp_path / "out", **keys)) == 2
    assert "60 steps and is evaluated every 500: lower eval_steps" in capsys.readouterr().err


def test_ppo_refuses_it_by_name(
    files: Path, tiny_repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"reward_function": f"{files / 'judge.py'}:like", "early_stopping_patience": 2}
    assert main(words("ppo", tiny_repo, files / "sft.jsonl", tmp_path / "out", **keys)) == 2
    assert "early_stopping_patience is not for ppo" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "is_rising", "threshold", "stale"),
    [
        ([], False, 0.0, 0),
        ([3.0], False, 0.0, 0),
        ([3, 2, 1], False, 0.0, 0),
        ([3, 2, 2, 2], False, 0.0, 2),
        ([1, 2, 3], False, 0.0, 2),
        ([1, 2, 3], True, 0.0, 0),
        # Small gains are no progress, and still move what is to be beaten.
        ([3, 2.9, 2.8, 2.7], False, 0.15, 3),
        ([3, 2.9, 2.7], False, 0.15, 0),
        ([3, math.nan, 2.0], False, 0.0, 0),
    ],
)
def test_evaluations_without_progress_are_counted(
    values: list[float], is_rising: bool, threshold: float, stale: int
) -> None:
    history = [{"eval_loss": value, "step": 1} for value in values]
    history.insert(0, {"loss": 0.0, "step": 1})
    for name in ("loss", "eval_loss"):
        assert count_stale(history, name, is_rising, threshold) == stale
