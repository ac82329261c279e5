"""Owns how a campaign runs: numbered cases, drawn from a seed, counted by how they ended.

A case is known by its number: the seed and the number say all of it, so a run goes on where it was
stopped, and a case that failed is repeated alone. How each ended is counted by a word ("right",
"refused", ...); a `Finding`, or any exception that a case does not expect, is kept with its number.
Does not know what is tried.
"""

import argparse
import os
import pickle
import random
import select
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.records import BUILD, describe_run, progress_of, write_json
from chatglm import door

RUNS = BUILD / "endurance"
SEED = 2026
KEPT_FINDINGS = 20
SAVED_EVERY = 10.0  # seconds
Tally = tuple[Counter[str], list[str]]  # how the units of a case ended, and what was found
Case = Callable[[random.Random], str | Tally]


class Finding(Exception):
    """A case ended in a way that it must not; the text says how, with the smallest input known."""


class Campaign(NamedTuple):
    """What is tried.

    Attributes:
        name: of its file and on the command line.
        title: what it does, for the page.
        unit: what a case counts as.
        count: units of a whole run.
        size: units of a case.
        prepare: makes what all cases share, and returns the case: it takes a generator that is its
            own, and returns a word for all of its units, or a tally.
    """

    name: str
    title: str
    unit: str
    count: int
    size: int
    prepare: Callable[[], Case]


def try_case(case: Case, seed: int, number: int, size: int) -> Tally:
    """Return how a case ended."""
    try:
        ended = case(random.Random(f"{seed} {number}"))
    except Finding as finding:
        return Counter({"found": size}), [str(finding)]
    except Exception:
        return Counter({"found": size}), [traceback.format_exc(limit=-3)]
    return (Counter({ended: size}), []) if isinstance(ended, str) else ended


def run_campaign(campaign: Campaign, args: argparse.Namespace) -> int:
    """Run what is left of a campaign; return the exit code, 1 if anything was ever found."""
    count = args.count or campaign.count
    path = args.runs / f"{campaign.name}.json"
    case = campaign.prepare()
    if args.only is not None:
        print(campaign.name, args.only, *try_case(case, args.seed, args.only, campaign.size))
        return 0
    with progress_of(path, {"seed": args.seed}, args.fresh) as found:
        found |= describe_run() | {"title": campaign.title, "unit": campaign.unit}
        start = {"done": 0, "seconds": 0.0, "outcomes": {}, "findings": [], "num_findings": 0}
        found |= {name: found.get(name, value) for name, value in start.items()}
        _run_cases(campaign, case, found, path, count, args)
        write_json(path, found)
    print(describe(campaign.name, found), flush=True)
    for finding in found["findings"]:
        print(f"  case {finding['case']}: {finding['text']}", flush=True)
    return int(found["num_findings"] > 0)


def _run_cases(
    campaign: Campaign,
    case: Case,
    found: dict[str, Any],
    path: Path,
    count: int,
    args: argparse.Namespace,
) -> None:
    begin = saved = time.monotonic()
    before = found["seconds"]
    while found["done"] < count:
        if args.minutes is not None and time.monotonic() - begin > 60 * args.minutes:
            return
        number = found["done"] // campaign.size
        words, texts = try_case(case, args.seed, number, campaign.size)
        found["outcomes"] = dict(Counter(found["outcomes"]) + words)
        found["done"] += campaign.size
        found["num_findings"] += len(texts)
        found["findings"] += [{"case": number, "text": text} for text in texts]
        del found["findings"][KEPT_FINDINGS:]
        found["seconds"] = round(before + time.monotonic() - begin, 1)
        if time.monotonic() - saved > SAVED_EVERY:
            saved = time.monotonic()
            write_json(path, found)


def describe(name: str, found: dict[str, Any]) -> str:
    """Return a line of what a run has come to."""
    outcomes = ", ".join(f"{number:,} {word}" for word, number in sorted(found["outcomes"].items()))
    return f"{name}: {found['done']:,} {found['unit']} in {found['seconds']:.0f} s: {outcomes}"


def run_apart(task: Callable[[], Any], seconds: float) -> Any:
    """Run a task in a process of its own, and return what it returns, or the exception it raised.

    Args:
        task: what the fork does; its result is pickled.
        seconds: that it may take.

    Raises:
        Finding: if it crashes or hangs.
    """
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        _do_and_leave(task, writer)
    os.close(writer)
    answer, end = b"", time.monotonic() + seconds
    with open(reader, "rb", buffering=0) as pipe:
        while select.select([pipe], [], [], max(end - time.monotonic(), 0))[0]:
            piece = pipe.read(1 << 16)
            answer += piece
            if not piece:
                break
        else:
            os.kill(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    if status == signal.SIGKILL:
        raise Finding(f"hangs: {seconds} s are over, or it was killed for its memory")
    if status:
        raise Finding(f"the process dies: {os.waitstatus_to_exitcode(status)}")
    return pickle.loads(answer)


def _do_and_leave(task: Callable[[], Any], writer: int) -> None:
    """Send what a task comes to, and leave without what an interpreter does at its end."""
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        try:
            result = task()
        except BaseException as error:
            trace = traceback.format_exc(limit=-3)
            names = tuple(kind.__name__ for kind in error.__class__.__mro__)
            result = Raised(names, str(error), trace)
        with open(writer, "wb") as pipe:
            pipe.write(pickle.dumps(result))
        os._exit(0)
    finally:
        os._exit(99)


class Raised(NamedTuple):
    """An exception of another process.

    Attributes:
        kinds: names of its class and of what that is derived from.
        message: what it says.
        trace: where it was raised.
    """

    kinds: tuple[str, ...]
    message: str
    trace: str


def make_parser() -> argparse.ArgumentParser:
    """Return the options that all campaigns take."""
    parser = argparse.ArgumentParser(description="Try the same thing very often.")
    parser.add_argument("--count", type=int, help="units to come to (each campaign's own)")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the draws ({SEED})")
    parser.add_argument("--minutes", type=float, help="that each campaign may take")
    parser.add_argument("--only", type=int, metavar="CASE", help="repeat one case, record nothing")
    parser.add_argument("--fresh", action="store_true", help="forget what was found before")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of the runs' files")
    return parser


def main_of(campaigns: Sequence[Campaign], argv: Sequence[str] | None) -> int:
    """Run the campaigns that a command line names, or all; return the exit code."""
    parser = make_parser()
    names = [campaign.name for campaign in campaigns]
    parser.add_argument("names", nargs="*", metavar="CAMPAIGN", help=f"of {', '.join(names)}")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(names):
        parser.error(f"there is no campaign {', '.join(sorted(unknown))}")
    chosen = [c for c in campaigns if not args.names or c.name in args.names]
    try:
        with door.package_code():
            return max(run_campaign(campaign, args) for campaign in chosen)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
