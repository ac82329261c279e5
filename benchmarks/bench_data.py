"""How long it takes to read the rows of a large file, and what memory: ours beside `datasets`.

    python -m benchmarks.bench_data [--rows N] [--rounds N]

`RecordFiles` reads, parses and checks each row, and keeps where it stands. `load_dataset("json")`
parses each row and writes it into a cache of its own, here a new one each time; "every row once" is
the same with a pass over all rows behind it, as any check of them needs. Each reading has a process
of its own; they take turns, and imports are not counted. Where others use the machine too, the
seconds that processors were busy say more than those of the clock.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import ROOT
from benchmarks.workers import Spread

WORDS = (
    "你好",
    "再见",
    "模型",
    "训练",
    "数据",
    "问题",
    "回答",
    "hello",
    "model",
    "because",
    "weather",
)
OURS, THEIRS, WHOLE = "ours", "datasets", "datasets, every row once"


def write_rows(path: Path, count: int) -> None:
    """Write questions with answers, some 400 bytes each."""
    rng = random.Random(1)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            instruction, more, answer = (" ".join(rng.choices(WORDS, k=k)) for k in (12, 6, 30))
            row = {
                "instruction": instruction,
                "input": more if number % 2 else "",
                "output": answer,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def prepare_ours(path: str) -> Callable[[], Any]:
    """Return what reads a file by this package."""
    from chatglm.data.dialects import read_answers
    from chatglm.data.files import RecordFiles

    return lambda: RecordFiles([path], read_answers)


def prepare_datasets(path: str, is_whole: bool) -> Callable[[], Any]:
    """Return what reads a file by `datasets`."""
    import datasets

    datasets.disable_progress_bars()

    def read() -> Any:
        with tempfile.TemporaryDirectory(prefix="bench-data-") as cache:
            rows = datasets.load_dataset("json", data_files=path, split="train", cache_dir=cache)
            return sum(1 for _ in rows) if is_whole else rows

    return read


def read_status(field: str) -> int:
    """Return a field of this process's memory, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])


def measure(contender: str, path: str) -> dict[str, float]:
    """Return what a reading in this process takes.

    Returns:
        Its `seconds`, those that processors were busy with it, and by how much memory grew at most.
    """
    read = prepare_ours(path) if contender == OURS else prepare_datasets(path, contender == WHOLE)
    before, began, busy = read_status("VmRSS"), time.perf_counter(), time.process_time()
    kept = read()
    times = {"seconds": time.perf_counter() - began, "busy": time.process_time() - busy}
    del kept
    return {**times, "megabytes": (read_status("VmHWM") - before) / 1e6}


def measure_apart(contender: str, path: Path) -> dict[str, float]:
    """Return what `measure` gives in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.bench_data", "--reading", contender, str(path)]
    ended = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return json.loads(ended.stdout.splitlines()[-1])


def describe(name: str, rounds: Sequence[dict[str, dict[str, float]]]) -> str:
    """Return a contender's figures in words; ratios are those of a round."""
    words = []
    for field, unit in (("seconds", "s"), ("busy", "s of processors")):
        spent = Spread.of([found[name][field] for found in rounds])
        ratio = Spread.of([found[name][field] / found[THEIRS][field] for found in rounds])
        words.append(f"{spent.median:.1f} {unit} ({ratio.median:.2f} x datasets)")
    grown = max(found[name]["megabytes"] for found in rounds)
    return f"{name}: {', '.join(words)}, {grown:.0f} MB more"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the file")
    parser.add_argument("--rounds", type=int, default=3, help="readings of each")
    parser.add_argument("--reading", nargs=2, metavar=("WHOSE", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.reading:
        print(json.dumps(measure(*args.reading)))
        return 0
    with tempfile.TemporaryDirectory(prefix="bench-data-") as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, args.rows)
        names = (OURS, THEIRS, WHOLE)
        rounds = [{name: measure_apart(name, path) for name in names} for _ in range(args.rounds)]
        size = path.stat().st_size / 1e6
    print(f"{args.rows:,} rows, {size:.0f} MB")
    for name in names:
        print(describe(name, rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
