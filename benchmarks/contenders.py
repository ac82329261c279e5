"""Starts the contenders of the whole model's benchmark: ours, other checkouts of it, and the peers.

Owns how a contender is named in words and which process it is. Does not know what is measured.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.full_size import Recipe
from benchmarks.results import read_commit
from benchmarks.workers import Worker

ROOT = Path(__file__).resolve().parent.parent
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
