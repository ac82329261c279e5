"""Speed of the whole model: reading prompts, decoding behind contexts, batches, and the start.

    python -m benchmarks.bench_generate [--only CASE ...] [--layers N] [--threads N] [--rounds N]
        [--ours bits=4 bits=4,group_size=32,embeddings=1 bits=4,dtype=bfloat16,alone=1 ...]
        [--chatglm-cpp PYTHON] [--original DIR --original-python PYTHON] [--checkout DIR] [--write]

Cases: `prefill` (a prompt up to the first token), `decode` (a token behind a context), `batch`
(the same for several rows at once), `overhead` (a token of a model whose blocks are so narrow that
Python, sampling and the head remain), `start` (a fresh process that loads a quantized checkpoint
from a warm disk cache and answers), `memory` (of such a process, over time, up to a long chat),
`own` (the model of this repository, as `chatglm bench` measures it).

A recipe with `alone=1` is measured without the engine, as where the model's files are alone.

All contenders run side by side, each in its own process, measured in turns with the bandwidth probe
(`workers`); ratios are ours to each peer. Beside the time of a token stand the bytes that it reads,
weights and keys and values, their rate, and its share of the probe's. `--write` appends the figures
to benchmarks/results.csv.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.full_size import Recipe, save_folder
from benchmarks.results import RESULTS, Case, Recorder, read_commit
from benchmarks.workers import (
    Round,
    Spread,
    Worker,
    compare_rounds,
    rate_rounds,
    run_rounds,
    share_of_probe,
    start_probe,
)
from chatglm.process_memory import read_status

ROOT = Path(__file__).resolve().parent.parent
CASES = ("prefill", "decode", "batch", "overhead", "start", "memory", "own")
PROMPTS = (64, 512)
CONTEXTS = (64, 512, 1024, 2000, 4096, 8192)
BATCHES = (8, 32)
BATCH_CONTEXT = 64
OVERHEAD_CONTEXT = 64
OVERHEAD_WIDTH = 64
TOP_P = 0.7
CHAT_TOKENS = 2048  # of prompt and answer, whose memory is measured
MEMORY_POINTS = 80  # of the curve
MEMORY_STEP = 0.05  # seconds between two looks
OWN_FIGURES = (
    ("own model, prefill", "prefill_tokens_per_second", "tokens/s"),
    ("own model, decode", "milliseconds_per_token", "ms/token"),
    ("own model, load", "load_seconds", "s"),
)
PLAIN_OPTIONS = ("--layers", "--hidden", "--dtype", "--bits", "--group-size")


def parse_recipe(text: str) -> Recipe:
    """Return the recipe that words like "bits=4,group_size=32" name.

    Raises:
        ValueError: for a name or a value that there is not.
    """
    fields: dict[str, Any] = {}
    for word in filter(None, text.split(",")):
        name, _, value = word.partition("=")
        if name not in Recipe._fields:
            raise ValueError(f"{name} is none of {', '.join(Recipe._fields)} (in {text})")
        fields[name] = value if name == "dtype" else int(value)
    for name in {"embeddings", "alone"} & set(fields):
        fields[name] = bool(fields[name])
    return Recipe(**fields)


def start_ours(
    recipe: Recipe, threads: int, name: str | None = None, checkout: Path = ROOT
) -> Worker:
    """Start a model of ours, or of another checkout of this repository."""
    command = [sys.executable, "-m", "benchmarks.contender", "--threads", str(threads)]
    for option in PLAIN_OPTIONS:
        value = getattr(recipe, option[2:].replace("-", "_"))
        command += [] if value is None else [option, str(value)]
    command += ["--embeddings"] if recipe.embeddings else []
    command += ["--alone"] if recipe.alone else []
    variables = {"PYTHONPATH": str(checkout)}
    return Worker(name or f"ours {recipe}", command, variables, checkout)


def start_chatglm_cpp(python: Path, folder: Path, layers: int, context: int) -> Worker:
    """Write a model file for chatglm.cpp and start the peer with it."""
    file = folder / "chatglm.bin"
    command = [str(python), "-m", "benchmarks.peer_chatglm_cpp"]
    sizes = ["--layers", str(layers), "--context", str(context)]
    written = subprocess.run(
        [*command, "--write", str(file), *sizes], cwd=ROOT, capture_output=True, check=True
    )
    worker = Worker("chatglm.cpp q4_0", [*command, "--serve", str(file)])
    worker.facts["step_bytes"] = json.loads(written.stdout)["bytes"]
    return worker


def start_original(python: Path, folder: Path, layers: int, threads: int) -> Worker:
    """Start the original code in its own environment."""
    command = [str(python), "-m", "benchmarks.peer_original", str(folder)]
    command += ["--layers", str(layers), "--threads", str(threads)]
    return Worker("original INT4", command)


def start_all(args: argparse.Namespace, stack: ExitStack) -> list[Worker]:
    """Start ours and the peers that were asked for, one after the other."""
    workers = []
    for text in args.ours:
        recipe = parse_recipe(text)._replace(layers=args.layers)
        workers.append(stack.enter_context(start_ours(recipe, args.threads)))
        if args.checkout:
            name = f"{read_commit(args.checkout)} {recipe}"
            peer = start_ours(recipe, args.threads, name, args.checkout.resolve())
            workers.append(stack.enter_context(peer))
    if args.chatglm_cpp:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=args.dir)))
        longest = max(*args.prompts, *args.contexts) + 2 * args.tokens
        peer = start_chatglm_cpp(args.chatglm_cpp, folder, args.layers, longest)
        workers.append(stack.enter_context(peer))
        if peer.facts["threads"] != args.threads:
            raise ValueError(
                f"chatglm.cpp takes {peer.facts['threads']} threads on this machine, whatever is "
                f"asked for: compare with --threads {peer.facts['threads']}"
            )
    if args.original:
        python = args.original_python or Path(sys.executable)
        peer = start_original(python, args.original, args.layers, args.threads)
        workers.append(stack.enter_context(peer))
    return workers


def record_rounds(
    recorder: Recorder,
    workers: Sequence[Worker],
    rounds: Sequence[Round],
    place: tuple[str, int, int],
    positions: int = 0,
) -> None:
    """Record what the rounds of one case gave, for every contender.

    Args:
        recorder: of the figures.
        workers: the contenders; those with a `position_bytes` fact are ours.
        rounds: theirs.
        place: the case, its size and its batch.
        positions: of context that a row reads in a step; 0 for a prompt, in tokens/s.
    """
    name, size, batch = place
    load = max(round_.foreign_load for round_ in rounds)
    peers = [worker.name for worker in workers if not worker.name.startswith("ours")]
    for worker in workers:
        versions = worker.facts["versions"]
        case = Case(worker.name, name, versions, size, batch, len(rounds), load)
        times = Spread.of([round_.seconds[worker.name] for round_ in rounds])
        speed = (times.scaled(1000), "ms/token")
        if not positions:
            speed = (rate_rounds(rounds, worker.name, size * batch), "tokens/s")
        for peer in ([] if worker.name in peers else peers) or [""]:
            ratio = compare_rounds(rounds, worker.name, peer) if peer else None
            recorder.add(case, *speed, ratio, peer)
        if positions and "step_bytes" in worker.facts:
            read = worker.facts["step_bytes"] + batch * positions * worker.facts["kv_bytes"]
            recorder.add(case, Spread.of([read / 1e9]), "GB/token")
            recorder.add(case, rate_rounds(rounds, worker.name, read / 1e9), "GB/s")
            recorder.add(case, share_of_probe(rounds, worker.name, read), "of the probe")
    rates = Spread.of([rate / 1e9 for round_ in rounds for rate in round_.rates.values()])
    recorder.add(Case("probe", name, "", size, batch, len(rounds), load), rates, "GB/s")


def ask_prefill(tokens: int, batch: int = 1) -> Callable[[Worker], float]:
    """Return the task of reading prompts."""
    return lambda worker: worker.ask("prefill", tokens=tokens, batch=batch)["seconds"]


def ask_decode(context: int, tokens: int, batch: int = 1) -> Callable[[Worker], float]:
    """Return the task of decoding so many tokens; its figure is the middle one."""

    def ask(worker: Worker) -> float:
        answer = worker.ask("decode", context=context, tokens=tokens, batch=batch)
        return Spread.of(answer["seconds"]).median

    return ask


def measure_phases(args: argparse.Namespace, recorder: Recorder) -> None:
    """Measure prompts, contexts and batches with all contenders side by side."""
    with ExitStack() as stack:
        probe = stack.enter_context(start_probe(args.threads))
        workers = start_all(args, stack)
        for worker in workers:
            case = Case(worker.name, "making the model", worker.facts["versions"])
            recorder.add(case, Spread.of([worker.load_seconds]), "s")
        for case, size, batch, task in iter_phases(args):
            able = [w for w in workers if batch == 1 or w.name.startswith("ours")]
            rounds = run_rounds(able, probe, task, args.rounds)
            positions = 0 if case.startswith("prefill") else size + args.tokens // 2
            record_rounds(recorder, able, rounds, (case, size, batch), positions)


def iter_phases(
    args: argparse.Namespace,
) -> Iterator[tuple[str, int, int, Callable[[Worker], float]]]:
    """Yield case, size, batch and task of what is measured side by side."""
    if "prefill" in args.only:
        for tokens in args.prompts:
            yield "prefill", tokens, 1, ask_prefill(tokens)
    if "decode" in args.only:
        for context in args.contexts:
            yield "decode", context, 1, ask_decode(context, args.tokens)
    if "batch" in args.only:
        for batch in args.batches:
            yield "prefill", BATCH_CONTEXT, batch, ask_prefill(BATCH_CONTEXT, batch)
            yield "decode", BATCH_CONTEXT, batch, ask_decode(BATCH_CONTEXT, args.tokens, batch)


def measure_overhead(args: argparse.Namespace, recorder: Recorder) -> None:
    """Measure a token of a model with all blocks and hardly any work in them."""
    recipe = parse_recipe(args.ours[0])._replace(layers=args.layers, hidden=OVERHEAD_WIDTH)
    name = f"ours {recipe}, width {OVERHEAD_WIDTH}"
    with start_ours(recipe, args.threads, name) as worker:
        for case, top_p in (("greedy", None), (f"top_p {TOP_P}", TOP_P)):
            call = {"context": OVERHEAD_CONTEXT, "tokens": args.tokens, "top_p": top_p}
            answers = [worker.ask("decode", **call)["seconds"] for _ in range(args.rounds + 1)]
            figures = [Spread.of(seconds).median for seconds in answers[1:]]  # one warms up
            name, versions = f"overhead, {case}", worker.facts["versions"]
            place = Case(worker.name, name, versions, OVERHEAD_CONTEXT, rounds=len(figures))
            recorder.add(place, Spread.of(figures).scaled(1000), "ms/token")


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
    rounds = []
    for number in range(args.rounds + 1):
        said = [run_first_answer(folder, args, recipe, checkout=root)[0] for root in roots]
        rounds += [said] if number else []  # the first ones warm the disk cache
    for case, key in (("start to loaded", "loaded"), ("start to answer", "answered")):
        place = Case(names[0], case, versions, rounds=len(rounds))
        ours, *peers = [[said[key] for said in figures] for figures in zip(*rounds)]
        if not peers:
            recorder.add(place, Spread.of(ours), "s")
        for name, peer in zip(names[1:], peers):
            ratio = Spread.of([theirs / own for own, theirs in zip(ours, peer)])
            recorder.add(place, Spread.of(ours), "s", ratio, name)
            recorder.add(place._replace(contender=name), Spread.of(peer), "s")


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


def make_parser() -> argparse.ArgumentParser:
    """Return the options."""
    parser = argparse.ArgumentParser(description="Speed of the whole model.")
    add = parser.add_argument
    add("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    add("--ours", nargs="+", default=["bits=4"], metavar="RECIPE", help="as bits=4,group_size=32")
    add("--chatglm-cpp", type=Path, metavar="PYTHON", help="of install_peers.sh")
    add("--checkout", type=Path, metavar="DIR", help="another checkout of this repository")
    add("--original", type=Path, metavar="DIR", help="the original INT4 code and configuration")
    add("--original-python", type=Path, metavar="PYTHON", help="with transformers 4.30")
    add("--layers", type=int, default=28, help="blocks (28)")
    add("--threads", type=int, default=os.cpu_count() or 1)
    add("--rounds", type=int, default=7, help="of each figure (7)")
    add("--tokens", type=int, default=16, help="decoded in a round (16)")
    add("--prompts", type=int, nargs="+", default=list(PROMPTS), metavar="N")
    add("--contexts", type=int, nargs="+", default=list(CONTEXTS), metavar="N")
    add("--batches", type=int, nargs="+", default=list(BATCHES), metavar="N")
    add("--chat-tokens", type=int, default=CHAT_TOKENS, help="of the memory's chat (2048)")
    add("--dir", type=Path, help="where checkpoints are made for a while")
    add("--write", action="store_true", help="append to benchmarks/results.csv")
    return parser


def measure_all(args: argparse.Namespace) -> None:
    """Measure the cases that were asked for."""
    path = RESULTS if args.write else None
    recorder = Recorder("bench_generate", args.layers, args.threads, path)
    if {"prefill", "decode", "batch"} & set(args.only):
        measure_phases(args, recorder)
    if "overhead" in args.only:
        measure_overhead(args, recorder)
    if {"start", "memory"} & set(args.only):
        measure_start(args, recorder)
    if "own" in args.only:
        measure_own(args, recorder)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and record; return the exit code."""
    args = make_parser().parse_args(argv)
    try:
        measure_all(args)
    except ValueError as error:
        print(f"bench_generate: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
