"""Speed of the whole model: prompts, tokens behind contexts, many rows, the start, the memory.

    python -m benchmarks.bench_generate [--only CASE ...] [--quick] [--layers N] [--threads N]
        [--rounds N] [--ours bits=4 bits=4,group_size=32,embeddings=1 bits=4,dtype=bfloat16 ...]
        [--chatglm-cpp PYTHON] [--fastllm PYTHON] [--original DIR --original-python PYTHON]
        [--checkout DIR] [--write]

Cases: `decode` (a token behind a context), `prefill` (a prompt up to its first token, and how much
of that is the products' own time), `rows` (a step of many rows beside a step of one), `company` (a
token beside busy processes), `batch` (padded batches), `lookup` (drafts that are looked up in the
prompt), `overhead` (a token of a chat with a model whose blocks are so narrow that Python, sampling
and the head remain), `first` (the first prompt of a process beside later ones), `start` (a fresh
process that loads a quantized checkpoint from a warm disk cache and answers, beside the imports
alone), `memory` (of such a process, over time, up to a long chat), `own` (the model of this
repository, as `chatglm bench` measures it). Each can be measured alone, and adds its rows to the
file as soon as it has them: what is stopped is repeated from there with `--only`.

A recipe with `alone=1` is measured without the engine, as where the model's files are alone.

All contenders run side by side, each in its own process, measured in turns with the bandwidth probe
(`workers`); ratios are ours to each peer. Beside the time of a token stand the bytes that it reads,
weights and keys and values, their rate, and its share of the probe's. `--write` appends the figures
to benchmarks/results.csv. `--quick` tries every line with a narrow model of one block in seconds;
its figures mean nothing and are not written.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.fresh import measure_first, measure_own, measure_start
from benchmarks.lookup import measure_lookup
from benchmarks.phases import MEASURES, measure_overhead, measure_phases
from benchmarks.results import RESULTS, Recorder

CASES = (
    "decode",
    "prefill",
    "rows",
    "company",
    "batch",
    "lookup",
    "overhead",
    "first",
    "start",
    "memory",
    "own",
)
PROMPTS = (64, 512, 1984)
CONTEXTS = (64, 512, 2000, 8192)
BATCHES = (8, 32)
ROWS = (1, 2, 4, 7, 8, 16, 32, 64)
FIRST_PROMPT = 512
LOOKUP_PROMPT = 512
LOOKUP_TOKENS = 64
CHAT_TOKENS = 2048  # of prompt and answer, whose memory is measured


# What needs contenders of its own.
ALONE: Mapping[str, Callable[[argparse.Namespace, Recorder], None]] = {
    "lookup": measure_lookup,
    "overhead": measure_overhead,
    "first": measure_first,
    "own": measure_own,
}


def make_parser() -> argparse.ArgumentParser:
    """Return the options."""
    parser = argparse.ArgumentParser(description="Speed of the whole model.")
    add = parser.add_argument
    add("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    add("--ours", nargs="+", default=["bits=4"], metavar="RECIPE", help="as bits=4,group_size=32")
    add("--chatglm-cpp", type=Path, metavar="PYTHON", help="of install_peers.sh")
    add("--checkout", type=Path, metavar="DIR", help="another checkout of this repository")
    add("--fastllm", type=Path, metavar="PYTHON", help="with the package ftllm")
    add("--original", type=Path, metavar="DIR", help="the original INT4 code and configuration")
    add("--original-python", type=Path, metavar="PYTHON", help="with transformers 4.30")
    add("--layers", type=int, default=28, help="blocks (28)")
    add("--threads", type=int, default=os.cpu_count() or 1)
    add("--rounds", type=int, default=7, help="of each figure (7)")
    add("--tokens", type=int, default=16, help="decoded in a round (16)")
    add("--prompts", type=int, nargs="+", default=list(PROMPTS), metavar="N")
    add("--contexts", type=int, nargs="+", default=list(CONTEXTS), metavar="N")
    add("--batches", type=int, nargs="+", default=list(BATCHES), metavar="N")
    add("--rows", type=int, nargs="+", default=list(ROWS), metavar="N", help="of a step")
    add("--first", type=int, default=FIRST_PROMPT, help="tokens of a process's first prompt (512)")
    add("--lookup-prompt", type=int, default=LOOKUP_PROMPT, help="tokens that are copied (512)")
    add("--lookup-tokens", type=int, default=LOOKUP_TOKENS, help="of the copying answer (64)")
    add("--probe-floats", type=int, help="values that the probe reads (2**28)")
    add("--quick", action="store_true", help="one narrow block, one round: to try the lines")
    add("--chat-tokens", type=int, default=CHAT_TOKENS, help="of the memory's chat (2048)")
    add("--dir", type=Path, help="where checkpoints are made for a while")
    add("--write", action="store_true", help="append to benchmarks/results.csv")
    return parser


# What `--quick` puts in the place of the options' values.
QUICK = {
    "layers": 1,
    "rounds": 1,
    "tokens": 2,
    "prompts": [24],
    "contexts": [24],
    "batches": [2],
    "rows": [1, 8],
    "first": 24,
    "lookup_prompt": 48,
    "lookup_tokens": 8,
    "chat_tokens": 64,
    "probe_floats": 2**20,
}
QUICK_WIDTH = 128


def make_quick(args: argparse.Namespace) -> None:
    """Put sizes in the options with which every line is tried in seconds.

    Raises:
        ValueError: if the figures are to be written.
    """
    if args.write:
        raise ValueError("--quick tries the lines, and its figures mean nothing: leave out --write")
    vars(args).update(QUICK)
    args.ours = [f"{text},hidden={QUICK_WIDTH}" for text in args.ours]


def measure_all(args: argparse.Namespace) -> None:
    """Measure the cases that were asked for."""
    if args.quick:
        make_quick(args)
    path = RESULTS if args.write else None
    recorder = Recorder("bench_generate", args.layers, args.threads, path)
    if MEASURES.keys() & set(args.only):
        measure_phases(args, recorder)
    for case, measure in ALONE.items():
        if case in args.only:
            measure(args, recorder)
    if {"start", "memory"} & set(args.only):
        measure_start(args, recorder)


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
