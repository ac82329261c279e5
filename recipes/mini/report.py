"""Writes what the small model can and cannot do into `docs/mini.md`, from the weights alone.

    python -m recipes.mini.report --data DIR --work DIR [--model ROOT]

The tables and the sample dialogues go between the markers of `docs/mini.md`, whose own text stays
as it is; the numbers also go to `docs/mini_report.json`, the loss curve to `docs/mini_loss.svg`.
Nothing is picked: the samples are drawn with a fixed seed, and answers are printed as they come.
"""

import argparse
import json
import math
import os
import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.mini.corpus import ROOT, Dialogue, Sampler, load_dialogues, split_dialogues
from recipes.mini.curve import draw_curves
from recipes.mini.evaluation import (
    GREEDY,
    MAX_NEW_TOKENS,
    NEAR,
    SEED,
    Question,
    language_of,
    measure_answers,
    measure_losses,
    pick_taught,
    pick_untaught,
)
from recipes.mini.ngram import ORDER, Baseline

DOCS = ROOT / "docs"
BEGIN, END = "<!-- report:begin -->", "<!-- report:end -->"
SAMPLES_PER_LANGUAGE = 15


def read_log(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the training's lines and the held-out ones up to the last saved step.

    A run that was stopped and resumed has logged some steps twice: the later line counts.

    Raises:
        ValueError: if no step was saved, or none logged before that.
    """
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    held_out = {line["step"]: line for line in lines if "held_out_loss" in line}
    training = {line["step"]: line for line in lines if "loss" in line}
    if not held_out:
        raise ValueError(f"{path} has no held-out loss: train until the first state is saved")
    kept = [training[step] for step in sorted(training) if step <= max(held_out)]
    if not kept:
        raise ValueError(
            f"{path} has no training loss up to step {max(held_out)}: train for 20 steps or more"
        )
    return kept, [held_out[step] for step in sorted(held_out)]


def describe_training(log: Path) -> tuple[dict[str, float], str]:
    """Return the training's numbers and its curve as SVG."""
    training, held_out = read_log(log)
    curve = draw_curves(
        {
            "loss of 20 training steps": [(line["step"], line["loss"]) for line in training],
            "loss on held-out examples": [(x["step"], x["held_out_loss"]) for x in held_out],
        }
    )
    facts = {
        "steps": held_out[-1]["step"],
        "hours": held_out[-1]["seconds"] / 3600,
        "tokens": sum(line["tokens"] for line in training),
        "loss": training[-1]["loss"],
        "held_out_loss": held_out[-1]["held_out_loss"],
    }
    return facts, curve


def pick_samples(seen: Sequence[Dialogue], untaught: Sequence[Question]) -> list[Dialogue]:
    """Draw dialogues that begin with an untaught wording, as many in each language."""
    asked = {q.dialogue: q.query for q in untaught if q.source == "seeds"}
    rng = random.Random(SEED)
    drawn: list[Dialogue] = []
    for language in ("zh", "en"):
        pool = [d for d in seen if d.id in asked and language_of(d) == language]
        drawn += rng.sample(pool, SAMPLES_PER_LANGUAGE)
    return [_ask_first(dialogue, asked[dialogue.id]) for dialogue in drawn]


def _ask_first(dialogue: Dialogue, query: str) -> Dialogue:
    """Return a dialogue that begins with one given wording."""
    first, *others = dialogue.rounds
    return dialogue._replace(rounds=[first._replace(questions=[query]), *others])


def talk(model: Any, tokenizer: Any, dialogue: Dialogue) -> dict[str, Any]:
    """Ask the questions of a dialogue one after the other, behind the model's own answers."""
    history: list[tuple[str, str]] = []
    for round_ in dialogue.rounds:
        _, history = model.chat(tokenizer, round_.questions[-1], history, **GREEDY)
    return {"id": dialogue.id, "rounds": history}


def measure(model: Any, tokenizer: Any, data: Path) -> dict[str, Any]:
    """Measure everything that follows from the weights and the data."""
    seen, held_out = split_dialogues(load_dialogues(data))
    sampler = Sampler(seen, tokenizer, model.build_prompt)
    baseline = Baseline(seen, sampler)
    taught, untaught = pick_taught(seen), pick_untaught(seen, held_out)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "losses": {
            "taught": measure_losses(model, baseline, taught, sampler),
            "untaught": measure_losses(model, baseline, untaught, sampler),
        },
        **measure_answers(model, seen, untaught, sampler),
        "samples": [talk(model, tokenizer, d) for d in pick_samples(seen, untaught)],
    }


def format_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table, all columns but the first aligned right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def format_losses(losses: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table of perplexities; of the baseline the best way of counting."""
    rows = []
    for source, taught in losses["taught"].items():
        row: list[object] = [source]
        for part in (taught, losses["untaught"].get(source)):
            row += _perplexities(part) if part else ["-"] * 3
        rows.append(row)
    head = ["source", "taught: rounds", "model", "n-gram", "untaught: rounds", "model", "n-gram"]
    return format_table(head, rows)


def _perplexities(part: Mapping[str, Any]) -> list[object]:
    sums = (part["model"], min(part["baseline"].values()))
    return [part["rounds"], *(f"{math.exp(total / part['tokens']):.2f}" for total in sums)]


def format_wordings(wordings: Mapping[str, Mapping[str, float]]) -> str:
    """Return the table of answers to untaught wordings."""
    rows = []
    for language, score in wordings.items():
        shares = [f"{score[name] / score['asked']:.1%}" for name in ("exact", "near")]
        means = [f"{score[name]:.2f}" for name in ("f1", "chance")]
        rows.append([language, score["asked"], *shares, *means])
    head = ["language", "asked", "the taught answer", f"F1 at least {NEAR}", "mean F1", "by chance"]
    return format_table(head, rows)


def format_arithmetic(arithmetic: Mapping[str, Mapping[str, int]]) -> str:
    """Return the table of sums."""
    rows = [[name, part["asked"], part["right"]] for name, part in arithmetic.items()]
    return format_table(["sums", "asked", "right"], rows)


def format_sample(number: int, sample: Mapping[str, Any]) -> str:
    """Return a dialogue, in a block that shows every character as it is."""
    lines = [f"问：{query}\n答：{answer}" for query, answer in sample["rounds"]]
    return "\n".join([f"{number}. `{sample['id']}`", "", "~~~~text", *lines, "~~~~"])


def format_report(report: Mapping[str, Any]) -> str:
    """Return the generated part of `docs/mini.md`."""
    training, stops = report["training"], report["stops"]
    samples = [format_sample(k, sample) for k, sample in enumerate(report["samples"], start=1)]
    parts = [
        f"{report['parameters']:,} parameters, {training['steps']:,} steps of training, "
        f"{training['tokens']:,} tokens, {training['hours']:.1f} hours. Last loss "
        f"{training['loss']:.2f} in training, {training['held_out_loss']:.2f} held out.",
        "![Loss by step](mini_loss.svg)",
        "### Perplexity of the answers",
        f"The n-gram is of order {ORDER}; each of its cells is the best of three ways of counting.",
        format_losses(report["losses"]),
        "### Answers to wordings that were not taught",
        format_wordings(report["wordings"]),
        f"Of all {stops['asked']} questions that were not taught, {stops['stopped']} got an answer "
        f"that ended by itself within {MAX_NEW_TOKENS} tokens.",
        "### Arithmetic",
        format_arithmetic(report["arithmetic"]),
        f"### {len(samples)} sample dialogues",
        *samples,
    ]
    return "\n\n".join(parts)


def insert_report(text: str, generated: str, marks: tuple[str, str] = (BEGIN, END)) -> str:
    """Put the generated part between the markers, and leave the rest as it is.

    Raises:
        ValueError: if the text has not exactly one of each marker, in this order.
    """
    before, begin, rest = text.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not begin or not end or any(mark in after for mark in marks):
        raise ValueError(f"mini.md needs one line {marks[0]} and, below it, one line {marks[1]}")
    return f"{before}{marks[0]}\n\n{generated}\n\n{marks[1]}{after}"


def write_report(args: argparse.Namespace) -> None:
    """Measure, and write the three files once all is known."""
    text = (args.docs / "mini.md").read_text(encoding="utf-8")
    training, curve = describe_training(args.work / "log.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, trust_remote_code=True, dtype=torch.float32
    ).eval()
    # Or every answer would warn that its own limit goes before that of generation_config.json.
    model.generation_config.max_length = None
    report = {"training": training, **measure(model, tokenizer, args.data)}
    new_text = insert_report(text, format_report(report))
    numbers = json.dumps(report, ensure_ascii=False, indent=1) + "\n"
    files = {"mini.md": new_text, "mini_report.json": numbers, "mini_loss.svg": curve}
    for name, content in files.items():
        (args.docs / name).write_text(content, encoding="utf-8", newline="\n")


def main(argv: list[str] | None = None) -> int:
    """Write the report; return the exit code."""
    parser = argparse.ArgumentParser(description="Measure the small model and write docs/mini.md.")
    parser.add_argument("--data", type=Path, required=True, help="folder of recipes.mini.sources")
    parser.add_argument("--work", type=Path, required=True, help="folder of recipes.mini.train")
    parser.add_argument("--model", type=Path, default=ROOT, help="folder of the checkpoint")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of mini.md")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        write_report(args)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
