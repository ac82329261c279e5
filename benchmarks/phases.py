"""Measures the phases of the whole model, with all contenders side by side in the same rounds.

Owns which sizes are measured and how the answers of the rounds become figures. Does not know
how contenders are started and asked (`contenders`), what rows and busy neighbours cost
(`beside`), nor what a fresh process takes (`fresh`).
"""

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from benchmarks.beside import measure_company, measure_rows
from benchmarks.contenders import (
    SHORT_CONTEXT,
    Side,
    ask_decode,
    ask_prefill,
    parse_recipe,
    start_all,
    start_ours,
)
from benchmarks.results import Case, Recorder
from benchmarks.workers import (
    Round,
    Spread,
    Turn,
    Worker,
    compare_rounds,
    rate_rounds,
    run_rounds,
    run_turns,
    share_of_probe,
    start_probe,
)

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


def measure_phases(args: argparse.Namespace, recorder: Recorder) -> None:
    """Measure prompts, contexts, batches and rows with all contenders side by side."""
    with ExitStack() as stack:
        probe = stack.enter_context(start_probe(args.threads, args.probe_floats))
        workers = start_all(args, stack)
        for worker in workers:
            case = Case(worker.name, "making the model", worker.facts["versions"])
            recorder.add(case, Spread.of([worker.load_seconds]), "s")
        side = Side(workers, probe, recorder, args)
        for name, measure in MEASURES.items():
            if name in args.only:
                measure(side)


def measure_prefill(side: Side) -> None:
    """Measure prompts up to their first token, and how much of that is the products' time."""
    for tokens in side.args.prompts:
        rounds = run_rounds(side.workers, side.probe, ask_prefill(tokens), side.args.rounds)
        record_rounds(side.recorder, side.workers, rounds, ("prefill", tokens, 1))
        for worker in side.able("products"):
            record_ceiling(side, worker, tokens)


def record_ceiling(side: Side, worker: Worker, tokens: int) -> None:
    """Record a prompt's time beside that of its products alone, measured in turns."""
    turns = [
        Turn(worker.name, worker, ask_prefill(tokens)),
        Turn("products", worker, lambda asked: asked.ask("products", tokens=tokens)["seconds"]),
    ]
    rounds = run_turns(turns, side.probe, side.args.rounds)
    load = max(round_.foreign_load for round_ in rounds)
    versions = worker.facts["versions"]
    case = Case(worker.name, "prefill", versions, tokens, 1, len(rounds), load)
    share = compare_rounds(rounds, worker.name, "products")
    side.recorder.add(case, share, "of its products")


def measure_decode(side: Side) -> None:
    """Measure a token behind contexts."""
    for context in side.args.contexts:
        task = ask_decode(context, side.args.tokens)
        rounds = run_rounds(side.workers, side.probe, task, side.args.rounds)
        positions = context + side.args.tokens // 2
        record_rounds(side.recorder, side.workers, rounds, ("decode", context, 1), positions)


def measure_batches(side: Side) -> None:
    """Measure padded batches, which peers have none of."""
    ours = [worker for worker in side.workers if worker.name.startswith("ours")]
    for batch in side.args.batches:
        positions = SHORT_CONTEXT + side.args.tokens // 2
        tasks = (
            ("prefill", 0, ask_prefill(SHORT_CONTEXT, batch)),
            ("decode", positions, ask_decode(SHORT_CONTEXT, side.args.tokens, batch)),
        )
        for name, read, task in tasks:
            rounds = run_rounds(ours, side.probe, task, side.args.rounds)
            record_rounds(side.recorder, ours, rounds, (name, SHORT_CONTEXT, batch), read)


MEASURES: dict[str, Callable[[Side], None]] = {
    "decode": measure_decode,
    "prefill": measure_prefill,
    "rows": measure_rows,
    "company": measure_company,
    "batch": measure_batches,
}


def measure_overhead(args: argparse.Namespace, recorder: Recorder) -> None:
    """Measure a token of a model with all blocks and hardly any work in them, as chat decodes."""
    recipe = parse_recipe(args.ours[0])._replace(layers=args.layers, hidden=OVERHEAD_WIDTH)
    name = f"ours {recipe}, width {OVERHEAD_WIDTH}"
    with start_ours(recipe, args.threads, name) as worker:
        for case, top_p in (("greedy", None), (f"top_p {TOP_P}", TOP_P)):
            call = {"context": SHORT_CONTEXT, "tokens": args.tokens, "top_p": top_p}
            answers = [worker.ask("answer", **call)["seconds"] for _ in range(args.rounds + 1)]
            figures = [Spread.of(seconds).median for seconds in answers[1:]]  # one warms up
            name, versions = f"overhead, {case}", worker.facts["versions"]
            place = Case(worker.name, name, versions, SHORT_CONTEXT, rounds=len(figures))
            recorder.add(place, Spread.of(figures).scaled(1000), "ms/token")
