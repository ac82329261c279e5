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
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.fresh import measure_own, measure_start
from benchmarks.phases import measure_overhead, measure_phases
from benchmarks.results import RESULTS, Recorder

CASES = ("prefill", "decode", "batch", "overhead", "start", "memory", "own")
PROMPTS = (64, 512)
CONTEXTS = (64, 512, 1024, 2000, 4096, 8192)
BATCHES = (8, 32)
CHAT_TOKENS = 2048  # of prompt and answer, whose memory is measured


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
