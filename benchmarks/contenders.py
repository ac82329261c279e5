"""Starts the contenders of the whole model's benchmark: ours, other checkouts of it, and the peers.

Owns how a contender is named in words, which process it is and how it is asked. Does not know which
sizes are measured, nor what becomes of the seconds.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.full_size import Recipe
from benchmarks.results import Recorder, read_commit
from benchmarks.workers import Spread, Worker

ROOT = Path(__file__).resolve().parent.parent
# Tokens behind which rows, batches, busy processes and the overhead are measured, whatever else is.
SHORT_CONTEXT = 64
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
    recipe: Recipe,
    threads: int,
    name: str | None = None,
    checkout: Path = ROOT,
    copies: bool = False,
) -> Worker:
    """Start a model of ours, or of another checkout; one that copies if asked."""
    command = [sys.executable, "-m", "benchmarks.contender", "--threads", str(threads)]
    for option in PLAIN_OPTIONS:
        value = getattr(recipe, option[2:].replace("-", "_"))
        command += [] if value is None else [option, str(value)]
    command += ["--embeddings"] if recipe.embeddings else []
    command += ["--alone"] if recipe.alone else []
    command += ["--copies"] if copies else []
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


def start_fastllm(python: Path, folder: Path, layers: int, threads: int) -> Worker:
    """Write a model folder for fastllm (12 GB of disk) and start the peer with it."""
    command = [str(python), "-m", "benchmarks.peer_fastllm"]
    written = subprocess.run(
        [*command, "--write", str(folder / "fastllm"), "--layers", str(layers)],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    serving = ["--serve", str(folder / "fastllm"), "--threads", str(threads)]
    # Its coordinator looks for work without a pause, and would take it from who is measured.
    worker = Worker("fastllm int4", [*command, *serving], is_restless=True)
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
        longest = max(SHORT_CONTEXT, *args.prompts, *args.contexts) + 2 * args.tokens
        peer = start_chatglm_cpp(args.chatglm_cpp, folder, args.layers, longest)
        workers.append(stack.enter_context(peer))
        if peer.facts["threads"] != args.threads:
            raise ValueError(
                f"chatglm.cpp takes {peer.facts['threads']} threads on this machine, whatever is "
                f"asked for: compare with --threads {peer.facts['threads']}"
            )
    if args.fastllm:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=args.dir)))
        # It coordinates with a thread beside those that compute: with all of them it is slower.
        threads = max(1, args.threads - 1)
        peer = start_fastllm(args.fastllm, folder, args.layers, threads)
        workers.append(stack.enter_context(peer))
    if args.original:
        python = args.original_python or Path(sys.executable)
        peer = start_original(python, args.original, args.layers, args.threads)
        workers.append(stack.enter_context(peer))
    return workers


class Side(NamedTuple):
    """What stands side by side: the contenders, the probe, who records, and the options."""

    workers: list[Worker]
    probe: Worker
    recorder: Recorder
    args: argparse.Namespace

    def able(self, call: str) -> list[Worker]:
        """Return the contenders that can be asked for this."""
        return [worker for worker in self.workers if call in worker.facts["calls"]]


def ask_prefill(tokens: int, batch: int = 1) -> Callable[[Worker], float]:
    """Return the task of reading prompts."""
    return lambda worker: worker.ask("prefill", tokens=tokens, batch=batch)["seconds"]


def ask_decode(context: int, tokens: int, batch: int = 1) -> Callable[[Worker], float]:
    """Return the task of decoding so many tokens; its figure is the middle one."""

    def ask(worker: Worker) -> float:
        answer = worker.ask("decode", context=context, tokens=tokens, batch=batch)
        return Spread.of(answer["seconds"]).median

    return ask


def ask_rows(contexts: Sequence[int], tokens: int) -> Callable[[Worker], float]:
    """Return the task of steps of rows behind these contexts; its figure is the middle one."""

    def ask(worker: Worker) -> float:
        answer = worker.ask("rows", contexts=list(contexts), tokens=tokens)
        return Spread.of(answer["seconds"]).median

    return ask
