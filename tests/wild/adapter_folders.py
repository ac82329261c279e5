"""Adapters as the stages of `chatglm train` leave them, trained small, and bases beside them."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from aligning import words, write_rows
from model_folders import Weights, stored
from safetensors.torch import save_file

from chatglm import cli

ROWS = [{"prompt": f"is {n} good?", "response": "yes, it is good."} for n in range(8)]
QUERY = "transformer.layers.0.attention.query_key_value.weight"


def train_adapter(
    monkeypatch: pytest.MonkeyPatch, repo: Path | str, output: Path, stage: str = "sft", **keys: Any
) -> Path:
    """Train an adapter for two steps, LoRA unless told otherwise."""
    monkeypatch.setattr("chatglm.training.progress.draw_curves", lambda *args: None)
    data = write_rows(output.parent / "rows.jsonl", ROWS)
    lora = (
        {"lora_rank": 2, "learning_rate": 0.05} if stage == "sft" and "adapter" not in keys else {}
    )
    command = words(stage, Path(repo), data, output, **{"max_steps": 2, **lora, **keys})
    if not str(repo):
        place = command.index("--model")
        del command[place : place + 2]
    assert cli.main(command) == 0
    return output


def write_weights(folder: Path, weights: Weights) -> None:
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_weights(folder: Path, names: str = QUERY, share: float = 0.01) -> Path:
    """Make another base of a copy: matrices of a name are moved, as a fine-tuning does."""
    weights = stored(folder)
    for name, tensor in weights.items():
        if name.endswith(names):
            noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3))
            weights[name] = (tensor.float() * (1 + share * noise)).to(tensor.dtype)
    write_weights(folder, weights)
    return folder


def run(capsys: pytest.CaptureFixture[str], *command: object) -> tuple[int, str, str]:
    """Run a command line; returns its exit code and what it said."""
    capsys.readouterr()
    code = cli.main([str(word) for word in command])
    said = capsys.readouterr()
    told = [line for line in said.err.splitlines() if line.startswith("chatglm: ")]
    return code, said.out, "\n".join(told)


def refuse(capsys: pytest.CaptureFixture[str], *command: object) -> str:
    """Run a command line that is refused; returns the one line."""
    code, _, told = run(capsys, *command)
    assert code == 2, told
    assert "Traceback" not in told
    return told.splitlines()[-1]


def ask(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Let lines stand on standard input."""
    text = "".join(f"{line}\n" for line in lines).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))


def read_origin(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "origin.json").read_text(encoding="utf-8"))
