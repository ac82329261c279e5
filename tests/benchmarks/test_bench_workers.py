"""The benchmarks' processes: the protocol, the rounds and their statistics."""

import sys
from pathlib import Path

import pytest

from benchmarks import workers
from benchmarks.workers import Round, Spread, Worker

CONTENDER = """
import sys, threading, time
from benchmarks.serving import serve

class Contender:
    def __init__(self):
        print("a library's greeting")
        if {burns}:
            threading.Thread(target=self.burn, daemon=True).start()
    def burn(self):
        while True:
            sum(range(1000))
    def describe(self):
        return {{"versions": "none"}}
    def prefill(self, tokens):
        print("more noise")
        if tokens < 0:
            raise ValueError(f"got {{tokens}}")
        time.sleep(0.3)
        return {{"seconds": tokens / 100}}
    def read(self):
        return {{"rate": 5e9}}

serve(Contender)
"""


def start(name: str, burns: bool = False) -> Worker:
    return Worker(name, [sys.executable, "-c", CONTENDER.format(burns=burns)])


def ask(worker: Worker) -> float:
    return worker.ask("prefill", tokens=7)["seconds"]


def test_a_worker_answers_and_its_prints_are_no_answers() -> None:
    with start("one") as worker:
        assert worker.facts == {"versions": "none", "calls": ["prefill", "describe", "read"]}
        assert worker.load_seconds < 1
        assert worker.ask("prefill", tokens=50) == {"seconds": 0.5}
        memory = worker.ask("memory")
        # Linux counts pages in batches.
        assert 1.02 * memory["peak"] >= memory["resident"] > 10**6
        with pytest.raises(ValueError, match=r"one cannot prefill .*ValueError: got -1"):
            worker.ask("prefill", tokens=-1)
        with pytest.raises(ValueError, match="has no decode"):
            worker.ask("decode", context=3)
        assert worker.ask("prefill", tokens=1) == {"seconds": 0.01}  # it goes on
    assert worker.process.returncode == 0


def test_a_contender_that_dies_is_named() -> None:
    with pytest.raises(ValueError, match="broken ended with exit code 3"):
        Worker("broken", [sys.executable, "-c", "raise SystemExit(3)"])


def test_rounds_measure_everyone_beside_the_probe() -> None:
    with start("one") as one, start("probe") as probe:
        rounds = workers.run_rounds([one], probe, ask, count=2, warm_up=False)
    assert [round_.seconds for round_ in rounds] == [{"one": 0.07}] * 2
    assert [round_.rates for round_ in rounds] == [{"one": 5e9}] * 2


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs /proc")
def test_a_contender_that_burns_while_it_waits_is_refused() -> None:
    refusal = pytest.raises(ValueError, match=r"hot used .* while it waited .*OMP_WAIT_POLICY")
    with start("one") as one, start("hot", burns=True) as hot, start("probe") as probe, refusal:
        workers.run_rounds([one, hot], probe, ask, count=1, warm_up=False)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs /proc")
def test_a_restless_contender_is_stopped_while_others_are_measured() -> None:
    command = [sys.executable, "-c", CONTENDER.format(burns=True)]
    with start("one") as one, Worker("hot", command, is_restless=True) as hot:
        before = hot.cpu_seconds()
        ask(one)
        assert hot.cpu_seconds() - before <= 2 / workers.TICKS
        assert ask(hot) == 0.07 and hot.cpu_seconds() - before > 0.05
    assert hot.process.returncode == 0


def test_one_contender_takes_several_turns_in_a_round() -> None:
    with start("one") as one, start("probe") as probe:
        turns = [
            workers.Turn("short", one, lambda asked: asked.ask("prefill", tokens=1)["seconds"]),
            workers.Turn("long", one, ask),
        ]
        (only, *_) = workers.run_turns(turns, probe, count=1, warm_up=False)
    assert (
        only.seconds == {"short": 0.01, "long": 0.07} and only.rates.keys() == only.seconds.keys()
    )


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs /proc")
def test_company_computes_and_is_not_a_disturbance() -> None:
    with start("one") as one, start("probe") as probe, workers.Company(1) as company:
        turn = workers.Turn("one", one, ask)
        (beside,) = workers.run_turns([turn], probe, count=1, warm_up=False, company=company)
        used = company.cpu_seconds()
        (foreign,) = workers.run_turns([turn], probe, count=1, warm_up=False)
    assert used > 0.01 and foreign.foreign_load >= 0
    assert all(process.returncode for process in company.processes)
    assert beside.seconds == {"one": 0.07}


def make_round(ours: float, peer: float, load: float = 0.0) -> Round:
    return Round({"ours": ours, "peer": peer}, {"ours": 10.0, "peer": 20.0}, load)


def test_ratios_are_paired_by_round() -> None:
    # The machine is twice as slow in the last round: medians of each would hide the ratio.
    rounds = [make_round(1, 3), make_round(1, 3), make_round(2, 6)]
    assert workers.compare_rounds(rounds, "ours", "peer") == Spread(3, 3, 3)
    assert workers.share_of_probe(rounds, "ours", 5) == Spread(0.5, pytest.approx(0.35), 0.5)
    assert workers.rate_rounds(rounds, "peer", 6).median == 2


def test_disturbed_rounds_are_left_out_while_enough_remain() -> None:
    quiet = [make_round(n, n) for n in range(1, 4)]
    disturbed = make_round(9, 9, load=0.5)
    assert workers.keep_quiet([disturbed, *quiet]) == quiet
    assert workers.keep_quiet([disturbed, *quiet[:2]]) == [*quiet[:2], disturbed]


def test_spread_of_five_figures() -> None:
    spread = Spread.of([5, 1, 2, 4, 3])
    assert spread.median == 3
    assert (spread.p20, spread.p80) == (pytest.approx(1.8), pytest.approx(4.2))
    assert Spread.of([2.0]).scaled(10) == Spread(20, 20, 20)
