"""Writes what the alignment gave into `docs/mini.md`, between two marks.

    python -m recipes.mini.alignment_page --work DIR

DIR is the folder of `recipes.mini.align`. The figures are kept as `docs/mini_alignment.json`, from
which alone the page is made: `--work` is left out to make it again.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes.mini.report import DOCS, format_table, insert_report

MARKS = ("<!-- alignment:begin -->", "<!-- alignment:end -->")
FIGURES = "mini_alignment.json"
CURVES = {"sft": "mini_sft.png", "reward": "mini_reward.png", "ppo": "mini_ppo.png"}


def collect(work: Path) -> dict[str, Any]:
    """Return the figures of a finished alignment."""
    states = sorted((work / "sft").glob("checkpoint-*/trainer_state.json"))
    if not states:
        raise ValueError(f"{work} holds no finished alignment: run recipes.mini.align first")
    history = json.loads(states[-1].read_text(encoding="utf-8"))["log_history"]
    curve = {str(line["step"]): line["eval_perplexity"] for line in history if "eval_loss" in line}
    pairs = json.loads((work / "reward" / "pairs.json").read_text(encoding="utf-8"))
    comparison = json.loads((work / "comparison.json").read_text(encoding="utf-8"))
    return {"perplexity": curve, "pairs": pairs, **comparison}


def format_pairs(pairs: Mapping[str, Any]) -> str:
    """Return the table of the reward model."""
    rows = [
        [name, part["pairs"], *(f"{part[key]:.1%}" for key in ("accuracy", "longer_wins"))]
        for name, part in {**pairs["kinds"], "all": pairs}.items()
    ]
    return format_table(["the worse answer is", "pairs", "right", "the longer one wins"], rows)


def format_variants(variants: Mapping[str, Any]) -> str:
    """Return the table of the variants."""
    rows = []
    for name, variant in variants.items():
        for group, part in variant["groups"].items():
            reward = part.get("reward")
            rows.append(
                [
                    name,
                    group,
                    f"{part['right'] / part['asked']:.1%}",
                    f"{part['ended'] / part['asked']:.1%}",
                    f"{part['in circles'] / part['asked']:.1%}",
                    "" if reward is None else f"{reward:.2f}",
                    f"{variant['kl']:.2f}",
                ]
            )
    head = ["variant", "questions", "right to the letter", "ended", "in circles", "reward", "KL"]
    return format_table(head, rows)


def format_answers(samples: list[dict[str, str]]) -> str:
    """Return the answers side by side, every character as it is."""
    parts = []
    for number, sample in enumerate(samples, start=1):
        lines = [f"{name}: {text}" for name, text in sample.items()]
        parts.append("\n".join([f"{number}.", "", "~~~~text", *lines, "~~~~"]))
    return "\n\n".join(parts)


def format_page(figures: Mapping[str, Any]) -> str:
    """Return the generated part of the page."""
    perplexity = [[step, f"{value:.2f}"] for step, value in figures["perplexity"].items()]
    parts = [
        "Perplexity of held-out answers while fine-tuning:",
        format_table(["step", "perplexity"], perplexity),
        "![Fine-tuning](mini_sft.png)",
        "The reward model on held-out pairs:",
        format_pairs(figures["pairs"]),
        "![Reward model](mini_reward.png)",
        "The variants on held-out questions, greedy, and their KL from the fine-tuned model in "
        "nats an answer:",
        format_variants(figures["variants"]),
        f"Best on the half of the questions that chooses, and published: **{figures['choice']}**.",
        "![PPO](mini_ppo.png)",
        f"### {len(figures['samples'])} answers side by side",
        format_answers(figures["samples"]),
    ]
    return "\n\n".join(parts)


def write_page(work: Path | None, docs: Path) -> None:
    """Write the page, and figures and curves if there is a folder that they come from."""
    if work is not None:
        text = json.dumps(collect(work), ensure_ascii=False, indent=1) + "\n"
        (docs / FIGURES).write_text(text, encoding="utf-8", newline="\n")
        for stage, name in CURVES.items():
            shutil.copy(work / stage / "curves.png", docs / name)
    figures = json.loads((docs / FIGURES).read_text(encoding="utf-8"))
    page = docs / "mini.md"
    text = insert_report(page.read_text(encoding="utf-8"), format_page(figures), MARKS)
    page.write_text(text, encoding="utf-8", newline="\n")


def main(argv: list[str] | None = None) -> int:
    """Write the page; return the exit code."""
    parser = argparse.ArgumentParser(description="Write the alignment's figures into docs/mini.md.")
    parser.add_argument("--work", type=Path, help="folder of recipes.mini.align")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of mini.md")
    args = parser.parse_args(argv)
    try:
        write_page(args.work, args.docs)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
