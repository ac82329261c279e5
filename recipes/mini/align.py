"""Leads the small model through the pipeline: fine-tuning, reward model, PPO and DPO, comparison.

    python -m recipes.mini.align --data DIR --work DIR [--base FOLDER] [--until STEP]

Each step is a command that a person could type; what is finished is not done again, and what was
broken off goes on where it was.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from recipes.mini.corpus import ROOT

STAGES = Path(__file__).resolve().parent / "stages"


class Step(NamedTuple):
    """A command, and the file that it leaves when it is done."""

    name: str
    words: list[str]
    result: Path


def plan_steps(data: Path, work: Path, base: Path) -> list[Step]:
    """Return the pipeline's steps in their order.

    Args:
        data: folder of `recipes.mini.sources`.
        work: folder of everything that is written.
        base: the model that is started from.
    """
    rows = work / "rows"

    def train(stage: str, model: Path, result: str, *more: str) -> Step:
        words = ["chatglm", "train", stage, "--config", str(STAGES / f"{stage}.yaml")]
        words += ["--model", str(model), "--output", str(work / stage), *more]
        if (work / stage / "settings.yaml").exists():
            words.append("--resume")
        return Step(stage, words, work / stage / result)

    def recipe(name: str, result: Path, *more: str) -> Step:
        return Step(name, [f"recipes.mini.{name}", *more], result)

    def file(name: str) -> str:
        return str(rows / f"{name}.jsonl")

    sft, adapters = work / "sft", "adapter_model.safetensors"
    asked = ["--model", str(sft), "--prompts", file("prompts"), "--out", file("own")]
    pairs = [file("pairs"), file("own")]
    folders = ["--data", str(data), "--work"]
    return [
        recipe("preferences", rows / "prompts_eval.jsonl", *folders, str(rows)),
        train(
            "sft", base, "model.safetensors", "--train_data", file("sft"), "--eval_data",
            file("sft_eval"),
        ),
        recipe("own", rows / "own.jsonl", *asked),
        train(
            "reward", sft, "model.safetensors", "--train_data", *pairs, "--eval_data",
            file("pairs_eval"),
        ),
        train("dpo", sft, adapters, "--train_data", file("own")),
        train(
            "ppo", sft, adapters, "--train_data", file("own"), "--reward_model",
            str(work / "reward"),
        ),
        recipe("comparison", work / "comparison.json", *folders, str(work)),
    ]  # fmt: skip


def main() -> int:
    """Run the steps that are not done; returns the exit code of the first that fails."""
    parser = argparse.ArgumentParser(description="Align the small model.")
    parser.add_argument("--data", type=Path, required=True, help="folder of recipes.mini.sources")
    parser.add_argument("--work", type=Path, required=True, help="folder of everything written")
    parser.add_argument("--base", type=Path, default=ROOT, help="the model (this repository)")
    parser.add_argument("--until", help="the last step to run")
    args = parser.parse_args()
    for step in plan_steps(args.data.resolve(), args.work.resolve(), args.base.resolve()):
        if not step.result.exists():
            done = subprocess.run([sys.executable, "-m", *step.words], cwd=ROOT, check=False)
            if done.returncode:
                return done.returncode
        if step.name == args.until:
            break
    return 0


if __name__ == "__main__":
    sys.exit(main())
