"""What the tests of the stages on trl share: toy preferences, commands, and the ids of `chat`."""

import json
import os
import signal
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import ROOT

from chatglm.cli import main

KINDS = {"contrary": "no, it is bad.", "truncated": "yes"}
BETTER = "yes, it is good."
SPECIAL = {
    "prompt": "is <eop> good?",
    "history": [["hello", "hi [gMASK]"]],
    "chosen": BETTER,
    "rejected": "no",
}
# Runs the command line, and dies without a word after a step.
KILLED_RUN = """
import os, signal, sys
import chatglm.training.progress as progress
import chatglm.training.trainer as core
from chatglm.cli import main
from transformers import TrainerCallback

class Killer(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == {step}:
            os.kill(os.getpid(), signal.SIGKILL)

progress.draw_curves = lambda *args: None
build = core.build_callbacks
core.build_callbacks = lambda *args: [*build(*args), Killer()]
sys.exit(main(sys.argv[1:]))
"""


def forget_accelerator() -> None:
    """Let a process have another run, perhaps in another number format."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_pairs(numbers: Iterable[int]) -> list[dict[str, Any]]:
    """Pairs of which a tiny model can learn what the better answers have in common."""
    return [
        {"prompt": f"is {n} good?", "chosen": BETTER, "rejected": rejected, "kind": kind}
        for n in numbers
        for kind, rejected in KINDS.items()
    ]


def words(stage: str, repo: Path, data: Path, output: Path, **keys: Any) -> list[str]:
    given = {
        "model": repo,
        "train_data": data,
        "output": output,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_steps": 1000,
        "report_to": "none",
        "disable_tqdm": True,
        **keys,
    }
    flags = []
    for key, value in given.items():
        flags += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return ["train", stage, *flags]


def train(stage: str, repo: Path, data: Path, output: Path, **keys: Any) -> None:
    """Run a stage, without the pictures of its curves, which take longer than all else."""
    with mock.patch("chatglm.training.progress.draw_curves"):
        assert main(words(stage, repo, data, output, **keys)) == 0


def run_until_killed(python: str, command: list[str], step: int) -> None:
    """Run a command line in a process of its own, which is killed behind a step."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    script = KILLED_RUN.format(step=step)
    done = subprocess.run([python, "-c", script, *command], env=env, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def chat_ids(model: Any, tokenizer: Any, row: dict[str, Any]) -> list[int]:
    """Return the ids that `chat` hands to the model for the question of a row."""
    seen = []

    def generate(**options: Any) -> torch.Tensor:
        seen.append(options["input_ids"])
        return options["input_ids"]

    model.generate = generate
    try:
        model.chat(tokenizer, row["prompt"], row.get("history"))
    finally:
        del model.generate
    return seen[0][0].tolist()


def answer_ids(model: Any, tokenizer: Any, text: str) -> list[int]:
    """Return the ids of an answer as the model writes one, its end token included."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [*ids, model.config.eos_token_id]


def sum_log_probs(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Return the log-probability of an answer, from the logits of the row alone."""
    ids = torch.tensor([prompt + answer])
    log_probs = type(model).forward(model, input_ids=ids, use_cache=False).logits.log_softmax(-1)
    places = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
    return log_probs[0, places, ids[0, len(prompt) :]].sum()


def read_log(output: Path, key: str) -> list[float]:
    """Return what was logged under a key, as the newest checkpoint tells."""
    state = max(output.glob("checkpoint-*/trainer_state.json"), key=lambda p: p.stat().st_mtime)
    return [line[key] for line in json.loads(state.read_text())["log_history"] if key in line]
