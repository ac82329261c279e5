"""Runs contenders side by side: each in a process of its own, measured in turns with the probe.

Owns the parent's side of `benchmarks.serving` and the statistics. Figures of a virtual machine do
not repeat, ratios taken within seconds of each other do: in every round each contender is measured
once with a reading of the bandwidth probe before and after it, and a ratio is the median over the
rounds of the ratios within a round. A contender that waits uses no processor; what other programs
used during a round is noted, and a round they disturbed is left out while enough others remain.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
QUIET_LOAD = 0.1  # processors that other programs may use in a round
LEAST_ROUNDS = 3  # that are kept, however disturbed
IDLE_LOAD = 0.05  # processors that a contender may use while it waits
TICKS = os.sysconf("SC_CLK_TCK")
BUSY_FIELDS = (0, 1, 2, 5, 6, 7)  # of /proc/stat: user, nice, system, irq, softirq, steal


class Worker:
    """A contender's process.

    Args:
        name: what tables call it.
        command: words that start it.
        variables: of its environment, beside the parent's own.
        folder: where it is started.
        is_restless: whether it computes between requests too, and has to be stopped there.

    Raises:
        ValueError: if it ends before it is ready.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        variables: Mapping[str, str] | None = None,
        folder: Path = ROOT,
        is_restless: bool = False,
    ) -> None:
        self.name, self.is_restless = name, is_restless
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | (variables or {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self.load_seconds: float = self._receive()["load_seconds"]
            self.facts = self.ask("describe")
        except ValueError:
            self.close()
            raise

    def ask(self, call: str, **arguments: Any) -> dict[str, Any]:
        """Have one thing measured.

        Raises:
            ValueError: if the contender cannot do it, or is gone.
        """
        assert self.process.stdin is not None
        self._wake(True)
        try:
            self.process.stdin.write(json.dumps({"call": call, **arguments}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # what it left in its output says more
        answer = self._receive()
        self._wake(False)
        if "error" in answer:
            raise ValueError(f"{self.name} cannot {call} {arguments}: {answer['error']}")
        return answer

    def _receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise ValueError(f"{self.name} ended with exit code {self.process.wait()}")
        return json.loads(line)

    def _wake(self, is_awake: bool) -> None:
        """Let a restless process go on, or stop it."""
        if self.is_restless:
            self.process.send_signal(signal.SIGCONT if is_awake else signal.SIGSTOP)

    def cpu_seconds(self) -> float:
        """Return the processor time that the process has used; 0 where there is no /proc."""
        return read_cpu_seconds(self.process.pid)

    def close(self) -> None:
        """End the process and wait for it."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self._wake(True)
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def start_probe(threads: int, floats: int | None = None) -> Worker:
    """Start the bandwidth probe, which reads so many float32 values, or a gigabyte."""
    command = [sys.executable, "-m", "benchmarks.probe", "--serve", "--threads", str(threads)]
    return Worker("probe", [*command, *(["--floats", str(floats)] if floats else [])])


def read_cpu_seconds(process: int) -> float:
    """Return the processor time that a process has used; 0 where there is no /proc."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    user, system = text.rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / TICKS


def read_busy_seconds() -> float:
    """Return the processor time that all programs have used; 0 where there is no /proc."""
    try:
        text = Path("/proc/stat").read_text(encoding="utf-8")
    except FileNotFoundError:
        return 0.0
    fields = text.partition("\n")[0].split()[1:]
    return sum(int(fields[index]) for index in BUSY_FIELDS) / TICKS


class Spread(NamedTuple):
    """The middle of some figures, and where a fifth of them ends on either side."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, figures: Sequence[float]) -> "Spread":
        """Summarize one figure or more."""
        if len(figures) == 1:
            return cls(figures[0], figures[0], figures[0])
        fifths = statistics.quantiles(figures, n=5, method="inclusive")
        return cls(statistics.median(figures), fifths[0], fifths[3])

    def scaled(self, factor: float) -> "Spread":
        """Return the figures in another unit."""
        return Spread(*(factor * figure for figure in self))


class Round(NamedTuple):
    """One round: seconds of each contender, the probe's rate beside it, and the others' load."""

    seconds: dict[str, float]
    rates: dict[str, float]
    foreign_load: float


Task = Callable[[Worker], float]


class Turn(NamedTuple):
    """What is measured once in a round.

    Attributes:
        name: what tables call it.
        worker: who is asked; one may have several turns.
        task: asks for the seconds.
    """

    name: str
    worker: Worker
    task: Task


class Company:
    """Processes beside the contenders that compute without end, as other programs may.

    Args:
        count: how many.
    """

    def __init__(self, count: int) -> None:
        command = [sys.executable, "-c", "while True: pass"]
        self.processes = [subprocess.Popen(command) for _ in range(count)]

    def cpu_seconds(self) -> float:
        """Return the processor time that they have used."""
        return sum(read_cpu_seconds(process.pid) for process in self.processes)

    def __enter__(self) -> "Company":
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def run_rounds(
    workers: Sequence[Worker], probe: Worker, task: Task, count: int, warm_up: bool = True
) -> list[Round]:
    """Measure every contender in every round, and return the rounds that were not disturbed.

    Args:
        workers: the contenders.
        probe: the bandwidth probe.
        task: asks a contender for its seconds.
        count: rounds.
        warm_up: whether each contender does the task once before.

    Raises:
        ValueError: if a contender cannot do the task, or uses the processor while it waits.
    """
    turns = [Turn(worker.name, worker, task) for worker in workers]
    return run_turns(turns, probe, count, warm_up)


def run_turns(
    turns: Sequence[Turn],
    probe: Worker,
    count: int,
    warm_up: bool = True,
    company: Company | None = None,
) -> list[Round]:
    """Measure every turn in every round, and return the rounds that were not disturbed.

    Args:
        turns: of the contenders, each with a name of its own.
        probe: the bandwidth probe.
        count: rounds.
        warm_up: whether each turn is taken once before.
        company: busy processes that are meant to be there.

    Raises:
        ValueError: as `run_rounds`.
    """
    for turn in turns if warm_up else ():
        turn.task(turn.worker)
    rounds = [_run_round(turns, probe, company or Company(0)) for _ in range(count)]
    return keep_quiet(rounds)


def _run_round(turns: Sequence[Turn], probe: Worker, company: Company) -> Round:
    workers = list({turn.worker.name: turn.worker for turn in turns}.values())
    everyone = [*workers, probe, company]
    began, busy = time.monotonic(), read_busy_seconds()
    used = sum(process.cpu_seconds() for process in everyone)
    seconds: dict[str, float] = {}
    rates: dict[str, float] = {}
    rate = probe.ask("read")["rate"]
    for turn in turns:
        idle = {other.name: other.cpu_seconds() for other in workers if other is not turn.worker}
        start = time.monotonic()
        seconds[turn.name] = turn.task(turn.worker)
        _check_idle(workers, idle, time.monotonic() - start)
        before, rate = rate, probe.ask("read")["rate"]
        rates[turn.name] = (before + rate) / 2
    own = sum(process.cpu_seconds() for process in everyone) - used
    foreign = max(0.0, read_busy_seconds() - busy - own) / (time.monotonic() - began)
    return Round(seconds, rates, foreign)


def _check_idle(workers: Sequence[Worker], before: Mapping[str, float], elapsed: float) -> None:
    """Refuse a contender that burnt processor time while another one was measured."""
    for worker in workers:
        used = worker.cpu_seconds() - before.get(worker.name, worker.cpu_seconds())
        if used > 2 / TICKS + 0.02 and used > IDLE_LOAD * elapsed:
            raise ValueError(
                f"{worker.name} used {used:.2f} s of processor time while it waited {elapsed:.2f} "
                "s: let its threads sleep (OMP_WAIT_POLICY=passive)"
            )


def keep_quiet(rounds: Sequence[Round]) -> list[Round]:
    """Return the undisturbed rounds; if there are too few of them, the least disturbed ones."""
    ranked = sorted(rounds, key=lambda round_: round_.foreign_load)
    quiet = [round_ for round_ in ranked if round_.foreign_load <= QUIET_LOAD]
    return quiet if len(quiet) >= LEAST_ROUNDS else ranked[:LEAST_ROUNDS]


def compare_rounds(rounds: Sequence[Round], name: str, baseline: str) -> Spread:
    """Return how many times as fast as the baseline a contender was, paired by round."""
    return Spread.of([r.seconds[baseline] / r.seconds[name] for r in rounds])


def rate_rounds(rounds: Sequence[Round], name: str, amount: float) -> Spread:
    """Return what a contender did in a second, of an amount that it does in a round's seconds."""
    return Spread.of([amount / r.seconds[name] for r in rounds])


def share_of_probe(rounds: Sequence[Round], name: str, step_bytes: float) -> Spread:
    """Return the share of the bandwidth beside it that a contender's reading came to."""
    return Spread.of([step_bytes / r.seconds[name] / r.rates[name] for r in rounds])
