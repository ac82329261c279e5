"""Speed of training at the 6B model's block shape, beside plain torch with peft.

    python -m benchmarks.bench_train [--methods full lora qlora] [--layers N] [--vocabulary N]
        [--length N] [--batch N] [--half] [--device cuda] [--checkpointing] [--threads N]
        [--rounds N] [--original DIR --original-python PYTHON] [--write]

A figure is one training step: forward pass, backward pass, clipped gradients, AdamW, on rows
without padding of which half is learned. `full` trains all, `lora` adapters of rank 8 at the joint
projection of queries, keys and values, `qlora` the same over 4-bit weights. The plain contender is
written with torch's own modules (`train_contender`); `--original` adds the original code from a
folder of chatglm-6b-int4, on a CPU in float32.

All contenders of a method run side by side, each in its own process, measured in turns with the
bandwidth probe (`workers`). Each takes 16 bytes for every trained number: at two blocks and a
vocabulary of 8192, 7 GB for `full`. Beside the tokens a second stands the peak of the memory: of
the process on a CPU, of the allocated part on a GPU.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.results import RESULTS, Case, Recorder
from benchmarks.workers import (
    Round,
    Spread,
    Worker,
    compare_rounds,
    rate_rounds,
    run_rounds,
    start_probe,
)
from chatglm.benching.command import METHODS

NUMBERS = ("layers", "vocabulary", "hidden", "threads")
SWITCHES = ("half", "checkpointing")


def start_contender(name: str, kind: str, method: str, args: argparse.Namespace) -> Worker:
    """Start one of the models of `train_contender`."""
    command = [sys.executable, "-m", "benchmarks.train_contender", kind, "--method", method]
    for option in (*NUMBERS, "device"):
        command += [f"--{option}", str(getattr(args, option))]
    command += [f"--{option}" for option in SWITCHES if getattr(args, option)]
    return Worker(name, command)


def start_original(method: str, args: argparse.Namespace) -> Worker:
    """Start the original code in its own environment."""
    python = args.original_python or Path(sys.executable)
    command = [str(python), "-m", "benchmarks.peer_original", str(args.original)]
    command += ["--layers", str(args.layers), "--threads", str(args.threads)]
    return Worker(
        "original code", [*command, "--train", method, "--vocabulary", str(args.vocabulary)]
    )


def measure_method(method: str, args: argparse.Namespace, recorder: Recorder) -> None:
    """Measure one way of training with all contenders side by side."""
    with ExitStack() as stack:
        probe = stack.enter_context(start_probe(args.threads))
        workers = [
            stack.enter_context(start_contender(name, kind, method, args))
            for name, kind in (("ours", "ours"), ("torch and peft", "plain"))
        ]
        if args.original:
            workers.append(stack.enter_context(start_original(method, args)))
        peaks: dict[str, int] = {}

        def train(worker: Worker) -> float:
            answer = worker.ask("train", length=args.length, batch=args.batch)
            peaks[worker.name] = answer["peak"]
            return answer["seconds"]

        rounds = run_rounds(workers, probe, train, args.rounds)
        record(recorder, workers, rounds, peaks, name_case(method, args), args)


def name_case(method: str, args: argparse.Namespace) -> str:
    """Return what a method's figures are called."""
    half = ", bfloat16" if args.half else ", float32"
    checkpointing = ", checkpointing" if args.checkpointing else ""
    return f"{method}{half}{checkpointing}" + (f" on {args.device}" if args.device != "cpu" else "")


def record(
    recorder: Recorder,
    workers: Sequence[Worker],
    rounds: Sequence[Round],
    peaks: dict[str, int],
    case: str,
    args: argparse.Namespace,
) -> None:
    """Record each contender's tokens a second and memory, ours with the ratios to the others."""
    load = max(round_.foreign_load for round_ in rounds)
    ours, *peers = [worker.name for worker in workers]
    for worker in workers:
        versions = worker.facts["versions"]
        place = Case(worker.name, case, versions, args.length, args.batch, len(rounds), load)
        speed = rate_rounds(rounds, worker.name, args.length * args.batch)
        for peer in peers if worker.name == ours else [""]:
            ratio = compare_rounds(rounds, ours, peer) if peer else None
            recorder.add(place, speed, "tokens/s", ratio, peer)
        recorder.add(place, Spread.of([peaks[worker.name] / 1e9]), "GB")


def make_parser() -> argparse.ArgumentParser:
    """Return the options."""
    parser = argparse.ArgumentParser(description="Speed of training at the 6B block shape.")
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    add("--layers", type=int, default=2, help="blocks (2)")
    add("--vocabulary", type=int, default=8192, help="tokens of it (8192; the 6B model's: 130528)")
    add("--hidden", type=int, default=4096, help="width of the model (4096)")
    add("--length", type=int, default=256, help="tokens of a row (256)")
    add("--batch", type=int, default=1, help="rows (1)")
    add("--half", action="store_true", help="compute in bfloat16")
    add("--checkpointing", action="store_true", help="compute blocks again in the backward pass")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--original", type=Path, metavar="DIR", help="the original INT4 code and configuration")
    add("--original-python", type=Path, metavar="PYTHON", help="with transformers 4.30 and peft")
    add("--threads", type=int, default=os.cpu_count() or 1)
    add("--rounds", type=int, default=7, help="of each figure (7)")
    add("--write", action="store_true", help="append to benchmarks/results.csv")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and record; return the exit code."""
    args = make_parser().parse_args(argv)
    path = RESULTS if args.write else None
    recorder = Recorder("bench_train", args.layers, args.threads, path)
    try:
        for method in args.methods:
            measure_method(method, args, recorder)
    except ValueError as error:
        print(f"bench_train: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
