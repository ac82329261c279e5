"""Measures the phases of the whole model, with all contenders side by side in the same rounds.

Owns what a contender is asked for and how the answers of the rounds become figures. Does not know
how contenders are started (`contenders`), nor what a fresh process takes (`fresh`).
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

from benchmarks.contenders import parse_recipe, start_all, start_ours
from benchmarks.results import Case, Recorder
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

BATCH_CONTEXT = 64
OVERHEAD_CONTEXT = 64
OVERHEAD_WIDTH = 64
TOP_P = 0.7


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
