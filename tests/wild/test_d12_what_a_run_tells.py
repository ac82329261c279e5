"""D12: a run tells what it is about to learn, and what it did; its last line is never empty."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("chatglm", reason="needs the package")

from training.aligning import write_rows
from transformers import AutoModelForCausalLM, Trainer

from chatglm import cli
from chatglm.training.settings import Settings
from chatglm.training.telling import count_parameters, list_losses

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is dep:FutureWarning",
    "ignore:.*gradient_checkpointing.* is dep:FutureWarning",
)

ROWS = {
    "sft": [{"prompt": f"question {i}", "output": f"answer {i}"} for i in range(4)],
    "pairs": [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": "bad"} for i in range(4)],
    "pretrain": [{"text": f"one two three four five six seven {i}"} for i in range(4)],
}
KIND = {"reward": "pairs", "dpo": "pairs", "pretrain": "pretrain"}
KEYS = {
    "ptuning": ["--pre_seq_len", "2"],
    "ppo": ["--max_new_tokens", "3", "--num_mini_batches", "2", "--num_ppo_epochs", "1"],
    "grpo": ["--num_generations", "2", "--max_completion_length", "3"],
}
SMALL = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--report_to", "none"]
JUDGE = "def judge(prompts, answers, references):\n    return [float(len(a)) for a in answers]\n"


@pytest.fixture
def train(
    tiny_repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[list[str], list[str]]]:
    """Train two steps; returns the lines of output and of errors."""

    def run(stage: str, *words: str, bad: int = 0) -> tuple[list[str], list[str]]:
        kept = ROWS[KIND.get(stage, "sft")]
        data = write_rows(tmp_path / "rows.jsonl", [*kept, *({"nothing": n} for n in range(bad))])
        (tmp_path / "judge.py").write_text(JUDGE)
        rewarded = ["--reward_function", f"{tmp_path}/judge.py:judge"]
        keys = [*KEYS.get(stage, []), *(rewarded if stage in ("ppo", "grpo") else [])]
        places = ["--model", str(tiny_repo), "--output", str(tmp_path / "out")]
        command = ["train", stage, *places, "--train_data", str(data), *SMALL, *keys, *words]
        assert cli.main(command) == 0
        captured = capsys.readouterr()
        return captured.out.splitlines(), captured.err.splitlines()

    return run


@pytest.mark.parametrize("stage", ["pretrain", "sft", "ptuning", "reward", "ppo", "dpo", "grpo"])
def test_every_stage_tells_its_start_and_its_end(
    stage: str, tmp_path: Path, train: Callable[..., Any]
) -> None:
    out, err = train(stage, "--bad_rows", "skip", bad=1)
    said = "\n".join(err)
    assert "rows.jsonl: JSON lines, UTF-8, 4 rows, 4 examples, 1 left out" in said
    assert " parameters are trained (" in said and "chatglm train: 2 steps, each of " in said
    assert "of memory are expected" in said and "tokens of an example: " in said
    assert len([line for line in err if line.startswith("chatglm train:")]) <= 18
    figures = json.loads(out[-1])
    assert figures["steps"] == 2 and figures["seconds"] > 0 and "loss" in figures
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["stage"], summary["rows"], summary["steps"]) == (stage, 4, 2)
    assert [item["count"] for item in summary["skipped"]] == [1]
    assert summary["figures"] == figures and summary["trained_tokens"] > 0
    assert summary["losses"].keys() == {"first", "last", "best"}
    trained, total = summary["parameters"]["trained"], summary["parameters"]["total"]
    assert 0 < trained <= total and f"{trained:,} of {total:,} parameters" in said
    assert summary["versions"]["transformers"] and summary["device"] and summary["command"]


def test_the_first_example_is_shown_as_it_is_learned(train: Callable[..., Any]) -> None:
    _, err = train("sft")
    assert "chatglm train: question 0[[answer 0]]" in err
    _, err = train("sft", "--resume")
    assert err[-1].endswith("It goes on with a larger max_steps or num_train_epochs")


def test_learned_tokens_and_what_is_trained_are_counted(
    tmp_path: Path, train: Callable[..., Any], tiny_repo: Path
) -> None:
    train("sft", "--lora_rank", "2")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tiny_repo, trust_remote_code=True)
    linears: list[Any] = [
        m.query_key_value for m in model.modules() if hasattr(m, "query_key_value")
    ]
    adapters = sum(2 * (linear.in_features + linear.out_features) for linear in linears)
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert summary["parameters"] == {"trained": adapters, "total": whole + adapters}
    assert summary["tokens"] == summary["trained_tokens"], "two steps of two rows are an epoch"
    assert 0 < summary["learned_tokens"] < summary["tokens"]


def test_packed_weights_count_as_what_they_stand_for(tiny_repo: Path) -> None:
    from chatglm.training.models import load_policy

    settings = Settings(model=str(tiny_repo), bits=4, lora_rank=2)
    whole = count_parameters(load_policy(Settings(model=str(tiny_repo))), settings)
    packed = count_parameters(load_policy(settings), settings)
    assert whole.trained == whole.total <= packed.total and packed.trained < whole.trained


def test_held_out_rows_are_measured_once_at_the_end(
    tmp_path: Path, train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    evaluate = Trainer.evaluate

    def note(trainer: Any, *args: Any, **options: Any) -> Any:
        steps.append(trainer.state.global_step)
        return evaluate(trainer, *args, **options)

    monkeypatch.setattr(Trainer, "evaluate", note)
    held_out = write_rows(tmp_path / "held_out.jsonl", ROWS["sft"][:2])
    words = ["--eval_data", str(held_out), "--eval_steps", "1", "--logging_steps", "1"]
    out, err = train("sft", *words)
    assert steps == [1, 2]
    assert json.loads(out[-1])["eval_loss"] > 0
    assert any("held out: 2 examples of " in line for line in err)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["held_out_rows"] == 2 and len(summary["losses"]) == 3


def test_they_are_measured_at_the_end_where_no_step_was_due(
    tmp_path: Path, train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = write_rows(tmp_path / "held_out.jsonl", ROWS["sft"][:2])
    out, _ = train("sft", "--eval_data", str(held_out), "--eval_strategy", "no")
    assert json.loads(out[-1])["eval_loss"] > 0


def test_losses_of_a_short_run_are_their_mean() -> None:
    assert list_losses([{"loss": 2.0}, {"eval_loss": 1.0}, {"loss": 1.5}]) == [2.0, 1.5]
    assert list_losses([{"train_loss": 3.0, "step": 2}]) == [3.0] and list_losses([]) == []


def test_a_stream_tells_of_its_first_rows(train: Callable[..., Any]) -> None:
    _, err = train("sft", "--streaming")
    said = "\n".join(err)
    assert "tokens in these first rows of the stream" in said and "question 0[[answer 0]]" in said
