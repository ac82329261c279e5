"""Supervised fine-tuning as its user runs it: a command, files, a folder that loads."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatglm.cli import main

# Transformers 5.23 has new names for checkpointing; peft and the Trainer still say the old ones.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")


@pytest.fixture(autouse=True)
def draw_where_it_is_looked_at(request: pytest.FixtureRequest) -> None:
    if "whole_model" not in request.node.name:
        request.getfixturevalue("pictures")


ROWS = [
    {"prompt": f"{a} plus {b}?", "response": f"{a} plus {b} is {a + b}."}
    for a in range(1, 7)
    for b in range(1, 5)
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def words(repo: Path, data: Path, output: Path, **keys: Any) -> list[str]:
    given = {
        "model": repo,
        "train_data": data,
        "output": output,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "disable_tqdm": True,
        **keys,
    }
    return ["train", "sft", *(w for key, value in given.items() for w in (f"--{key}", str(value)))]


def train(repo: Path, data: Path, output: Path, **keys: Any) -> None:
    assert main(words(repo, data, output, **keys)) == 0


def read_losses(output: Path) -> list[float]:
    state = max(output.glob("checkpoint-*/trainer_state.json"), key=lambda p: p.stat().st_mtime)
    history = json.loads(state.read_text())["log_history"]
    return [line["loss"] for line in history if "loss" in line]


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def test_the_whole_model_learns_and_loads_again(
    tiny_repo: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    keys = {"eval_data": data, "max_steps": 24, "save_steps": 24, "eval_steps": 12}
    keys |= {"sample_prompts": "1 plus 1?", "warmup_steps": 2, "lr_scheduler_type": "linear"}
    train(tiny_repo, data, output, **keys)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    losses = read_losses(output)
    state = json.loads((output / "checkpoint-24/trainer_state.json").read_text())
    assert all({"tokens/s", "GB"} <= line.keys() for line in state["log_history"] if "loss" in line)
    assert losses[0] > 8 and losses[-1] < losses[0] - 1.5
    assert figures["eval_perplexity"] < 2000
    model, tokenizer = load(output), AutoTokenizer.from_pretrained(output, trust_remote_code=True)
    before = load(tiny_repo).state_dict()
    assert model.state_dict().keys() == before.keys()
    assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])
    assert isinstance(model.chat(tokenizer, "1 plus 1?", max_new_tokens=4)[0], str)
    samples = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in samples][:2] == [12, 24]
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list(output.rglob("events.out.tfevents.*"))


@pytest.mark.parametrize("bits", [0, 4, 8])
def test_adapters_load_onto_the_base_under_the_officials_names(
    bits: int, tiny_repo: Path, data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    train(tiny_repo, data, output, lora_rank=4, bits=bits, max_steps=8)
    weights = load_file(output / "adapter_model.safetensors")
    expected = "base_model.model.transformer.layers.0.attention.query_key_value.lora_A.weight"
    assert expected in weights and len(weights) == 4
    fields = json.loads((output / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == str(tiny_repo)
    assert (fields["r"], fields["lora_alpha"]) == (4, 8)
    adapted = PeftModel.from_pretrained(load(tiny_repo), output)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), adapted.disable_adapter():
        before = adapted(ids).logits
    assert not torch.allclose(adapted(ids).logits, before, atol=1e-4)


def test_adapters_are_trained_further(tiny_repo: Path, data: Path, tmp_path: Path) -> None:
    train(tiny_repo, data, tmp_path / "one", lora_rank=4)
    train(tiny_repo, data, tmp_path / "two", adapter=tmp_path / "one", learning_rate=1e-9)
    first, second = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two")
    )
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-6)


def test_packing_learns_the_same_tokens(tiny_repo: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    train(tiny_repo, data, output, packing=True, max_length=128, per_device_train_batch_size=1)
    losses = read_losses(output)
    assert losses[-1] < losses[0]


def test_checkpointing_and_bf16_train_too(tiny_repo: Path, data: Path, tmp_path: Path) -> None:
    keys = {"gradient_checkpointing": True, "bf16": True, "max_steps": 6}
    train(tiny_repo, data, tmp_path / "out", **keys)
    losses = read_losses(tmp_path / "out")
    assert losses[-1] < losses[0]
    assert load(tmp_path / "out").lm_head.weight.dtype == torch.float32


def run_until_killed(command: list[str], checkpoint: Path) -> None:
    """Start a training and kill it when a checkpoint has been written."""
    threads = str(torch.get_num_threads())  # with another number sums are rounded otherwise
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads}
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE) as process:
        while not (checkpoint / "trainer_state.json").exists() and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        _, stderr = process.communicate()
    assert process.returncode == -signal.SIGKILL, stderr.decode()


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(tiny_repo: Path, data: Path, tmp_path: Path) -> None:
    keys = {"max_steps": 30, "save_steps": 5, "lora_rank": 4, "lora_dropout": 0.1}
    keys["group_by_length"] = True  # orders of its own, several epochs of them
    command = [sys.executable, "-m", "chatglm", *words(tiny_repo, data, tmp_path / "cut", **keys)]
    run_until_killed(command, tmp_path / "cut" / "checkpoint-5")
    assert not (tmp_path / "cut" / "checkpoint-30").exists()
    train(tiny_repo, data, tmp_path / "cut", resume=True, **keys)
    train(tiny_repo, data, tmp_path / "whole", **keys)
    name = "adapter_model.safetensors"
    resumed, straight = (load_file(tmp_path / run / name) for run in ("cut", "whole"))
    assert all(torch.equal(resumed[key], straight[key]) for key in straight)


def refusal(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """Return the one line that a command which fails writes."""
    assert main(list(command)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    return line


def test_what_a_user_gets_wrong_is_one_line(
    tiny_repo: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep me")
    line = refusal(capsys, *words(tiny_repo, data, full))
    assert str(full) in line and "resume: true" in line
    assert [path.name for path in full.iterdir()] == ["mine.txt"]
    out = tmp_path / "out"
    line = refusal(capsys, *words(tiny_repo, data, out, bits=4))
    assert "bits=4" in line and "lora_rank" in line
    line = refusal(capsys, *words(tiny_repo, data, tmp_path / "a", max_length=12))
    assert "data.jsonl:1" in line and "max_length" in line
    line = refusal(capsys, *words(tiny_repo, data, tmp_path / "b", learning_rat=1))
    assert "there is no key learning_rat; did you mean learning_rate?" in line
    line = refusal(capsys, *words(tiny_repo, data, tmp_path / "c", optim="adamm"))
    assert "adamm" in line
    line = refusal(capsys, *words(tiny_repo, data, tmp_path / "d", dtype="float16"))
    assert "float16" in line and "fp16: true" in line


def test_other_settings_do_not_resume(
    tiny_repo: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny_repo, data, tmp_path / "out")
    capsys.readouterr()
    line = refusal(capsys, *words(tiny_repo, data, tmp_path / "out", resume=True, seed=7))
    assert "seed was None" in line and "is 7 now" in line


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(
    tiny_repo: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    keys = {"learning_rate": 1e30, "save_steps": 1, "lr_scheduler_type": "constant"}
    line = refusal(capsys, *words(tiny_repo, data, output, max_grad_norm=0, **keys))
    assert "the loss was nan in step" in line
    assert "is the last good checkpoint" in line and "learning_rate" in line
    assert (output / "checkpoint-1" / "trainer_state.json").exists()


def test_half_a_checkpoint_is_passed_over(tiny_repo: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    train(tiny_repo, data, output, save_steps=2)
    (output / "checkpoint-4" / "trainer_state.json").write_text('{"half":')
    train(tiny_repo, data, output, save_steps=2, resume=True)
    assert (output / "broken-checkpoint-4").is_dir()
    assert json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())
