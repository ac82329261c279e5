"""Writes the figures of docs/long_dialogue.md and its plots from docs/long_dialogue.json.

python -m benchmarks.long_page            # take finished runs over, and write page and plots
python -m benchmarks.long_page --check    # exit with 1 if they are not what they would be
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.long_dialogue import OTHER_NAMES, TAUGHT_NAMES
from benchmarks.long_prompts import BOTH_ROWS, RUN
from benchmarks.plots import draw_panels
from benchmarks.records import read_json, take_records
from benchmarks.results import ROOT
from recipes.mini.report import insert_report

DOCS = ROOT / "docs"
RECORD = DOCS / "long_dialogue.json"
PROMPT_MARKS = ("<!-- prompts:begin -->", "<!-- prompts:end -->")
ROUND_MARKS = ("<!-- rounds:begin -->", "<!-- rounds:end -->")
PART = 20  # rounds that a figure of time and memory is taken over
HIGHEST = 1000.0  # perplexities beyond it are not drawn
NOTHING = "No run is recorded yet."


def format_table(rows: Sequence[Sequence[object]]) -> str:
    """Return a table whose first row is its head."""
    lines = [[str(cell) for cell in row] for row in rows]
    lines.insert(1, ["---", *["---:"] * (len(lines[0]) - 1)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def describe_run(run: dict[str, Any]) -> str:
    """Return when and on what a run was made."""
    return f"Measured {run['date']} at {run['commit']} on {run['cpu']}; {run['versions']}."


def perplexity(cell: dict[str, float]) -> float:
    """Return the perplexity of a token of an answer."""
    return math.exp(min(cell["loss"] / cell["tokens"], 50.0))


def format_prompts(run: dict[str, Any] | None) -> str:
    """Return the table of perplexities by length, and where it comes from."""
    if run is None:
        return NOTHING
    cells = run["cells"]
    lengths = sorted({length for row in cells.values() for length in row}, key=int)
    rows: list[list[object]] = [["prompt of up to", *(f"{n} tokens" for n in lengths)]]
    for name, row in cells.items():
        shown = [f"{perplexity(row[n]):.3g}" if n in row else "" for n in lengths]
        rows.append([name, *shown])
    count = run["key"]["count"]
    said = f"Perplexity of a token of the taught answer, {count} prompts of each length, float32."
    return "\n\n".join(
        [format_table(rows), "![Perplexity](long_prompts.svg)", said, describe_run(run)]
    )


def draw_prompts(run: dict[str, Any]) -> str:
    """Return perplexities against the prompt's length, both by powers of ten."""
    lines = {
        name: [
            (cell["prompt_tokens"], perplexity(cell))
            for cell in sorted(row.values(), key=lambda cell: cell["prompt_tokens"])
            if perplexity(cell) <= HIGHEST
        ]
        for name, row in run["cells"].items()
        if name != BOTH_ROWS
    }
    labels = ("tokens of the prompt", "perplexity of the answer")
    return draw_panels(labels, {name: line for name, line in lines.items() if line}, is_log=True)


def summarize(rows: Sequence[Sequence[Any]]) -> list[object]:
    """Return how long a round takes and what is resident, once warm and at the end."""
    warm, last = rows[PART : 2 * PART] or rows[-1:], rows[-PART:]
    seconds = [f"{statistics.median(row[0] for row in part):.2f} s" for part in (warm, last)]
    memory = [f"{statistics.median(row[1] for row in part):.0f} MB" for part in (warm, last)]
    right = sum(bool(row[2]) for row in rows) / len(rows)
    return [len(rows), *seconds, *memory, f"{right:.0%}"]


def format_rounds(run: dict[str, Any] | None) -> str:
    """Return the tables of a long dialogue, and where they come from."""
    if run is None:
        return NOTHING
    variants, count = run["variants"], run["key"]["probes"]
    warm = f"rounds {PART + 1} to {2 * PART}"
    head = ["window", "rounds", warm, f"last {PART}", f"memory, {warm}", f"last {PART}", "right"]
    costs = [head, *([name, *summarize(part["rounds"])] for name, part in variants.items())]
    ends = sorted({end for part in variants.values() for end in part["probes"]}, key=int)
    answers: list[list[object]] = [["behind so many rounds", *ends]]
    for name, part in variants.items():
        shares = [part["probes"].get(end) for end in ends]
        answers.append([name, *("" if n is None else f"{n / count:.0%}" for n in shares)])
    return "\n\n".join(
        [
            "A round, in seconds of the processor with one thread, and the memory of the process;\n"
            "right are answers that are the taught one:",
            format_table(costs),
            "![Time](long_time.svg)",
            f"Right to the letter, of {count} taught questions asked behind the same dialogue:",
            format_table(answers),
            "![Answers](long_answers.svg)",
            "Names that were remembered when so many other rounds had followed:",
            format_recall(variants),
            describe_run(run),
        ]
    )


def format_recall(variants: dict[str, Any]) -> str:
    """Return which names are remembered by distance, those of taught exchanges apart."""
    ends = sorted({end for part in variants.values() for end in part.get("recall", {})}, key=int)
    rows: list[list[object]] = [["window, names", *ends]]
    for name, part in variants.items():
        for kind, names in (("taught", TAUGHT_NAMES), ("others", OTHER_NAMES)):
            cells = [part.get("recall", {}).get(end) for end in ends]
            shown = ["" if c is None else f"{len(set(c) & set(names))}/{len(names)}" for c in cells]
            rows.append([f"{name}, {kind}", *shown])
    return format_table(rows)


def draw_time(run: dict[str, Any]) -> str:
    """Return the seconds of a round over a dialogue, medians of some rounds each."""
    lines = {}
    for name, part in run["variants"].items():
        rows = part["rounds"]
        ends = range(PART, len(rows) + 1, PART)
        lines[name] = [
            (float(end), statistics.median(row[0] for row in rows[end - PART : end]))
            for end in ends
        ]
    return draw_panels(
        ("round", "processor seconds"), {name: line for name, line in lines.items() if line}
    )


def draw_answers(run: dict[str, Any]) -> str:
    """Return the share of right answers by the round that they are asked behind, in percent."""
    count = run["key"]["probes"]
    lines = {
        name: sorted((float(end), 100 * n / count) for end, n in part["probes"].items())
        for name, part in run["variants"].items()
    }
    return draw_panels(("round", "% of the answers right to the letter"), lines)


def build_files(record: dict[str, Any]) -> dict[str, str]:
    """Return what the page and the plots have to be, by file name."""
    page = (DOCS / "long_dialogue.md").read_text(encoding="utf-8")
    page = insert_report(page, format_prompts(record.get("prompts")), PROMPT_MARKS)
    page = insert_report(page, format_rounds(record.get("rounds")), ROUND_MARKS)
    files = {"long_dialogue.md": page}
    drawings: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
        "long_prompts.svg": ("prompts", draw_prompts),
        "long_time.svg": ("rounds", draw_time),
        "long_answers.svg": ("rounds", draw_answers),
    }
    for name, (part, draw) in drawings.items():
        if part in record:
            files[name] = draw(record[part])
    return files


def main(argv: Sequence[str] | None = None) -> int:
    """Write or compare; return the exit code."""
    parser = argparse.ArgumentParser(description="Write docs/long_dialogue.md.")
    parser.add_argument("--check", action="store_true", help="write nothing")
    is_check = parser.parse_args(argv).check
    record = read_json(RECORD) if is_check else take_records(RUN.parent, RECORD)
    for name, text in build_files(record).items():
        path = DOCS / name
        if not is_check:
            path.write_text(text, encoding="utf-8", newline="\n")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            sys.stderr.write(f"{name} is out of date: python -m benchmarks.long_page\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
