"""Trainings killed at random, also while they save and delete: they go on to the very same weights.

A case trains a tiny model in a fork, with a checkpoint behind every step and two of them kept, and
kills it (kill -9): at a random moment, or at a random one of its operations that change files. The
same command with `--resume`, now and then killed once more, must then finish it. Its weights are
bit for bit those of a run that nothing disturbed, its checkpoints are whole and no more than two,
nothing else is left of them, and one more `--resume` changes nothing.
"""

import functools
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.endurance.campaign import Campaign, Case, Finding
from benchmarks.endurance.folders import scratch, write_folder
from benchmarks.endurance.kills import hash_folder, wait
from chatglm.cli import main
from chatglm.training.checkpoints import find_fault, list_checkpoints

STAGES = ("sft", "reward", "ppo", "dpo")
STEPS, KEPT = 6, 2
ROWS = [{"prompt": f"{n} plus 1?", "response": f"it is {n + 1}."} for n in range(12)]
PAIRS = [{"prompt": f"is {n} good?", "chosen": "yes, it is.", "rejected": "no"} for n in range(12)]
REWARDS = "def measure(prompts, answers, references):\n    return [len(a) % 5 for a in answers]\n"
PPO = ["--max_new_tokens", "3", "--num_mini_batches", "1", "--num_ppo_epochs", "1"]
WAYS = ("moment", "operation")
OPERATIONS = ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync")
KILLED_ONCE_MORE = 0.3  # of the runs
KILLED = -signal.SIGKILL
RESULTS = (".safetensors", ".bin")
Words = list[str]


class Truth(NamedTuple):
    """What a run comes to that nothing disturbs.

    Attributes:
        words: its command.
        weights: hashes of what it writes.
        seconds: that it takes.
        operations: that it changes files with.
    """

    words: Words
    weights: dict[str, str]
    seconds: float
    operations: int


def list_runs() -> dict[str, Words]:
    """Return the commands of all kinds of runs, without their output."""
    data = scratch() / "data"
    runs = {}
    for stage in STAGES:
        rows = data / ("rows.jsonl" if stage in ("sft", "ppo") else "pairs.jsonl")
        words = ["train", stage, str(scratch() / "trained"), "--train_data", str(rows)]
        words += ["--max_steps", str(STEPS), "--save_steps", "1", "--save_total_limit", str(KEPT)]
        words += ["--per_device_train_batch_size", "2", "--learning_rate", "0.003"]
        words += ["--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true"]
        if stage == "ppo":
            words += ["--reward_function", f"{data / 'rewards.py'}:measure", *PPO]
        runs[stage] = words
        runs[f"{stage} lora"] = [*words, "--lora_rank", "2"]
    return runs


def write_data() -> None:
    """Write the model and the rows that all runs read."""
    write_folder(scratch() / "trained")
    data = scratch() / "data"
    data.mkdir(exist_ok=True)
    for name, rows in (("rows", ROWS), ("pairs", PAIRS)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (data / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (data / "rewards.py").write_text(REWARDS, encoding="utf-8")


def start(words: Words, kill_at: int | None = None) -> int:
    """Start a training in a fork, and return the process.

    Args:
        words: the command.
        kill_at: the number of the operation at which it kills itself; None for none.
    """
    process = os.fork()
    if process:
        return process
    try:
        errors = os.open(scratch() / "errors", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(errors, 1)
        os.dup2(errors, 2)
        count = count_operations(kill_at)
        for module in ("progress", "run_log"):  # the pictures take longer than all else
            loaded: Any = importlib.import_module(f"chatglm.training.{module}")
            loaded.draw_curves = lambda *args: None
        code = main(words)
        (scratch() / "operations").write_text(str(count[0]), encoding="utf-8")
        sys.stdout.flush()
        os._exit(code)
    finally:
        os._exit(99)


def count_operations(kill_at: int | None) -> list[int]:
    """Count from now on what changes files in this process, which dies before one of them."""
    count = [0]

    def wrap(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if count[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            count[0] += 1
            return function(*args, **kwargs)

        return call

    for name in OPERATIONS:
        setattr(os, name, wrap(getattr(os, name)))
    return count


def kill(words: Words, truth: Truth, way: str, rng: random.Random) -> bool:
    """Run a command and kill it; whether it was not done before."""
    if way == "operation":
        code = wait(start(words, rng.randrange(truth.operations)))
    else:
        process = start(words)
        time.sleep(rng.uniform(0, truth.seconds))
        os.kill(process, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if code not in (0, KILLED):
        raise Finding(f"ends with {code} before it is killed: {read_errors()}")
    return code == KILLED


def finish(words: Words, when: str) -> None:
    """Run a command to its end; `Finding` if it fails."""
    code = wait(start(words))
    if code:
        raise Finding(f"{when} it ends with {code}: {read_errors()}")


def read_errors() -> str:
    """Return the last lines that a run has said."""
    return " ".join((scratch() / "errors").read_text(encoding="utf-8").split())[-500:]


def hash_results(output: Path) -> dict[str, str]:
    """Return the hashes of the weights that a run has written as its result."""
    return {k: v for k, v in hash_folder(output).items() if "/" not in k and k.endswith(RESULTS)}


def check_output(output: Path, truth: Truth) -> None:
    """Raise `Finding` if a finished run's folder is not as an undisturbed one's."""
    if hash_results(output) != truth.weights:
        raise Finding("its weights are others")
    left = list_checkpoints(output)
    if [path.name for path in left] != [f"checkpoint-{STEPS - 1}", f"checkpoint-{STEPS}"]:
        raise Finding(f"it keeps {[path.name for path in left]}")
    for path in left:
        if fault := find_fault(path):
            raise Finding(f"{path.name} is not whole: {fault}")
    if ruins := [path.name for path in output.glob("*-checkpoint-*")]:
        raise Finding(f"it leaves {ruins}: {find_fault(output / ruins[0])}")


def kill_and_go_on(truths: dict[str, Truth], rng: random.Random) -> str:
    """Kill one run, go on with it until it is finished, and look at what it has come to."""
    name, way = rng.choice(list(truths)), rng.choice(WAYS)
    truth, output = truths[name], scratch() / "output"
    begin = [*truth.words, "--output", str(output)]
    again = [*begin, "--resume"]
    try:
        shutil.rmtree(output, ignore_errors=True)
        while not kill(begin, truth, way, rng):
            shutil.rmtree(output)
        if rng.random() < KILLED_ONCE_MORE:
            kill(again, truth, rng.choice(WAYS), rng)
        finish(again, "gone on with")
        check_output(output, truth)
        before = hash_folder(output)
        finish(again, "finished,")
        if hash_folder(output) != before:
            raise Finding("finished, it changes its folder once more")
    except Finding as finding:
        raise Finding(f"{name}, {way}: {finding}") from None
    return f"{name}, {way}"


def prepare() -> Case:
    """Write what all runs read, and run each kind undisturbed."""
    write_data()
    for stage in STAGES:  # the forks then have it
        module = "chatglm.training.ppo.trainer" if stage == "ppo" else f"stages.{stage}"
        importlib.import_module(module if stage == "ppo" else f"chatglm.training.{module}")
    truths = {}
    for name, words in list_runs().items():
        output, begin = scratch() / "output", time.monotonic()
        finish([*words, "--output", str(output)], f"{name}: undisturbed")
        seconds = time.monotonic() - begin
        operations = int((scratch() / "operations").read_text(encoding="utf-8"))
        truths[name] = Truth(words, hash_results(output), seconds, operations)
        shutil.rmtree(output)
    return functools.partial(kill_and_go_on, truths)


CAMPAIGN = Campaign(
    "trainings", "Trainings killed, and gone on with until finished", "kills", 100, 1, prepare
)
