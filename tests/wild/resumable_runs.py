"""Small trainings of every kind that are interrupted at a step, and gone on with in one process."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import TrainerCallback

from chatglm.cli import main
from chatglm.training import progress, run_log
from chatglm.training import trainer as core
from chatglm.training.ppo.trainer import PpoTrainer

SIZE = 2
ROWS = [{"prompt": f"{n} plus 1?", "response": f"it is {n + 1}."} for n in range(6 * SIZE)]
PAIRS = [{"prompt": f"is {n} good?", "chosen": "yes, it is.", "rejected": "no"} for n in range(12)]
REWARDS = "def measure(prompts, answers, references):\n    return [len(a) % 5 for a in answers]\n"
LORA, FULL = {"lora_rank": 2}, {}
# Each learns 6 steps, an epoch.
PPO = {"max_new_tokens": 3, "num_mini_batches": 1, "num_ppo_epochs": 1, "num_train_epochs": 1}


def write_data(folder: Path) -> Path:
    """Write rows for every stage."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("rows", ROWS), ("pairs", PAIRS)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def words(stage: str, repo: Path, data: Path, output: Path, **keys: Any) -> list[str]:
    """Return the command line of a run of 6 steps with a checkpoint behind every second one."""
    name = "pairs" if stage in ("dpo", "reward") else "rows"
    given = {
        "model": repo,
        "train_data": data / f"{name}.jsonl",
        "output": output,
        "num_train_epochs": 1,
        "per_device_train_batch_size": SIZE,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    if stage == "ppo":
        given |= PPO | {"reward_function": f"{data / 'rewards.py'}:measure"}
    given |= keys
    flags = [(f"--{key}", str(value)) for key, value in given.items() if value is not None]
    return ["train", stage, *(word for flag in flags for word in flag)]


class Interrupter(TrainerCallback):
    """Ends a run as Ctrl-C does.

    Args:
        step: behind which it does.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@contextlib.contextmanager
def without_pictures() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (progress, run_log):
            patch.setattr(module, "draw_curves", lambda *args: None)
        yield


def run(*command: str) -> int:
    """Run a command line, and return its exit code."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    with without_pictures():
        return main(list(command))


def run_interrupted(step: int, *command: str) -> int:
    """Run a command line that is interrupted behind a step, before a checkpoint is written."""
    build, take = core.build_callbacks, PpoTrainer.take_step

    def take_or_end(self: Any) -> Any:
        if self.run.step == step - 1:
            raise KeyboardInterrupt
        return take(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "build_callbacks", lambda *a: [*build(*a), Interrupter(step)])
        patch.setattr(PpoTrainer, "take_step", take_or_end)
        return run(*command)


def hash_results(folder: Path) -> dict[str, str]:
    """Return the hashes of the weights that a run has written."""
    files = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    """Return when each file of a folder was changed, and to what."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in files
    }
