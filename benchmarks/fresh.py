"""Measures fresh processes: their first answer and first prompt, and the memory of a long chat.

Owns the turns of such processes and the curve of their memory. What a process does is in
`first_answer`.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.contenders import ask_prefill, parse_recipe, start_ours
from benchmarks.full_size import Recipe, save_folder
from benchmarks.results import Case, Recorder, read_commit
from benchmarks.workers import Spread
from chatglm.process_memory import read_status

ROOT = Path(__file__).resolve().parent.parent
PLAIN_IMPORTS = (
    "import torch, transformers; from transformers import PreTrainedModel, GenerationMixin"
)
IMPORTS_NAME = "torch and transformers"
LATER_PROMPTS = 3
MEMORY_POINTS = 80  # of the curve
MEMORY_STEP = 0.05  # seconds between two looks
OWN_FIGURES = (
    ("own model, prefill", "prefill_tokens_per_second", "tokens/s"),
    ("own model, decode", "milliseconds_per_token", "ms/token"),
    ("own model, load", "load_seconds", "s"),
)


def run_first_answer(
    folder: Path,
    args: argparse.Namespace,
    recipe: Recipe,
    context: int = 0,
    checkout: Path = ROOT,
) -> tuple[dict[str, float], list[tuple[float, int]]]:
    """Run one fresh process, and return what it said and its resident bytes over the seconds.

    What it holds while it ends is left out: with CUDA in it, PyTorch 2.14 grows by 70 MB then.
    Older checkouts do not say when that is.
    """
    command = [sys.executable, "-m", "benchmarks.first_answer", str(folder)]
    command += ["--dtype", recipe.dtype, "--threads", str(args.threads)]
    command += ["--context", str(context), *(["--alone"] if recipe.alone else [])]
    curve = []
    began = time.monotonic()
    command += ["--began", str(began)]
    variables = {**os.environ, "PYTHONPATH": str(checkout)}
    options: Any = {"cwd": checkout, "env": variables, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **options) as process:
        while process.poll() is None:
            curve.append((time.monotonic() - began, read_status("VmRSS", process.pid)))
            time.sleep(MEMORY_STEP)
        assert process.stdout is not None
        said = process.stdout.read().splitlines()
    if process.returncode:
        raise ValueError(f"the answering process ended with exit code {process.returncode}")
    figures = json.loads(said[-1])
    done = figures.get("done", math.inf)
    return figures, [(moment, size) for moment, size in curve if moment <= done]


def measure_seconds(
    folder: Path, args: argparse.Namespace, recipe: Recipe, versions: str, recorder: Recorder
) -> None:
    """Measure how long fresh processes take, in turns with those of another checkout."""
    roots = [ROOT, *([args.checkout.resolve()] if args.checkout else [])]
    names = [f"ours {recipe}", *(f"{read_commit(root)} {recipe}" for root in roots[1:])]
    rounds, imports = [], []
    for number in range(args.rounds + 1):
        imports.append(time_imports())
        said = [run_first_answer(folder, args, recipe, checkout=root)[0] for root in roots]
        rounds += [said] if number else []  # the first ones warm the disk cache
    record_imports(recorder, versions, names[0], imports[1:], [said[0] for said in rounds])
    for case, key in (("start to loaded", "loaded"), ("start to answer", "answered")):
        place = Case(names[0], case, versions, rounds=len(rounds))
        ours, *peers = [[said[key] for said in figures] for figures in zip(*rounds)]
        if not peers:
            recorder.add(place, Spread.of(ours), "s")
        for name, peer in zip(names[1:], peers):
            ratio = Spread.of([theirs / own for own, theirs in zip(ours, peer)])
            recorder.add(place, Spread.of(ours), "s", ratio, name)
            recorder.add(place._replace(contender=name), Spread.of(peer), "s")


def time_imports() -> float:
    """Return the seconds of a process that imports what every program around a model does."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", PLAIN_IMPORTS], check=True)
    return time.monotonic() - began


def record_imports(
    recorder: Recorder,
    versions: str,
    name: str,
    imports: Sequence[float],
    answers: Sequence[dict[str, float]],
) -> None:
    """Record the plain imports' time, and that of an answer in units of it, paired by round."""
    place = Case(IMPORTS_NAME, "imports alone", versions, rounds=len(imports))
    recorder.add(place, Spread.of(imports), "s")
    prices = [said["answered"] / alone for said, alone in zip(answers, imports)]
    place = Case(name, "start to answer", versions, rounds=len(prices))
    recorder.add(place, Spread.of(prices), "imports alone")


def measure_first(args: argparse.Namespace, recorder: Recorder) -> None:
    """Measure the first prompt of processes beside later ones of the same length."""
    for text in args.ours:
        recipe = parse_recipe(text)._replace(layers=args.layers)
        answers = [time_prompts(recipe, args) for _ in range(max(1, args.rounds // 2))]
        with start_ours(recipe, args.threads) as worker:
            versions = worker.facts["versions"]
        case = Case(f"ours {recipe}", "first prompt", versions, args.first, rounds=len(answers))
        recorder.add(case, Spread.of([first for first, _ in answers]), "s")
        recorder.add(case, Spread.of([first / later for first, later in answers]), "later prompts")


def time_prompts(recipe: Recipe, args: argparse.Namespace) -> tuple[float, float]:
    """Return the seconds of a new process's first prompt, and the middle of later ones."""
    with start_ours(recipe, args.threads) as worker:
        task = ask_prefill(args.first)
        first, *later = [task(worker) for _ in range(1 + LATER_PROMPTS)]
    return first, Spread.of(later).median


def measure_start(args: argparse.Namespace, recorder: Recorder) -> None:
    """Measure fresh processes that load a quantized checkpoint from a warm disk cache."""
    import torch

    recipe = parse_recipe(args.ours[0])._replace(layers=args.layers)
    versions, name = f"torch {torch.__version__}", f"ours {recipe}"
    with tempfile.TemporaryDirectory(prefix="chatglm-6b-random-", dir=args.dir) as parent:
        folder = Path(parent) / "model"
        folder.mkdir()
        save_folder(folder, recipe._replace(dtype="float16"))
        if "start" in args.only:
            measure_seconds(folder, args, recipe, versions, recorder)
        if "memory" in args.only:
            said, curve = run_first_answer(folder, args, recipe, args.chat_tokens)
            peak = Case(name, "peak memory", versions, args.chat_tokens)
            recorder.add(peak, Spread.of([said["peak"] / 1e9]), "GB")
            beyond = said["peak"] - said["weights"] - args.chat_tokens * said["position"]
            recorder.add(peak, Spread.of([beyond / 1e9]), "GB beyond weights and cache")
            for seconds, resident in curve[:: len(curve) // MEMORY_POINTS + 1]:
                point = Case(name, "memory over time", versions, round(1000 * seconds))
                recorder.add(point, Spread.of([resident / 1e9]), "GB", is_point=True)


def measure_own(args: argparse.Namespace, recorder: Recorder) -> None:
    """Measure the model of this repository by its own command, in a process each round."""
    command = [sys.executable, "-m", "chatglm", "bench", str(ROOT), "--device", "cpu", "--json"]
    command += ["--threads", str(args.threads)]
    reports = []
    for _ in range(args.rounds):
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
        reports.append(json.loads(done.stdout))
    versions = f"torch {reports[0]['versions']['torch']}"
    for case, key, unit in OWN_FIGURES:
        figures = Spread.of([report[key] for report in reports])
        size = reports[0]["prompt_length"]
        name = f"this repository, {reports[0]['dtype']}"
        recorder.add(Case(name, case, versions, size, rounds=len(reports)), figures, unit)
