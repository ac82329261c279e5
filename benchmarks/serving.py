"""The side of a contender: a process that loads once, then answers one JSON line with another.

Owns the protocol (`workers` is the other side) and the report of the process's memory. A request
names a call and its arguments, as {"call": "decode", "context": 64, "tokens": 16}; the answer is
what the contender's method returned, or {"error": ...}. Between two requests the process sleeps in
a read. Standard library only: it also runs in the environments of the peers.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from chatglm.process_memory import read_peak, read_status

CALLS = (
    "prefill",
    "decode",
    "rows",
    "products",
    "look_up",
    "answer",
    "train",
    "describe",
    "read",
)


def serve(load: Callable[[], Any]) -> None:
    """Load a contender, report ready, and answer requests until the input ends.

    Args:
        load: makes the contender, an object with some of the methods in `CALLS`.
    """
    # What a library prints must not look like an answer.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    began = time.perf_counter()
    contender = load()
    _write(answers, {"load_seconds": time.perf_counter() - began})
    for line in sys.stdin:
        request = json.loads(line)
        _write(answers, _answer(contender, request.pop("call"), request))


def _answer(contender: Any, call: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return what a call gave; errors are the parent's business."""
    if call == "memory":
        return {"peak": read_peak(), "resident": read_status("VmRSS")}
    method = getattr(contender, call, None) if call in CALLS else None
    if method is None:
        return {"error": f"{type(contender).__name__} has no {call}"}
    try:
        answer = method(**arguments)
        # An older checkout's contender lacks some calls: who asks it can know before.
        can = [name for name in CALLS if hasattr(contender, name)]
        return answer | ({"calls": can} if call == "describe" else {})
    except (ValueError, RuntimeError, MemoryError) as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _write(answers: Any, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
