"""Owns the memory of processes: what is resident, and the most that ever was.

Standard library only: benchmarks use it in environments that have nothing else.
"""

import importlib
import importlib.util
import sys
from typing import Any


def read_status(field: str, process: int | str = "self") -> int:
    """Return a field of a process's status in bytes; 0 if it has ended, or has no such file."""
    try:
        with open(f"/proc/{process}/status", encoding="utf-8") as status:
            values = dict(line.split(":", 1) for line in status)
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(values[field].split()[0]) * 1024 if field in values else 0


def read_peak() -> int:
    """Return the most bytes that were resident in this process at once; 0 if it is not known."""
    if peak := read_status("VmHWM"):
        return peak
    if importlib.util.find_spec("resource") is None:  # Windows
        return 0
    resource: Any = importlib.import_module("resource")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
