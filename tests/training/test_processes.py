"""Processes of a launcher, how they end, and what a process does that has none and sees GPUs."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from aligning import forget_accelerator, make_pairs, train, write_rows
from conftest import ROOT

from chatglm.cli import main
from chatglm.training import trainer as core
from chatglm.training.ppo import run as ppo
from chatglm.training.stage import TrainerStage
from chatglm.training.stage_list import STAGES, find_stage

LEAVE = """
import atexit, sys
from chatglm.training.processes import leave
atexit.register(print, "taken apart")
print("done")
leave(int(sys.argv[1]))
"""


@pytest.mark.parametrize("code", [0, 2])
@pytest.mark.parametrize("world_size", [None, "1", "2"])
def test_a_process_ends_with_its_code_and_its_output(code: int, world_size: str | None) -> None:
    env = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    env |= {"PYTHONPATH": str(ROOT)} | ({"WORLD_SIZE": world_size} if world_size else {})
    command = [sys.executable, "-c", LEAVE, str(code)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    lines = ["done"] if world_size == "2" else ["done", "taken apart"]
    assert (done.returncode, done.stdout.split("\n")[:-1]) == (code, lines)


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let this process believe that it sees four GPUs; what it computes is computed on the CPU."""
    forget_accelerator()
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    yield
    forget_accelerator()


LINE = "chatglm: 4 GPUs are seen and cpu alone is used, since no launcher started this process."
REMEDY = "torchrun --nproc_per_node 4 -m chatglm.training.command STAGE"


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize("name", [n for n in STAGES if n not in ("ppo", "eval", "score")])
def test_a_stage_takes_one_of_several_gpus(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever its arguments are: transformers' or those of trl, which would refuse."""
    if name in ("reward", "dpo", "grpo"):
        pytest.importorskip("trl")
    stage = find_stage(name)
    assert isinstance(stage, TrainerStage), "say what a stage without a Trainer does with GPUs"
    settings = stage.settings(output=str(tmp_path))
    given = {"use_cpu": False, "report_to": [], "per_device_train_batch_size": 8}
    arguments = stage.build_arguments(stage.arguments, settings, given, **stage.defaults)
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, 8)
    said = capsys.readouterr().err
    assert said.startswith(LINE) and REMEDY in said and said.count("\n") == 1


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_no_model_is_spread_over_gpus(
    stage: str,
    tiny_repo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two steps and an evaluation, in which DataParallel would be asked to cut the batch."""
    pytest.importorskip("trl")

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("DataParallel")

    monkeypatch.setattr(torch.nn.DataParallel, "__init__", refuse)
    monkeypatch.setattr(core, "save_trained", lambda *args: None)
    rows = make_pairs(range(4))
    if stage == "sft":
        rows = [{"prompt": row["prompt"], "response": row["chosen"]} for row in rows]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    keys = {"use_cpu": False, "dataloader_pin_memory": False, "max_steps": 2, "eval_data": data}
    train(stage, tiny_repo, data, tmp_path / "out", **keys)
    captured = capsys.readouterr()
    assert LINE in captured.err and "eval_loss" in captured.out


@pytest.mark.usefixtures("four_gpus")
def test_ppo_says_so_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has no Trainer, and accelerate spreads nothing: here is but the line."""
    found = SimpleNamespace(
        num_processes=1,
        device=torch.device("cuda:0"),
        distributed_type=SimpleNamespace(value="NO"),
    )
    monkeypatch.setattr(ppo, "Accelerator", lambda **options: found)
    settings = ppo.PpoSettings(output=str(tmp_path), train_data=["x"], reward_function="a:b")
    arguments = ppo.PpoArguments(report_to=[])
    assert ppo.build_accelerator(settings, arguments) is found
    assert capsys.readouterr().err.startswith("chatglm: 4 GPUs are seen and cuda:0 alone is used")
    found.num_processes = 4
    ppo.build_accelerator(settings, arguments)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("count", ["2", "16"])
def test_a_launcher_s_processes_do_not_all_evaluate(
    count: str,
    tiny_repo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All would do the same work and write the same files."""
    monkeypatch.setenv("WORLD_SIZE", count)
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "response": "b"}])
    words = f"train eval {tiny_repo} --eval_data {data} --output {tmp_path / 'out'}"
    assert main(words.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"chatglm: eval runs in one process, and a launcher started {count}")
    assert not (tmp_path / "out").exists()
