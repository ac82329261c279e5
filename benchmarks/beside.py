"""Measures what many rows cost beside one, and what busy programs cost a contender.

Owns the turns of these two: one contender does several things in the same round, so that a step of
many rows is compared with a step of one that was taken within seconds of it.
"""

import argparse
from collections.abc import Iterator, Sequence

from benchmarks.contenders import SHORT_CONTEXT, Side, ask_decode, ask_rows
from benchmarks.results import Case, Recorder
from benchmarks.workers import (
    Company,
    Round,
    Spread,
    Turn,
    Worker,
    compare_rounds,
    rate_rounds,
    run_turns,
)

# The contexts that rows of mixed lengths have in turn.
MIXED_CONTEXTS = (64, 200, 500, 1000)
MIXED_ROWS = (8, 32)
# So many rows are measured beside the peers, whose token takes the same however many ask.
PEERS_ROWS = 16
# A step of many rows takes so long that a part of the tokens that one row gets is enough.
STEP_SHARE = 4
BUSY = (0, 1, 2)


def iter_row_turns(worker: Worker, args: argparse.Namespace) -> Iterator[tuple[str, int, Turn]]:
    """Yield case, number of rows and turn of each step that a contender is measured with."""
    mixed = [min(context, max(args.contexts)) for context in MIXED_CONTEXTS]
    steps = max(1, args.tokens // STEP_SHARE)
    for count in args.rows:
        name = f"{worker.name}, {count} rows"
        yield "rows", count, Turn(name, worker, ask_rows([SHORT_CONTEXT] * count, steps))
        if count in MIXED_ROWS:
            contexts = [mixed[place % len(mixed)] for place in range(count)]
            turn = Turn(f"{name} of mixed lengths", worker, ask_rows(contexts, steps))
            yield "rows of mixed lengths", count, turn


def measure_rows(side: Side) -> None:
    """Measure steps of many rows, each beside a step of one, and some beside the peers' tokens.

    Peers without rows decode one, so that what they give in a second is comparable.
    """
    args, able = side.args, side.able("rows")
    steps = max(1, args.tokens // STEP_SHARE)
    task = ask_decode(SHORT_CONTEXT, steps)
    peers = [Turn(worker.name, worker, task) for worker in side.workers if worker not in able]
    for worker in able:
        one = Turn(f"{worker.name}, one", worker, ask_rows([SHORT_CONTEXT], steps))
        for case, count, turn in iter_row_turns(worker, args):
            beside = peers if count == PEERS_ROWS and case == "rows" else []
            rounds = run_turns([one, turn, *beside], side.probe, args.rounds)
            record_rows(side.recorder, rounds, (case, count, turn), one, beside)


def record_rows(
    recorder: Recorder,
    rounds: Sequence[Round],
    measured: tuple[str, int, Turn],
    one: Turn,
    peers: Sequence[Turn],
) -> None:
    """Record a step's time, its price in steps of one row, and tokens a second beside the peers'.

    Args:
        recorder: of the figures.
        rounds: in which all of these were measured.
        measured: case, number of rows and turn of the step.
        one: the turn of one row.
        peers: turns of one row of theirs.
    """
    name, count, turn = measured
    worker, load = turn.worker, max(round_.foreign_load for round_ in rounds)
    versions = worker.facts["versions"]
    case = Case(worker.name, name, versions, SHORT_CONTEXT, count, len(rounds), load)
    times = Spread.of([round_.seconds[turn.name] for round_ in rounds])
    recorder.add(case, times.scaled(1000), "ms/step")
    price = Spread.of([round_.seconds[turn.name] / round_.seconds[one.name] for round_ in rounds])
    recorder.add(case, price, "steps of one row")
    speed = rate_rounds(rounds, turn.name, count)
    for peer in peers or [None]:
        ratio = None if peer is None else compare_rounds(rounds, turn.name, peer.name).scaled(count)
        recorder.add(case, speed, "tokens/s", ratio, "" if peer is None else peer.name)


def measure_company(side: Side) -> None:
    """Measure a token of every contender alone and beside busy processes."""
    task = ask_decode(SHORT_CONTEXT, side.args.tokens)
    turns = [Turn(worker.name, worker, task) for worker in side.workers]
    for count in BUSY:
        with Company(count) as company:
            warms_up = count == BUSY[0]
            rounds = run_turns(turns, side.probe, side.args.rounds, warms_up, company)
        for worker in side.workers:
            record_company(side, worker, rounds, count)


def record_company(side: Side, worker: Worker, rounds: Sequence[Round], busy: int) -> None:
    """Record a contender's token beside so many busy processes, ours with ratios to the peers."""
    load = max(round_.foreign_load for round_ in rounds)
    versions, name = worker.facts["versions"], f"beside {busy} busy"
    case = Case(worker.name, name, versions, SHORT_CONTEXT, 1, len(rounds), load)
    times = Spread.of([round_.seconds[worker.name] for round_ in rounds]).scaled(1000)
    peers = [other.name for other in side.workers if not other.name.startswith("ours")]
    for peer in (peers if worker.name.startswith("ours") else []) or [""]:
        ratio = compare_rounds(rounds, worker.name, peer) if peer else None
        side.recorder.add(case, times, "ms/token", ratio, peer)
