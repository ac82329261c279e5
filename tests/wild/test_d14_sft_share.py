"""D14: a share of plain answers beside preferences, against forgetting, in DPO, GRPO and PPO."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

pytest.importorskip("chatglm", reason="needs the package")

from aligning import (
    answer_ids,
    chat_ids,
    forget_accelerator,
    make_pairs,
    read_log,
    run_until_killed,
    sum_log_probs,
    train,
    words,
    write_rows,
)
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatglm.cli import main
from chatglm.training.beside import SEED_SHIFT, count_beside, weigh_beside
from chatglm.training.data.batches import pick_rows

# Transformers 5.23 has new names for checkpointing; peft and trl still say the old ones.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated"),
    pytest.mark.usefixtures("pictures"),
]
needs_trl = pytest.mark.skipif(sys.version_info < (3, 11), reason="trl has no release for 3.10")
SHARE = 1 / 3
ANSWERS = [{"prompt": f"{n} and {n}?", "response": f"{n * 2} " * (1 + n % 4)} for n in range(7)]
JUDGE = "def like(prompts, answers, references):\n    return [float(len(a)) for a in answers]\n"
SEED = 42


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_rows(folder / "pairs.jsonl", make_pairs(range(6)))
    write_rows(folder / "answers.jsonl", ANSWERS)
    (folder / "judge.py").write_text(JUDGE)
    return folder


@pytest.fixture(autouse=True)
def forget() -> Any:
    forget_accelerator()
    yield
    forget_accelerator()


def keys_of(stage: str, files: Path, **keys: Any) -> tuple[Path, dict[str, Any]]:
    given = {"sft_data": files / "answers.jsonl", "sft_share": SHARE, "seed": SEED}
    judge = {"reward_function": f"{files / 'judge.py'}:like"}
    if stage == "grpo":
        given |= judge | {"num_generations": 2, "max_completion_length": 4}
    if stage == "ppo":
        given |= judge | {"max_new_tokens": 4, "num_mini_batches": 1, "num_ppo_epochs": 1}
    return files / "pairs.jsonl", given | keys


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


def sum_nats(model: Any, repo: Path, rows: list[int]) -> tuple[Tensor, int]:
    """Return the summed loss of some answers, each row alone, and how many tokens they have."""
    tokenizer, asked = AutoTokenizer.from_pretrained(repo, trust_remote_code=True), load(repo)
    nats, tokens = torch.zeros(()), 0
    for row in (ANSWERS[i] for i in rows):
        answer = answer_ids(asked, tokenizer, row["response"])
        nats = nats - sum_log_probs(model, chat_ids(asked, tokenizer, row), answer)
        tokens += len(answer)
    return nats, tokens


def mean_nats(folder: Path, repo: Path) -> float:
    with torch.no_grad():
        nats, tokens = sum_nats(load(folder), repo, list(range(len(ANSWERS))))
    return float(nats) / tokens


@pytest.mark.parametrize("share", [0.1, 0.2, 1 / 3, 0.333, 0.5, 0.75])
@pytest.mark.parametrize("rows", [1, 2, 4, 6, 8, 64])
def test_plain_rows_are_their_share(rows: int, share: float) -> None:
    beside = count_beside(rows, share)
    assert beside >= 1
    assert beside == 1 or abs(beside - share * (rows + beside)) <= 0.5
    assert weigh_beside(share) == pytest.approx(share / (1 - share))
    assert count_beside(4, 1 / 3) == 2 and weigh_beside(1 / 3) == pytest.approx(0.5)


@needs_trl
@pytest.mark.parametrize("stage", ["dpo", "grpo"])
def test_a_step_is_that_of_both_losses(
    stage: str, files: Path, tiny_repo: Path, tmp_path: Path
) -> None:
    """By plain gradient descent what is added to a step is the slow gradient of the plain rows."""
    rate = 0.05
    exact = {"optim": "sgd", "learning_rate": rate, "max_grad_norm": 1e9, "max_steps": 1}
    exact |= {"gradient_accumulation_steps": 3, "save_steps": 1, "per_device_train_batch_size": 4}
    data, keys = keys_of(stage, files, **exact)
    train(stage, tiny_repo, data, tmp_path / "with", **keys)
    del keys["sft_data"], keys["sft_share"]
    forget_accelerator()
    train(stage, tiny_repo, data, tmp_path / "without", **keys)
    rows = pick_rows(len(ANSWERS), SEED + SEED_SHIFT, 0, 6)
    model = load(tiny_repo)
    nats, tokens = sum_nats(model, tiny_repo, rows)
    (nats / tokens).backward()
    one, other = (load(tmp_path / name).state_dict() for name in ("with", "without"))
    for name, parameter in model.named_parameters():
        step = one[name] - other[name]
        torch.testing.assert_close(step, -rate * 0.5 * parameter.grad, rtol=2e-3, atol=2e-6)
    logged = read_log(tmp_path / "with", "sft_loss")
    assert logged == [
        pytest.approx(float(nats.detach()) / tokens, rel=0.05)
    ]  # a mean of the passes' means
    assert not read_log(tmp_path / "without", "sft_loss")


def test_ppo_learns_its_share_too(files: Path, tiny_repo: Path, tmp_path: Path) -> None:
    data, keys = keys_of("ppo", files, max_steps=1, learning_rate=1e-9)
    train("ppo", tiny_repo, data, tmp_path / "out", **keys)
    (line,) = [json.loads(x) for x in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    rows = pick_rows(len(ANSWERS), SEED + SEED_SHIFT, 0, 2)
    with torch.no_grad():
        nats, tokens = sum_nats(load(tiny_repo), tiny_repo, rows)
    assert line["sft_loss"] == pytest.approx(float(nats) / tokens, rel=1e-4)
    assert "ptx_loss" not in line


@pytest.mark.parametrize("stage", [pytest.param("dpo", marks=needs_trl), "ppo"])
def test_nothing_is_forgotten_while_preferences_are_learned(
    stage: str, files: Path, tiny_repo: Path, tmp_path: Path
) -> None:
    """The same steps with plain rows and without: both learn what is preferred."""
    sft = {"max_steps": 25, "learning_rate": 1e-2, "save_steps": 1000}
    train("sft", tiny_repo, files / "answers.jsonl", tmp_path / "base", **sft)
    data, keys = keys_of(stage, files, max_steps=20, lora_rank=8, lora_targets="all")
    keys["learning_rate"] = 3e-3 if stage == "ppo" else 2e-2
    keys |= {"num_mini_batches": 2, "num_ppo_epochs": 2} if stage == "ppo" else {}
    losses, liked = {"base": mean_nats(tmp_path / "base", tiny_repo)}, {}
    for name in ("with", "without"):
        forget_accelerator()
        train(stage, tmp_path / "base", data, tmp_path / name, **keys)
        merged = tmp_path / f"{name}-merged"
        command = ["merge", str(tmp_path / "base"), str(merged), "--lora", str(tmp_path / name)]
        assert main(command) == 0
        losses[name], liked[name] = mean_nats(merged, tiny_repo), read_liked(stage, tmp_path / name)
        keys = {k: v for k, v in keys.items() if not k.startswith("sft_")}
    assert losses["with"] < losses["base"] < losses["without"], losses
    assert all(last > first for first, last in liked.values()), liked


def read_liked(stage: str, output: Path) -> tuple[float, float]:
    """Return how much what is preferred was preferred, at first and at last."""
    if stage == "dpo":
        margins = read_log(output, "rewards/margins")
        return margins[0], margins[-1]
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    rewards = [line["reward"] for line in lines]
    return sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5


@needs_trl
def test_a_killed_run_goes_on_bit_for_bit(
    files: Path, tiny_repo: Path, tmp_path: Path, quick_python: str
) -> None:
    data, keys = keys_of("dpo", files, save_steps=2, max_steps=6, gradient_accumulation_steps=2)
    keys |= {"per_device_train_batch_size": 2}
    train("dpo", tiny_repo, data, tmp_path / "whole", **keys)
    run_until_killed(quick_python, words("dpo", tiny_repo, data, tmp_path / "cut", **keys), 3)
    forget_accelerator()
    train("dpo", tiny_repo, data, tmp_path / "cut", **keys, resume=True)
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    cut = load_file(tmp_path / "cut" / "model.safetensors")
    assert all(torch.equal(cut[name], tensor) for name, tensor in whole.items())
    assert read_log(tmp_path / "cut", "sft_loss") == read_log(tmp_path / "whole", "sft_loss")


@needs_trl
@pytest.mark.slow
def test_two_processes_learn_as_one(files: Path, tiny_repo: Path, tmp_path: Path) -> None:
    data, keys = keys_of("dpo", files, max_steps=2, save_steps=2, learning_rate=1e-3)
    train("dpo", tiny_repo, data, tmp_path / "one", **keys, per_device_train_batch_size=4)
    command = words("dpo", tiny_repo, data, tmp_path / "two", **keys, per_device_train_batch_size=2)
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch += ["-m", "chatglm.training.command", *command[1:]]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", *launch], env=env, capture_output=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr.decode()
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-5)
    expected = read_log(tmp_path / "one", "sft_loss")
    assert read_log(tmp_path / "two", "sft_loss") == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"sft_share": 0}, "sft_data names 1 files and sft_share is 0.*sft_share: 0.333"),
        ({"sft_data": []}, "sft_data names 0 files"),
        ({"sft_share": 1}, "sft_share must be from 0 to below 1, got 1"),
        ({"sft_share": -0.5}, "sft_share must be"),
        ({"sft_share": 33}, "sft_share must be"),
        ({"ptx_data": "answers.jsonl"}, "ptx_data and sft_data are learned in the same place"),
    ],
)
def test_half_a_wish_is_refused(
    keys: dict[str, Any], said: str,
    files: Path, tiny_repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data, given = keys_of("ppo", files, **keys)
    given = {key: value for key, value in given.items() if value != []}
    assert main(words("ppo", tiny_repo, data, tmp_path / "out", **given)) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and re.search(said, error), error
